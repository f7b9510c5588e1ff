"""The preset `emoji`: its data by stage, first values that average, an encoder of given widths, scores and floors counted by hand."""
import numpy as np
import pytest
import torch

from vlmamba_lite.cli.runs import make_plan
from vlmamba_lite.cli.settings import resolve_settings
from vlmamba_lite.data.batches import Batches, Mixture
from vlmamba_lite.data.emoji import Drawing, EmojiVQA, emoji_vqa, load_emoji
from vlmamba_lite.evaluation import emoji as scores
from vlmamba_lite.model.presets import emoji_config, recall_init
from vlmamba_lite.model.vlmamba import VLMamba
from vlmamba_lite.training.run import fingerprint
from vlmamba_lite.vision.encoders import ConvEncoder


@pytest.fixture(scope="module")
def plan():
    settings, stages = resolve_settings({"preset": "emoji", "training": {"steps": 2, "batch_size": 12}})
    return make_plan(settings, stages)


def test_the_preset_reads_things_first_and_then_scenes_too(plan):
    assert [stage.name for stage in plan.stages] == ["names", "scenes"] and plan.settings.on_emoji()
    rows = {name: source[0] for name, source in plan.sources.items()}
    asked = {name: plan.model.tokenizer.decode_batch(batch.input_ids.tolist()) for name, batch in rows.items()}
    assert all(batch.images.shape == (12, 3, 64, 64) for batch in rows.values())
    assert len(asked["names"]) == 12 and sum("what is this ?" in text for text in asked["names"]) == 12
    assert any("what is in the picture ?" in text for text in asked["scenes"]) and any("what is this ?" in text for text in asked["scenes"])
    again = plan.sources["scenes"][0]
    assert torch.equal(again.images, rows["scenes"].images) and torch.equal(again.input_ids, rows["scenes"].input_ids)
    loss = plan.model.train()(rows["scenes"]).loss
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in plan.model.parameters())


def test_a_generated_set_is_known_by_its_settings_and_not_drawn(monkeypatch):
    def of(**options):
        return fingerprint(Batches(Mixture([emoji_vqa("train", 10**6, **options)]), None))
    monkeypatch.setattr(EmojiVQA, "__getitem__", None)                 # a picture drawn would fail
    assert of(seed=0) == of(seed=0) and of(seed=0)["samples"] == 10**6
    assert len({of(**options)["checksum"] for options in ({}, {"seed": 1}, {"varied": True}, {"things": (1,)}, {"turns": 2})}) == 5


@pytest.mark.parametrize("changes, on", [({}, True), ({"stages": ["names"]}, True), ({"recipe": "lite"}, False),
                                         ({"data": ["emoji-things"], "recipe": "lite"}, False)])
def test_only_its_own_data_is_its_own_run(changes, on):
    settings, _ = resolve_settings({"preset": "emoji", **changes})
    assert settings.on_emoji() == on and not settings.on_easy_vqa()


def test_recall_init_reads_an_average_before_anything_is_learned():
    "With it a token far back reaches the output about as strongly as a near one; without it hardly at all."
    reach = {}
    for recall in (False, True):
        torch.manual_seed(0)
        language = VLMamba(emoji_config(40)).language
        if recall:
            recall_init(language)
        x = torch.randn(4, 16, 128, requires_grad=True)
        hidden, _ = language.hidden(inputs_embeds=x)
        hidden[:, -1].sum().backward()
        size = x.grad.norm(dim=(0, 2))                                 # of the influence of each position on the last
        reach[recall] = float(size[:8].mean() / size[-1])
    assert reach[True] > 2 * reach[False], reach


def test_an_encoder_of_given_widths():
    torch.manual_seed(0)
    usual, named = ConvEncoder(24, 8), ConvEncoder(24, widths=(8, 16))
    named.load_state_dict(usual.state_dict())
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    assert torch.equal(usual.eval()(images)[0], named.eval()(images)[0])
    tokens, grid = ConvEncoder(24, image_size=96, widths=(4, 8, 8))(torch.zeros(1, 3, 96, 96))
    assert tokens.shape == (1, 36, 24) and grid == (6, 6)
    with pytest.raises(ValueError, match="image_size: got 72, need a positive multiple of 16"):
        ConvEncoder(24, image_size=72, widths=(4, 8, 8))
    with pytest.raises(ValueError, match="widths"):
        ConvEncoder(24, widths=(4, 0))


def test_scores_are_shares_of_right_answers(monkeypatch):
    "A speaker who knows every answer but says `no` to what is asked with yes or no, and lists the other way round."
    truth = {}
    for things in ((1,), (2, 3, 4)):
        data = EmojiVQA("validation", 12, things, 1)
        for i in range(12):
            record = data[i]
            truth |= {(record["image"].tobytes(), q): a for q, a in zip(record["questions"], record["answers"])}
    names = {page.tobytes(): name for page, name in scores.name_pages("validation")}

    def speak(model, pairs, **options):
        said = [truth.get((image.tobytes(), question), names.get(image.tobytes())) for image, question in pairs]
        return ["no" if text == "yes" else " + ".join(reversed(text.split(" + "))) for text in said]

    monkeypatch.setattr(scores, "answer", speak)
    found = scores.emoji_scores(None, "validation", 12)
    sure = ("name", "subgroup", "caption", "beside", "count", "largest", "list", "listed")
    assert all(found[kind] == 1 for kind in sure) and all(0 < found[kind] < 1 for kind in ("relation", "there"))
    assert found["one"] == pytest.approx((3 + found["is"]) / 4)
    assert found["scenes"] == pytest.approx((3 + found["relation"] + found["there"]) / 5)


def test_the_nearest_drawing_is_the_nearest():
    known = [d for d in load_emoji("train") if d.artist == "twemoji"][:40]
    near = scores.nearest_drawings(known[:5], known)
    assert [d.name for d in near] == [d.name for d in known[:5]]
    other = [d for d in load_emoji("validation")][:3]
    for drawing, found in zip(other, scores.nearest_drawings(other, known)):
        far = [np.square(scores.bare(drawing) - scores.bare(k)).sum() for k in known]
        assert found is known[int(np.argmin(far))] and isinstance(found, Drawing)

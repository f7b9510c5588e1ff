"""The classes of transformers: the library's answers from `pipeline` and `generate`, folders for both, Trainer, TRL and PEFT."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
import yaml
from PIL import Image
from torch import nn

import vlmamba_lite.hf as hf
from test_data_conversations import chat_tokenizer, random_turns
from vlmamba_lite.connectors.connectors import CONNECTORS
from vlmamba_lite.data.batches import Batch
from vlmamba_lite.data.conversations import Conversation, encode_conversation
from vlmamba_lite.data.easy_vqa import build_set, load_easy_vqa
from vlmamba_lite.data.pictures import normalize
from vlmamba_lite.evaluation.answers import answer_all
from vlmamba_lite.hf.modeling import CACHE, StateCache
from vlmamba_lite.hf.processing import IMAGE
from vlmamba_lite.language.model import MIXERS, MambaConfig
from vlmamba_lite.model.presets import VLMambaConfig, tiny_config
from vlmamba_lite.model.saving import learn_words
from vlmamba_lite.model.vlmamba import VLMamba

pytestmark = pytest.mark.filterwarnings("ignore")
ARGS = {"mamba": dict(d_state=4), "mamba2": dict(d_state=8, headdim=8, chunk_size=32), "mamba3": dict(d_state=8, headdim=8),
        "attention": dict(headdim=8)}


@pytest.fixture(autouse=True, scope="module")
def quiet():
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def picture(seed, size=(50, 40)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


def user(*parts):
    "A message of a user: texts and pictures."
    return {"role": "user", "content": [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
                                        for part in parts]}


def said(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def build(tokenizer, mixer="mamba2", vision=None, connector="vss_l2", connector_args=None, seed=0, **language):
    "A tiny model of any parts, of two layers, as a model of transformers."
    from inspect import signature
    if connector_args is None:
        connector_args = dict(scan="bsm") if "scan" in signature(CONNECTORS[connector]).parameters else {}
    words = tokenizer.get_vocab_size()
    args = ARGS[mixer] | language.pop("mixer_args", {})
    config = MambaConfig(d_model=16, n_layer=2, vocab_size=words, mixer=mixer, mixer_args=args, pad_vocab_size_multiple=1, embedding_std=0.2, **language)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VLMamba(VLMambaConfig(vision or tiny_config(words).vision, connector, connector_args, config), tokenizer)
    return hf.VLMambaForConditionalGeneration.of(model).eval()


@pytest.fixture(scope="module")
def validation(small):
    "The first 200 questions of 40 validation pictures."
    data = build_set(load_easy_vqa("validation").select(range(60)), small.tokenizer)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in data.images]
    return SimpleNamespace(data=data, asked=[(pictures[i], question) for i, question in zip(data.image_of, data.questions)][:200])


@pytest.fixture
def folder(make_model, tmp_path):
    "A folder as `vlmamba train` leaves it: nothing in it is of transformers."
    make_model().save_pretrained(tmp_path / "library")
    return tmp_path / "library"


def same_weights(one, two, atol=0.):
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=0, atol=atol) for name in a)


# Folders and answers

def test_a_folder_of_the_library_answers_in_a_pipeline(folder, validation):
    "Three lines, and the words of `ask`; the model's answers differ between the pictures."
    pipe, model = transformers.pipeline("image-text-to-text", model=str(folder)), VLMamba.from_pretrained(folder)
    assert type(pipe.model) is hf.VLMambaForConditionalGeneration and type(pipe.processor) is hf.VLMambaProcessor
    answers = set()
    for image, question in validation.asked[::40]:
        new, = pipe(text=[user(image, question)], return_full_text=False, max_new_tokens=8)
        assert new["generated_text"].strip() == model.ask(image, question)
        answers.add(new["generated_text"])
    assert len(answers) > 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_200_questions_in_batches_are_answered_as_by_answer_all(folder, validation, side):
    "Prompts of unequal length, padded on either side."
    model, processor = VLMamba.from_pretrained(folder), transformers.AutoProcessor.from_pretrained(folder)
    ours = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    want, got, widths = answer_all(model, validation.data)[:200], [], set()
    for at in range(0, 200, 50):
        chats = [[user(image, question)] for image, question in validation.asked[at:at + 50]]
        batch = processor.apply_chat_template(chats, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
                                              processor_kwargs=dict(padding=True, padding_side=side))
        widths |= set(batch["attention_mask"].sum(1).tolist())
        new = ours.generate(**batch, max_new_tokens=3, do_sample=False)[:, batch["input_ids"].shape[1]:]
        for row in new.tolist():
            end = row.index(1) if 1 in row else None
            got.append(model.tokenizer.decode(row[:end], skip_special_tokens=False) + " ..." * (end is None))
    assert got == want and len(widths) > 3 and len(set(want)) > 3


def test_folders_go_both_ways(folder, tmp_path):
    "Library, transformers, library: weights bit for bit; the second folder holds all that both need, and its tied head once."
    model = VLMamba.from_pretrained(folder)
    ours = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    assert same_weights(model, ours) and not ours.training
    ours.save_pretrained(tmp_path / "ours")
    assert same_weights(VLMamba.from_pretrained(tmp_path / "ours"), model)
    hf.VLMambaProcessor.from_pretrained(folder).save_pretrained(tmp_path / "ours")
    again, processor = VLMamba.from_pretrained(tmp_path / "ours"), transformers.AutoProcessor.from_pretrained(tmp_path / "ours")
    assert same_weights(again, model) and again.ask(picture(0), "is there a circle?") == model.ask(picture(0), "is there a circle?")
    a, b = (p(picture(1), f"{IMAGE}is there a circle?", return_tensors="pt") for p in (processor, hf.VLMambaProcessor.from_pretrained(folder)))
    assert all(torch.equal(a[name], b[name]) for name in ("input_ids", "attention_mask", "pixel_values"))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert isinstance(config, hf.VLMambaConfig) and vars(config.parts) == vars(model.config) and config.get_text_config().hidden_size == 16
    again.save_pretrained(tmp_path / "third")
    assert json.loads((tmp_path / "third/config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_the_example_of_a_card_runs(make_model, tmp_path, monkeypatch):
    "Its code and its widget: the file that the example shows lies beside it."
    make_model().save_pretrained(tmp_path, card=str(tmp_path))
    monkeypatch.chdir(tmp_path)
    text = (tmp_path / "README.md").read_text()
    code, names = text.split("```python\n")[2].split("```")[0], {}
    exec(code.replace("ask(text", "answer = ask(max_new_tokens=5, text"), names)
    message, = yaml.safe_load(text.split("---\n")[1])["widget"][0]["messages"]
    again, = names["ask"](text=[message], return_full_text=False, max_new_tokens=5)
    want = VLMamba.from_pretrained(tmp_path).ask(Image.open("example.png"), "what color is the shape?", 5)
    assert names["answer"][0]["generated_text"] == again["generated_text"] and again["generated_text"].strip() == want


def test_a_weight_that_is_missing_is_an_error(folder):
    from safetensors.torch import load_file, save_file
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("connector.linear1.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="connector.linear1.weight"):
        transformers.AutoModelForImageTextToText.from_pretrained(folder)


TOWERS = [dict(kind="siglip", config="tiny-siglip"), dict(kind="clip", config="tiny-clip"), dict(kind="dinov2", config="tiny-dinov2"),
          dict(kind="vit", dim=16, depth=2, heads=2, patch_size=16, image_size=64)]


@pytest.mark.parametrize("vision", TOWERS, ids=lambda v: v["kind"])
def test_towers_keep_their_weights_and_read_the_same_pixels(small, vision, tmp_path):
    "Positions that are in no file among them."
    ours = build(small.tokenizer, vision=vision)
    before = {name: t.clone() for name, t in [*ours.named_parameters(), *ours.named_buffers()]}
    ours.save_pretrained(tmp_path)
    again, processor = hf.VLMambaForConditionalGeneration.from_pretrained(tmp_path), hf.VLMambaProcessor.from_pretrained(tmp_path)
    assert all(torch.equal(t, before[name]) for name, t in [*again.named_parameters(), *again.named_buffers()])
    batch = processor(picture(0), f"{IMAGE}what color is the shape?", return_tensors="pt")
    assert torch.equal(batch["pixel_values"], ours.vlmamba.pixels(picture(0)))
    with torch.no_grad():
        want = ours.language(batch["input_ids"][:, processor.image_seq_length:], state=ours.vlmamba.read_image(picture(0))).logits
        assert torch.allclose(again(**batch).logits[:, processor.image_seq_length:, :-1], want, atol=1e-5)


# Numbers

@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_logits_do_not_depend_on_padding_pieces_or_steps(small, mixer):
    "Three pictures in two rows, one in the midst of the words: left, right, alone, with and without a cache, within 1e-5."
    ours, text = build(small.tokenizer, mixer), f"{IMAGE}what color is the shape?"
    processor = hf.VLMambaProcessor.of(ours.config.parts, small.tokenizer)
    texts, images = [text, f"{IMAGE}is there{IMAGE}a red circle?"], [[picture(0)], [picture(1), picture(2)]]
    with torch.no_grad():
        alone = [ours(**processor(i, t, return_tensors="pt")).logits[0] for i, t in zip(images, texts)]
        for side in ("left", "right"):
            batch = processor(images, texts, padding=True, padding_side=side, return_tensors="pt")
            whole = ours(**batch).logits
            for row, mask, want in zip(whole, batch["attention_mask"].bool(), alone):
                assert torch.allclose(row[mask], want, atol=1e-5)
            last = ours(**batch, logits_to_keep=1, use_cache=True)
            assert torch.allclose(last.logits[:, 0], torch.stack([want[-1] for want in alone]), atol=1e-5)
            ids = torch.randint(3, 20, (2, 4), generator=torch.Generator().manual_seed(0))
            steps, cache = [], last.cache
            for t in range(4):
                out = ours(input_ids=ids[:, t:t + 1], cache=cache, use_cache=True)
                steps, cache = [*steps, out.logits], out.cache
            grown = dict(batch) | dict(input_ids=torch.cat([batch["input_ids"], ids], 1),
                                       attention_mask=torch.cat([batch["attention_mask"], torch.ones_like(ids)], 1))
            assert torch.allclose(torch.cat(steps, 1), ours(**grown, logits_to_keep=4).logits, atol=1e-5)
            piece = ours(input_ids=ids, attention_mask=torch.ones_like(ids), cache=last.cache, use_cache=True)
            assert torch.allclose(piece.logits, torch.cat(steps, 1), atol=1e-5) and piece.cache.length == cache.length == batch["input_ids"].shape[1] + 4
        assert not torch.allclose(alone[1][-1], ours(**processor([picture(1), picture(3)], texts[1], return_tensors="pt")).logits[0, -1], atol=1e-5)


def test_the_loss_is_that_of_the_library(small):
    "And its gradient; `num_items_in_batch` makes of it the mean over all micro-batches; <image> is never learned."
    ours = build(small.tokenizer).train()
    data, model, row = small.data, ours.vlmamba, torch.tensor([0, 30, 70])
    images, ids, labels = data.images[torch.as_tensor(data.image_of)[row]], data.input_ids[row], data.labels[row]
    mask = ids != 0
    batch = Batch.from_rows(images, ids, labels, mask)
    want = model.train()(batch).loss
    want.backward()
    gradient = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    image = torch.full((3, 64), ours.config.image_token_id)
    count = (labels[:, 1:] != -100).sum()
    ids, labels, pixels = torch.cat([image, ids], 1), torch.cat([image, labels], 1), normalize(images)
    mask = torch.cat([torch.ones(3, 64), mask], 1)
    out = ours(input_ids=ids, labels=labels, attention_mask=mask, pixel_values=pixels)
    out.loss.backward()
    assert torch.allclose(out.loss, want, atol=1e-6) and out["loss"] is out[0] is out.loss
    for name, p in ours.named_parameters():
        assert torch.allclose(p.grad, gradient[name], atol=1e-5), name
    ours.eval()
    halves = [ours(input_ids=ids[i], labels=labels[i], attention_mask=mask[i], pixel_values=pixels[i], num_items_in_batch=count).loss for i in (slice(1), slice(1, 3))]
    assert torch.allclose(sum(halves), ours(input_ids=ids, labels=labels, attention_mask=mask, pixel_values=pixels).loss, atol=1e-6)


def test_generation_in_all_its_forms(small):
    "Samples, several sequences with several pictures each, beams, a streamer, a repetition penalty, going on from a cache."
    ours = build(small.tokenizer)
    processor = hf.VLMambaProcessor.of(ours.config.parts, small.tokenizer)
    batch = processor([[picture(0), picture(1)], [picture(2)]], [f"{IMAGE}{IMAGE}what color?", f"{IMAGE}is there a shape?"], padding=True, return_tensors="pt")
    width = batch["input_ids"].shape[1]
    greedy = ours.generate(**batch, max_new_tokens=6, do_sample=False)
    assert torch.equal(greedy, ours.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=False))
    three = ours.generate(**batch, max_new_tokens=6, do_sample=True, top_k=1, num_return_sequences=3)
    assert torch.equal(three, greedy.repeat_interleave(3, 0))
    pixels = ours._expand_inputs_for_generation(3, **batch)[1]["pixel_values"]
    assert torch.equal(pixels, torch.cat([*[batch["pixel_values"][:2]] * 3, *[batch["pixel_values"][2:]] * 3]))
    beams = [ours.generate(**batch, max_new_tokens=5, num_beams=3, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*beams) and not torch.equal(beams[0], greedy[:, :beams[0].shape[1]])
    sampled = ours.generate(**batch, max_new_tokens=6, do_sample=True, temperature=5., repetition_penalty=1.5, no_repeat_ngram_size=2)
    assert sampled.shape[0] == 2 and (sampled[:, width:] != ours.config.image_token_id).all()
    streamer, one = transformers.TextIteratorStreamer(processor.tokenizer, skip_prompt=True), processor(picture(0), f"{IMAGE}what color?", return_tensors="pt")
    new = ours.generate(**one, max_new_tokens=4, do_sample=False, streamer=streamer)
    assert "".join(streamer).split() == processor.tokenizer.decode(new[0, one["input_ids"].shape[1]:]).split()
    first = ours.generate(**one, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    kept = getattr(first, "cache", None) or ours(**one, use_cache=True).cache        # transformers 5.24 gives it back under this name
    assert isinstance(kept, StateCache)
    if CACHE == "cache":                                     # an argument of `generate` since transformers 5.24
        more = ours.generate(first.sequences, cache=kept, max_new_tokens=3, do_sample=False)
        assert torch.equal(more, ours.generate(**one, max_new_tokens=6, do_sample=False)[:, :more.shape[1]])
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        ours.generate(**one, max_new_tokens=3, assistant_model=ours)


def test_errors_name_what_does_not_fit(small, make_model):
    ours = build(small.tokenizer)
    processor = hf.VLMambaProcessor.of(ours.config.parts, small.tokenizer)
    batch = processor(picture(0), f"{IMAGE}what color?", return_tensors="pt")
    pixels = batch["pixel_values"]
    for given, message in ((dict(pixel_values=None), "pixel_values: got 0 visual tokens of 0 pictures, need 64, one for each <image> in input_ids"),
                           (dict(pixel_values=pixels.repeat(2, 1, 1, 1)), "pixel_values: got 128 visual tokens of 2 pictures, need 64"),
                           (dict(output_attentions=True), "output_attentions, output_hidden_states: got true, need false")):
        with pytest.raises(ValueError, match=f"^{message}"):
            ours(**(dict(batch) | given))
    for images, text, options, message in ((None, f"{IMAGE}what?", {}, "images: got 0, need 1, one for each <image> in the text"),
                                           (picture(0), "what?", {}, "images: got 1, need 0"),
                                           (picture(0), f"{IMAGE}what?", dict(truncation=True, max_length=40), "max_length: got 40, need more: it cuts through a picture of 64 tokens"),
                                           (None, "what?", dict(videos=[1]), "processor: got videos, need images and text"),
                                           (None, "what?", dict(colour="red"), "processor: got colour, need images and text")):
        with pytest.raises(ValueError, match=f"^{message}"):
            processor(images, text, **options)
    for messages, message in (([user("what?"), said("red"), user("what?")], "messages: got several questions, need one"),
                              ([{"role": "system", "content": "be brief"}], "messages: got the role system, need user or assistant"),
                              ([user(f"what {IMAGE}?")], "messages: got a control token in the words, need plain text"),
                              ([user("what <eos>?")], "messages: got a control token in the words, need plain text")):
        with pytest.raises(Exception, match=message):
            processor.apply_chat_template(messages)
    raw = chat_tokenizer()
    with pytest.raises(ValueError, match="^template: got one without the user's words, need one that asks$"):
        hf.VLMambaProcessor.of(tiny_config(raw.get_vocab_size()), raw, "plain")


def test_more_words_can_be_added(small, tmp_path):
    "`resize_token_embeddings`: old logits stay, new words can be said, both kinds of folder hold them."
    ours = build(small.tokenizer)
    processor = hf.VLMambaProcessor.of(ours.config.parts, small.tokenizer)
    batch = processor(picture(0), f"{IMAGE}what color?", return_tensors="pt")
    before, width = ours(**batch).logits, small.tokenizer.get_vocab_size()
    processor.tokenizer.add_tokens(["zebra", "okapi"])
    ours.resize_token_embeddings(len(processor.tokenizer))
    after = ours(**batch).logits
    assert torch.equal(after[..., :width], before[..., :width]) and after.shape[-1] == width + 3
    assert (after[..., ours.config.image_token_id] == torch.finfo(torch.float32).min).all() and ours.language.lm_head.weight is ours.language.backbone.embedding.weight
    ours.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, after) and same_weights(VLMamba.from_pretrained(tmp_path), again)


# Messages

def labels_of(batch):
    return batch["input_ids"].masked_fill(~batch["assistant_masks"].bool() | ~batch["attention_mask"].bool(), -100)


@pytest.mark.parametrize("template", ["zephyr", "llava"])
def test_200_conversations_are_those_of_the_library(template):
    "Ids, and what is learned, of conversations with a picture: as `encode_conversation` makes them for training."
    tokenizer, rng = chat_tokenizer(), np.random.default_rng(0)
    processor = hf.VLMambaProcessor.of(tiny_config(tokenizer.get_vocab_size()), tokenizer, template)
    chats, rows = [], []
    for _ in range(200):
        turns = [(q.replace(IMAGE, "image"), a.replace(IMAGE, "image")) for q, a in random_turns(rng)]
        rows.append(encode_conversation(Conversation("1", [], turns), tokenizer, template)[0])
        messages = [message for q, a in turns for message in (user(q), said(a))]
        messages[0] = user(picture(0, (8, 8)), turns[0][0])
        chats.append(messages)
    batch = processor.apply_chat_template(chats, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True,
                                          processor_kwargs=dict(padding=True, padding_side="right"))
    labels = labels_of(batch)
    assert all((batch["input_ids"][:, :64] == processor.image_token_id).flatten())
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        assert batch["input_ids"][i, 64:64 + n].tolist() == row.input_ids and batch["attention_mask"][i].sum() == 64 + n
        assert labels[i, 64:64 + n].tolist() == row.labels


def test_word_level_conversations_are_those_of_the_library(small):
    "A question and its answer do not run into each other."
    processor, texts = hf.VLMambaProcessor.of(tiny_config(small.tokenizer.get_vocab_size()), small.tokenizer), small.data
    for question, answer in list(zip(texts.questions, texts.answers))[:50]:
        row, = encode_conversation(Conversation("1", [], [(question, answer)]), small.tokenizer, "lite")
        batch = processor.apply_chat_template([[user(picture(0), question), said(answer)]], tokenize=True, return_dict=True, return_tensors="pt",
                                              return_assistant_tokens_mask=True)
        assert batch["input_ids"][0, 64:].tolist() == row.input_ids and labels_of(batch)[0, 64:].tolist() == row.labels


def test_only_the_last_question_is_asked_of_a_model_that_reads_one_at_a_time(small):
    "With all pictures before it, as a `Chat` does; a picture stays where the message has it."
    processor = hf.VLMambaProcessor.of(tiny_config(small.tokenizer.get_vocab_size()), small.tokenizer)
    render = processor.apply_chat_template
    messages = [user(picture(0), "what color?"), said("red"), user(picture(1), "is there ", picture(2), " a circle?")]
    assert render(messages, add_generation_prompt=True) == f"{IMAGE}{IMAGE}is there {IMAGE} a circle?\x1f"
    raw = chat_tokenizer()
    render = hf.VLMambaProcessor.of(tiny_config(raw.get_vocab_size()), raw).apply_chat_template
    assert render(messages, add_generation_prompt=True) == (
        f"{IMAGE}<|user|>\nwhat color?<|endoftext|>\n<|assistant|>\nred<|endoftext|>{IMAGE}\n<|user|>\nis there {IMAGE} a circle?<|endoftext|>\n<|assistant|>\n")


# Training

def command(*words):
    "`vlmamba ...` in this process."
    from typer.testing import CliRunner

    from vlmamba_lite.cli.commands import app
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_line_goes_on_with_a_model_and_learns_words(folder, tmp_path):
    "New words come behind the old ones, whose vectors stay; a dry run knows the model; other parts beside it are refused."
    turns = [{"from": "human", "value": "<image>\nwhat is this?"}, {"from": "gpt", "value": "an okapi"}]
    for i in range(4):
        picture(i).save(tmp_path / f"{i}.png")
    (tmp_path / "own.json").write_text(json.dumps([{"id": str(i), "image": f"{i}.png", "conversations": turns} for i in range(4)]))
    given = ("train", "--weights", folder, "--data", tmp_path / "own.json", "--pictures", tmp_path)
    done = command(*given, "--steps", 2, "--set", "training.batch_size=2", "--output", tmp_path / "run")
    assert done.exit_code == 0, done.output
    old, new = VLMamba.from_pretrained(folder), VLMamba.from_pretrained(tmp_path / "run")
    words = old.tokenizer.get_vocab_size()
    added = {word: i for word, i in new.tokenizer.get_vocab().items() if i >= words}
    assert sorted(added) == ["an", "okapi", "this"] and new.config.language.vocab_size == words + 3 and sorted(added.values()) == [words, words + 1, words + 2]
    assert {word: i for word, i in new.tokenizer.get_vocab().items() if i < words} == old.tokenizer.get_vocab()
    fresh = VLMamba.from_pretrained(folder)
    assert learn_words(fresh, ["An okapi: what is this?"]) == ["an", "okapi", "this"] and fresh.language.lm_head.weight is fresh.language.backbone.embedding.weight
    assert torch.equal(fresh.language.lm_head.weight[:words], old.language.lm_head.weight) and learn_words(fresh, ["an okapi"]) == []
    drawn = []
    for _ in range(6):                                               # a seed says which vectors
        torch.manual_seed(0)
        learn_words(again := VLMamba.from_pretrained(folder), ["an okapi"])
        drawn.append((again, again.language.lm_head.weight))
    assert all(torch.equal(weight, drawn[0][1]) for _, weight in drawn)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.allclose(fresh.language(ids).logits[..., :words], old.language(ids).logits, atol=1e-6)
    dry = command(*given, "--dry-run")
    assert dry.exit_code == 0 and f"weights: {folder}" in dry.output.replace("\n", "").replace("  ", " ")
    refused = command(*given, "--connector", "mlp", "--output", tmp_path / "other")
    assert refused.exit_code == 2 and "weights: got a model in" in refused.stderr and "and connector, need one of the two" in refused.stderr.replace("\n", " ")


def rows_of(small, count=12):
    "Rows for Trainer and TRL: a picture, and messages about it."
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in small.data.images]
    asked = list(zip(small.data.image_of, small.data.questions, small.data.answers))[::5][:count]
    return [dict(images=[pictures[i]], messages=[dict(role="user", content=q), dict(role="assistant", content=a)]) for i, q, a in asked]


def collator(processor):
    "Rows -> a batch with labels."
    def collate(rows):
        chats = [[user(row["images"][0], row["messages"][0]["content"]), said(row["messages"][1]["content"])] for row in rows]
        batch = processor.apply_chat_template(chats, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True,
                                              processor_kwargs=dict(padding=True, padding_side="right"))
        labels = labels_of(batch)
        return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")} | dict(labels=labels)
    return collate


def tensors(model):
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def moved(before, model):
    return {name for name, t in tensors(model).items() if not torch.equal(t, before[name])}


def trainer(kind, model, small, output, **options):
    "A Trainer or TRL's SFTTrainer of 20 steps, with a checkpoint at step 10."
    processor = hf.VLMambaProcessor.of(small.config, small.tokenizer)
    common = dict(output_dir=str(output), max_steps=20, save_steps=10, per_device_train_batch_size=4, learning_rate=1e-2, lr_scheduler_type="constant",
                  report_to=[], use_cpu=True, disable_tqdm=True, seed=0, save_only_model=False, logging_steps=5, bf16=False, **options)
    if kind == "trainer":
        args = transformers.TrainingArguments(remove_unused_columns=False, **common)
        return transformers.Trainer(model, args, train_dataset=rows_of(small), data_collator=collator(processor), processing_class=processor)
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'vlmamba_lite[hf]'")
    from datasets import Dataset, Features, List, Value
    from datasets import Image as Picture
    texts = List({"role": Value("string"), "content": Value("string")})
    data = Dataset.from_list(rows_of(small), features=Features(images=List(Picture()), messages=texts))
    args = trl.SFTConfig(assistant_only_loss=True, max_length=None, **common)
    return trl.SFTTrainer(model, args, train_dataset=data, processing_class=processor)


@pytest.fixture
def learner(small):
    "A tiny model, and its configuration where the trainers look for it."
    pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install 'vlmamba_lite[hf]'")
    model = build(small.tokenizer)
    small.config, small.words = model.config.parts, small.tokenizer.get_vocab_size()
    return model


@pytest.mark.parametrize("kind", ["trainer", "trl"])
def test_trainers_move_everything_save_load_and_resume(kind, small, learner, tmp_path):
    "And only what is not frozen; from step 10 on as without a stop; the library opens the result."
    learner.vision.requires_grad_(False)
    before, run = tensors(learner), trainer(kind, learner, small, tmp_path / "run", gradient_checkpointing=kind == "trainer")
    losses = [line["loss"] for line in (run.train(), run.state.log_history)[1] if "loss" in line]
    assert losses[-1] < losses[0] and learner.language.backbone.recompute == (kind == "trainer")
    assert moved(before, learner) == {name for name in before if not name.startswith("vision.")}
    again = trainer(kind, build(small.tokenizer), small, tmp_path / "run")
    again.model.vision.requires_grad_(False)
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-10"))
    assert same_weights(again.model, learner, 1e-3)                  # a step is 1e-2
    loaded = VLMamba.from_pretrained(tmp_path / "run/checkpoint-20")
    assert same_weights(loaded, learner)
    ask = dict(text=[user(picture(0), "is there a circle?")], return_full_text=False, max_new_tokens=3)
    pipe = transformers.pipeline("image-text-to-text", model=str(tmp_path / "run/checkpoint-20"))
    assert pipe(**ask)[0]["generated_text"].strip() == loaded.ask(picture(0), "is there a circle?", 3)


def test_trl_learns_what_the_library_learns(small, learner, tmp_path):
    "The labels of its batches are those of `encode_conversation`."
    run = trainer("trl", learner, small, tmp_path)
    rows = rows_of(small, 4)
    batch = run.data_collator([dict(row) for row in rows])
    for i, row in enumerate(rows):
        want, = encode_conversation(Conversation("1", [], [tuple(message["content"] for message in row["messages"])]), small.tokenizer, "lite")
        n = len(want.labels)
        assert batch["labels"][i, 64:64 + n].tolist() == want.labels and (batch["labels"][i, 64 + n:] == -100).all()
    everything = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)          # without assistant_only_loss
    losses = [learner(**batch | dict(labels=labels), fused_lm_head=True).loss for labels in (everything, everything.masked_fill(everything == small.words, -100))]
    assert torch.equal(*losses) and not torch.equal(losses[0], learner(**batch, fused_lm_head=True).loss)


def linears(model):
    "The names of all Linears but the head, which is the embedding's table."
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "language.lm_head"]


@pytest.mark.parametrize("kind", ["trainer", "trl"])
def test_lora_moves_adapters_alone_saves_loads_resumes_and_merges(kind, small, learner, tmp_path):
    "All Linears; not even a running mean of the base moves; the adapter's file has kilobytes; merged, nothing changes."
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'vlmamba_lite[hf]'")
    before, names = tensors(learner), linears(learner)
    config = peft.LoraConfig(r=2, target_modules=names)
    torch.manual_seed(0)
    run = trainer(kind, peft.get_peft_model(learner, config), small, tmp_path / "run")
    first = tensors(run.model)
    run.train()
    changed = moved(first, run.model)
    assert changed == {name for name in first if "lora_" in name} and len(changed) == 2 * len(names)
    saved = tmp_path / "run/checkpoint-20"
    assert (saved / "adapter_model.safetensors").stat().st_size < 40_000 and not (saved / "model.safetensors").exists()
    batch = collator(hf.VLMambaProcessor.of(small.config, small.tokenizer))(rows_of(small, 4))
    batch.pop("labels")
    with torch.no_grad():
        want = run.model.eval()(**batch).logits
        loaded = peft.PeftModel.from_pretrained(build(small.tokenizer), saved).eval()
        assert torch.allclose(loaded(**batch).logits, want, atol=1e-5) and not torch.allclose(build(small.tokenizer)(**batch).logits, want, atol=1e-2)
        merged = loaded.merge_and_unload()
        assert torch.allclose(merged(**batch).logits, want, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert same_weights(VLMamba.from_pretrained(tmp_path / "merged"), merged)
    torch.manual_seed(0)
    again = trainer(kind, peft.get_peft_model(build(small.tokenizer), config), small, tmp_path / "run")
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-10"))
    assert same_weights(again.model, run.model, 1e-3)
    assert all(torch.equal(t, before[name]) for name, t in tensors(build(small.tokenizer)).items())


PARTS = [*(dict(mixer=mixer) for mixer in sorted(MIXERS)), dict(mixer="mamba", mixer_args=dict(bias=True)), dict(d_intermediate=24),
         *(dict(connector=name) for name in sorted(CONNECTORS)), dict(connector_args=dict(scan="csm", shared=False)),
         *(dict(vision=vision | (dict(frozen=False) if "config" in vision else {})) for vision in TOWERS)]


@pytest.mark.parametrize("start", ["lora", "dora", "pissa", "olora"])
def test_no_adapter_is_dead(small, start):
    """On every Linear of every block, connector and encoder an adapter gets a gradient, wrapping changes nothing and merging is exact.

    DoRA rescales the output of a layer less its bias, and `dt_proj` leaves its bias to the scan, so there it would be another formula."""
    peft, count = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'vlmamba_lite[hf]'"), 0
    for parts in PARTS:
        model = build(small.tokenizer, **parts)
        processor = hf.VLMambaProcessor.of(model.config.parts, small.tokenizer)
        names = [name for name in linears(model) if start != "dora" or not name.endswith("dt_proj")]
        batch = processor([picture(0), picture(1)], [f"{IMAGE}what color?\x1fred<eos>", f"{IMAGE}is there a circle?\x1fyes<eos>"], padding=True, return_tensors="pt")
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        with torch.no_grad():
            before = model(**batch).logits
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names, use_dora=start == "dora",
                                                             init_lora_weights=start if start in ("pissa", "olora") else True)).eval()
        assert torch.allclose(wrapped(**batch).logits, before, atol=2e-5), parts
        wrapped.train()(**batch).loss.backward()
        alive = {name.split(".lora_B")[0].removeprefix("base_model.model.") for name, p in wrapped.named_parameters()
                 if "lora_B" in name and p.grad is not None and p.grad.abs().sum() > 0}
        assert alive == set(names), (parts, set(names) - alive)
        count += len(names)
        with torch.no_grad():
            for name, p in wrapped.named_parameters():
                if "lora_B" in name:
                    p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
            adapted = wrapped.eval()(**batch).logits
            merged = wrapped.merge_and_unload().eval()(**batch).logits
        assert torch.allclose(merged, adapted, atol=2e-5) and not torch.allclose(adapted, before, atol=1e-2), parts
    assert count > 150

"""Batches: every layout gives the loss of the plain one, positions are pure functions, skips and cuts are counted, streams go on."""
import random
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmamba_lite.data.batches import (Batch, Batches, Mixture, Preparer, Tally, collate, collate_by_image,
                                       collate_packed, first_fit, load_batches)
from vlmamba_lite.data.checks import loader_speed, stream_batches
from vlmamba_lite.data.conversations import Codec, Conversation, SampleError, byte_tokenizer
from vlmamba_lite.data.pictures import normalize, process_images
from vlmamba_lite.data.records import ConversationSet, hub_set, undecoded
from vlmamba_lite.data.sort_of_clevr import sort_of_clevr
from vlmamba_lite.language.model import MambaConfig, MambaLM
from vlmamba_lite.model.vlmamba import VLMamba

TENSORS = ("images", "prefixes", "prefix_of", "starts", "input_ids", "labels", "mask")
COLUMNS = {"images": "image", "questions": "q", "answers": "a"}


def same(a, b):
    return a.names == b.names and all(torch.equal(getattr(a, name), getattr(b, name)) for name in TENSORS)


def page(seed, size=8):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(["what is this, a big teal circle?"] * 3, 300)


def random_rows(tokenizer, count, seed, pictures=True, template="zephyr"):
    rng = random.Random(seed)
    prepare, rows = Preparer(tokenizer, template, process=lambda images: process_images(images, 8)), []
    for n in range(count):
        images = [page(rng.randint(0, 2)) for _ in range(rng.choice([0, 1, 1, 2]) if pictures else 0)]
        turns = [("what " * rng.randint(1, 3), "a big teal circle"[:rng.randint(1, 17)].strip()) for _ in range(rng.randint(1, 2))]
        rows += prepare(Conversation(str(n), images, turns), n)
    return rows


def model_and_eye(mixer, seed=0):
    torch.manual_seed(seed)
    args = {"mamba": {"d_state": 4}, "mamba2": {"d_state": 8, "headdim": 8, "chunk_size": 8}}[mixer]
    model = MambaLM(MambaConfig(d_model=16, n_layer=2, vocab_size=300, mixer=mixer, mixer_args=args, embedding_std=0.5)).double()
    eye = torch.nn.Linear(3 * 16, 16).double()
    def see(images):
        return eye(torch.nn.functional.unfold(images.double(), 4, stride=4).mT)
    return model, see, [*model.parameters(), *eye.parameters()]


class Reader(VLMamba):
    "The `forward` of the whole model, of any language model and function from pictures to visual tokens."
    def __init__(self, language, see=None):
        torch.nn.Module.__init__(self)
        self.language, self.pictures = language, see

    def see(self, images):
        return self.pictures(images)


def batch_loss(language, batch, see=None):
    return Reader(language, see)(batch).loss


def one_by_one(model, rows, see):
    "The slow twin: every text alone, its pictures' tokens before it, and the mean over all learned tokens."
    total, count = 0.0, 0
    for row in rows:
        x = model.embed(torch.tensor([row.input_ids]))
        if len(row.images):
            x = torch.cat([see(normalize(row.images)).flatten(0, 1)[None], x], 1)
        labels = torch.tensor([row.labels])
        logits = model(inputs_embeds=x).logits[:, -labels.shape[1]:]
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")
        total, count = total + loss, count + (labels[0, 1:] != -100).sum()
    return total / count


LAYOUTS = {"plain": collate, "by image": collate_by_image, "packed": collate_packed,
           "packed wide": lambda rows, pad: collate_packed(rows, pad, 4 * max(len(r.input_ids) for r in rows)),
           "one line": lambda rows, pad: collate_packed(rows, pad, sum(len(r.input_ids) for r in rows))}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
@pytest.mark.parametrize("pictures", [True, False])
def test_every_layout_gives_the_loss_and_the_gradients_of_one_text_at_a_time(tokenizer, mixer, layout, pictures):
    model, see, params = model_and_eye(mixer)
    for seed in range(2):
        rows = random_rows(tokenizer, 5, seed, pictures)
        loss, want = batch_loss(model, LAYOUTS[layout](rows, 0), see), one_by_one(model, rows, see)
        torch.testing.assert_close(loss, want, rtol=1e-10, atol=0)
        got, expected = (torch.autograd.grad(x, params, allow_unused=True) for x in (loss, want))
        for g, e in zip(got, expected):
            torch.testing.assert_close(torch.zeros(()) if g is None else g, torch.zeros(()) if e is None else e, rtol=1e-7, atol=1e-12)


def test_without_new_states_packing_leaks(tokenizer):
    model, *_ = model_and_eye("mamba2")
    batch = collate_packed(random_rows(tokenizer, 6, 1, pictures=False), 0, 200)
    assert batch.starts.ge(0).sum() == 6 and len(batch.mask) < 6
    leaking = model(batch.input_ids, mask=batch.mask, labels=batch.labels).loss
    assert (leaking - batch_loss(model, batch)).abs() > 1e-4


def test_the_whole_model_gets_the_same_loss(make_model, small):
    "A VLMamba: plain batches, shared pictures and packed lines have the loss of q rows for each picture."
    model = make_model().eval().double()
    data = hub_set(small.rows)
    prepare = Preparer(small.tokenizer, "lite", questions=2)
    rows = [row for i in range(4) for row in prepare(data[i], i)]
    shared = collate_by_image(rows, 0)
    assert shared.images.shape == (4, 3, 64, 64) and collate(rows, 0).images.shape == (8, 3, 64, 64)
    want = model(Batch.from_rows(shared.images, shared.input_ids, shared.labels, shared.mask)).loss
    for layout in LAYOUTS.values():
        torch.testing.assert_close(model(layout(rows, 0)).loss, want, rtol=1e-9, atol=0)


def test_what_a_batch_holds(tokenizer):
    rows = random_rows(tokenizer, 7, 3)
    for layout in LAYOUTS.values():
        batch = layout(rows, 0)
        for n, row in enumerate(rows):
            (line, at), = (batch.starts == n).nonzero().tolist()
            end = at + len(row.input_ids)
            assert batch.input_ids[line, at:end].tolist() == row.input_ids and batch.labels[line, at:end].tolist() == row.labels
            own = batch.prefixes[batch.prefix_of[n]]
            pictures = batch.images[own[own >= 0]] if (own >= 0).any() else []
            assert len(pictures) == len(row.images) and all(torch.equal(p, q) for p, q in zip(pictures, row.images))
        assert batch.mask.sum() == sum(len(r.input_ids) for r in rows) and (batch.labels[~batch.mask] == -100).all()
        assert (batch.input_ids[~batch.mask] == 0).all() and batch.mask.dtype == torch.bool and batch.names == [r.name for r in rows]


def test_pads_hide_no_end_of_text(tokenizer):
    "The pad is the end-of-text token here: the real ones stay real and learned."
    rows = random_rows(tokenizer, 5, 2, pictures=False)
    batch = collate(rows, Codec(tokenizer).pad_id)
    assert Codec(tokenizer).pad_id == Codec(tokenizer).eos_id == 0
    ends = sum(row.input_ids.count(0) for row in rows)
    assert (batch.input_ids[batch.mask] == 0).sum() == ends and (batch.labels == 0).sum() == ends // 2


def test_batches_refuse_nothing_and_pictures_of_two_sizes(tokenizer):
    with pytest.raises(ValueError, match="rows: got none"):
        collate([], 0)
    with pytest.raises(ValueError, match="rows: got none"):
        collate_packed([], 0)
    rows = [row for row in random_rows(tokenizer, 9, 0) if len(row.images)]
    odd = replace(rows[0], images=torch.zeros(1, 3, 9, 9, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"images: got pictures of 2 sizes, \(3, 8, 8\) and \(3, 9, 9\)"):
        collate([rows[0], odd], 0)
    with pytest.raises(ValueError, match="length: got a text of .* tokens, need at most 3"):
        collate_packed(rows, 0, 3)


@settings(deadline=None, max_examples=80, derandomize=True)
@given(st.lists(st.integers(1, 20), max_size=30), st.integers(20, 40))
def test_first_fit(lengths, room):
    lines = first_fit(lengths, room)
    assert sorted(i for line in lines for i in line) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in line) for line in lines]
    assert all(s <= room for s in sums) and sum(2 * s <= room for s in sums) <= 1            # no two half-empty lines


# ---- mixtures and positions ----

def toy_set(count, label, broken=()):
    records = [{"image": None, "q": f"what {i}?", "a": "" if i in broken else f"{label} {i}"} for i in range(count)]
    return ConversationSet(records, COLUMNS, label)


def slow_places(mixture, count):
    "The order as it happens, position by position."
    drawn, seen = [], Counter()
    for block in range(-(-count // mixture.BLOCK)):
        drawn += np.random.default_rng((mixture.seed, 0, block)).choice(len(mixture.sets), mixture.BLOCK, p=mixture.share).tolist()
    for k in drawn[:count]:
        this_pass, i = divmod(seen[k], len(mixture.sets[k]))
        yield k, int(np.random.default_rng((mixture.seed, 1 + k, this_pass)).permutation(len(mixture.sets[k]))[i])
        seen[k] += 1


def test_places_are_those_of_the_slow_twin_in_any_order():
    sets = [toy_set(7, "a"), toy_set(30, "b"), toy_set(1, "c")]
    want = list(slow_places(Mixture(sets, [5, 3, 1], seed=4), 9_000))
    order = list(range(9_000))
    random.Random(0).shuffle(order)
    mixture = Mixture(sets, [5, 3, 1], seed=4)
    assert all(mixture.place(n) == want[n] for n in order[:3000])
    share = np.bincount([k for k, _ in want], minlength=3) / 9_000
    assert np.abs(share - np.array([5, 3, 1]) / 9).max() < 0.02
    assert [Mixture(sets, [5, 3, 1], seed=5).place(n) for n in range(50)] != want[:50]


def test_weights_are_sizes_by_default():
    assert Mixture([toy_set(7, "a"), toy_set(21, "b")]).share.tolist() == [0.25, 0.75]
    only = Mixture([toy_set(5, "a")])
    assert sorted(only.place(n)[1] for n in range(5, 10)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("sets, weights", [([], None), ([toy_set(2, "a")], [0]), ([toy_set(2, "a")], [1, 2]), ([toy_set(2, "a")], [-1]),
                                           ([toy_set(2, "a")], [float("nan")]), ([toy_set(0, "a"), toy_set(2, "b")], [1, 1])])
def test_impossible_mixtures(sets, weights):
    with pytest.raises(ValueError, match="sets, weights: got sizes"):
        Mixture(sets, weights)


def make_batches(tokenizer, sets=None, **settings_):
    return Batches(Mixture(sets or [sort_of_clevr(40, seed=1), toy_set(30, "text")], [1, 1], seed=2),
                     Preparer(tokenizer, "zephyr", questions=3, augmented=True, process=partial(process_images, size=16)),
                     **{"batch_size": 4, **settings_})


@pytest.mark.parametrize("how", [{}, {"collate": collate_by_image}, {"collate": collate_packed}])
def test_stopping_and_going_on_gives_the_same_next_batch(tokenizer, how):
    whole = list(load_batches(make_batches(tokenizer, **how), 0, 12))
    for stop in (1, 4, 7, 11):
        assert same(next(iter(load_batches(make_batches(tokenizer, **how), stop, 12))), whole[stop])
    with_workers = list(load_batches(make_batches(tokenizer, **how), 3, 12, workers=2))
    assert len(with_workers) == 9 and all(same(a, b) for a, b in zip(with_workers, whole[3:]))
    assert not same(whole[0], whole[1])


def test_skips_are_counted_replaced_and_move_nothing_else(tokenizer):
    good, bad = [toy_set(20, "x")], [toy_set(20, "x", broken={3, 4, 5})]
    with pytest.raises(SampleError, match="sample . of x: assistant, turn 1: got an empty text"):
        for step in range(5):
            Batches(Mixture(bad), Preparer(tokenizer), 4)[step]
    want, got = (Batches(Mixture(sets), Preparer(tokenizer), 4, on_error="skip") for sets in (good, bad))
    tally = Tally()
    for step in range(5):
        a, b = want[step], got[step]
        assert len(b.names) == 4 and sum(x != y for x, y in zip(a.names, b.names)) == sum("of x" in x and int(x.split()[0]) in (3, 4, 5) for x in a.names)
        tally.add(b.tally)
    assert tally.skipped["empty"] >= 3 and tally.read == 20 + tally.skipped["empty"] and tally.messages
    assert same(got[2], got[2])


def test_a_set_of_nothing_but_errors_ends(tokenizer):
    batches = Batches(Mixture([toy_set(3, "x", broken={0, 1, 2})]), Preparer(tokenizer), 2, on_error="skip")
    with pytest.raises(ValueError, match="100 samples in a row could not be used; the last: sample"):
        batches[0]
    with pytest.raises(ValueError, match="on_error: got 'warn'"):
        replace(batches, on_error="warn")[0]


def test_cut_tokens_are_counted_in_the_batch(tokenizer):
    long = ConversationSet([{"image": None, "q": "what?", "a": "a big teal circle " * 20} for _ in range(6)], COLUMNS, "x")
    batches = Batches(Mixture([long]), Preparer(tokenizer, max_length=60), 3)
    whole = Batches(Mixture([long]), Preparer(tokenizer), 3)[0]
    batch = batches[0]
    assert batch.mask.shape[1] == 60 and batch.tally.cut == int((whole.labels != -100).sum() - (batch.labels != -100).sum()) > 0


def test_pictures_that_fail_are_errors(tokenizer):
    sets = [ConversationSet([{"image": {"bytes": b"no"}, "q": "a", "a": "b"}, {"image": page(1), "q": "a", "a": "b"}], COLUMNS, "x")]
    tally = Tally()
    batch = Batches(Mixture(sets), Preparer(tokenizer), 2, on_error="skip")[0]
    tally.add(batch.tally)
    assert tally.skipped == {"image": tally.read - 2} and set(batch.names) == {"1 of x"}
    wide = [ConversationSet([{"image": Image.fromarray(np.full((2, 2), 70_000, np.int32)), "q": "a", "a": "b"}], COLUMNS, "x")]
    with pytest.raises(SampleError, match="sample 0 of x: image: got levels"):
        Batches(Mixture(wide), Preparer(tokenizer), 1)[0]


def test_questions_are_drawn_anew(tokenizer):
    data = ConversationSet([{"image": None, "q": [f"what {i}?" for i in range(9)], "a": [f"it {i}" for i in range(9)]}], COLUMNS, "x")
    batches = Batches(Mixture([data]), Preparer(tokenizer, "lite", questions=4), 1)
    seen = [tuple(map(tuple, batches[s].input_ids.tolist())) for s in range(6)]
    assert len(set(seen)) > 1 and all(len(set(rows)) == len(rows) == 4 for rows in seen)


def test_batches_move_to_a_device(tokenizer):
    batch = make_batches(tokenizer)[0]
    assert same(batch.to("cpu"), batch) and batch.to("meta").labels.device.type == "meta" and batch.to("meta").names == batch.names
    assert batch.to("meta", non_blocking=True).learns.is_meta and batch.to("meta").cuts == batch.cuts


def test_a_batch_has_pictures():
    ids = torch.ones(2, 3, dtype=torch.long)
    for images, ids, match in ((torch.zeros(0, 3, 8, 8), ids, "^images: got none, need at least one$"), (torch.zeros(3, 3, 8, 8), ids, "^input_ids: got 2 rows"),
                               (torch.zeros(1, 3, 8, 8), ids[:0], "^input_ids: got 0 rows")):
        with pytest.raises(ValueError, match=match):
            Batch.from_rows(images, ids, ids)


def test_batches_are_pinned(tokenizer, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda part: pinned.append(part) or part.clone())
    batch = make_batches(tokenizer)[0]
    new = batch.pin_memory()
    assert same(new, batch) and all(any(getattr(batch, name) is part for part in pinned) for name in [*TENSORS, "learns"])


# ---- streams ----

@pytest.mark.parametrize("kind", ["list", "datasets", "datasets shuffled", "datasets interleaved"])
def test_a_stream_goes_on_where_it_stopped(tokenizer, kind):
    from datasets import Dataset
    rows = [{"image": page(i), "q": f"what {i}?", "a": f"it {i}"} for i in range(11)]
    def records():
        "Made anew for each stream, as a run that goes on makes them: a set of `datasets` 5.2 keeps one place, and mixes up two readers."
        if kind == "list":
            return rows
        if "interleaved" in kind:
            from datasets import interleave_datasets
            parts = [Dataset.from_list(part).to_iterable_dataset() for part in (rows[:6], rows[6:])]
            return undecoded(interleave_datasets(parts, [0.7, 0.3], seed=1, stopping_strategy="all_exhausted_without_replacement"))
        found = Dataset.from_list(rows).to_iterable_dataset()
        return undecoded(found.shuffle(seed=3, buffer_size=4) if "shuffled" in kind else found)
    def stream(position=0):
        return stream_batches(records(), Preparer(tokenizer, process=partial(process_images, size=8)), COLUMNS, 3, position=position)
    positions, whole = zip(*stream())
    assert [len(b.names) for b in whole] == [3, 3, 3, 2] and positions == (3, 6, 9, 11)
    for n in range(1, 4):
        assert same(next(stream(positions[n - 1]))[1], whole[n])


def test_a_stream_skips_and_counts(tokenizer):
    records = [{"q": "what?", "a": "" if i % 3 == 1 else f"it {i}"} for i in range(9)]
    def stream(on_error, position=0):
        return stream_batches(records, Preparer(tokenizer), COLUMNS, 2, on_error=on_error, position=position)
    batches = [batch for _, batch in stream("skip")]
    assert [b.names for b in batches] == [["0 of stream", "2 of stream"], ["3 of stream", "5 of stream"], ["6 of stream", "8 of stream"]]
    assert [b.tally.skipped["empty"] for b in batches] == [1, 1, 1] and same(next(stream("skip", 3))[1], batches[1])
    with pytest.raises(SampleError, match="sample 1 of stream"):
        list(stream("raise"))


def test_loader_speed_reports_what_came(tokenizer):
    got = loader_speed(make_batches(tokenizer), workers=0, steps=2)
    assert set(got) == {"pictures", "texts", "batches"} and got["texts"] == pytest.approx(4 * got["batches"], rel=0.02)

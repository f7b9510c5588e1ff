"""The batches of easy-VQA: bit for bit those of the first edition's loop, in micro-batches alike, and the batch of plain rows."""
import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from vlmamba_lite.data.batches import Batch, load_batches
from vlmamba_lite.data.conversations import build_tokenizer
from vlmamba_lite.data.easy_vqa import PHASES, ROW_TYPES, VQABatches, build_set, load_easy_vqa
from vlmamba_lite.data.pictures import augment, normalize

TENSORS = ("images", "prefixes", "prefix_of", "starts", "input_ids", "labels", "mask")


def slow_batch(data, seed, step, steps, batch_size, questions, phases, shift):
    "The first edition's `make_batch`, turn by turn: (images, rows of the set)."
    per_pass = max(len(data.images) // batch_size, 1)
    order = np.random.default_rng((seed, step // per_pass)).permutation(len(data.images))
    pictures = order[step % per_pass * batch_size:][:batch_size]
    rng = np.random.default_rng((seed, step, 1))
    weights = [w for start, w in phases if step / steps >= start][-1]
    noise, rows = rng.gumbel(size=(len(pictures), data.table.shape[1])), []
    for picture, own in zip(pictures, noise):
        there = [row for row in data.table[picture] if row >= 0]
        keys = [(np.log(weights[data.types[row]]) if weights[data.types[row]] else -1e6) + g for row, g in zip(there, own)]
        ranked = [there[i] for i in np.argsort(-np.array(keys))[:questions]]
        rows += ranked + ranked[:1] * (questions - len(ranked))
    images = data.images[pictures]
    return images if shift is None else augment(images, rng, shift), rows


@pytest.mark.parametrize("settings", [{}, {"seed": 5, "batch_size": 7, "questions": 9}, {"shift": None, "questions": 1},
                                      {"steps": 40, "phases": ((0.0, (1, 0, 0, 1, 0)), (0.5, (0, 0, 0, 0, 1)))}])
def test_a_batch_is_that_of_the_slow_twin(small, settings):
    batches = VQABatches(small.train, **{"steps": 20, "batch_size": 16, **settings})
    for step in (0, 1, 9, 19):
        images, rows = slow_batch(small.train, batches.seed, step, batches.steps, batches.batch_size, batches.questions, batches.phases, batches.shift)
        got = batches[step]
        assert torch.equal(got.images, images) and len(got.input_ids) == len(rows) == len(images) * batches.questions
        for i, row in enumerate(rows):
            length = int(got.mask[i].sum())
            assert length == small.train.prompt[row] + (small.train.labels[row] != -100).sum() and got.mask[i, :length].all()
            assert torch.equal(got.input_ids[i, :length], small.train.input_ids[row, :length])
            assert torch.equal(got.labels[i, :length], small.train.labels[row, :length]) and (got.labels[i, length:] == -100).all()
        assert got.mask.any(0).all()                                                     # no column of padding alone


def test_the_recipe_draws_what_the_recorded_runs_drew():
    "Digests of what the first edition's `make_batch` gave, before its models were trained and their accuracies recorded."
    rows = load_easy_vqa("train")
    tokenizer = build_tokenizer(text for name in ("questions", "answers") for texts in rows[name] for text in texts)
    batches = VQABatches(build_set(rows, tokenizer, captions=True))
    recorded = {(0, 0): ("626d559a390ed323", "8803e2d94d39821a", "3ba396d91a240483"), (0, 250): ("f37bf8eb16e62020", "124d14b0e8d2d89a", "125cf26e7fae2ee2"),
                (3, 999): ("8d7153d69ed6f627", "77ea0f521a313aa9", "a2bcea0508d44de5")}
    for (seed, step), want in recorded.items():
        batch = replace(batches, seed=seed)[step]
        parts = normalize(batch.images), batch.input_ids, batch.labels
        assert tuple(hashlib.sha256(part.numpy().tobytes()).hexdigest()[:16] for part in parts) == want
    assert batches.samples == 3_600 and batches.phases == PHASES and all(len(weights) == len(ROW_TYPES) for _, weights in PHASES)


def test_a_batch_depends_on_seed_and_step_alone(small):
    batches = VQABatches(small.train, steps=10, batch_size=8)
    once, states = batches[5], (torch.get_rng_state(), np.random.get_state()[1].copy())
    batches[6], np.random.rand(), torch.rand(3)
    again, loaded = VQABatches(small.train, steps=10, batch_size=8)[5], next(iter(load_batches(batches, 5, 6, workers=1)))
    torch.set_rng_state(states[0])
    for other in (again, loaded):
        assert all(torch.equal(getattr(once, name), getattr(other, name)) for name in TENSORS)
    for other in (batches[4], replace(batches, seed=1)[5]):
        assert not torch.equal(once.images, other.images)


def test_every_pass_sees_every_picture_once(small):
    batches = VQABatches(small.train, batch_size=8, shift=None)
    seen = [picture.numpy().tobytes() for step in range(5) for picture in batches[step].images]
    assert len(set(seen)) == len(seen) == 40 == batches.samples


def test_micro_batches_are_pieces_of_the_batch(small):
    whole = VQABatches(small.train, batch_size=12, questions=3)
    pieces = [replace(whole, parts=4)[7 * 4 + part] for part in range(4)]
    batch = whole[7]
    assert torch.equal(torch.cat([piece.images for piece in pieces]), batch.images)
    for i, piece in enumerate(pieces):
        own, width = slice(9 * i, 9 * i + 9), piece.mask.shape[1]
        assert torch.equal(piece.labels, batch.labels[own, :width]) and torch.equal(piece.input_ids, batch.input_ids[own, :width])
        assert torch.equal(piece.mask, batch.mask[own, :width]) and not batch.mask[own, width:].any()
    with pytest.raises(ValueError, match="batch_size: got 12 pictures, need a multiple of 5"):
        replace(whole, parts=5)[0]


def test_a_batch_of_plain_rows():
    images, ids = torch.rand(2, 3, 4, 4), torch.arange(18).view(6, 3)
    batch = Batch.from_rows(images, ids, ids)
    assert batch.prefixes.tolist() == [[0], [1]] and batch.prefix_of.tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.starts.tolist() == [[i, -1, -1] for i in range(6)] and batch.mask.all() and len(batch.names) == 6
    mask = torch.tensor([[True, True, False]] * 6)
    assert Batch.from_rows(images, ids, ids, mask).mask is mask
    for rows in (ids[:5], ids[:0]):
        with pytest.raises(ValueError, match=f"input_ids: got {len(rows)} rows, need a multiple of the 2 images"):
            Batch.from_rows(images, rows, rows)

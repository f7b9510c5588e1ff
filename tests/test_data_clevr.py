"""Sort-of-CLEVR: its rules on scenes checked by hand, its statistics, its speed; and what the words of a turn allow to be changed."""
import re
import time
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmamba_lite.data.conversations import build_tokenizer, encode_conversation
from vlmamba_lite.data.easy_vqa import COLORS, easy_vqa_set
from vlmamba_lite.data.pictures import COLOR_WORDS, allowed_changes, augment_pictures
from vlmamba_lite.data.sort_of_clevr import (CLEVR_COLORS, NON_RELATIONAL, RELATIONAL, Scene, draw_scene,
                                             random_scene, scene_answer, sort_of_clevr)

NAMES = ["red", "green", "blue", "orange", "gray", "yellow"]
#        x, y of     red       green     blue      orange    gray      yellow
BY_HAND = Scene(((10, 10), (25, 10), (60, 12), (12, 60), (37, 38), (65, 66)), (True, False, True, True, False, True))
ANSWERS = {     # worked out on squared paper: squared distances below
    "shape": "circle square circle circle square circle", "left": "yes yes no yes yes no", "top": "yes yes yes no no no",
    # nearest: red-green 225; green-red 225; blue-gray 1205 (green 1229); orange-gray 1109; gray-green 928; yellow-gray 1568
    "closest": "square circle square square square square",
    # furthest: red-yellow 6161; green-yellow 4736; blue-orange 4608; orange-blue 4608; gray-yellow 1568 (red 1513); yellow-red 6161
    "furthest": "circle circle circle circle circle circle",
    "count": "4 2 4 4 2 4"}


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_scene_checked_by_hand(kind):
    assert [scene_answer(BY_HAND, kind, i) for i in range(6)] == ANSWERS[kind].split()


def test_another_scene_checked_by_hand():
    scene = Scene(((5, 40), (69, 40), (37, 5), (38, 69), (20, 20), (50, 50)), (False,) * 6)
    assert [scene_answer(scene, "count", i) for i in range(6)] == ["6"] * 6
    assert [scene_answer(scene, k, i) for k in ("closest", "furthest", "shape") for i in range(6)] == ["square"] * 18
    assert [scene_answer(scene, "left", i) for i in range(6)] == "yes no yes no yes no".split()
    assert [scene_answer(scene, "top", i) for i in range(6)] == "no no yes no yes no".split()
    alone = Scene(scene.centers, (True, False, False, False, False, False))
    assert scene_answer(alone, "count", 0) == "1" and scene_answer(alone, "count", 1) == "5"


def test_a_tie_of_two_shapes_has_no_answer():
    centers = ((20, 20), (40, 20), (30, 60), (10, 60), (60, 60), (30, 20))
    assert scene_answer(Scene(centers, (True, False, True, True, False, True)), "closest", 5) is None
    assert scene_answer(Scene(centers, (True, True, True, True, False, False)), "closest", 5) == "circle"
    far = ((5, 37), (69, 37), (37, 37), (37, 50), (37, 25), (25, 37))
    assert scene_answer(Scene(far, (True, False, True, True, True, True)), "furthest", 2) is None


def test_the_picture_shows_the_scene():
    page = draw_scene(BY_HAND)
    assert page.shape == (75, 75, 3) and page.dtype == np.uint8
    for (x, y), circle, color in zip(BY_HAND.centers, BY_HAND.circles, CLEVR_COLORS.values()):
        own = (page == color).all(-1)
        rows, columns = np.where(own)
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (y - 5, y + 5, x - 5, x + 5)
        assert own.sum() == (97 if circle else 121) and own[y - 5, x - 5] != circle
    assert (page == 255).all(-1).sum() == 75 * 75 - 4 * 97 - 2 * 121


def question_kind(question):
    for kind, text in {**NON_RELATIONAL, **RELATIONAL}.items():
        if found := re.fullmatch(re.escape(text).replace(r"\{\}", r"(\w+)"), question):
            return kind, NAMES.index(found[1])


def test_statistics():
    data, counts, first = sort_of_clevr(1500, seed=3), {}, []
    for i in range(1500):
        conversation, scene = data[i], random_scene(np.random.default_rng((3, i)))
        kinds = [question_kind(q) for q, _ in conversation.turns]
        assert len(set(kinds)) == 20 and [k in NON_RELATIONAL for k, _ in kinds] == [True] * 10 + [False] * 10
        for (kind, color), (_, answer) in zip(kinds, conversation.turns):
            assert answer == scene_answer(scene, kind, color)
            counts.setdefault(kind, Counter())[answer] += 1
        assert np.array_equal(np.asarray(conversation.images[0]), draw_scene(scene))
        gaps = [(a - c) ** 2 + (b - d) ** 2 for j, (a, b) in enumerate(scene.centers) for c, d in scene.centers[:j]]
        assert min(gaps) >= 100 and all(5 <= v < 70 for v in chain(*scene.centers))
        first.append(scene.centers[0])
    for kind, pair in (("shape", "circle"), ("left", "yes"), ("top", "yes"), ("closest", "circle"), ("furthest", "circle")):
        assert abs(counts[kind][pair] / counts[kind].total() - 0.5) < 0.04, kind
    assert all(abs(c.total() / 5000 - 1) < 0.06 for c in counts.values())
    binomial = {str(k): w for k, w in zip(range(1, 7), np.array([1, 5, 10, 10, 5, 1]) / 32)}    # itself, and five coins
    assert all(abs(counts["count"][k] / counts["count"].total() - w) < 0.03 for k, w in binomial.items())
    assert np.abs(np.mean(first, 0) - 37).max() < 1.6 and np.abs(np.std(first, 0) - 65 / 12 ** 0.5).max() < 1.0


def test_a_pure_function_of_seed_and_position():
    a, b = sort_of_clevr(50, seed=1), sort_of_clevr(10, seed=1)
    assert [a[i].turns for i in (9, 3)] == [b[i].turns for i in (9, 3)]
    assert a[3].images[0].tobytes() == b[3].images[0].tobytes() != sort_of_clevr(10, seed=2)[3].images[0].tobytes()
    assert len({a[i].images[0].tobytes() for i in range(50)}) == 50
    assert a[0].name == "0 of Sort-of-CLEVR seed 1" and len(a) == 50


def test_ten_thousand_pictures_take_under_a_minute():
    "500 of them, as a share of the minute: CPU seconds of one thread."
    data, began = sort_of_clevr(10_000), time.process_time()
    for i in range(500):
        data[i]
    assert (time.process_time() - began) * 20 < 60


def test_words_of_the_set_suit_the_small_tokenizer():
    data = sort_of_clevr(60)
    words = build_tokenizer({text for i in range(60) for turn in data[i].turns for text in turn})
    rows = [row for i in range(60) for row in encode_conversation(data[i], words, "lite")]
    assert len(rows) == 1200 and words.get_vocab_size() < 45


# ---- augmentation ----

@pytest.mark.parametrize("text, allowed", [
    ("what shape is it", "color mirror"), ("is it on the LEFT?", "color"), ("Right-hand side", "color"), ("the leftmost one", "color"),
    ("what colour is it?", "mirror"), ("a grey cat", "mirror"), ("a RED bus on the right", ""), ("it is bright", "mirror color"),
    ("what does the sign say?", "color"), ("read it", "color"), ("[0.12, 0.5, 0.3, 0.9]", "color"), ("(12, 40)", "color"), ("at (x, y)", "color mirror"),
    ("go clockwise", "color"), ("the reddish bride", "color mirror"), ("it is brightly lit, leftover, upright", "color mirror")])
def test_what_words_allow(text, allowed):
    got = allowed_changes([("what is it?", text)])
    assert got == allowed_changes([(text, "yes")])
    assert "mirror" in got if "mirror" in allowed else "mirror" not in got
    if "bright" not in text or "brightly" in text:
        assert ("color" in got) == ("color" in allowed)


def test_every_color_of_the_sets_is_a_color_word():
    assert {*COLORS, *CLEVR_COLORS} <= COLOR_WORDS


def test_easy_vqa_may_be_mirrored_but_not_recolored_when_it_speaks_of_colors():
    for conversation in (easy_vqa_set("validation")[i] for i in range(30)):
        assert allowed_changes(conversation.turns) <= {"mirror"}


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(0, 10_000), st.sampled_from(["what is it", "on the left", "a red one", "left red"]), st.integers(0, 3))
def test_only_what_is_allowed_is_done(seed, text, shift):
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (2, 3, 9, 11), dtype=np.uint8))
    got = augment_pictures(images, [(text, "yes")], np.random.default_rng(seed), shift)
    assert got.shape == images.shape and got.dtype == torch.uint8
    def moved(source):
        for y in range(-shift, shift + 1):
            for x in range(-shift, shift + 1):
                rows, columns = np.clip(np.arange(9) + y, 0, 8), np.clip(np.arange(11) + x, 0, 10)
                if torch.equal(got, source[:, :, rows][:, :, :, columns]):
                    return True
        return False
    if "red" in text:
        assert moved(images) or ("left" not in text and moved(images.flip(-1)))
    elif "left" in text:
        flat = torch.full((1, 3, 4, 4), 90, dtype=torch.uint8)
        assert torch.equal(augment_pictures(flat, [(text, "yes")], np.random.default_rng(seed), shift), flat)      # grey stays grey


def test_both_changes_happen_half_of_the_time():
    page = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    page[:, 0, :, 0] = 250
    seen = Counter()
    for seed in range(400):
        got = augment_pictures(page, [("what is it", "a bar")], np.random.default_rng(seed), 0)
        assert torch.equal(got, augment_pictures(page, [("what is it", "a bar")], np.random.default_rng(seed), 0))
        seen[bool(got[..., 3].any()), bool(got[:, 1].any())] += 1
    assert len(seen) == 4 and min(seen.values()) > 70

"""The metrics of benchmarks against cases worked out by hand, intervals, questions from files, and runs that are stopped."""
import io
import json
import os
import re
import subprocess
import sys
from fractions import Fraction as F
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest

from vlmamba_lite.evaluation import lmms, metrics
from vlmamba_lite.evaluation.answers import (answer, bootstrap, check_pairs, evaluate, leave_one_out, pope_answer, pope_formula, pope_parts,
                                             share_interval)
from vlmamba_lite.evaluation.metrics import (BENCHMARKS, CONTRACTIONS, PAPERS, Sample, answer_samples, evaluate_benchmark, read_benchmark, score,
                                             vqa_accuracy, vqa_answer)

few = settings(deadline=None, max_examples=30, derandomize=True)


# How an answer is written before it is compared. (text, VQAv2, and TextVQA where it differs)

WRITTEN = [
    ("red", "red"), ("Red", "red"), ("  red  ", "red"), ("red\n", "red"), ("dark\tred", "dark red"), ("", ""), ("the", ""), ("The Dog", "dog"),
    ("a an the", ""), ("an apple", "apple"), ("theater", "theater"), ("a", ""),                         # articles, whole words only
    ("two", "2"), ("Ten", "10"), ("none", "0"), ("zero", "0"), ("eleven", "eleven"), ("one hundred", "1 hundred"), ("twofold", "twofold"),
    ("dont", "don't"), ("don't", "don't"), ("Im", "im"), ("Ive", "ive"), ("couldnt've", "couldn't've"), ("couldn'tve", "couldn't've"),
    ("couldntve", "couldntve"),                                                                         # two apostrophes missing: no entry
    ("twas", "'twas"), ("yall'd've", "y'all'd've"), ("somebody'd", "somebodyd"), ("hed", "he'd"), ("shed", "shed"), ("well", "well"),
    ("isn't it", "isn't it"), ("oclock", "o'clock"),
    ("let's", "let's", "let 's"), ("dog's", "dog's", "dog 's"), ("it's a dog", "it's dog", "it 's dog"),
    ("yes.", "yes"), ("yes!", "yes"), ("yes?", "yes"), ("...", ""), ("3.5", "3.5"), ("3.", "3"), ("a.b", "a.b".replace(".", "")), (".5", ".5"),
    ("p.m.", "pm"), ("5 p.m.", "5 pm"), ("v1.2.", "v1.2"),
    ("1,000", "1000"), ("1,000-2,000", "10002000", "1000 2000"), ("red,blue", "red blue", "redblue"), ("red, blue", "red blue"),
    ("red ,blue", "red blue"), ("1,a", "1", "1a"),                                                      # a comma makes "a" an article
    ("red/blue", "red blue"), ("red / blue", "red blue"), ("red/blue / green", "redblue green"),
    ("red /blue/green", "red bluegreen"), ("red/ blue/green", "red bluegreen"),
    ("t-shirt", "t shirt"), ("t-shirt - blue", "tshirt blue"), ("(red)", "red"), ("[1]", "1"), ("50%", "50%"), ("$5", "$5"), ("#1", "#1"),
    ("12:30", "12:30"), ("a & b", "& b"), ("x=1", "x 1"), ("c++", "c"), ("\"stop\"", "stop"), ("me@home", "me home"), ("one_two", "1 2"),
    ("one-two", "1 2"), ("what?ever", "what ever", "whatever"), ("dont.", "don't"), ("é.", "é"), ("2.0.", "2.0"),
    ("." * 32 + "x", "x"), ("." * 34 + "x", "..x"),                                                     # only the first 32 periods go
]


@pytest.mark.parametrize("case", WRITTEN, ids=lambda case: repr(case[0])[:24])
def test_answers_as_they_are_compared(case):
    assert vqa_answer(case[0]) == case[1]


def test_contractions_are_the_published_ones():
    "114 of the 120 entries of the official table change a lower-case word; four are in upper case, and two say the same twice."
    assert len(CONTRACTIONS) == 114
    assert CONTRACTIONS["thered've"] == CONTRACTIONS["there'dve"] == "there'd've" and CONTRACTIONS["'ows'at"] == "'ow's'at"
    for word in ("Im", "I'dve", "let's", "she's", "wed", "ill", "hell", "shell", "id"):
        assert word not in CONTRACTIONS


# Soft accuracy. (prediction, {answer: people}, VQAv2, TextVQA and VizWiz where it differs)

SOFT = [
    ("red", {"red": 10}, 1), ("blue", {"red": 10}, 0), ("red", {"red": 9, "blue": 1}, 1), ("blue", {"red": 9, "blue": 1}, 0.3),
    ("blue", {"red": 8, "blue": 2}, 0.6), ("blue", {"red": 7, "blue": 3}, 0.9), ("blue", {"red": 6, "blue": 4}, 1),
    ("blue", {"red": 5, "blue": 5}, 1), ("green", {"red": 5, "blue": 5}, 0), ("", {"red": 5, "blue": 5}, 0),
    ("", {"the": 3, "red": 7}, 0.9),                                                           # both are nothing after normalisation
    ("Red", {"red": 3, "blue": 7}, 0.9), ("red.", {"red": 2, "blue": 8}, 0.6), ("the red", {"red": 1, "blue": 9}, 0.3),
    ("red", {"Red": 1, "red": 1, "RED": 1, "blue": 7}, 0.9), ("red", {"a red": 2, "red": 2, "blue": 6}, 1),
    ("2", {"two": 3, "3": 7}, 0.9), ("two", {"2": 4, "3": 6}, 1), ("none", {"0": 2, "1": 8}, 0.6), ("ten", {"10": 1, "9": 9}, 0.3),
    ("two", {"2": 10}, 0, 1), ("Yes", {"yes": 10}, 0, 1), ("yes.", {"yes": 10}, 0, 1), ("yes\n", {"yes": 10}, 1),
    ("the dog", {"the dog": 10}, 1), ("dog", {"the dog": 10}, 0, 1), ("yes", {"yes ": 4, "yes": 6}, 1),
    ("Yes", {"yes ": 4, "yes": 6}, 0, 1),                                                      # spaces at the ends do not make them differ
    ("Yes", {"Yes": 5, "yes": 5}, 1), ("dont", {"don't": 3, "do": 7}, 0.9), ("1,000", {"1000": 2, "100": 8}, 0.6),
    ("t-shirt", {"t shirt": 1, "shirt": 9}, 0.3), ("red,blue", {"red blue": 4, "red": 6}, 1, 0),
    ("dog's", {"dog s": 3, "dog": 7}, 0), ("dog 's", {"dog's": 3, "dog": 7}, 0, 0.9),
    ("no", {"yes": 4, "no": 3, "maybe": 3}, 0.9), ("maybe", {"yes": 4, "no": 4, "maybe": 2}, 0.6),
    ("b", {"a b": 1, "b": 1, "B.": 1, "c": 7}, 0.9), ("unanswerable", {"unanswerable": 6, "blue": 4}, 1),
    ("x", {"x": 2}, F(1, 3)), ("x", {"x": 1, "y": 1}, F(1, 6)), ("x", {"x": 3}, F(2, 3)), ("x", {"x": 1, "y": 2}, F(2, 9)),
    ("x", {"x": 4}, 1), ("x", {"x": 2, "y": 2}, F(1, 2)), ("x", {"x": 1, "y": 4}, F(4, 15)), ("x", {"x": 3, "y": 2}, F(4, 5)),
]


@pytest.mark.parametrize("case", SOFT, ids=str)
def test_soft_accuracy_by_hand(case):
    prediction, people, vqa = case[:3]
    answers = [answer for answer, count in people.items() for _ in range(count)]
    assert vqa_accuracy(prediction, answers) == pytest.approx(float(vqa))
    assert vqa_accuracy(prediction, answers[::-1]) == pytest.approx(float(vqa))                # nobody's place matters


def test_soft_accuracy_needs_somebody_else():
    for answers in ([], ["red"]):
        with pytest.raises(ValueError, match=f"^answers: got {len(answers)}, need at least 2"):
            vqa_accuracy("red", answers)


@few
@given(st.integers(0, 10))
def test_soft_accuracy_of_ten_is_three_tenths_a_person(agree):
    assert leave_one_out("x", ["x"] * agree + ["y"] * (10 - agree)) == pytest.approx(min(1, 0.3 * agree))


# POPE: how an answer is read, then scores

POPE_TEXT = [
    ("Yes", "yes"), ("yes", "yes"), ("Yes.", "yes"), ("Yes, there is.", "yes"), ("No", "no"), ("no", "no"), ("No.", "no"), ("No, it is", "no"),
    ("no dog", "no"), ("There is no dog.", "no"), ("There is not", "no"), ("It does not.", "no"), ("There isn't", "yes"), ("Nope", "yes"),
    ("NO", "yes"), ("NOT", "yes"), ("None", "yes"), ("nothing", "yes"), ("", "yes"), (" ", "yes"), (".", "yes"), ("Yes. No.", "yes"), ("No. Yes.", "no"),
    ("Yes and no", "no"), ("yes,no", "yes"), ("yes, no", "no"), (",no", "no"), (" no ", "no"), ("no\n", "yes"), ("no!", "yes"), ("knot", "yes"),
    (".no", "yes"), ("A. not", "yes"), ("I do not know", "no"), ("Not", "yes"), ("I cannot say", "yes"),
]

# what is said, what is true, then accuracy, precision, recall, F1 and the yes ratio
POPE = [
    ("y", "y", 1, 1, 1, 1, 1), ("n", "n", 1, 0, 0, 0, 0), ("y", "n", 0, 0, 0, 0, 1), ("n", "y", 0, 0, 0, 0, 0),
    ("yn", "yn", 1, 1, 1, 1, F(1, 2)), ("ny", "yn", 0, 0, 0, 0, F(1, 2)), ("yy", "yn", F(1, 2), F(1, 2), 1, F(2, 3), 1),
    ("nn", "yn", F(1, 2), 0, 0, 0, 0), ("yy", "yy", 1, 1, 1, 1, 1), ("yn", "yy", F(1, 2), 1, F(1, 2), F(2, 3), F(1, 2)),
    ("nn", "nn", 1, 0, 0, 0, 0), ("yn", "nn", F(1, 2), 0, 0, 0, F(1, 2)), ("yyy", "yyn", F(2, 3), F(2, 3), 1, F(4, 5), 1),
    ("yyn", "yyn", 1, 1, 1, 1, F(2, 3)), ("ynn", "yyn", F(2, 3), 1, F(1, 2), F(2, 3), F(1, 3)), ("nnn", "yyn", F(1, 3), 0, 0, 0, 0),
    ("nny", "yyn", 0, 0, 0, 0, F(1, 3)), ("yny", "yyn", F(1, 3), F(1, 2), F(1, 2), F(1, 2), F(2, 3)),
    ("yyy", "ynn", F(1, 3), F(1, 3), 1, F(1, 2), 1), ("ynn", "ynn", 1, 1, 1, 1, F(1, 3)), ("yyn", "ynn", F(2, 3), F(1, 2), 1, F(2, 3), F(2, 3)),
    ("nyy", "ynn", 0, 0, 0, 0, F(2, 3)), ("yyyy", "yynn", F(1, 2), F(1, 2), 1, F(2, 3), 1), ("yyyn", "yynn", F(3, 4), F(2, 3), 1, F(4, 5), F(3, 4)),
    ("ynyn", "yynn", F(1, 2), F(1, 2), F(1, 2), F(1, 2), F(1, 2)), ("ynnn", "yynn", F(3, 4), 1, F(1, 2), F(2, 3), F(1, 4)),
    ("nnyn", "yynn", F(1, 4), 0, 0, 0, F(1, 4)), ("yyyn", "yyyn", 1, 1, 1, 1, F(3, 4)), ("ynnn", "yyyn", F(1, 2), 1, F(1, 3), F(1, 2), F(1, 4)),
    ("yyyy", "yyyn", F(3, 4), F(3, 4), 1, F(6, 7), 1), ("ynny", "yyyn", F(1, 4), F(1, 2), F(1, 3), F(2, 5), F(1, 2)),
    ("yynyy", "yyynn", F(2, 5), F(1, 2), F(2, 3), F(4, 7), F(4, 5)), ("yynyyy", "yyynnn", F(1, 3), F(2, 5), F(2, 3), F(1, 2), F(5, 6)),
]


def pope_scores(predictions, labels):
    return pope_formula(pope_parts(predictions, labels).sum(0))


@pytest.mark.parametrize("text, answer", POPE_TEXT, ids=str)
def test_pope_answers_by_hand(text, answer):
    assert pope_answer(text) == answer


@pytest.mark.parametrize("case", POPE, ids=lambda case: f"{case[0]}-{case[1]}")
def test_pope_scores_by_hand(case):
    word = {"y": "yes", "n": "no"}
    scores = pope_scores([word[c] for c in case[0]], [word[c] for c in case[1]])
    assert list(scores) == ["accuracy", "precision", "recall", "f1", "yes_ratio"]
    assert list(scores.values()) == pytest.approx([float(x) for x in case[2:]])


def test_pope_yes_ratio_counts_predictions():
    "Half of the labels are yes; the ratio follows what is said, not what is true."
    labels = ["yes", "no"] * 10
    for said in range(21):
        predictions = ["Yes, I see it"] * said + ["No"] * (20 - said)
        assert pope_scores(predictions, labels)["yes_ratio"] == pytest.approx(said / 20)
        assert pope_scores(predictions, ["no"] * 20)["yes_ratio"] == pytest.approx(said / 20)


def test_pope_refuses_other_labels():
    with pytest.raises(ValueError, match="^answers: got 'Yes', need one of no, yes$"):
        pope_scores(["yes"], ["Yes"])
    with pytest.raises(ValueError, match="^predictions: got 1, need 2"):
        pope_scores(["yes"], ["yes", "no"])


def test_every_metric_has_thirty_cases_by_hand():
    tables = (WRITTEN, SOFT, POPE_TEXT, POPE)
    assert min(len(table) for table in tables) >= 30
    assert all(len({row[:2] if table is POPE else str(row[:2]) for row in table}) == len(table) for table in tables)


# Means, parts and intervals

def mean(sums):
    return {"accuracy": sums[0] / sums[1]}


def mean_parts(values):
    return np.array([[value, 1] for value in values], float)


def sample(i, answer="yes", category="", picture=None):
    return Sample(str(i), "?", None, (answer,), category, str(i if picture is None else picture))


def test_means_by_category():
    categories, values = ["a", "b", "", "b"], [1, 0, 0, 1]
    result = score("exact", [sample(i, category=c) for i, c in enumerate(categories)], ["yes" if v else "no" for v in values], resamples=30)
    assert result["scores"] == pytest.approx({"accuracy": 0.5, "accuracy, a": 1, "accuracy, b": 0.5})
    assert np.isfinite(result["intervals"]["accuracy, a"]).all()                               # draws without an `a` say nothing of it


def test_check_pairs_names_what_is_wrong():
    check_pairs(["x"], ["yes"], {"yes", "no"})
    with pytest.raises(ValueError, match="^predictions: got 0, need 0, one for each answer and at least one$"):
        check_pairs([], [])


@few
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40), st.integers(0, 5))
def test_pope_counts_add_up(rows, seed):
    "Shuffled questions, or two halves added, give the same scores; four counts a question, one of them 1."
    said, true = ([("no", "yes")[x] for x in column] for column in zip(*rows))
    parts = pope_parts(said, true)
    assert (parts.sum(1) == 1).all()
    order = np.random.default_rng(seed).permutation(len(rows))
    assert pope_scores([said[i] for i in order], [true[i] for i in order]) == pope_scores(said, true) == pope_formula(parts.sum(0))
    assert pope_formula(parts[:3].sum(0) + parts[3:].sum(0)) == pope_scores(said, true)


def test_bootstrap_of_a_mean_is_the_known_interval():
    parts = mean_parts(np.repeat([1.0, 0.0], [300, 100]))
    low, high = bootstrap(parts, mean, seed=3)["accuracy"]
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.006)
    narrow = bootstrap(parts, mean, level=0.5)["accuracy"]
    assert low < narrow[0] < 0.75 < narrow[1] < high


def test_bootstrap_against_a_slow_twin():
    "Rows drawn one by one, with the same random numbers."
    rng = np.random.default_rng(4)
    parts, draws = rng.random((7, 2)), np.random.default_rng(1)
    slow = [mean(sum(parts[i] for i in draws.integers(7, size=7)))["accuracy"] for _ in range(50)]
    assert bootstrap(parts, mean, resamples=50, seed=1)["accuracy"] == pytest.approx(np.quantile(slow, [0.025, 0.975]))


def test_bootstrap_repeats_itself_and_changes_with_the_seed():
    parts = mean_parts(np.arange(50) % 3 == 0)
    assert bootstrap(parts, mean, seed=1) == bootstrap(parts, mean, seed=1) != bootstrap(parts, mean, seed=2)
    assert bootstrap(parts[:1], mean)["accuracy"] == (1, 1)                                    # one unit: nothing varies


@pytest.mark.parametrize("name, answer, wrong", [("exact", "red", "blue"), ("vqav2", ("red",) * 10, "blue"), ("pope", "yes", "no")])
def test_pictures_are_drawn_with_all_their_questions(name, answer, wrong):
    "Five questions about each picture, right or wrong together, tell no more than one: the same interval to the last digit."
    answers = (answer,) if isinstance(answer, str) else answer
    good = np.random.default_rng(1).random(60) < 0.6

    def interval(times):
        samples = [Sample(f"{i}-{k}", "?", None, answers, "random", f"{i:02}.png") for i in range(60) for k in range(times)]
        result = score(name, samples, [answers[0] if good[i] else wrong for i in range(60) for _ in range(times)])
        assert (result["pictures"], result["questions"]) == (60, 60 * times)
        return result["intervals"]["accuracy"]
    assert interval(5) == interval(1) and interval(1)[1] - interval(1)[0] > 0.2


def test_bootstrap_says_what_it_needs():
    for parts, options in ((np.zeros(3), {}), (np.array([[1, np.nan]]), {}), (np.zeros((0, 2)), {}), (np.zeros((3, 2)), dict(resamples=0)), (np.zeros((3, 2)), dict(level=1))):
        with pytest.raises(ValueError, match="^parts: got shape"):
            bootstrap(parts, mean, **options)


@pytest.mark.parametrize("trials", [1, 3, 20, 400])
def test_intervals_of_shares_are_the_exact_ones(trials):
    for right in range(0, trials + 1, max(1, trials // 7)):
        for level in (0.9, 0.95):
            theirs = binomtest(right, trials).proportion_ci(level, method="exact")
            assert share_interval(right / trials, trials, level) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@few
@given(st.integers(0, 1000), st.integers(1, 10 ** 6))
def test_intervals_of_shares_hold_the_share_and_have_a_width(thousandths, trials):
    low, high = share_interval(thousandths / 1000, trials)
    assert 0 <= low <= thousandths / 1000 <= high <= 1 and low < high


def test_intervals_of_shares_say_what_they_need():
    for share, trials in ((1.2, 3), (-0.1, 3), (float("nan"), 3), (0.5, 0)):
        with pytest.raises(ValueError, match=f"^share: got {share} of {trials} trials, need a share in"):
            share_interval(share, trials)


@pytest.mark.parametrize("name", ["exact", "pope"])
@pytest.mark.parametrize("right, count", [(3, 3), (0, 20), (1, 1), (200, 200), (0, 200), (19, 20)])
def test_no_interval_has_width_zero(name, right, count):
    "And of few pictures none is narrower than the exact one of so many trials."
    samples = [sample(i, "yes" if i % 2 else "no", "even" if i % 2 else "odd") for i in range(count)]
    said = [s.answers[0] if i < right else {"yes": "no", "no": "yes"}[s.answers[0]] for i, s in enumerate(samples)]
    result = score(name, samples, said, resamples=50)
    for kind, (low, high) in result["intervals"].items():
        assert low <= result["scores"][kind] <= high and high - low > 0.01, kind
    exact = binomtest(right, count).proportion_ci(0.95, method="exact")
    low, high = result["intervals"]["accuracy"]
    assert low <= exact.low + 1e-9 and high >= exact.high - 1e-9


def test_questions_about_one_picture_are_one_trial():
    "Three right answers about one picture say no more than one: it could be the one picture of forty that the model knows."
    result = score("exact", [sample(i, picture="p") for i in range(3)], ["yes"] * 3)
    assert result["intervals"]["accuracy"] == pytest.approx([0.025, 1])
    half = score("exact", [sample(i, picture=i // 2) for i in range(80)], ["yes", "no"] * 40)                     # every picture is half right
    assert half["intervals"]["accuracy"] == pytest.approx(list(share_interval(0.5, 40)))


# Files of the benchmarks, written small

def picture_bytes(color):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(file, "png")
    return file.getvalue()


PIXELS = picture_bytes("red")
def question(answer="yes", name=None, image="p.png", **more):
    return {"image": image, "question": "Is there a dog?", "answer": answer, **({"name": name} if name else {}), **more}


# name: lines of questions.jsonl, predictions that are all right, one that is not
FILES = {
    "exact": ([question("red"), question("blue", category="color")], ["red", "blue"], "Red"),
    "vqav2": ([question(None, answers=["red"] * 9 + ["blue"])], ["Red."], "green"),
    "pope": ([question(label, category=kind) for kind, label in (("random", "yes"), ("popular", "yes"), ("adversarial", "no"))],
             ["Yes", "Yes", "No"], "Not sure. No"),
}


def write_questions(folder, lines):
    "A folder with two pictures, p.png and q.png, and the lines (records, or text as it is) in questions.jsonl."
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("p.png", "q.png"):
        (folder / name).write_bytes(PIXELS)
    text = lines if isinstance(lines, str | bytes) else "\n".join(map(json.dumps, lines))
    (folder / "questions.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


@pytest.mark.parametrize("name", FILES)
def test_questions_are_read_and_scored(name, tmp_path):
    lines, right, wrong = FILES[name]
    samples = read_benchmark(name, write_questions(tmp_path, lines))
    assert [s.name for s in samples] == [str(i + 1) for i in range(len(lines))] and all(s.image.is_file() for s in samples)
    assert [(s.category, s.picture) for s in samples] == [(line.get("category", ""), line["image"]) for line in lines]

    def best(predictions, resamples=5):
        result = score(name, samples, predictions, resamples=resamples)
        json.dumps(result, allow_nan=False)
        assert result["questions"] == len(lines) and set(result["scores"]) == set(result["intervals"])
        return result["scores"]["accuracy"]
    assert best(right, 20) == pytest.approx(1)
    if name != "pope":
        assert best([wrong] * len(right)) == 0


@pytest.mark.parametrize("line, message", [
    ("[1]", "^questions.jsonl, line 1: got list, need an object"), ("{oops", "^questions.jsonl, line 1: is not JSON"),
    (b"\xff\xfe", "line 1: byte 0 is not UTF-8"), (question(image="../p.png"), "^sample 1: image: got the path"),
    (question(image="/etc/passwd"), "^sample 1: image: got the path"), (question(image="r.png"), "^sample 1: image: no file r.png"),
    (question(image=5), "^sample 1: image: got int, need text"), (question(5, name="a"), "^sample a: answer: got int, need text"),
    (question(None, answers=["a", 2]), "^sample 1: answer: got int"), (question(None, answers=[]), "^sample 1: answer: got NoneType"),
    ({"image": "p.png", "answer": "x"}, "^sample 1: question: got NoneType"), (question(question=" "), "^sample 1: question: got an empty text"),
    ([question(name="a")] * 2, "^sample a: name: came before"), ("", "^data: got no questions")], ids=str)
def test_damaged_files_are_refused(line, message, tmp_path):
    write_questions(tmp_path, [line] if isinstance(line, dict) else line)
    with pytest.raises(ValueError, match=message):
        read_benchmark("exact", tmp_path)


def test_labels_that_cannot_be_scored_are_found_before_anything_is_asked(tmp_path):
    for name, lines, message in (("pope", [question("maybe")], "answers: got 'maybe', need one of no, yes"),
                                 ("vqav2", [question("red")], "answers: got 1, need at least 2")):
        with pytest.raises(ValueError, match=message):
            read_benchmark(name, write_questions(tmp_path, lines))


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(PIXELS)
    root = write_questions(tmp_path / "root", [question()])
    (root / "p.png").unlink()
    (root / "p.png").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(ValueError, match="leads out of the root folder"):
        read_benchmark("exact", root)


def test_read_benchmark_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="^data: no file questions.jsonl in"):
        read_benchmark("pope", tmp_path)
    with pytest.raises(ValueError, match="^data: got None; pope needs the folder"):
        read_benchmark("pope")
    with pytest.raises(ValueError, match="^data: got .*easy_vqa is embedded"):
        read_benchmark("easy_vqa", tmp_path)
    for name in ("gqa", "mme", "mm_vet", "imagenet"):
        with pytest.raises(ValueError, match=f"^benchmark: got '{name}', need one of easy_vqa, exact, .*lmms-eval runs the others"):
            read_benchmark(name, tmp_path)


def test_papers_figures_belong_to_benchmarks():
    assert {"pope", "vqav2"} <= set(PAPERS["ML-Mamba"]) & set(BENCHMARKS)
    assert PAPERS["VL-Mamba"]["mme"] == 1369.6 and PAPERS["ML-Mamba"]["pope"] == 88.3 and len(PAPERS["VL-Mamba"]) == 9


# Scores by name

def test_pope_shows_its_files_and_their_mean():
    samples = [Sample(f"{kind}-{i}", "?", None, ({"y": "yes", "n": "no"}[label],), kind)
               for kind, labels in (("random", "yyn"), ("popular", "ynn"), ("adversarial", "nny")) for i, label in enumerate(labels)]
    scores = score("pope", samples, ["yes"] * 9, resamples=5)["scores"]
    assert scores["f1, random"] == pytest.approx(4 / 5) and scores["f1, popular"] == scores["f1, adversarial"] == pytest.approx(1 / 2)
    assert scores["f1, mean of files"] == pytest.approx(3 / 5) and scores["f1"] == pytest.approx(2 * (4 / 9) / (13 / 9)) and scores["yes_ratio"] == 1


def test_easy_vqa_by_name_is_accuracy_by_type(small):
    samples = read_benchmark("easy_vqa")
    assert len(samples) == 9673
    result = score("easy_vqa", samples, ["yes"] * 9673, resamples=50)
    assert round(100 * result["scores"]["accuracy"], 2) == 37.33 and result["pictures"] == 1000
    assert result["scores"]["accuracy, what color"] == 0 and len(result["scores"]) == 5
    low, high = result["intervals"]["accuracy"]
    assert 0.36 < low < 0.3733 < high < 0.39


def test_score_needs_one_prediction_a_sample():
    sample = Sample("a", "?", None, ("yes",))
    for predictions in ([], ["yes", "no"]):
        with pytest.raises(ValueError, match=f"^predictions: got {len(predictions)}, need 1"):
            score("exact", [sample], predictions)


# The loop

def numbered(count):
    image = {"bytes": PIXELS}
    return [Sample(f"q{i}", f"what is {i}?", image, (f"{i}",)) for i in range(count)]


class Stub:
    "Answers a question with its number, counts its batches, and is killed before batch `until`."

    def __init__(self, until=None):
        self.until, self.batches = until, []

    def __call__(self, pairs):
        if len(self.batches) == self.until:
            raise KeyboardInterrupt
        images, questions = zip(*pairs)
        self.batches.append((images, questions))
        return [question.split()[-1][:-1] for question in questions]


@pytest.mark.parametrize("count, batch_size", [(1, 1), (10, 3), (12, 3), (5, 16)])
def test_answers_come_in_order_and_in_batches(count, batch_size, tmp_path):
    stub, steps, samples = Stub(), [], numbered(count)
    assert answer_samples(stub, samples, tmp_path / "p.jsonl", batch_size, on_step=steps.append) == [str(i) for i in range(count)]
    assert steps == [*range(batch_size, count, batch_size), count] and [len(q) for _, q in stub.batches] == np.diff([0, *steps]).tolist()
    written = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert written == [{"name": s.name, "question": s.question, "prediction": str(i)} for i, s in enumerate(samples)]
    assert len({id(image) for image in stub.batches[0][0]}) == 1                              # one picture, opened once for a batch


@pytest.mark.parametrize("until", range(4))
@pytest.mark.parametrize("cut", [0, 1, 20, 60])
def test_a_killed_run_goes_on_to_the_same_file(until, cut, tmp_path):
    "Killed before any batch, and with any part of the last batch missing from the disk."
    samples, whole, path = numbered(10), tmp_path / "whole.jsonl", tmp_path / "p.jsonl"
    answer_samples(Stub(), samples, whole, 3)
    with pytest.raises(KeyboardInterrupt):
        answer_samples(Stub(until), samples, path, 3)
    left = path.read_bytes()
    assert left == b"".join(whole.read_bytes().splitlines(True)[:3 * until])                  # all batches that were answered are there
    path.write_bytes(left[:len(left) - cut])
    again = Stub()
    assert answer_samples(again, samples, path, 3, resume=True) == [str(i) for i in range(10)]
    assert path.read_bytes() == whole.read_bytes()
    assert len(again.batches) == 4 - until + (1 if cut and until else 0)                      # at most one batch is done again


def test_a_finished_file_asks_nothing_and_foreign_ones_are_refused(tmp_path):
    samples, path = numbered(4), tmp_path / "p.jsonl"
    answer_samples(Stub(), samples, path, 3)
    stub = Stub()
    answer_samples(stub, samples, path, 3, resume=True)
    assert stub.batches == []
    with pytest.raises(ValueError, match="^output: .* exists; resume goes on"):
        answer_samples(stub, samples, path, 3)
    for others in (samples[::-1], samples[:2], numbered(5)[1:]):
        before = path.read_bytes()
        with pytest.raises(ValueError, match=r"^p.jsonl: line \d is no answer to question"):
            answer_samples(stub, others, path, 3, resume=True)
        assert path.read_bytes() == before
    for text in ("[1]\n" * 3, '{"name": "q0"}\n' * 3, "oops\n" * 3):
        path.write_text(text)
        with pytest.raises(ValueError, match="^p.jsonl"):
            answer_samples(stub, samples, path, 3, resume=True)


def test_a_model_that_does_not_answer_each_question_is_refused(tmp_path):
    for i, model in enumerate((lambda pairs: ["x"], lambda pairs: [1] * len(pairs))):
        with pytest.raises(ValueError, match=r"^model: got \d answers, need 3 texts"):
            answer_samples(model, numbered(3), tmp_path / f"{i}.jsonl", 3)


def test_predictions_of_any_characters_survive(tmp_path):
    odd = ["a\nb", "\u2028", "\ud800", "é\t\"", ""]
    samples, path = numbered(5), tmp_path / "p.jsonl"
    assert answer_samples(lambda pairs: odd, samples, path, 5) == odd
    assert answer_samples(Stub(0), samples, path, 5, resume=True) == odd


def test_evaluate_benchmark_leaves_everything(tmp_path):
    samples, asked = read_benchmark("exact", write_questions(tmp_path / "data", [question()])), []
    result = evaluate_benchmark(lambda pairs: asked.extend(pairs) or ["yes"], "exact", samples, tmp_path / "out", suffix=True, settings={"model": "stub"})
    assert [text for _, text in asked] == ["Is there a dog?\nAnswer the question using a single word or phrase."]
    kept = json.loads((tmp_path / "out/result.json").read_text())
    assert kept["scores"] == result["scores"] == {"accuracy": 1} and {"commit", "command", "hardware", "versions", "seed", "model"} <= set(kept)
    with pytest.raises(ValueError, match="^output: .* already holds an evaluation"):
        evaluate_benchmark(Stub(), "exact", samples, tmp_path / "out", suffix=True, settings={"model": "stub"})
    with pytest.raises(ValueError, match="^suffix: got False, need True, with which this run began$"):
        evaluate_benchmark(Stub(), "exact", samples, tmp_path / "out", resume=True, settings={"model": "stub"})
    again = evaluate_benchmark(Stub(0), "exact", samples, tmp_path / "out", resume=True, suffix=True, settings={"model": "stub"})
    assert again["scores"] == result["scores"]


def says_yes(model, pairs):
    return ["yes"] * len(pairs)


def begun(folder, samples, ask, **options):
    "An evaluation that was killed after its first batch."
    def kill(done):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        evaluate_benchmark(ask, "exact", samples, folder, 2, on_step=kill, **options)


def test_a_run_goes_on_with_the_same_or_says_what_differs(tmp_path):
    "The weights, their names, a picture's bytes, an answer, the order, a setting: each is refused by name, and nothing is lost."
    def samples(**more):
        lines = [question(name=str(i), image=image, **{"answer": "yes", **more}) for i, image in enumerate(("p.png", "q.png", "p.png", "q.png"))]
        return read_benchmark("exact", write_questions(tmp_path / "data", lines))
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    begun(tmp_path / "out", samples(), partial(says_yes, model))
    kept = (tmp_path / "out/predictions.jsonl").read_bytes()

    def refused(field, ask=partial(says_yes, model), questions=None, **options):
        with pytest.raises(ValueError, match=f"^{field}: got .*, need .*, with which this run began$"):
            evaluate_benchmark(ask, "exact", questions or samples(), tmp_path / "out", **{"batch_size": 2, **options}, resume=True)
        assert (tmp_path / "out/predictions.jsonl").read_bytes() == kept
    other, bias = torch.nn.Linear(2, 2), model.bias[1].item()
    refused("checksums.weights", partial(says_yes, other))
    with torch.no_grad():
        model.bias[1] += 1e-3                                              # one number of one tensor
        refused("checksums.weights")
        model.bias[1] = bias
    refused("checksums.weights", lambda pairs: ["yes"] * len(pairs))
    refused("checksums.data", questions=samples(answer="no"))
    refused("checksums.data", questions=samples(category="b"))
    refused("checksums.data", questions=samples()[::-1])
    refused("questions", questions=samples()[:3])
    refused("batch_size", batch_size=3)
    refused("suffix", suffix=True)
    refused("model", settings={"model": "b"})
    same, pixels = samples(), bytearray(PIXELS)
    pixels[-13] ^= 1                                                       # a picture of the same size
    (tmp_path / "data/q.png").write_bytes(pixels)
    refused("checksums.data", questions=same)
    assert evaluate_benchmark(partial(says_yes, model), "exact", samples(), tmp_path / "out", 2, resume=True)["scores"] == {"accuracy": 1}


# lmms-eval

def lmms_request(question, pictures, place, **options):
    "A request as lmms-eval makes it."
    return SimpleNamespace(args=(question, options, lambda doc: [doc] * pictures, place, "easy", "test"))


@pytest.fixture
def lmms_model(small, make_model, tmp_path):
    "An untrained model, whose answers go on to the end, as lmms-eval makes it, and three pictures as its documents."
    make_model().save_pretrained(tmp_path / "model")
    model = lmms.VLMambaForLMMS.create_from_arg_string(f"pretrained={tmp_path / 'model'}", {"batch_size": 2, "max_batch_size": None, "device": "cpu"}) \
        if hasattr(lmms.VLMambaForLMMS, "create_from_arg_string") else lmms.VLMambaForLMMS(str(tmp_path / "model"), batch_size="2", device="cpu")
    model.task_dict = {"easy": {"test": list(small.rows["image"][:3])}}
    return model


def test_lmms_eval_gets_the_answers_of_answer(small, make_model, lmms_model):
    "In the order of the requests, whatever their settings, in batches of `batch_size`."
    asked = [(place, small.data.questions[place], longest) for place, longest in ((0, 2), (1, 1), (2, 2), (0, 1), (1, 2))]
    batches, generate = [], lmms_model.model.language.generate
    lmms_model.model.language.generate = lambda ids, *args, **kwargs: batches.append(len(ids)) or generate(ids, *args, **kwargs)
    texts = lmms_model.generate_until([lmms_request(question, 1, place, max_new_tokens=longest) for place, question, longest in asked])
    want = [answer(make_model(), [(small.rows["image"][place], question)], max_new_tokens=longest)[0] for place, question, longest in asked]
    assert texts == want and batches == [2, 1, 2] and str(lmms_model.device) == "cpu"


def test_lmms_eval_settings_are_obeyed(small, lmms_model):
    question = small.data.questions[0]

    def said(**options):
        return lmms_model.generate_until([lmms_request(question, 1, 0, **options)])[0]
    text = said()
    assert len(text.split()) > 4 and said(max_new_tokens=3) == " ".join(text.split()[:3]) and said(until=[], max_new_tokens=0) == text
    first, second, third = text.split()[:3]
    assert said(until=[" " + third]) == said(until=" " + third) == text.split(" " + third)[0]
    assert said(until=["\n\n", " " + third, " " + second]) == min(text.split(" " + second)[0], text.split(" " + third)[0], key=len)
    assert said(do_sample=False, num_beams=1, temperature=0, top_p=None) == text
    for options in (dict(do_sample=True), dict(num_beams=3)):
        with pytest.raises(ValueError, match="^generation_kwargs: got {.*}, need do_sample false and num_beams 1$"):
            said(**options)


def test_lmms_eval_gets_errors_for_what_the_model_cannot_do(small, lmms_model):
    for pictures in (0, 2):
        with pytest.raises(ValueError, match=f"^requests: got {pictures} pictures in one, need one$"):
            lmms_model.generate_until([lmms_request(small.data.questions[0], pictures, 0)])
    for method in (lmms_model.loglikelihood, lmms_model.generate_until_multi_round):
        with pytest.raises(NotImplementedError):
            method([])


LMMS_TASK = """task: easy_local
dataset_path: parquet
dataset_kwargs: {data_files: {test: FOLDER/test.parquet}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.picture
doc_to_text: question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 4, until: ["\\n\\n"], do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def test_lmms_eval_from_its_command_line_is_vlmamba_eval(small, make_model, tmp_path):
    "By the model's name, on a task of local files: exit code 0, and the exact match of `vlmamba eval` on the same questions."
    pytest.importorskip("lmms_eval")
    from datasets import Dataset, Features, Image, Value
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    pictures, questions = [small.rows["image"][i] for i in (0, 0, 1, 1, 2, 2, 3)], small.data.questions[:7]
    given = answer(model, list(zip(pictures, questions)), max_new_tokens=4)
    answers = [text if i % 3 and text.strip() else "wrong" for i, text in enumerate(given)]
    rows = [dict(image=p, question=q, answer=a) for p, q, a in zip(pictures, questions, answers)]
    Dataset.from_list(rows, features=Features(image=Image(), question=Value("string"), answer=Value("string"))).to_parquet(tmp_path / "test.parquet")
    task, entry = tmp_path / "task", tmp_path / "entry" / "vlmamba_entry-0.dist-info"
    for folder in (task, entry, tmp_path / "data"):
        folder.mkdir(parents=True)
    (task / "easy_local.yaml").write_text(LMMS_TASK.replace("FOLDER", str(tmp_path)))
    (task / "utils.py").write_text("def picture(doc):\n    return [doc['image']]\n")
    (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: vlmamba_entry\nVersion: 0\n")                   # as `pip install` writes them
    (entry / "entry_points.txt").write_text("[lmms_eval.models]\nvlmamba = vlmamba_lite.evaluation.lmms:manifest\n")
    path = os.pathsep.join([str(Path(__file__).parent.parent), str(tmp_path / "entry"), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, "-m", "lmms_eval", "--model", "vlmamba", "--model_args", f"pretrained={tmp_path / 'model'}", "--tasks", "easy_local",
                          "--include_path", str(task), "--batch_size", "2", "--output_path", str(tmp_path / "out")], capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": path, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"})
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    theirs = json.loads(next((tmp_path / "out").rglob("*results.json")).read_text())["results"]["easy_local"]["exact_match,none"]
    for i, row in enumerate(rows):
        row["image"].save(tmp_path / "data" / f"{i}.png")
    lines = [json.dumps({"image": f"{i}.png", "question": row["question"], "answer": row["answer"]}) for i, row in enumerate(rows)]
    (tmp_path / "data" / "questions.jsonl").write_text("\n".join(lines))
    assert vlmamba("eval", tmp_path / "model", "--benchmark", "exact", "--data", tmp_path / "data", "--tokens", 4, "--device", "cpu").code == 0
    ours = json.loads((tmp_path / "model/eval/exact/result.json").read_text())["scores"]["accuracy"]
    assert theirs == pytest.approx(ours) and 0 < ours < 1


# vlmamba eval

def vlmamba(*arguments):
    "The command in this process."
    from typer.testing import CliRunner

    from vlmamba_lite.cli.commands import app
    said = CliRunner().invoke(app, [str(a) for a in arguments])
    return SimpleNamespace(code=said.exit_code, out=said.output, err=said.stderr)


@pytest.fixture
def saved(small, make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_eval_of_easy_vqa_is_what_training_reports(small, make_model, saved, monkeypatch):
    "The same accuracies as `evaluate` on the same questions, by type; the folder holds predictions, settings and result."
    monkeypatch.setattr(metrics, "load_easy_vqa", lambda split: small.rows)
    said = vlmamba("eval", saved, "--benchmark", "easy_vqa", "--device", "cpu", "--batch-size", 50)
    assert said.code == 0 and "accuracy, what shape" in said.out, said.out
    folder = saved / "eval/easy_vqa"
    result = json.loads((folder / "result.json").read_text())
    mine = {name.removeprefix("accuracy, "): value for name, value in result["scores"].items()}
    theirs = evaluate(make_model(), small.data)
    assert {name.replace("accuracy", "all"): value for name, value in mine.items()} == pytest.approx(theirs)
    assert result["questions"] == len(small.data.answers) and result["pictures"] == 40
    assert {p.name for p in folder.iterdir()} == {"predictions.jsonl", "result.json", "run_config.json"}
    again = vlmamba("eval", saved, "--benchmark", "easy_vqa", "--device", "cpu", "--batch-size", 50)
    assert again.code == 2 and "already holds an evaluation" in again.err
    before = (folder / "predictions.jsonl").read_bytes()
    (folder / "predictions.jsonl").write_bytes(before[:5000])
    assert vlmamba("eval", saved, "--benchmark", "easy_vqa", "--device", "cpu", "--batch-size", 50, "--resume").code == 0
    assert (folder / "predictions.jsonl").read_bytes() == before


def test_eval_goes_on_with_the_same_model(small, make_model, saved, monkeypatch):
    "Another model in the same folder is refused; the first one put back goes on."
    monkeypatch.setattr(metrics, "load_easy_vqa", lambda split: small.rows)
    arguments = ("eval", saved, "--benchmark", "easy_vqa", "--device", "cpu", "--batch-size", 50)
    assert vlmamba(*arguments).code == 0
    path = saved / "eval/easy_vqa/predictions.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:5000])
    make_model(seed=7).save_pretrained(saved)
    said = vlmamba(*arguments, "--resume")
    assert said.code == 2 and "checksums.weights: got" in said.err and path.read_bytes() == whole[:5000]
    make_model().save_pretrained(saved)
    assert vlmamba(*arguments, "--resume").code == 0 and path.read_bytes() == whole


@pytest.mark.parametrize("where", ["weight", "norm_eps"])
def test_eval_of_a_damaged_model_is_an_error(small, make_model, saved, monkeypatch, where):
    "NaN in one weight, or in the configuration, is no score of 0 %: one line, and no result."
    monkeypatch.setattr(metrics, "load_easy_vqa", lambda split: small.rows)
    model = make_model()
    if where == "weight":
        with torch.no_grad():
            model.language.backbone.norm_f.weight[0] = float("nan")
    else:
        model.config.language.norm_eps = float("nan")
    model.save_pretrained(saved)
    said = vlmamba("eval", saved, "--benchmark", "easy_vqa", "--device", "cpu")
    assert said.code == 2 and said.err.count("\n") == 1 and re.search("nan", said.err, re.I), said
    assert not (saved / "eval/easy_vqa/result.json").exists()


def test_eval_of_files_with_words_the_model_knows(small, saved, tmp_path):
    data = write_questions(tmp_path / "data", [question("red", question=small.data.questions[0])])
    small.rows["image"][0].save(data / "p.png")
    said = vlmamba("eval", saved, "--benchmark", "exact", "--data", data, "--output", tmp_path / "out", "--device", "cpu", "--tokens", 2)
    assert said.code == 0 and "exact, 1 questions" in said.out, said
    assert json.loads((tmp_path / "out/result.json").read_text())["benchmark"] == "exact"


def test_eval_says_what_is_wrong_in_one_line(saved, tmp_path):
    data = write_questions(tmp_path / "data", [question()])
    for arguments, message in (((saved, "--benchmark", "gqa", "--data", tmp_path), "benchmark: got 'gqa', need one of easy_vqa, exact, vqav2, pope; lmms-eval"),
                               ((saved, "--benchmark", "exact"), "data: got None; exact needs the folder"),
                               ((saved, "--benchmark", "exact", "--data", tmp_path / "no"), "data: no file questions.jsonl"),
                               ((tmp_path / "no", "--benchmark", "exact", "--data", data), "model: no folder"),
                               ((saved, "--benchmark", "exact", "--data", data, "--suffix"), "words this model has never read")):
        said = vlmamba("eval", *arguments, "--device", "cpu", "--output", tmp_path / f"out{len(message)}")
        assert said.code == 2 and message in said.err and said.err.count("\n") == 1, said


def test_eval_stopped_by_ctrl_c_says_how_to_go_on(small, saved, monkeypatch):
    monkeypatch.setattr(metrics, "load_easy_vqa", lambda split: small.rows)
    whole, calls = metrics.os.fsync, []

    def stopped(file):
        calls.append(file)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(file)

    monkeypatch.setattr(metrics.os, "fsync", stopped)
    arguments = ("eval", saved, "--benchmark", "easy_vqa", "--device", "cpu", "--batch-size", 20)
    said = vlmamba(*arguments)
    assert said.code == 130 and "Go on with the same command and --resume" in said.out
    assert len((saved / "eval/easy_vqa/predictions.jsonl").read_text().splitlines()) == 40
    assert vlmamba(*arguments, "--resume").code == 0


# What else a file may hold

def test_a_broken_picture_is_named_and_the_answers_before_it_are_kept(tmp_path):
    samples = numbered(5)
    samples[4] = Sample("bad", "what?", {"bytes": b"hello"}, ("x",))
    with pytest.raises(ValueError, match="^sample bad: image"):
        answer_samples(Stub(), samples, tmp_path / "p.jsonl", 2)
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 4


@few
@given(st.lists(st.sampled_from(["red", "Red.", "the red", "two", "2", "1,000", "a/b", "dont", ""]), min_size=2, max_size=10),
       st.sampled_from(["red", "two", "1000", "a b", "don't", "x"]))
def test_soft_accuracy_against_a_slow_twin(answers, prediction):
    "Each person in turn is left out, and the others are asked one by one."
    if len(set(answers)) == 1:
        answers = [*answers, "something else"]                            # else nothing is normalised
    clean, said = [vqa_answer(a) for a in answers], vqa_answer(prediction)
    total = F(0)
    for i in range(len(clean)):
        agree = sum(1 for j, other in enumerate(clean) if j != i and other == said)
        total += min(F(1), F(agree, 3))
    assert vqa_accuracy(prediction, answers) == pytest.approx(float(total / len(clean)))

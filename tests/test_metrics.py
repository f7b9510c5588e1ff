"""Chapter 17's benchmark metrics: each against a table of cases worked out by hand, then properties and intervals."""
import base64
import io
import json
import sys
from fractions import Fraction as F
from functools import partial
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmamba_lite.evaluation import (BENCHMARKS, COGNITION, CONTRACTIONS, PAPERS, PERCEPTION, Answers, Judge, Sample, answer_all, answer_samples,
                                     ask_text, bootstrap, check_pairs, circular_formula, circular_parts, decode_answer, distinct, draw_sum,
                                     evalai_answer, evaluate_benchmark, gqa_answer, gqa_match, leave_one_out, mean_formula, mean_parts, mme_answer, mme_formula,
                                     lmms_eval_model, mme_parts, mme_pictures, mme_scores, option_letter, pope_answer, pope_formula, pope_parts,
                                     pope_scores, read_benchmark, scienceqa_letter, score, seed_letter, textvqa_accuracy, vqa_accuracy, vqa_answer, vsr_answer)

few = settings(deadline=None, max_examples=30, derandomize=True)


# How an answer is written before it is compared. (text, VQAv2, EvalAI where it differs)

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
    text, vqa, evalai = case if len(case) == 3 else (*case, case[1])
    assert vqa_answer(text) == vqa
    assert evalai_answer(text) == evalai


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
    prediction, people, vqa, textvqa = case if len(case) == 4 else (*case, case[2])
    answers = [answer for answer, count in people.items() for _ in range(count)]
    assert vqa_accuracy(prediction, answers) == pytest.approx(float(vqa))
    assert textvqa_accuracy(prediction, answers) == pytest.approx(float(textvqa))
    assert vqa_accuracy(prediction, answers[::-1]) == pytest.approx(float(vqa))                # nobody's place matters


def test_soft_accuracy_needs_somebody_else():
    for answers in ([], ["red"]):
        with pytest.raises(ValueError, match=f"^answers: got {len(answers)}, need at least 2"):
            vqa_accuracy("red", answers)


@few
@given(st.integers(0, 10))
def test_soft_accuracy_of_ten_is_three_tenths_a_person(agree):
    assert leave_one_out("x", ["x"] * agree + ["y"] * (10 - agree)) == pytest.approx(min(1, 0.3 * agree))


# GQA

GQA = [
    ("red", "red", 1), ("Red", "red", 1), ("RED", "red", 1), ("red.", "red", 1), ("red!", "red", 1), (" red ", "red", 1), ("red\n", "red", 1),
    ("blue", "red", 0), ("", "red", 0), (".", "red", 0), ("reddish", "red", 0), ("dark red", "red", 0), ("red dark", "dark red", 0),
    ("dark  red", "dark red", 1), ("dark-red", "dark red", 0), ("darkred", "dark-red", 1), ("the dog", "dog", 0), ("a dog", "dog", 0),
    ("dogs", "dog", 0), ("two", "2", 0), ("2", "2", 1), ("2.0", "20", 1), ("3.5", "35", 1), ("yes", "yes", 1), ("Yes, it is", "yes", 0),
    ("Yes,", "yes", 1), ("no", "yes", 0), ("dont", "don't", 1), ("t-shirt", "tshirt", 1), ("(left)", "left", 1), ("left?", "left", 1),
    ("fire truck", "firetruck", 0), ("\"stop sign\"", "stop sign", 1), ("é", "e", 0), ("color: red", "red", 0), ("x_y", "xy", 1),
]


@pytest.mark.parametrize("prediction, answer, right", GQA, ids=str)
def test_gqa_by_hand(prediction, answer, right):
    assert gqa_match(prediction, answer) is bool(right)
    assert gqa_match(answer, prediction) is bool(right) and gqa_answer(gqa_answer(answer)) == gqa_answer(answer)


# ScienceQA: (text, number of choices, letter)

LETTERS = [
    ("A", 4, "A"), ("B", 4, "B"), ("E", 5, "E"), ("E", 4, ""), ("D", 3, ""), ("F", 5, ""), ("b", 4, ""), ("", 4, ""), (" B", 4, "B"), ("B ", 4, "B"),
    ("B.", 4, ""), ("B. ", 4, "B"), ("B. cat", 4, "B"), ("B.cat", 4, ""), ("B cat", 4, ""), ("(B)", 4, ""), ("B) cat", 4, ""), (" B. cat", 4, ""),
    ("B\n", 4, "B"), ("B\ncat", 4, "B"), ("D. cat", 3, ""), ("The answer is B", 4, "B"), ("The answer is B.", 4, "B"), ("The answer is b", 4, ""),
    ("the answer is B", 4, ""), ("So. The answer is C. It is", 4, "C"), ("The answer is D.", 3, ""), ("The answer is Absent", 4, "A"),
    ("The answer is A because so. The answer is B.", 4, "B"), ("The answer is A. The answer is B.", 4, "A"), ("The answer is: B", 4, ""),
    ("A. The answer is B.", 4, "A"), ("The answer is (B)", 4, ""), ("cat", 4, ""), ("Answer: B", 4, ""), ("BB", 4, ""), ("A, B", 4, ""),
    ("The answer is\nB", 4, ""), ("F. The answer is A.", 4, "A"),
]


@pytest.mark.parametrize("text, choices, letter", LETTERS, ids=str)
def test_scienceqa_letters_by_hand(text, choices, letter):
    assert scienceqa_letter(text, choices) == letter


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
    with pytest.raises(ValueError, match=r"^answers: got 'Yes', need one of \['no', 'yes'\]$"):
        pope_scores(["yes"], ["Yes"])
    with pytest.raises(ValueError, match="^predictions: got 1, need 2"):
        pope_scores(["yes"], ["yes", "no"])


# MME

MME_TEXT = [
    ("Yes", "yes"), ("yes", "yes"), ("YES", "yes"), ("Yes.", "yes"), ("Yes, it is", "yes"), ("yesterday", "yes"), (" yes", "yes"), ("  yes", "other"),
    ("No", "no"), ("no", "no"), ("NO", "no"), ("No.", "no"), ("No, it is not", "no"), ("not", "no"), ("none", "no"), ("Nope", "no"), (" no", "no"),
    ("  no", "no"), ("   no", "other"), ("know", "no"), ("I know", "other"), ("I no", "no"), ("", "other"), ("maybe", "other"), ("The", "other"),
    ("ye", "other"), ("n", "other"), ("eyes", "yes"), ("noyes", "no"), ("nyes", "yes"), ("yesno", "yes"), ("It is yes", "other"), ("Ayes", "yes"),
]

# one string a picture, a digit a question: acc, acc+, points
MME = [
    ("11", 100, 100, 200), ("10", 50, 0, 50), ("01", 50, 0, 50), ("00", 0, 0, 0), ("11 11", 100, 100, 200), ("11 10", 75, 50, 125),
    ("11 01", 75, 50, 125), ("11 00", 50, 50, 100), ("10 10", 50, 0, 50), ("10 01", 50, 0, 50), ("10 00", 25, 0, 25), ("00 00", 0, 0, 0),
    ("11 11 11 11", 100, 100, 200), ("11 11 11 10", 87.5, 75, 162.5), ("11 11 11 00", 75, 75, 150), ("11 11 10 10", 75, 50, 125),
    ("11 11 10 00", 62.5, 50, 112.5), ("11 11 00 00", 50, 50, 100), ("11 10 10 10", 62.5, 25, 87.5), ("11 10 01 00", 50, 25, 75),
    ("11 10 00 00", 37.5, 25, 62.5), ("11 00 00 00", 25, 25, 50), ("10 10 10 10", 50, 0, 50), ("10 01 10 00", 37.5, 0, 37.5),
    ("10 10 00 00", 25, 0, 25), ("01 00 00 00", 12.5, 0, 12.5), ("00 00 00 00", 0, 0, 0), ("11 11 11 11 10", 90, 80, 170),
    ("11 11 11 10 00", 70, 60, 130), ("11 11 10 10 10", 70, 40, 110), ("11 10 10 00 00", 40, 20, 60), ("10 00 00 00 00", 10, 0, 10),
    ("01 01 01 01 01", 50, 0, 50),
]


def mme_rows(text, category="count"):
    "Answers, labels, categories and pictures of a row of `MME`; the first question of a picture has the answer yes."
    pairs, labels, wrong = text.split(), ["yes", "no"], {"yes": "No", "no": "I see"}
    said = [({"yes": "Yes", "no": "No"} if right == "1" else wrong)[label] for pair in pairs for right, label in zip(pair, labels)]
    return said, labels * len(pairs), [category] * len(said), [i // 2 for i in range(len(said))]


@pytest.mark.parametrize("text, answer", MME_TEXT, ids=str)
def test_mme_answers_by_hand(text, answer):
    assert mme_answer(text) == answer


@pytest.mark.parametrize("text, acc, plus, points", MME, ids=str)
def test_mme_scores_by_hand(text, acc, plus, points):
    scores = mme_scores(*mme_rows(text))
    assert [scores[k] for k in ("count acc", "count acc+", "count", "perception", "cognition", "total")] == pytest.approx([acc, plus, points, points, 0, points])


def test_mme_sums_over_categories():
    "A category counts the same however many pictures it has; pictures of one name in two categories are two."
    rows = zip(*(mme_rows(*row) for row in (("11 10", "OCR"), ("11", "existence"), ("11 11 00 00", "code_reasoning"), ("10", "posters"))))
    scores = mme_scores(*(sum(parts, []) for parts in rows))
    assert [scores[name] for name in ("OCR", "existence", "code_reasoning", "posters")] == [125, 200, 100, 50]
    assert [scores[name] for name in ("perception", "cognition", "total")] == [375, 100, 475]
    assert len(PERCEPTION) == 10 and len(COGNITION) == 4 and "celebrity" not in scores


def test_mme_needs_pairs_and_known_categories():
    said, labels, categories, pictures = mme_rows("11 11")
    with pytest.raises(ValueError, match="^pictures: got 1 questions about 1 of count, need two a picture$"):
        mme_scores(said[:3], labels[:3], categories[:3], pictures[:3])
    with pytest.raises(ValueError, match="^pictures: got 4 questions about 7 of count"):
        mme_scores(said, labels, categories, [7] * 4)
    with pytest.raises(ValueError, match="^answers: got 'cats', need one of"):
        mme_scores(said, labels, ["cats"] * 4, pictures)
    with pytest.raises(ValueError, match="^answers: got 'Yes'"):
        mme_scores(said, ["Yes"] * 4, categories, pictures)


# MMBench

OPTIONS = {"A": "cat", "B": "dog", "C": "a red fox", "D": "fish"}
OPTION = [
    ("A", "A"), ("B", "B"), ("D", "D"), ("E", ""), ("a", ""), ("", ""), ("B.", "B"), ("(B)", "B"), ("B) dog", "B"), ("B. dog", "B"), ("B: dog", "B"),
    ("{B}", "B"), ("*B*", "B"), ("#B", "B"), ("The answer is B", "B"), ("The answer is B.", "B"), ("B dog cat", "B"), ("A or B", ""), ("A, B", ""),
    ("A cat", "A"), ("A dog", "A"), ("A dog is here", "B"), ("A big dog sits", "B"), ("A large animal here", ""), ("It is A", "A"), ("It is surely A", ""),
    ("dog", "B"), ("Dog", "B"), ("the dog", "B"), ("cat and dog", ""), ("fox", ""), ("A red fox", "A"), ("a red fox", "C"), ("Clearly a RED FOX", "C"),
    ("catfish", ""), ("hotdog", "B"), ("B-", ""), ("AB", ""), ("B\n", "B"), ("Bdog", "B"), ("C D", ""), ("I say D; it swims", "D"),
]

# one string a question, a digit a rotation: circular, plain
CIRCULAR = [
    ("1", 1, 1), ("0", 0, 0), ("11", 1, 1), ("10", 0, F(1, 2)), ("00", 0, 0), ("111", 1, 1), ("110", 0, F(2, 3)), ("100", 0, F(1, 3)), ("1111", 1, 1),
    ("1110", 0, F(3, 4)), ("0111", 0, F(3, 4)), ("1100", 0, F(1, 2)), ("1000", 0, F(1, 4)), ("0000", 0, 0), ("1111 1111", 1, 1),
    ("1111 1110", F(1, 2), F(7, 8)), ("1111 1000", F(1, 2), F(5, 8)), ("1111 0000", F(1, 2), F(1, 2)), ("1110 1110", 0, F(3, 4)), ("11 1111", 1, 1),
    ("11 0000", F(1, 2), F(1, 3)), ("10 1111", F(1, 2), F(5, 6)), ("00 1111", F(1, 2), F(2, 3)), ("11 11 10", F(2, 3), F(5, 6)),
    ("11 10 10", F(1, 3), F(2, 3)), ("111 111 000", F(2, 3), F(2, 3)), ("111 110 100", F(1, 3), F(2, 3)), ("1 11 111 1111", 1, 1),
    ("1 11 111 1110", F(3, 4), F(9, 10)), ("0 11 111 1111", F(3, 4), F(9, 10)), ("0 00 000 1111", F(1, 4), F(2, 5)),
    ("1000 1000 1000 1000", 0, F(1, 4)), ("1111 0111 1011 1101", F(1, 4), F(13, 16)),
]


@pytest.mark.parametrize("text, letter", OPTION, ids=str)
def test_options_by_hand(text, letter):
    assert option_letter(text, OPTIONS) == letter


@pytest.mark.parametrize("text, circular, plain", CIRCULAR, ids=str)
def test_circular_by_hand(text, circular, plain):
    rows = [(digit == "1", group) for group, digits in enumerate(text.split()) for digit in digits]
    for order in (rows, rows[::-1], sorted(rows)):                                             # a question's rotations need not be neighbours
        scores = circular_formula(circular_parts(*zip(*order)).sum(0))
        assert scores == pytest.approx({"circular": float(circular), "plain": float(plain)})


# SEED-Bench and VSR

SEED = [
    ("A", "A"), ("B", "B"), ("D", "D"), ("a", "a"), ("", ""), (" ", ""), (" C", "C"), ("C ", "C"), ("\nC", "C"), ("B.", "B"), ("B. dog", "B"), ("B) dog", "B"),
    ("(B)", "("), ("Big", "B"), ("Dog", "D"), ("dog", "d"), ("A cat", "A"), ("An apple", "A"), ("The answer is B", "T"), ("Answer: B", "A"), ("BA", "B"),
    ("1", "1"), ("E", "E"), (".", "."), ("\tD. fish", "D"), ("C\n", "C"), ("C, I think", "C"), ("D and B", "D"), ("*A*", "*"), ("ABCD", "A"), ("Cat", "C"),
]
VSR = [
    ("True", "true"), ("true", "true"), ("TRUE", "true"), ("True.", "true"), ("Yes", "true"), ("yes, it is", "true"), ("False", "false"), ("false", "false"),
    ("False.", "false"), ("No", "false"), ("no, not at all", "false"), ("NO!", "false"), ("", "other"), ("maybe", "other"), ("It is true", "other"),
    ("not true", "other"), ("untrue", "other"), ("truely", "other"), ("nope", "other"), ("yesterday", "other"), (" true", "true"), ("\nfalse", "false"),
    ("'true'", "true"), ("(no)", "false"), ("**Yes**", "true"), ("1", "other"), ("0", "other"), (".", "other"), ("true false", "true"), ("no yes", "false"),
    ("True\nbecause", "true"), ("t", "other"), ("The", "other"),
]


@pytest.mark.parametrize("text, letter", SEED, ids=str)
def test_seed_letters_by_hand(text, letter):
    assert seed_letter(text) == letter


@pytest.mark.parametrize("text, answer", VSR, ids=str)
def test_vsr_answers_by_hand(text, answer):
    assert vsr_answer(text) == answer


def test_every_metric_has_thirty_cases_by_hand():
    tables = (WRITTEN, SOFT, GQA, LETTERS, POPE_TEXT, POPE, MME_TEXT, MME, OPTION, CIRCULAR, SEED, VSR)
    assert min(len(table) for table in tables) >= 30
    assert all(len({row[:2] if table in (LETTERS, GQA, POPE) else str(row[:2]) for row in table}) == len(table) for table in tables)


# Means, parts and intervals

def test_means_by_group():
    parts, names = mean_parts([1, 0, 0.3, 1], [("a",), ("a", "b"), (), ("b",)])
    assert names == ["all", "a", "b"]
    assert mean_formula(names, parts.sum(0)) == pytest.approx({"accuracy": 0.575, "accuracy, a": 0.5, "accuracy, b": 0.5})
    assert np.isnan(mean_formula(names, parts[2:3].sum(0))["accuracy, a"])                     # nothing there: no number


def test_check_pairs_names_what_is_wrong():
    check_pairs(["x"], ["yes"], {"yes", "no"})
    with pytest.raises(ValueError, match="^predictions: got 0, need 0, one an answer and at least one$"):
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
    right = np.repeat([1.0, 0.0], [300, 100])
    parts, names = mean_parts(right)
    low, high = bootstrap(parts, partial(mean_formula, names), seed=3)["accuracy"]
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.006)
    narrow = bootstrap(parts, partial(mean_formula, names), level=0.5)["accuracy"]
    assert low < narrow[0] < 0.75 < narrow[1] < high


def test_bootstrap_repeats_itself_and_changes_with_the_seed():
    parts, names = mean_parts(np.arange(50) % 3 == 0)
    formula = partial(mean_formula, names)
    assert bootstrap(parts, formula, seed=1) == bootstrap(parts, formula, seed=1) != bootstrap(parts, formula, seed=2)
    assert bootstrap(parts[:1], formula)["accuracy"] == (1, 1)                                 # one unit: nothing varies


def test_bootstrap_draws_whole_units():
    "40 pictures with two questions that are right or wrong together: the interval is that of 40, not of 80."
    rng = np.random.default_rng(0)
    hit = rng.random(40) < 0.5
    parts = circular_parts(np.repeat(hit, 2), np.repeat(np.arange(40), 2))
    low, high = bootstrap(parts, circular_formula, resamples=3000)["plain"]
    p = hit.mean()
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(p * (1 - p) / 40), rel=0.1)


@pytest.mark.parametrize("name, answer, wrong", [("gqa", "red", "blue"), ("vqav2", ("red",) * 10, "blue"), ("pope", "yes", "no"), ("vsr", "true", "false")])
def test_pictures_are_drawn_with_all_their_questions(name, answer, wrong):
    "Five questions about each picture, right or wrong together, tell no more than one: the same interval to the last digit."
    answers = (answer,) if isinstance(answer, str) else answer
    good = np.random.default_rng(1).random(60) < 0.6
    def interval(times):
        samples = [Sample(f"{i}-{k}", "?", f"{i:02}.png", answers, (), ("random",)) for i in range(60) for k in range(times)]
        result = score(name, samples, [answers[0] if good[i] else wrong for i in range(60) for _ in range(times)])
        assert (result["units"], result["unit"], result["questions"]) == (60, "pictures", 60 * times)
        return result["intervals"]["accuracy"]
    assert interval(5) == interval(1) and interval(1)[1] - interval(1)[0] > 0.2


def test_bootstrap_keeps_the_size_of_strata():
    "Two strata without variance inside: no interval when each is drawn from by itself, a wide one otherwise."
    parts, names = mean_parts([1] * 10 + [0] * 30)
    formula, strata = partial(mean_formula, names), ["a"] * 10 + ["b"] * 30
    assert bootstrap(parts, formula, strata)["accuracy"] == (0.25, 0.25)
    low, high = bootstrap(parts, formula)["accuracy"]
    assert high - low > 0.2


def test_bootstrap_of_mme_draws_pictures_within_categories():
    rows = [sum(x, []) for x in zip(mme_rows("11 11 11 10 00 11 10 11", "OCR"), mme_rows("11 00 10 11", "count"))]
    right = mme_pictures(*rows)
    parts, names = mme_parts(right)
    found = bootstrap(parts, partial(mme_formula, names), [category for category, _ in right], resamples=200)
    scores = mme_scores(*rows)
    assert set(found) == set(scores) and all(found[name][0] <= scores[name] <= found[name][1] for name in scores)
    assert all(np.isfinite(found[name]).all() for name in found) and found["total"][0] < found["total"][1]


def test_bootstrap_says_what_it_needs():
    for parts, options in ((np.zeros(3), {}), (np.zeros((0, 2)), {}), (np.zeros((3, 2)), dict(resamples=0)), (np.zeros((3, 2)), dict(level=1))):
        with pytest.raises(ValueError, match="^parts: got shape"):
            bootstrap(parts, circular_formula, **options)


def test_a_draw_sums_as_many_rows():
    parts = np.eye(5)
    drawn = draw_sum(parts, np.random.default_rng(0))
    assert drawn.sum() == 5 and (drawn == np.round(drawn)).all() and drawn.max() > 1


# Files of the benchmarks, written small

def picture_bytes(color):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(file, "png")
    return file.getvalue()


PIXELS = picture_bytes("red")
TEN = [{"answer": "red", "answer_confidence": "yes", "answer_id": i} for i in range(9)] + [{"answer": "blue", "answer_confidence": "no", "answer_id": 9}]
COCO = "val2014/COCO_val2014_000000000007.jpg"
B64 = base64.b64encode(PIXELS).decode()
TSV = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]


def lines(rows):
    return "\n".join(map(json.dumps, rows)) + "\n"


def table(rows):
    return "\n".join("\t".join(map(str, row)) for row in [TSV, *rows]) + "\n"


# name: {file: content}, a list of answers that are all right, an answer that is not
FILES = {
    "vqav2": ({"v2_OpenEnded_mscoco_val2014_questions.json": {"questions": [{"question_id": 70, "image_id": 7, "question": "what color?"}]},
               "v2_mscoco_val2014_annotations.json": {"annotations": [{"question_id": 70, "answer_type": "other", "answers": TEN}]}, COCO: PIXELS},
              ["Red."], "green"),
    "textvqa": ({"TextVQA_0.5.1_val.json": {"data": [{"question_id": 3, "question": "what?", "image_id": "ab", "answers": ["stop"] * 10}]},
                 "train_images/ab.jpg": PIXELS}, ["Stop"], "go"),
    "vizwiz": ({"Annotations/val.json": [{"image": "v.jpg", "question": "what?", "answers": TEN, "answer_type": "other"}], "val/v.jpg": PIXELS},
               ["the red"], "unanswerable"),
    "gqa": ({"testdev_balanced_questions.json": {"g1": {"imageId": "n1", "question": "is it?", "answer": "yes"}}, "images/n1.jpg": PIXELS},
            ["Yes."], "no"),
    "scienceqa": ({"problems.json": {"1": {"question": "which?", "choices": ["a", "b", "c"], "answer": 2, "image": "image.png", "hint": "look"},
                                     "2": {"question": "which?", "choices": ["a", "b"], "answer": 0, "image": None, "hint": ""}},
                   "pid_splits.json": {"test": ["1", "2"]}, "images/test/1/image.png": PIXELS}, ["C"], "A"),
    "pope": ({f"coco_pope_{kind}.json": lines([{"question_id": 1, "image": "p.jpg", "text": "Is there a dog?", "label": label}])
              for kind, label in (("random", "yes"), ("popular", "yes"), ("adversarial", "no"))} | {"val2014/p.jpg": PIXELS},
             ["Yes", "Yes", "No"], "Not sure. No"),
    "mme": ({"count/x.txt": "One?\tYes\nTwo?\tNo\n", "count/x.jpg": PIXELS, "OCR/images/y.png": PIXELS,
             "OCR/questions_answers_YN/y.txt": "A?\tYes\nB?\tNo\n\n"}, ["Yes", "No", "Yes", "No"], "what"),
    "mmbench": ({"mmbench_dev.tsv": table([[5, "which?", "look", "cat", "dog", "", "", "A", "k", B64],
                                           [1000005, "which?", "nan", "dog", "cat", "", "", "B", "k", "5"]])}, ["A", "B"], "C"),
    "seed": ({"SEED-Bench.json": {"question_type": {"Scene": 1}, "questions": [
        {"question_id": "s1", "question_type_id": 1, "data_type": "image", "data_id": "d1", "question": "which?", "answer": "D",
         "choice_a": "1", "choice_b": "2", "choice_c": "3", "choice_d": "4"}, {"question_id": "s2", "data_type": "video"}]},
        "SEED-Bench-image/d1": PIXELS}, ["D. 4"], "A"),
    "vsr": ({"test.jsonl": lines([{"image": "c.jpg", "caption": "The cat is left of the dog.", "label": 1},
                                  {"image": "c.jpg", "caption": "The dog is on the cat.", "label": 0}]), "images/c.jpg": PIXELS}, ["True", "no"], "maybe"),
}


def write_files(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content)).encode())
    return folder


def best(name, scores):
    "The one number that is 1 (or all points) for a benchmark when everything is right."
    return {"mme": lambda s: s["total"] / 400, "mmbench": lambda s: s["circular"]}.get(name, lambda s: s["accuracy"])(scores)


@pytest.mark.parametrize("name", FILES)
def test_published_files_are_read_and_scored(name, tmp_path):
    files, right, wrong = FILES[name]
    samples = read_benchmark(name, write_files(tmp_path, files))
    assert len(samples) == len(right) == len({s.name for s in samples})
    result = score(name, samples, right, resamples=20)
    assert best(name, result["scores"]) == 1 and result["questions"] == len(right) and set(result["scores"]) == set(result["intervals"])
    json.dumps(result, allow_nan=False)
    if name != "pope":
        assert best(name, score(name, samples, [wrong] * len(right), resamples=5)["scores"]) == 0
    for sample in samples:
        assert isinstance(sample.image, dict) or sample.image.is_file()


def test_what_readers_make_of_the_files(tmp_path):
    read = {name: read_benchmark(name, write_files(tmp_path / name, files)) for name, (files, *_) in FILES.items()}
    assert read["vqav2"][0].answers == ("red",) * 9 + ("blue",) and read["vqav2"][0].labels == ("other",)
    assert read["scienceqa"][0].question == "which?\nContext: look" and read["scienceqa"][0].options == ("a", "b", "c")
    assert [s.name for s in read["pope"]] == ["random-1", "popular-1", "adversarial-1"] and read["pope"][2].labels == ("adversarial",)
    assert [s.unit for s in read["mmbench"]] == ["5", "5"] and read["mmbench"][1].image == {"bytes": PIXELS}
    assert read["mmbench"][0].question == "look\nwhich?" and read["mmbench"][1].question == "which?"
    assert read["seed"][0].labels == ("Scene",) and [s.answers[0] for s in read["vsr"]] == ["true", "false"]
    assert {s.unit for s in read["mme"]} == {"count/x", "OCR/y"}
    assert ask_text("scienceqa", read["scienceqa"][0], True).splitlines()[2:] == ["A. a", "B. b", "C. c",
                                                                                 "Answer with the option's letter from the given choices directly."]
    assert ask_text("gqa", read["gqa"][0]) == "is it?" and ask_text("mm_vet", read["gqa"][0], True) == "is it?"


def test_quoted_line_breaks_stay_in_mmbench(tmp_path):
    write_files(tmp_path, {"a.tsv": table([[5, '"two\nlines?"', "", "cat", "dog", "", "", "A", "k", B64]])})
    assert read_benchmark("mmbench", tmp_path)[0].question == "two\nlines?"


def change(files, name, edit):
    "The files with one of them edited as parsed JSON."
    content = json.loads(json.dumps(files[name]))
    edited = edit(content)
    return {**files, name: content if edited is None else edited}


HOSTILE = [
    ("vqav2", "v2_mscoco_val2014_annotations.json", lambda c: c["annotations"].clear(), "sample 70: .*answer_type|sample 70: answers"),
    ("vqav2", "v2_OpenEnded_mscoco_val2014_questions.json", lambda c: c["questions"].append(c["questions"][0]), "^sample 70: question_id: came before"),
    ("vqav2", "v2_mscoco_val2014_annotations.json", lambda c: c["annotations"].append(c["annotations"][0]), "^sample 70: question_id: came before"),
    ("vqav2", "v2_OpenEnded_mscoco_val2014_questions.json", lambda c: c["questions"][0].update(image_id="../7"), "^sample 70: image_id: got str, need int"),
    ("vqav2", "v2_OpenEnded_mscoco_val2014_questions.json", lambda c: c["questions"][0].update(image_id=8), "^sample 70: image: no file"),
    ("vqav2", "v2_OpenEnded_mscoco_val2014_questions.json", lambda c: c["questions"][0].update(question=" "), "^sample 70: question: got an empty text"),
    ("vqav2", "v2_OpenEnded_mscoco_val2014_questions.json", lambda c: c["questions"].append(None), "^sample 1 of questions: question_id: got nothing"),
    ("vqav2", "v2_OpenEnded_mscoco_val2014_questions.json", lambda c: [1], "^sample questions: questions: got nothing, need list"),
    ("textvqa", "TextVQA_0.5.1_val.json", lambda c: c["data"][0].update(image_id="../../ab"), "need a relative one without '..'"),
    ("textvqa", "TextVQA_0.5.1_val.json", lambda c: c["data"][0].update(answers=["x"]), "^sample 3: answers: got 1, need at least two"),
    ("textvqa", "TextVQA_0.5.1_val.json", lambda c: c["data"][0].update(answers=[1, 2]), "^sample 3: answers: got 2, need at least two texts"),
    ("vizwiz", "Annotations/val.json", lambda c: c[0].update(image="/etc/passwd"), "^sample /etc/passwd: image"),
    ("vizwiz", "Annotations/val.json", lambda c: c.append(c[0]), "^sample v.jpg: image: came before"),
    ("gqa", "testdev_balanced_questions.json", lambda c: c["g1"].pop("answer") and None, "^sample g1: answer: got NoneType, need text"),
    ("gqa", "testdev_balanced_questions.json", lambda c: {"g1": 5}, "^sample g1: question"),
    ("gqa", "testdev_balanced_questions.json", lambda c: [], "^sample questions: questions: got list, need dict"),
    ("gqa", "testdev_balanced_questions.json", lambda c: c.clear(), "^data: got no questions"),
    ("scienceqa", "problems.json", lambda c: c["1"].update(answer=3), "^sample 1: choices: got answer 3 of 3"),
    ("scienceqa", "problems.json", lambda c: c["1"].update(answer=-1), "^sample 1: choices: got answer -1 of 3"),
    ("scienceqa", "problems.json", lambda c: c["1"].update(answer=True), "^sample 1: answer: got bool, need int"),
    ("scienceqa", "problems.json", lambda c: c["1"].update(image="../2/image.png"), "need a relative one"),
    ("scienceqa", "problems.json", lambda c: c.pop("1") and None, "^sample 1: 1: got nothing, need dict"),
    ("scienceqa", "pid_splits.json", lambda c: c["test"].append("1"), "^data: got the name 1 twice"),
    ("seed", "SEED-Bench.json", lambda c: c["questions"][0].update(answer="AB"), "^sample s1: choices: got answer 'AB' of 4"),
    ("seed", "SEED-Bench.json", lambda c: c["questions"][0].pop("choice_c") and None, "^sample s1: choices"),
    ("seed", "SEED-Bench.json", lambda c: c["questions"][0].update(data_id="../d1"), "need a relative one"),
]


@pytest.mark.parametrize("name, file, edit, message", HOSTILE, ids=lambda x: x if isinstance(x, str) else "")
def test_hostile_files_are_refused(name, file, edit, message, tmp_path):
    write_files(tmp_path, change(FILES[name][0], file, edit))
    with pytest.raises(ValueError, match=message):
        read_benchmark(name, tmp_path)


@pytest.mark.parametrize("name, file, content, message", [
    ("pope", "coco_pope_random.json", '{"question_id": 1, "image": "p.jpg", "text": "a?", "label": "maybe"}', "^sample random-1: label: got 'maybe'"),
    ("pope", "coco_pope_random.json", '{"question_id": 1}\n{"question_id": 1}', "^sample 1: question_id: came before"),
    ("pope", "coco_pope_random.json", "{oops", "coco_pope_random.json"), ("pope", "coco_pope_random.json", b"\xff\xfe", "UTF-8|utf-8"),
    ("vsr", "test.jsonl", '{"image": "c.jpg", "caption": "x", "label": 2}', "^sample line 0: label: got 2"), ("vsr", "test.jsonl", "[1]", "^sample line 0: label"),
    ("vsr", "test.jsonl", '{"image": "c.jpg", "caption": "x", "label": true}', "^sample line 0: label: got True"), ("vsr", "test.jsonl", "", "^data: got no questions"),
    ("mme", "count/x.txt", "One?\tYes\nTwo?\tmaybe", "^sample count/x, line 1: label"), ("mme", "count/x.txt", "One? Yes", "^sample count/x, line 0: label"),
    ("mme", "count/x.png", PIXELS, "^sample x.txt: image: got 2 pictures"),
    ("mmbench", "mmbench_dev.tsv", table([[5, "q", "", "cat", "dog", "", "", "C", "k", B64]]), "^sample 5: choices: got answer 'C' of 2"),
    ("mmbench", "mmbench_dev.tsv", table([[5, "q", "", "cat", "dog", "", "", "A", "k", "!!"]]), "^sample 5: image: got '!!', need base64"),
    ("mmbench", "mmbench_dev.tsv", table([["x", "q", "", "cat", "dog", "", "", "A", "k", B64]]), "^sample x: index: need a number"),
    ("mmbench", "mmbench_dev.tsv", table([[5, "q", "", "cat", "dog", "", "", "A", "k", B64]] * 2), "^sample 5: index: came before"),
    ("mmbench", "mmbench_dev.tsv", b"\xff", "mmbench_dev.tsv"), ("mmbench", "other.tsv", table([]), "^data: got 2 files"),
])
def test_damaged_files_are_refused(name, file, content, message, tmp_path):
    write_files(tmp_path, {**FILES[name][0], file: content})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_benchmark(name, tmp_path)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(PIXELS)
    root = write_files(tmp_path / "root", FILES["gqa"][0])
    (root / "images/n1.jpg").unlink()
    (root / "images/n1.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(ValueError, match="leads out of the root folder"):
        read_benchmark("gqa", root)


def test_read_benchmark_says_what_is_missing(tmp_path):
    for name in FILES:
        with pytest.raises(FileNotFoundError, match="^data: "):
            read_benchmark(name, tmp_path / "nowhere")
        with pytest.raises(ValueError, match=f"^data: got None; {name} needs the folder"):
            read_benchmark(name)
    with pytest.raises(ValueError, match="^data: got .*easy_vqa is embedded"):
        read_benchmark("easy_vqa", tmp_path)
    with pytest.raises(ValueError, match="^benchmark: got 'imagenet', need one of easy_vqa, gqa, mm_vet"):
        read_benchmark("imagenet", tmp_path)
    with pytest.raises(FileNotFoundError, match="^data: got 0 files test.jsonl or "):
        read_benchmark("vsr", tmp_path)


def test_papers_figures_belong_to_benchmarks():
    assert all(set(scores) <= set(BENCHMARKS) for scores in PAPERS.values())
    assert PAPERS["VL-Mamba"]["mme"] == 1369.6 and PAPERS["ML-Mamba"]["pope"] == 88.3 and len(PAPERS["VL-Mamba"]) == 9


# Scores by name

def test_pope_shows_its_files_and_their_mean():
    samples = [Sample(f"{kind}-{i}", "?", None, (label,), labels=(kind,)) for kind, labels in (("random", "yyn"), ("popular", "ynn"), ("adversarial", "nny"))
               for i, label in enumerate({"y": "yes", "n": "no"}[c] for c in labels)]
    scores = score("pope", samples, ["yes"] * 9, resamples=5)["scores"]
    assert scores["f1, random"] == pytest.approx(4 / 5) and scores["f1, popular"] == scores["f1, adversarial"] == pytest.approx(1 / 2)
    assert scores["f1, mean of files"] == pytest.approx(3 / 5) and scores["f1"] == pytest.approx(2 * (4 / 9) / (13 / 9)) and scores["yes_ratio"] == 1


def test_easy_vqa_by_name_is_accuracy_by_type(small):
    samples = read_benchmark("easy_vqa")
    assert len(samples) == 9673
    result = score("easy_vqa", samples, ["yes"] * 9673, resamples=50)
    assert round(100 * result["scores"]["accuracy"], 2) == 37.33 and result["units"] == 1000 and result["unit"] == "pictures"
    assert result["scores"]["accuracy, what color"] == 0 and len(result["scores"]) == 5
    low, high = result["intervals"]["accuracy"]
    assert 0.36 < low < 0.3733 < high < 0.39


def test_score_needs_one_prediction_a_sample():
    sample = Sample("a", "?", None, ("yes",))
    for predictions in ([], ["yes", "no"]):
        with pytest.raises(ValueError, match=f"^predictions: got {len(predictions)}, need 1"):
            score("gqa", [sample], predictions)


def test_the_judge_of_mm_vet_needs_a_model_and_a_key():
    sample = Sample("v1", "how many?", None, ("two",), labels=("ocr", "math"))
    for arguments in ((), (print,), (None, "key"), (print, "")):
        with pytest.raises(ValueError, match="^judge: MM-Vet needs a language model"):
            Judge(*arguments)
    with pytest.raises(ValueError, match="^judge: MM-Vet needs"):
        score("mm_vet", [sample], ["2"])
    asked = []
    judge = Judge(lambda prompt, key: asked.append((prompt, key)) or " 0.7\n", "k")
    result = score("mm_vet", [sample], ["2"], judge, resamples=5)
    assert result["scores"] == {"accuracy": 0.7, "accuracy, math": 0.7, "accuracy, ocr": 0.7}
    assert asked[0][1] == "k" and all(text in asked[0][0] for text in ("how many?", "two", "grade: 2"))
    for reply in ("good", "1.5", "-1", "", None, "0.5 or so"):
        with pytest.raises(ValueError, match="^judge: got .* for question v1, need one number from 0 to 1$"):
            score("mm_vet", [sample], ["2"], Judge(lambda prompt, key, reply=reply: reply, "k"))


# The loop

def numbered(count):
    image = {"bytes": PIXELS}
    return [Sample(f"q{i}", f"what is {i}?", image, (f"{i}",)) for i in range(count)]


class Stub:
    "Answers a question with its number, counts its batches, and is killed before batch `until`."

    def __init__(self, until=None):
        self.until, self.batches = until, []

    def __call__(self, images, questions):
        if len(self.batches) == self.until:
            raise KeyboardInterrupt
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
    for i, model in enumerate((lambda images, questions: ["x"], lambda images, questions: [1] * len(questions))):
        with pytest.raises(ValueError, match=r"^model: got \d answers, need 3 texts"):
            answer_samples(model, numbered(3), tmp_path / f"{i}.jsonl", 3)


def test_predictions_of_any_characters_survive(tmp_path):
    odd = ["a\nb", "\u2028", "\ud800", "é\t\"", ""]
    samples, path = numbered(5), tmp_path / "p.jsonl"
    assert answer_samples(lambda images, questions: odd, samples, path, 5) == odd
    assert answer_samples(Stub(0), samples, path, 5, resume=True) == odd


def test_evaluate_benchmark_leaves_everything(tmp_path):
    samples = read_benchmark("gqa", write_files(tmp_path / "data", FILES["gqa"][0]))
    result = evaluate_benchmark(lambda images, questions: ["yes"], "gqa", samples, tmp_path / "out", suffix=True, settings={"model": "stub"})
    kept = json.loads((tmp_path / "out/result.json").read_text())
    assert kept["scores"] == result["scores"] == {"accuracy": 1} and {"commit", "command", "hardware", "versions", "seed", "model"} <= set(kept)
    with pytest.raises(ValueError, match="^output: .* already holds an evaluation"):
        evaluate_benchmark(Stub(), "gqa", samples, tmp_path / "out", suffix=True, settings={"model": "stub"})
    with pytest.raises(ValueError, match="^suffix: got False, need True, with which this run began$"):
        evaluate_benchmark(Stub(), "gqa", samples, tmp_path / "out", resume=True, settings={"model": "stub"})
    again = evaluate_benchmark(Stub(0), "gqa", samples, tmp_path / "out", resume=True, suffix=True, settings={"model": "stub"})
    assert again["scores"] == result["scores"]


def test_mm_vet_says_at_once_that_it_needs_a_judge(tmp_path):
    stub = Stub()
    with pytest.raises(ValueError, match="^judge"):
        evaluate_benchmark(stub, "mm_vet", numbered(2), tmp_path / "out")
    assert stub.batches == [] and not (tmp_path / "out").exists()


# The model behind the function

def test_answers_are_those_of_answer_all(small, make_model):
    model = make_model()
    with torch.no_grad():
        model.language.lm_head.weight.mul_(3) if hasattr(model.language, "lm_head") else None
    images = [image for image, questions in zip(small.rows["image"], small.rows["questions"]) for _ in questions]
    want = answer_all(model, small.data)
    pieces = [Answers(model, 3, decode_answer)(images[i:i + 37], small.data.questions[i:i + 37]) for i in range(0, len(images), 37)]
    assert sum(pieces, []) == want and len(set(want)) > 1
    assert Answers(model, 3)(images[:1], small.data.questions[:1])[0] == want[0].removesuffix(" ...")


def test_distinct_pictures_by_hand():
    a, b, c = (Image.new("RGB", (2, 2), color) for color in ("red", "red", "blue"))            # a and b are equal, and two pictures all the same
    assert distinct([a, a, b]) == ([a, b], [0, 0, 1]) and distinct([c]) == ([c], [0])
    pictures, which = distinct([a, b, a, c, b])
    assert which == [0, 1, 0, 2, 1] and all(x is y for x, y in zip(pictures, (a, b, c))) and len(pictures) == 3


def test_answers_read_each_picture_once(small, make_model):
    model = make_model()
    seen, read = [], model.read
    model.read = lambda pixels: seen.append(len(pixels)) or read(pixels)
    first, second = small.rows["image"][:2]
    Answers(model, 1)([first, second, first, first], [small.data.questions[0]] * 4)
    assert seen == [2]


def test_answers_name_words_the_model_does_not_know(small, make_model):
    with pytest.raises(ValueError, match="words this model has never read: zebra"):
        Answers(make_model())([small.rows["image"][0]], ["is there a zebra?"])


# lmms-eval

def test_lmms_eval_gets_a_model(small, make_model, tmp_path, monkeypatch):
    "Against a stub of its registry and base class, with requests as it makes them."
    registered = {}

    def register_model(name):
        return lambda kind: registered.setdefault(name, kind)

    modules = {name: ModuleType(name) for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.api.registry")}
    modules["lmms_eval.api.model"].lmms = type("lmms", (), {"task_dict": {}})
    modules["lmms_eval.api.registry"].register_model = register_model
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    make_model().save_pretrained(tmp_path)
    kind = lmms_eval_model()
    assert registered == {"vlmamba": kind}
    model = kind(pretrained=str(tmp_path), batch_size="2", max_new_tokens=2)
    model.task_dict = {"easy": {"test": list(small.rows["image"][:3])}}
    requests = [SimpleNamespace(args=(small.data.questions[0], {"until": ["x"]}, lambda doc: [doc], i, "easy", "test")) for i in range(3)]
    assert model.generate_until(requests) == Answers(make_model(), 2)(list(small.rows["image"][:3]), [small.data.questions[0]] * 3)
    requests[1].args = (*requests[1].args[:2], lambda doc: [doc, doc], *requests[1].args[3:])
    with pytest.raises(ValueError, match="^requests: got 2 pictures in one, need one$"):
        model.generate_until(requests)
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError):
            method([])


def test_lmms_eval_says_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(ModuleNotFoundError, match="^lmms_eval_model needs lmms-eval, which is not installed"):
        lmms_eval_model()


# vlmamba eval

def vlmamba(*arguments):
    "The command in this process."
    from typer.testing import CliRunner

    from vlmamba_lite.cli import app
    said = CliRunner().invoke(app, [str(a) for a in arguments])
    return SimpleNamespace(code=said.exit_code, out=said.output, err=said.stderr)


@pytest.fixture
def saved(small, make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_eval_of_easy_vqa_is_what_training_reports(small, make_model, saved, monkeypatch):
    "The same accuracies as `evaluate` on the same questions, by type; the folder holds predictions, settings and result."
    import vlmamba_lite.evaluation as evaluation
    monkeypatch.setattr(evaluation, "load_easy_vqa", lambda split: small.rows)
    said = vlmamba("eval", saved, "--benchmark", "easy_vqa", "--device", "cpu", "--batch-size", 50)
    assert said.code == 0 and "accuracy, what shape" in said.out, said.out
    folder = saved / "eval/easy_vqa"
    result = json.loads((folder / "result.json").read_text())
    mine = {name.removeprefix("accuracy, "): value for name, value in result["scores"].items()}
    theirs = evaluation.evaluate(make_model(), small.data)
    assert {name.replace("accuracy", "all"): value for name, value in mine.items()} == pytest.approx(theirs)
    assert result["questions"] == len(small.data.answers) and result["units"] == 40 and result["unit"] == "pictures"
    assert {p.name for p in folder.iterdir()} == {"predictions.jsonl", "result.json", "run_config.json"}
    again = vlmamba("eval", saved, "--benchmark", "easy_vqa", "--device", "cpu", "--batch-size", 50)
    assert again.code == 2 and "already holds an evaluation" in again.err
    before = (folder / "predictions.jsonl").read_bytes()
    (folder / "predictions.jsonl").write_bytes(before[:5000])
    assert vlmamba("eval", saved, "--benchmark", "easy_vqa", "--device", "cpu", "--batch-size", 50, "--resume").code == 0
    assert (folder / "predictions.jsonl").read_bytes() == before


def test_eval_of_files_with_words_the_model_knows(small, saved, tmp_path):
    image = small.rows["image"][0]
    image.save(tmp_path / "n1.jpg")
    asked = {"g1": {"imageId": "n1", "question": small.data.questions[0], "answer": "red"}}
    data = write_files(tmp_path / "data", {"testdev_balanced_questions.json": asked, "images/n1.jpg": (tmp_path / "n1.jpg").read_bytes()})
    said = vlmamba("eval", saved, "--benchmark", "gqa", "--data", data, "--output", tmp_path / "out", "--device", "cpu", "--tokens", 2)
    assert said.code == 0 and "gqa, 1 questions" in said.out, said
    assert json.loads((tmp_path / "out/result.json").read_text())["benchmark"] == "gqa"


def test_eval_says_what_is_wrong_in_one_line(saved, tmp_path):
    data = write_files(tmp_path / "data", FILES["gqa"][0])
    for arguments, message in (((saved, "--benchmark", "imagenet"), "benchmark: got 'imagenet', need one of"),
                               ((saved, "--benchmark", "gqa"), "data: got None; gqa needs the folder"),
                               ((saved, "--benchmark", "gqa", "--data", tmp_path / "no"), "data: no folder"),
                               ((tmp_path / "no", "--benchmark", "gqa", "--data", data), "model: no folder"),
                               ((saved, "--benchmark", "gqa", "--data", data, "--suffix"), "words this model has never read")):
        said = vlmamba("eval", *arguments, "--device", "cpu", "--output", tmp_path / f"out{len(message)}")
        assert said.code == 2 and message in said.err and said.err.count("\n") == 1, said


def test_eval_stopped_by_ctrl_c_says_how_to_go_on(small, saved, monkeypatch):
    import vlmamba_lite.evaluation as evaluation
    monkeypatch.setattr(evaluation, "load_easy_vqa", lambda split: small.rows)
    whole, calls = evaluation.append_batch, []

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(evaluation, "append_batch", stopped)
    arguments = ("eval", saved, "--benchmark", "easy_vqa", "--device", "cpu", "--batch-size", 20)
    said = vlmamba(*arguments)
    assert said.code == 130 and "Go on with the same command and --resume" in said.out
    assert len((saved / "eval/easy_vqa/predictions.jsonl").read_text().splitlines()) == 40
    assert vlmamba(*arguments, "--resume").code == 0 and len(calls) == 3 + -(-(len(small.data.answers) - 40) // 20)


# What else a file may hold

def test_mm_vet_is_read_by_capability(tmp_path):
    record = {"imagename": "v1_0.png", "question": "how many?", "answer": "two<AND>left", "capability": ["ocr", "math"]}
    files = {"mm-vet.json": {"v1_0": record}, "images/v1_0.png": PIXELS}
    sample, = read_benchmark("mm_vet", write_files(tmp_path, files))
    assert (sample.name, sample.answers, sample.labels) == ("v1_0", ("two<AND>left",), ("ocr", "math"))
    write_files(tmp_path, {"mm-vet.json": {"v1_0": {**record, "imagename": "../v1_0.png"}}})
    with pytest.raises(ValueError, match="^sample v1_0: image: got the path"):
        read_benchmark("mm_vet", tmp_path)


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
    clean, said = [evalai_answer(a) for a in answers], evalai_answer(prediction)
    total = F(0)
    for i in range(len(clean)):
        agree = sum(1 for j, other in enumerate(clean) if j != i and other == said)
        total += min(F(1), F(agree, 3))
    assert textvqa_accuracy(prediction, answers) == pytest.approx(float(total / len(clean)))

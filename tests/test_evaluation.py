"""Scores worked out by hand, floors of easy-VQA, answers of a batch against answers one by one, and which samples are shown."""
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmamba_lite.data.conversations import EOS, PAD, UNK
from vlmamba_lite.data.easy_vqa import QUESTION_TYPES, VQASet, load_easy_vqa
from vlmamba_lite.evaluation.answers import (PUBLISHED, accuracy, accuracy_by_type, after_picture, answer, answer_all, baselines, blind_majority, conversation_samples, evaluate, pick_samples, plot_samples,
                                             sample_sheet)
from vlmamba_lite.data.easy_vqa import VQABatches
from vlmamba_lite.training.loop import train
from vlmamba_lite.training.recipes import pick_recipe


# Scores

def test_accuracy_by_hand():
    assert accuracy(["red", "yes", "no"], ["red", "no", "no"]) == pytest.approx(2 / 3)
    assert accuracy(["Red", "red ", ""], ["red", "red", "red"]) == 0                              # letter for letter
    assert accuracy(["a"], ("a",)) == 1 and isinstance(accuracy(["a"], ["a"]), float)
    for predictions, answers in ((["a"], ["a", "b"]), (["a", "b"], ["a"]), ([], [])):
        with pytest.raises(ValueError, match=f"^predictions: got {len(predictions)}, need {len(answers)}, one for each answer and at least one$"):
            accuracy(predictions, answers)


def test_accuracy_by_type_by_hand():
    data = SimpleNamespace(answers=["red", "blue", "circle", "yes", "no", "yes"], types=np.array([0, 0, 1, 2, 2, 2]))
    scores = accuracy_by_type(["red", "red", "circle", "no", "no", "yes"], data)
    assert list(scores) == ["all", "what color", "what shape", "yes/no color"]                    # a type that does not occur has no score
    assert [scores[name] for name in scores] == pytest.approx([4 / 6, 1 / 2, 1, 2 / 3])
    assert all(type(score) is float for score in scores.values())
    for wrong in (["red"], ["red"] * 7):
        with pytest.raises(ValueError, match=f"^predictions: got {len(wrong)}, need 6"):
            accuracy_by_type(wrong, data)


def test_blind_majority():
    questions = ["color?"] * 5 + ["shape?"] * 3 + ["red?"]
    guess = blind_majority(questions, ["red", "blue", "red", "teal", "red", "circle", "circle", "triangle", "no"])
    assert [guess(q) for q in ("color?", "shape?", "red?", "never met?")] == ["red", "circle", "no", "red"]


def test_blind_majority_is_the_best_blind_guess(small):
    "On the data it was made from, no other fixed answer to a question is right more often."
    data = small.data
    guess = blind_majority(data.questions, data.answers)
    for question in set(data.questions):
        theirs = Counter(a for q, a in zip(data.questions, data.answers) if q == question)
        assert theirs[guess(question)] == max(theirs.values())


def test_baselines_of_easy_vqa():
    def flat(split):
        rows = load_easy_vqa(split)
        return SimpleNamespace(**{name: [x for row in rows[name] for x in row] for name in ("questions", "answers")})
    found = baselines(flat("train"), flat("test"))
    assert {name: round(100 * score, 2) for name, score in found.items()} == {"always yes": 37.33, "blind majority": 67.00}


def test_published_results_say_where_they_stand():
    assert PUBLISHED and all(0 < score < 1 and "github.com/" in source for score, source in PUBLISHED.values())


# Answers

class Parrot:
    "Stands in for a model's language model: gives each row the same ids."

    def __init__(self, model, ids):
        self.model, self.ids, self.language, self.training = model, ids, self, False

    def __getattr__(self, name):
        return getattr(self.model, name)

    def generate(self, ids, max_new_tokens, stops, mask=None, state=None):
        return torch.cat([ids, torch.tensor([self.ids] * len(ids))], 1)


def test_what_ids_say(small, make_model):
    "Text up to the end; with `exact` a special token is shown, and a text that did not end says so."
    tokenizer, model = small.tokenizer, make_model().eval()
    red, yes, stop, pad, unk = (tokenizer.token_to_id(t) for t in ("red", "yes", EOS, PAD, UNK))

    def said(ids, exact=True):
        return answer(Parrot(model, ids), [(small.data.images[0], small.data.questions[0])], exact=exact)[0]
    assert said([red, stop, yes]) == "red" and said([stop, red]) == ""
    assert said([red, yes, stop]) == "red yes" and said([stop]) == ""
    assert said([red, yes, red]) == "red yes red ..." and said([red, yes, red], exact=False) == "red yes red"
    for ids in ([pad, yes, stop], [unk, yes, stop], [yes, pad, stop]):
        assert said(ids) != "yes" and said(ids, exact=False) == "yes"       # one wrong token is a wrong answer, also a special one


def cut(data, counts, seed=None):
    "The first pictures of a `VQASet` with that many questions each; `seed` shuffles the rows."
    rows = np.concatenate([data.table[i][:count] for i, count in enumerate(counts)])
    if seed is not None:
        rows = np.random.default_rng(seed).permutation(rows)
    table = np.full((len(counts), max(counts)), -1)
    for i in range(len(counts)):
        mine = np.flatnonzero(data.image_of[rows] == i)
        table[i, :len(mine)] = mine
    return VQASet(data.images[:len(counts)], data.input_ids[rows], data.labels[rows], data.prompt[rows], data.types[rows], table,
                  [data.questions[r] for r in rows], [data.answers[r] for r in rows], data.image_of[rows])


def plain(text):
    "An answer as `ask` gives it: without special tokens, and no word on whether it ended."
    return " ".join(word for word in text.split() if word not in ("...", PAD, UNK))


@pytest.fixture(scope="module")
def talker(make_model, small):
    "A model trained for a second: its answers differ, and end."
    model, stage = make_model(), replace(pick_recipe("tiny")[0], steps=60, batch_size=8, lr=2e-2)
    train(model, [stage], {stage.name: VQABatches(small.train, 60, 8, phases=((0, (1, 1, 1, 1, 1)),))})
    return model.eval()


def one_by_one(model, small, data):
    return [model.ask(small.rows[int(i)]["image"], question, 3) for i, question in zip(data.image_of, data.questions)]


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_a_batch_answers_what_each_question_alone_gets(make_model, small, mixer):
    model, data = make_model(mixer=mixer, seed=3, embedding_std=0.05).eval(), cut(small.data, [9, 1, 4, 2, 7])
    answers = answer_all(model, data, batch_size=3)
    assert [plain(a) for a in answers] == one_by_one(model, small, data)


def test_also_of_a_model_that_has_learnt(talker, small):
    data = cut(small.data, [1, 5, 2, 8, 3, 1], seed=0)        # a picture whose first question is its only one, rows in no order
    assert (data.table >= 0).sum(1).tolist() == [1, 5, 2, 8, 3, 1]
    answers = answer_all(talker, data, batch_size=4)
    assert [plain(a) for a in answers] == one_by_one(talker, small, data)
    everything = answer_all(talker, small.data)
    assert len(set(everything)) >= 3 and all(isinstance(a, str) for a in everything) and len(everything) == len(small.data.answers)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_the_size_of_a_batch_does_not_matter(talker, small, batch_size):
    assert answer_all(talker, small.data, batch_size) == answer_all(talker, small.data)


def test_pil_pictures_and_their_bytes_get_the_same_answers(talker, small):
    images = [image for image, questions in zip(small.rows["image"], small.rows["questions"]) for _ in questions]
    got = answer(talker, list(zip(images, small.data.questions)), 37, 3, exact=True)
    assert got == answer_all(talker, small.data) and answer(talker, []) == []


def test_a_batch_reads_each_picture_once(small, make_model):
    model = make_model()
    seen, read = [], model.read
    model.read = lambda pixels: seen.append(len(pixels)) or read(pixels)
    first, second = small.rows["image"][:2]
    answer(model, [(picture, small.data.questions[0]) for picture in (first, second, first, first)], 4, 1)
    assert seen == [2]


def test_states_are_answered_like_their_pictures(talker, small):
    states = [talker.read_image(image) for image in small.rows["image"][:2]]
    pairs = [(picture, small.data.questions[k]) for picture in (0, 1, 0) for k in (0, 3)]
    got = answer(talker, [(states[i], question) for i, question in pairs], 4, 3)
    assert got == [talker.ask(small.rows["image"][i], question, 3) for i, question in pairs]


def test_answers_name_words_the_model_does_not_know(small, make_model):
    with pytest.raises(ValueError, match="words this model has never read: zebra"):
        answer(make_model(), [(small.rows["image"][0], "is there a zebra?")])


def test_the_answer_is_not_shown_to_the_model(talker, small):
    data = cut(small.data, [9, 3, 5])
    answers, hidden = answer_all(talker, data), data.input_ids.clone()
    for row, prompt in zip(hidden, data.prompt):
        row[prompt:] = torch.randint(0, small.tokenizer.get_vocab_size(), (len(row) - prompt,))
    assert not torch.equal(hidden, data.input_ids)
    data.input_ids = hidden
    assert answer_all(talker, data) == answers


def test_evaluation_leaves_the_model_as_it_was(make_model, small):
    model, data = make_model().train(), cut(small.data, [3, 2])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    scores = evaluate(model, data)
    assert model.training and all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    answers = answer_all(model.eval(), data)
    assert not model.training and scores == accuracy_by_type(answers, data)
    assert set(scores) == {"all", *(QUESTION_TYPES[i] for i in set(data.types))}


def test_an_error_leaves_the_model_in_training(make_model, small):
    model = make_model().train()
    model.read = lambda pixels: 1 / 0
    with pytest.raises(ZeroDivisionError):
        answer_all(model, cut(small.data, [1]))
    assert model.training


def test_evaluate_finds_a_model_that_knows(talker, small):
    "A perfect score where the answers are the model's own, and the right share where some are not."
    data = cut(small.data, [9, 3, 5, 8])
    data.answers = answer_all(talker, data)
    assert set(evaluate(talker, data).values()) == {1.0}
    data.answers[:5] = ["something else"] * 5
    assert evaluate(talker, data)["all"] == pytest.approx(1 - 5 / len(data.answers))


# Samples

@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=25), st.integers(1, 9), st.integers(0, 3))
@settings(deadline=None, max_examples=150, derandomize=True)
def test_which_samples_are_shown(rows, count, seed):
    data = SimpleNamespace(image_of=np.array([i for i, _ in rows]), answers=["yes"] * len(rows))
    predictions = ["yes" if right else "no" for _, right in rows]
    picked = pick_samples(predictions, data, count, seed)
    assert picked == pick_samples(predictions, data, count, seed) and all(type(r) is int for r in picked)
    pictures = [data.image_of[r] for r in picked]
    assert len(set(pictures)) == len(pictures) == min(count, len(set(data.image_of)))             # each once, as many as there are
    wrong = [predictions[r] != "yes" for r in picked]
    first = min(count // 2, len({i for i, right in rows if not right}))
    assert all(wrong[:first])                                                                     # wrong ones first, up to half
    if sum(wrong) > count // 2:                                                                   # more only where nothing right is left
        assert {i for i, right in rows if right} <= set(pictures)


def test_samples_are_drawn(small):
    answers = list(small.data.answers)
    answers[::2] = ["wrong"] * len(answers[::2])
    draws = {tuple(pick_samples(answers, small.data, seed=seed)) for seed in range(5)}
    assert len(draws) == 5
    for rows in draws:
        assert [answers[r] == "wrong" for r in rows] == [True] * 4 + [False] * 4


def test_figure_of_samples(small, tmp_path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    answers = list(small.data.answers)
    answers[3] = "purple"
    rows = [3, 14, 25, 36, 47]
    axes = plot_samples(answers, small.data, rows, tmp_path / "samples.png").axes
    assert [len(axis.images) for axis in axes] == [1] * 5
    for axis, row in zip(axes, rows):
        words = axis.get_title().split()
        assert " ".join(words).startswith(small.data.questions[row]) and answers[row] in words
        assert (axis.title.get_color() == "firebrick") == (row == 3)
        shown = torch.as_tensor(np.asarray(axis.images[0].get_array()))
        assert torch.equal(shown.permute(2, 0, 1), small.data.images[small.data.image_of[row]])
    assert f"purple (true: {small.data.answers[3]})" in " ".join(axes[0].get_title().split())
    assert (tmp_path / "samples.png").read_bytes()[:4] == b"\x89PNG" and len(list(tmp_path.iterdir())) == 1
    plt.close("all")


@pytest.mark.parametrize("words", [1, 8, 24])
def test_a_page_of_samples_is_not_cut_off(tmp_path, words):
    "Titles of one line and of many have room over square pictures and wide ones."
    from PIL import Image
    sample_sheet([(np.zeros((8, 8 + 4 * (i % 2), 3), np.uint8), "what " * words, "this", "that " * words) for i in range(5)], tmp_path / "page.png")
    page = np.asarray(Image.open(tmp_path / "page.png").convert("L"))
    assert min(page[0].min(), page[-1].min(), page[:, 0].min(), page[:, -1].min()) == 255


def test_talks_are_shown_with_what_was_written_down(make_model, small, tmp_path):
    "One picture a sample; talks with none or several are left out; long texts end in dots."
    from vlmamba_lite.data.conversations import Conversation
    picture, question = small.rows["image"][0], small.data.questions[0]
    talks = [Conversation("none", [], [(question, "a")]), Conversation("two", [picture, picture], [(question, "b")]),
             Conversation("long", [picture], [(question, "word " * 40)]), Conversation("one", [picture], [(question, "$c_$ and $")])]
    model = make_model().eval()
    shown = conversation_samples(model, talks, count=2, max_new_tokens=3)
    assert shown[0][3].endswith(" ...") and len(shown[0][3]) <= 72 and shown[1][3] == "$c_$ and $"
    assert len(shown) == 2 and shown[1][2] == model.ask(picture, question, 3)[:72] and shown[0][0].shape[2] == 3
    figure = sample_sheet(shown, tmp_path / "page.png")
    assert len(figure.axes) == 2 and (tmp_path / "page.png").stat().st_size > 1000
    assert len(conversation_samples(model, talks, count=1, max_new_tokens=3)) == 1
    with pytest.raises(ValueError, match="samples: got none"):
        sample_sheet([])


def test_answers_leave_a_model_that_another_thread_trains_alone(small, make_model):
    "No part of it is switched, at any instant; the answers are those of evaluation mode."
    model, modes, data = make_model().train(), [], small.data
    pairs = [(data.images[0], data.questions[0]), (data.images[1], data.questions[0])]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def start(answering, *rest):
        modes.append((model.training, answering.training, all(part.training for part in model.modules())))
        return after_picture(answering, *rest)
    said = answer(model, pairs, start=start)
    assert modes == [(True, False, True)] and all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert said == answer(model.eval(), pairs)

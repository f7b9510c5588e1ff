"""Emoji: the table is what its README says, artists are held out, answers are those of hand-made scenes, the rest follows from a seed."""
import hashlib
import io
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmamba_lite.data.checks import check_data
from vlmamba_lite.data.conversations import build_tokenizer, encode_conversation
from vlmamba_lite.data.emoji import (ALWAYS, APART, ARTISTS, CLASSES, HANDED, ONE, PAGE, SCENE, SIDES, Drawing, EmojiVQA, Item, blind_floor,
                                     draw_items, emoji_answer, emoji_tokenizer, emoji_turns, emoji_vqa, load_emoji, random_items, same_list)

FOLDER = Path(__file__).resolve().parent.parent / "data" / "emoji"
README = (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def drawings():
    return [d for split in ARTISTS for d in load_emoji(split)]


# ---- the table ----

def test_the_readme_says_what_the_file_holds(drawings):
    file = (FOLDER / "emoji.parquet").read_bytes()
    assert hashlib.sha256(file).hexdigest() in README and len(file) <= 8 * 2**20
    table = {artist: int(n.replace(",", "")) for artist, n in re.findall(r"^\| `([\w-]+)` \|.*\| ([\d,]+) \|$", README, re.M)}
    assert table == Counter(d.artist for d in drawings) and len(table) == 7
    groups = {group: int(n) for group, n in re.findall(r"^\| ([\w-]+) \| (\d+) \|$", README, re.M)}
    names = defaultdict(set)
    for d in drawings:
        names[d.name].add(d.artist)
    assert groups == Counter({d.name: d.group for d in drawings}.values()) and sum(groups.values()) == len(names)
    assert len({(d.name, d.artist) for d in drawings}) == len(drawings) and min(map(len, names.values())) >= 5
    assert all(re.fullmatch(r"\w+( \w+)*", name) and name == name.lower() for name in names)
    for word in ("Apache-2.0", "CC BY 4.0", "MIT License", "Microsoft", "Twitter", "EmojiOne", "Mozilla", "Google"):
        assert word in README


def test_every_drawing_is_a_picture_of_its_own(drawings):
    seen = defaultdict(list)
    for d in drawings:
        picture = Image.open(io.BytesIO(d.png))
        assert picture.size == (64, 64) and picture.mode in ("RGB", "RGBA") and picture.getbbox(), d.name
        seen[d.artist, picture.tobytes()].append(d.name)
    assert [names for names in seen.values() if len(names) > 1] == []


def test_artists_are_held_out(drawings):
    splits = {split: {d.artist for d in load_emoji(split)} for split in ARTISTS}
    assert {split: set(artists) for split, artists in ARTISTS.items()} == splits and sum(map(len, splits.values())) == 7
    for together in (("fluent", "fluent-flat"),):                        # the same shapes, never on both sides
        assert sum(not artists.isdisjoint(together) for artists in splits.values()) == 1
    assert {d.name for d in load_emoji("test")} <= {d.name for d in load_emoji("train")}
    with pytest.raises(ValueError, match="split: got 'all', need one of train, validation, test"):
        load_emoji("all")


# ---- scenes made by hand ----

def item(name, subgroup, left, top, size):
    return Item(Drawing(name, "", subgroup, "me", b""), left, top, size)


OWL, KEY, PIZZA = item("owl", "animal-bird", 0, 0, 24), item("key", "lock", 30, 70, 22), item("pizza", "food-prepared", 48, 10, 48)
DUCK, PEAR = item("duck", "animal-bird", 2, 40, 30), item("pear", "food-fruit", 40, 30, 38)
YES_NO = {True: "yes", False: "no", None: None}


@pytest.mark.parametrize("items, asked, answer", [
    ((OWL, KEY, PIZZA), ("beside", "left of", "key"), "owl"), ((OWL, KEY, PIZZA), ("beside", "right of", "key"), "pizza"),
    ((OWL, KEY, PIZZA), ("beside", "right of", "owl"), None),            # both are
    ((OWL, KEY, PIZZA), ("beside", "left of", "owl"), None),             # none is
    ((OWL, KEY, PIZZA), ("beside", "below", "pizza"), "key"), ((OWL, KEY, PIZZA), ("beside", "above", "pizza"), "owl"),
    ((OWL, DUCK, PIZZA), ("beside", "right of", "owl"), None),           # the pizza is, and the duck 5 pixels: too near to say
    ((OWL, DUCK), ("beside", "right of", "owl"), None), ((OWL, DUCK), ("beside", "below", "owl"), "duck"),
    ((OWL, DUCK), ("relation", "left of", "owl", "duck"), None), ((OWL, DUCK), ("relation", "above", "owl", "duck"), "yes"),
    ((OWL, DUCK), ("relation", "below", "owl", "duck"), "no"), ((DUCK, OWL), ("relation", "below", "duck", "owl"), "yes"),
    ((DUCK, PEAR), ("relation", "above", "duck", "pear"), None),         # centres 55 and 49: 6 pixels
    ((OWL, DUCK, PEAR), ("count", "a bird"), "2"), ((OWL, DUCK, PEAR), ("count", "something to eat"), "1"),
    ((OWL, DUCK, PEAR), ("count", "a drink"), "0"), ((OWL, DUCK, PEAR), ("there", "a fruit"), "yes"), ((KEY, PIZZA), ("there", "a fruit"), "no"),
    ((OWL, KEY, PIZZA), ("largest",), "pizza"), ((PEAR, DUCK), ("largest",), None), ((PIZZA, PEAR), ("largest",), None),   # 48 / 38 = 1.26
    ((PIZZA, OWL, KEY), ("list",), "owl + key + pizza"), ((OWL,), ("name",), "owl"), ((OWL,), ("subgroup",), "animal bird"),
    ((OWL,), ("is", "an animal"), "yes"), ((OWL,), ("is", "a fruit"), "no"), ((OWL,), ("caption",), "owl animal bird")])
def test_answers_of_scenes_made_by_hand(items, asked, answer):
    assert emoji_answer(items, *asked) == answer


SUBGROUPS = {"animals": {"animal-mammal", "animal-bird", "animal-amphibian", "animal-reptile", "animal-marine", "animal-bug"}, "birds": {"animal-bird"},
             "plants": {"plant-flower", "plant-other"}, "fruits": {"food-fruit"}, "drinks": {"drink"}, "buildings": {"place-building"},
             "things to eat": {"food-fruit", "food-vegetable", "food-prepared", "food-asian", "food-marine", "food-sweet"},
             "pieces of clothing": {"clothing"}, "tools": {"tool"}, "musical instruments": {"musical-instrument"}}
ONE_OF = {"an animal": "animals", "a bird": "birds", "a plant": "plants", "a fruit": "fruits", "a drink": "drinks", "a building": "buildings",
          "something to eat": "things to eat", "clothing": "pieces of clothing", "a tool": "tools", "a musical instrument": "musical instruments"}


def twin(items, question):
    "The set of right answers to a question as it is written, from squares in half pixels: another way than the library's."
    x, y = ({i.drawing.name: 2 * at(i) + i.size for i in items} for at in (lambda i: i.left, lambda i: i.top))
    further = {"left of": lambda a, b: x[b] - x[a], "right of": lambda a, b: x[a] - x[b], "above": lambda a, b: y[b] - y[a], "below": lambda a, b: y[a] - y[b]}

    def number(plural):
        return sum(i.drawing.subgroup in SUBGROUPS[plural] for i in items)

    if found := re.fullmatch("what is (left of|right of|above|below) the (.+)\\?", question):
        side, name = found.groups()
        pixels = {a: further[side](a, name) for a in x if a != name}                       # 12 half pixels: the margin
        return {a for a in pixels if pixels[a] > 12 and all(pixels[b] < -12 or pixels[b] == 0 for b in pixels if b != a)}
    if found := re.fullmatch("how many (.+) are there\\?", question):
        return {str(number(found[1]))}
    if found := re.fullmatch("is (?:there|it) (.+)\\?", question):
        return {"no" if number(ONE_OF[found[1]]) == 0 else "yes"}
    if found := re.fullmatch("is the (.+) (left of|right of|above|below) the (.+)\\?", question):
        pixels = further[found[2]](found[1], found[3])
        return {"yes"} if pixels > 12 else {"no"} if pixels < -12 else set()
    if question == "what is the largest thing?":
        return {i.drawing.name for i in items if all(10 * i.size >= 13 * j.size for j in items if j is not i)}
    if question == "what is in the picture?":
        return {" + ".join(name for _, name in sorted((x[name], name) for name in x))}
    name, kind = items[0].drawing.name, items[0].drawing.subgroup.replace("-", " ")
    return {{"what is this?": name, "what kind of thing is it?": kind, "describe the picture": f"{name} {kind}"}[question]}


def test_answers_are_those_of_an_independent_twin():
    rng, seen = np.random.default_rng(8), Counter()
    for count in (1, 2, 3, 4) * 60:
        items = random_items(load_emoji("train"), rng, count)
        for kind, question, answer in emoji_turns(items, rng):
            right = twin(items, question)
            assert len(right) == 1 and (answer in right or kind == "list" and same_list(answer, *right)), (items, question, answer, right)
            seen[kind] += 1
    assert min(seen[kind] for kind in (*ONE, *SCENE)) >= 25, seen


def test_lists_are_sets():
    assert same_list("b + a b", "a b + b") and not same_list("a", "a + b") and not same_list("a + a", "a + b")


# ---- drawn from a seed ----

def test_a_varied_drawing_stays_itself_and_a_clock_is_never_mirrored():
    assert {"oclock", "left"} <= HANDED
    things = {(d.artist, d.name): d for d in load_emoji("train")}
    white = Image.new("RGBA", (64, 64), "white")
    def gray(picture):
        return np.asarray(Image.alpha_composite(white, picture).convert("L"), float)
    for key, mirrors in ((("twemoji", "three oclock"), False), (("twemoji", "key"), True)):
        rng, drawing = np.random.default_rng(0), things[key]
        plain, turned = gray(drawing.picture(64)), 0
        for _ in range(40):
            new = drawing.varied(64, rng)
            assert new.size == (64, 64) and new.mode == "RGBA" and new.getbbox()
            turned += abs(gray(new)[:, ::-1] - plain).mean() < abs(gray(new) - plain).mean()
        assert (10 < turned < 30) if mirrors else turned < 8, (key, turned)
    a, b = (drawing.varied(40, np.random.default_rng(3)) for _ in range(2))
    assert a.tobytes() == b.tobytes() != drawing.picture(40).tobytes()


def test_few_turns_begin_with_the_one_that_says_most_and_pages_have_the_size_asked_for():
    for things in ((1,), (2, 3, 4)):
        few, every = EmojiVQA("train", 20, things, 4, varied=True, side=64, turns=2), EmojiVQA("train", 20, things, 4)
        for i in range(20):
            record = few[i]
            assert record["kinds"][0] in ALWAYS and len(record["kinds"]) == 2 and record["image"].size == (64, 64)
            assert record["kinds"][0] == ("name" if things == (1,) else "list") and every[i]["image"].size == (PAGE, PAGE)
    assert len({EmojiVQA("train", 200, (1,), 4, turns=2)[i]["kinds"][1] for i in range(60)}) == 3


def test_the_tokenizer_knows_all_words_of_all_splits():
    words = emoji_tokenizer()
    assert emoji_tokenizer().to_str() == words.to_str()
    for split in ARTISTS:
        for i in range(60):
            encode_conversation(emoji_vqa(split, 60, seed=9)[i], words, "lite")


def test_squares_keep_apart_and_on_the_page():
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 4) * 20:
        items = random_items(load_emoji("train"), rng, count)
        assert len({i.drawing.name for i in items}) == count
        page = np.zeros((PAGE, PAGE), int)
        for i in items:
            assert 22 <= i.size <= 48 and 0 <= i.left <= PAGE - i.size and 0 <= i.top <= PAGE - i.size
            page[max(i.top - APART + 1, 0):i.top + i.size, max(i.left - APART + 1, 0):i.left + i.size] += 1
            page[i.top:i.top + i.size, i.left:i.left + i.size] += 10
        assert page.max() < 20 and draw_items(items, rng).size == (PAGE, PAGE)


def test_a_record_is_a_function_of_the_seed_and_its_number():
    data, again, other = (EmojiVQA("test", 30, seed=seed) for seed in (5, 5, 6))
    for i in (7, 3):
        a, b = data[i], again[i]
        assert a["image"].tobytes() == b["image"].tobytes() and {**a, "image": 0} == {**b, "image": 0}
        assert a["image"].tobytes() != other[i]["image"].tobytes()


def test_questions_are_in_the_words_of_their_kind_and_yes_is_as_frequent_as_no():
    forms = {kind: re.sub(r"\\\{\d?\\\}", "(.+)", re.escape(text)) for kind, text in (ONE | SCENE).items()}
    said = defaultdict(Counter)
    for i in range(300):
        record = EmojiVQA("train", 300, seed=1)[i]
        assert len(set(record["kinds"])) == len(record["kinds"]) == len(record["questions"]) == len(record["answers"])
        for kind, question, answer in zip(record["kinds"], record["questions"], record["answers"]):
            assert re.fullmatch(forms[kind], question)
            said[kind][answer] += 1
    assert set(said) == {*ONE, *SCENE} and set(said["count"]) <= set("01234")
    for kind in ("there", "relation", "is"):
        yes, total = said[kind]["yes"], said[kind].total()
        assert set(said[kind]) == {"yes", "no"} and abs(yes - total / 2) < 1.5 * total ** 0.5, (kind, said[kind])            # 3 sigma


def test_a_word_level_tokenizer_can_say_every_answer_and_the_check_is_clean():
    data = emoji_vqa("validation", 40, seed=2)
    words = build_tokenizer({text for i in range(40) for turn in data[i].turns for text in turn})
    for i in range(40):
        encode_conversation(data[i], words, "lite")                      # proves every mask
    report = check_data(data, words, "lite", limit=10)
    assert report["usable"] == 10 and not report["errors"]


def test_floors_by_hand():
    class Few(list):
        def __init__(self, *answers):
            super().__init__({"kinds": ["there"], "answers": [answer]} for answer in answers)
    assert blind_floor(Few("yes", "no", "yes"), Few("yes", "no", "no", "no")) == {"there": 0.25}
    assert all(noun in CLASSES for noun in ("a bird", "a fruit")) and set(SIDES) == {"left of", "right of", "above", "below"}

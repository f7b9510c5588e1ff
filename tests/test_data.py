"""easy-VQA and its tensors: counts, the split, tokens and masks, pictures of all kinds, augmentation, drawing questions."""
import re
import socket
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer

import vlmamba_lite
from vlmamba_lite.data.batches import pad_rows
from vlmamba_lite.data.conversations import (EOS, PAD, UNK, Conversation, build_tokenizer, encode_conversation,
                                             encode_prompt, show_turn)
from vlmamba_lite.data.easy_vqa import (CAPTION_QUESTION, COLORS, QUESTION_TYPES, ROW_TYPES, SHAPES,
                                        VALIDATION_IMAGES, build_set, caption, draw_questions, easy_vqa_folder,
                                        load_easy_vqa, question_type)
from vlmamba_lite.data.pictures import augment, normalize, open_image, process_images, to_rgb

ROOT = Path(__file__).resolve().parent.parent
FEW = dict(deadline=None, max_examples=40, derandomize=True)


@pytest.fixture(scope="session")
def splits():
    return {name: load_easy_vqa(name) for name in ("train", "validation", "test")}


@pytest.fixture(scope="session")
def tokenizer(splits):
    return build_tokenizer(text for name in ("questions", "answers") for texts in splits["train"][name] for text in texts)


@pytest.fixture(scope="session")
def train(splits, tokenizer):
    return build_set(splits["train"], tokenizer)


def encode_turn(tokenizer, question, answer):
    row, = encode_conversation(Conversation(repr(question), [], [(question, answer)]), tokenizer, "lite")
    return row.input_ids, row.labels


def flat(data, name):
    return list(chain.from_iterable(data[name]))


# ---- easy-VQA ----

def test_counts_are_those_of_the_readme(splits):
    readme = (ROOT / "data" / "easy_vqa" / "README.md").read_text()
    table = {name: tuple(int(x.replace(",", "")) for x in numbers)
             for name, *numbers in re.findall(r"\| `(\w+)\.parquet` \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|", readme)}
    assert set(table) == {"train", "test"}
    for shipped, ours in (("train", ("train", "validation")), ("test", ("test",))):
        answers = [a for name in ours for a in flat(splits[name], "answers")]
        got = sum(len(splits[name]) for name in ours), len(answers), sum(a in ("yes", "no") for a in answers)
        assert got == table[shipped]


def test_split_by_picture_fixed_for_all_seeds(splits):
    train, validation = (splits[name]["image_id"][:] for name in ("train", "validation"))
    assert len(validation) == VALIDATION_IMAGES == 400 and len(train) == 3_600
    assert sorted(train + validation) == list(range(4_000)) and train == sorted(train) and validation == sorted(validation)
    order = np.random.default_rng(2024).permutation(4_000)
    assert validation == sorted(order[:400].tolist())
    assert validation[:5] == [3, 12, 14, 18, 28]                        # whatever numpy does one day


def test_no_picture_is_in_two_splits(splits):
    pixels = [np.asarray(image).tobytes() for data in splits.values() for image in data["image"]]
    assert len(pixels) == len(set(pixels)) == 5_000


def test_thirteen_answers_and_a_shared_stock_of_questions(splits):
    answers = {name: set(flat(data, "answers")) for name, data in splits.items()}
    assert all(words == {"yes", "no", *COLORS, *SHAPES} for words in answers.values())
    questions = {name: set(flat(data, "questions")) for name, data in splits.items()}
    assert len(questions["train"]) == 107 and questions["test"] | questions["validation"] <= questions["train"]


def test_loads_without_a_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was used")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert load_easy_vqa("test")[0]["image"].size == (64, 64)


@pytest.mark.parametrize("split", ["val", "Train", None, 0])
def test_refuses_other_splits(split):
    with pytest.raises(ValueError, match=f"split: got {split!r}, need 'train', 'validation' or 'test'"):
        load_easy_vqa(split)


def test_folder_in_a_checkout_and_in_a_package(tmp_path, monkeypatch):
    assert easy_vqa_folder() == ROOT / "data" / "easy_vqa"
    package = tmp_path / "site" / "vlmamba_lite"
    package.mkdir(parents=True)
    monkeypatch.setattr(vlmamba_lite, "__file__", str(package / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="easy-VQA: no train.parquet in .*vlmamba_lite.easy_vqa or .*data.easy_vqa"):
        easy_vqa_folder()
    for folder in (tmp_path / "site" / "data" / "easy_vqa", package / "easy_vqa"):     # the package's own wins
        folder.mkdir(parents=True)
        (folder / "train.parquet").write_bytes(b"")
        assert easy_vqa_folder() == folder


def test_question_type_of_every_turn(splits):
    def slow(question, answer):
        words = question.rstrip("?").split()
        kind = "what" if words[0] == "what" else "yes/no"
        if kind == "what":
            return "what color" if "color" in words else "what shape"
        return "yes/no color" if any(w in COLORS for w in words) else "yes/no shape"
    for data in splits.values():
        for q, a in set(zip(flat(data, "questions"), flat(data, "answers"))):
            assert question_type(q, a) == slow(q, a) and question_type(q.upper(), a) == slow(q, a)
    with pytest.raises(ValueError, match="answer: got 'dog', need yes, no"):
        question_type("what shape is this?", "dog")


def facts(question, answer):
    "What one turn says: pairs (is it so, word)."
    words = [w for w in re.findall(r"\w+", question) if w in COLORS + SHAPES]
    if answer in ("yes", "no"):
        return [((answer == "yes") != (" no " in f" {question} " or " not " in question), words[0])]
    return [(True, w) for w in (*words, answer)]


def test_captions_agree_with_every_turn(splits):
    captions = 0
    for data in splits.values():
        for questions, answers in zip(data["questions"], data["answers"]):
            told = [fact for turn in zip(questions, answers) for fact in facts(*turn)]
            true = {word for is_so, word in told if is_so}
            assert len(true) <= 2 and not true & {word for is_so, word in told if not is_so}
            said = caption(questions, answers)
            assert said == (" ".join(sorted(true, key=SHAPES.__contains__)) if len(true) == 2 else None)
            captions += said is not None
    assert 0.85 < captions / 5_000 < 0.92


def test_a_set_with_captions(splits, tokenizer):
    data = splits["validation"].select(range(40))
    plain, got = build_set(data, tokenizer), build_set(data, tokenizer, captions=True)
    assert torch.equal(plain.images, got.images) and got.input_ids.dtype == plain.input_ids.dtype
    for own, before, questions, answers in zip(got.table, plain.table, data["questions"], data["answers"]):
        own, said = own[own >= 0], caption(questions, answers)
        assert [got.questions[r] for r in own] == questions + [CAPTION_QUESTION] * (said is not None)
        assert [got.answers[r] for r in own] == answers + [said] * (said is not None)
        assert got.types[own].tolist() == plain.types[before[before >= 0]].tolist() + [4] * (said is not None)
    learned = [tokenizer.decode([x for x in row if x != -100]) for row in got.labels.tolist()]
    assert learned == got.answers and ROW_TYPES == (*QUESTION_TYPES, "caption")
    assert question_type(CAPTION_QUESTION, "red circle") == "caption" and question_type("is a circle present?", "no") == "yes/no shape"


def test_the_order_of_columns_does_not_matter(splits, tokenizer):
    data = splits["validation"].select(range(5))
    turned = data.select_columns(["answers", "image", "questions"])
    for captions in (False, True):
        a, b = (build_set(x, tokenizer, captions=captions) for x in (data, turned))
        assert torch.equal(a.input_ids, b.input_ids) and a.questions == b.questions and a.answers == b.answers


# ---- words ----

def test_tokenizer_reserves_three_and_is_stable(tokenizer, splits):
    assert [tokenizer.token_to_id(t) for t in (PAD, EOS, UNK)] == [0, 1, 2]
    words = sorted({w for name in ("questions", "answers") for text in flat(splits["train"], name) for w in re.findall(r"\w+|\?", text)})
    assert [tokenizer.id_to_token(i) for i in range(3, 31)] == words and tokenizer.get_vocab_size() == 31
    again = build_tokenizer(reversed([*flat(splits["train"], "answers"), *flat(splits["train"], "questions")]))
    assert again.to_str() == tokenizer.to_str()


def test_every_text_makes_the_round_trip(tokenizer, splits):
    for data in splits.values():
        for text in {*flat(data, "questions"), *flat(data, "answers")}:
            assert tokenizer.decode(tokenizer.encode(text).ids).replace(" ?", "?") == text


@settings(**FEW)
@given(st.data())
def test_any_words_make_the_round_trip(tokenizer, data):
    words = sorted(w for w in tokenizer.get_vocab() if w.isalpha())
    text = " ".join(data.draw(st.lists(st.sampled_from(words), min_size=1)))
    messy = "".join(c.upper() if up else c for c, up in zip(text, data.draw(st.lists(st.booleans(), min_size=len(text))) or []))
    for version in (text, messy or text, f"  {text.replace(' ', '   ')} "):
        want = version.lower().replace("   ", " ").strip() + " ?" * (text.split()[0] in ("does", "is", "what"))
        assert tokenizer.decode(encode_prompt(tokenizer, version)) == want


TYPED = {                                                                # a question as people type it
    "without ?": lambda q: q[:-1], "full stop": lambda q: q[:-1] + ".", "twice": lambda q: q + "?!", "apart": lambda q: q[:-1] + " ?",
    "capitals": str.upper, "title": str.title, "two spaces": lambda q: q.replace(" ", "  "), "around": lambda q: f" \t{q} \n",
    "no-break spaces": lambda q: q.replace(" ", "\xa0"), "commas": lambda q: q.replace(" ", ", "),
    "two lines": lambda q: q.replace(" ", "\n", 1),
    "full width": lambda q: "".join(chr(ord(c) + 0xFEE0) if c > " " else c for c in q),
    "British": lambda q: q.replace("color", "colour").replace("gray", "Grey"), "picture": lambda q: q.replace("image", "picture"),
    "all at once": lambda q: q.upper().replace("COLOR", " COLOUR").replace("IMAGE", "picture")[:-1] + " ."}


@pytest.fixture(scope="session", params=["built", "saved", "transformers"])
def reader(request, tokenizer, tmp_path_factory):
    "text -> ids, by the tokenizer and by those who read its file."
    if request.param == "built":
        return lambda text: encode_prompt(tokenizer, text)
    file = str(tmp_path_factory.mktemp("words") / "tokenizer.json")
    tokenizer.save(file)
    if request.param == "saved":
        saved = Tokenizer.from_file(file)
        return lambda text: encode_prompt(saved, text)
    from transformers import PreTrainedTokenizerFast
    fast = PreTrainedTokenizerFast(tokenizer_file=file)
    return lambda text: fast(text)["input_ids"]


@pytest.mark.parametrize("typed", TYPED.values(), ids=TYPED)
def test_a_question_as_people_type_it_is_the_same_question(reader, tokenizer, splits, typed):
    for question in sorted({q for data in splits.values() for q in flat(data, "questions")}):
        want = [tokenizer.token_to_id(word) for word in re.findall(r"\w+|\?", question)]
        assert reader(question) == reader(typed(question)) == want, question


def test_only_what_the_texts_lack_is_read_as_something_else(tokenizer):
    for answer in ("yes", "teal triangle", "no"):                        # no answer becomes a question
        assert tokenizer.decode(tokenizer.encode(answer).ids) == answer
    marked = build_tokenizer(["what is it?", "1.5, or 2", "yes."])       # '.' and ',' are tokens here
    for text, want in (("is it 1.5, or 2.", "is it 1 . 5 , or 2 ."), ("yes!", "yes"), ("WHAT is it.", "what is it ?"), ("2 ?", "2 ?")):
        assert marked.decode(marked.encode(text).ids) == want
    british = build_tokenizer(["what colour is it?", "grey", "color", "a picture or an image", "what not", "is it", "is it?"])
    for text in ("what colour is it", "grey", "color", "picture image", "what not", "is it"):
        assert british.decode(british.encode(text).ids) == text           # 'what' and 'is' begin other texts too
    clevr = build_tokenizer(["how many?", "what shape?", "describe 1", "list what shape?"])
    texts = ("How MANY", "what shape.", "describe", "list what shape", "list what shape?")
    assert [clevr.decode(clevr.encode(t).ids) for t in texts] == ["how many ?", "what shape ?", "describe", "list what shape ?", "list what shape ?"]


@pytest.mark.parametrize("question", ["zebra " * 200_000, "z" * 1_000_000, "what " + "?" * 1_000_000, "what" + " " * 1_000_000 + "zebra",
                                      "?" * 1_000_000, " " * 1_000_000, " ".join(f"z{i}" for i in range(100_000))])
def test_a_question_of_a_megabyte_gets_a_short_answer(tokenizer, question):
    if "z" not in question and question.startswith("what"):
        assert encode_prompt(tokenizer, question) == encode_prompt(tokenizer, "what")
    else:
        with pytest.raises(ValueError, match="^question: got ") as error:
            encode_prompt(tokenizer, question)
        assert len(str(error.value)) < 1000 and "\n" not in str(error.value)


@settings(**FEW)
@given(st.lists(st.sampled_from(["what", "color", "Purple", "<eos>", "<pad>", "<unk>", "zebra", "?", "!", "is", "é"]), max_size=6))
def test_unknown_words_are_all_named(tokenizer, words):
    question = " ".join(words)
    parts = re.split("(<eos>|<pad>|<unk>)", question.lower())            # what lies between them is read alone
    parts = [part.replace("!", "") for part in parts]                    # a mark that the texts lack
    parts = [part.rstrip(" ?") + "?" if re.match(r"\s*(what|is)\b", part) else part for part in parts]
    pieces = [p for part in parts for p in ([part] if part in (EOS, PAD, UNK) else re.findall(r"\w+|[^\w\s]+", part))]
    unknown = list(dict.fromkeys(p for p in pieces if p in (EOS, PAD, UNK) or tokenizer.token_to_id(p) is None))
    if not pieces or unknown:
        message = f"never read: {', '.join(unknown)}; it knows: ? a black" if unknown else "need at least one word"
        with pytest.raises(ValueError, match=re.escape(message)):
            encode_prompt(tokenizer, question)
    else:
        assert encode_prompt(tokenizer, question) == [tokenizer.token_to_id(p) for p in pieces]


@pytest.mark.parametrize("question", ["<eos>", "is <pad> there?", "<unk>", "what color <EOS> is the shape?"])
def test_special_tokens_are_no_words(tokenizer, question):
    with pytest.raises(ValueError, match="question: got words this model has never read: (<eos>|<pad>|<unk>|<, eos, >);"):
        encode_prompt(tokenizer, question)


@pytest.mark.parametrize("question", ["", "   ", "\n", None, 7])
def test_refuses_empty_questions(tokenizer, question):
    with pytest.raises(ValueError, match="question: got .*, need at least one word"):
        encode_prompt(tokenizer, question)


def test_a_turn_is_question_answer_eos(tokenizer):
    ids, labels = encode_turn(tokenizer, "what is the blue shape?", "circle")
    assert tokenizer.decode(ids, skip_special_tokens=False) == "what is the blue shape ? circle <eos>"
    assert labels == [-100] * 6 + ids[6:]
    ids, labels = encode_turn(tokenizer, "what is there?", "teal triangle")           # answers may have several words
    assert labels == [-100] * 4 + ids[4:] and len(ids) == 7


@pytest.mark.parametrize("answer", ["turquoise", "Blue", "", " ", "<eos>", "<pad> blue", "blue turquoise", "blue  circle"])
def test_a_mask_that_does_not_decode_to_the_answer_is_refused(tokenizer, answer):
    with pytest.raises(ValueError, match="'what color is the shape\\?'"):
        encode_turn(tokenizer, "what color is the shape?", answer)


def test_masks_of_every_training_question_decode_to_its_answer(train, tokenizer, splits):
    questions, answers = flat(splits["train"], "questions"), flat(splits["train"], "answers")
    assert len(train.labels) == len(questions) == 34_721
    decode = {}                                                         # rows repeat, decoding is slow
    for i, (ids, labels, prompt) in enumerate(zip(train.input_ids.tolist(), train.labels.tolist(), train.prompt.tolist())):
        key = (*ids, *labels)
        if key not in decode:
            learned = [x for x in labels if x != -100]
            assert all(y in (x, -100) for x, y in zip(ids, labels)) and learned[-1] == 1 and learned.count(1) == 1
            decode[key] = tokenizer.decode(ids[:prompt]), tokenizer.decode(learned)
            end = prompt + len(learned)
            assert labels[:prompt] == [-100] * prompt and labels[prompt:end] == ids[prompt:end]
            assert ids[end:] == [0] * (len(ids) - end) and labels[end:] == [-100] * (len(ids) - end)
        assert decode[key] == (questions[i].replace("?", " ?"), answers[i])


def test_views_of_turns(tokenizer):
    ids, labels = encode_turn(tokenizer, "is a circle present?", "no")
    view = show_turn(tokenizer, ids, labels)
    assert repr(view) == ("is a circle present ? no <eos>\n"
                          "                      ^^ ^^^^^")
    page = show_turn(tokenizer, torch.tensor([ids + [0]] * 2), torch.tensor([labels + [-100]] * 2))._repr_html_()
    assert page.count("<div>") == 2 and "&lt;eos&gt;" in page and "<eos>" not in page
    learned = re.findall(r'<span style="background[^>]*>([^<]*)</span>', page)
    assert learned == ["no", "&lt;eos&gt;"] * 2
    assert page == show_turn(tokenizer, [ids + [0]] * 2, [labels + [-100]] * 2)._repr_html_()


# ---- pictures ----

def test_open_image_turns_photos_upright(tmp_path):
    image = Image.new("RGB", (4, 2), "red")
    image.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6                                                    # to be turned by 90 degrees clockwise
    image.save(tmp_path / "photo.png", exif=exif)
    upright = open_image(tmp_path / "photo.png")
    assert upright.size == (2, 4) and upright.getpixel((1, 0)) == (0, 0, 255)
    assert open_image(str(tmp_path / "photo.png")).size == (2, 4)


def test_open_image_holds_no_file_open(tmp_path):
    path = tmp_path / "a.gif"
    Image.new("P", (3, 3)).save(path)
    image = open_image(path)
    path.unlink()
    assert process_images([image], 4).shape == (1, 3, 4, 4)


def test_open_image_names_the_fault(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"^image: no file .*no\.png$"):
        open_image(tmp_path / "no.png")
    with pytest.raises(ValueError, match="^image: .* is not a file$"):
        open_image(tmp_path)
    for content in (b"", b"%PDF-1.4 and so on", b"\x89PNG\r\n\x1a\n"):
        (tmp_path / "odd.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"^image: .*odd\.png (is not a picture|cannot be read)"):
            open_image(tmp_path / "odd.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:4000])
    with pytest.raises(ValueError, match=r"^image: .*half\.png cannot be read: .*truncated"):
        open_image(tmp_path / "half.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"whole\.png cannot be read: Image size"):
        open_image(tmp_path / "whole.png")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "F"])
@pytest.mark.parametrize("size", [(1, 1), (64, 64), (3, 200), (65, 63)])
def test_every_mode_and_size(mode, size):
    pixels = process_images([Image.new(mode, size)], 64)
    assert pixels.shape == (1, 3, 64, 64) and pixels.dtype == torch.uint8 and pixels.is_contiguous()


def test_rgb_of_the_right_size_is_untouched(splits):
    row = splits["test"][3]["image"]
    assert row.mode == "RGB" and np.array_equal(process_images([row], 64)[0].permute(1, 2, 0).numpy(), np.asarray(row))


def test_transparency_shows_white():
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (8, 8, 4), dtype=np.uint8)
    alpha = rgba[..., 3:] / 255
    want = rgba[..., :3] * alpha + 255 * (1 - alpha)
    got = process_images([Image.fromarray(rgba)], 8)[0].permute(1, 2, 0).numpy()
    assert np.abs(got - want).max() <= 1
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert process_images([palette], 4)[0, :, 0, 0].tolist() == [0, 0, 255]
    palette.info["transparency"] = 1
    assert process_images([palette], 4)[0, :, 0, 0].tolist() == [255, 255, 255]


def test_sixteen_bits_keep_the_upper_eight(tmp_path):
    levels = np.array([[0, 255, 256], [4095, 40_000, 65_535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    got = process_images([open_image(tmp_path / "deep.png").resize((3, 2))], 64)
    assert got.max() == 255 and got.min() == 0
    assert np.asarray(to_rgb(open_image(tmp_path / "deep.png")))[..., 0].tolist() == (levels >> 8).tolist()


@pytest.mark.parametrize("images,message", [
    ([], "images: got none, need at least one picture"),
    (["a.png"], "images: got str, need PIL pictures; `open_image`"),
    ([np.zeros((4, 4, 3))], "images: got ndarray, need PIL pictures"),
    ([Image.new("RGB", (0, 5))], "images: got a picture of 0x5 pixels, need at least 1x1")])
def test_refuses_what_is_no_picture(images, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        process_images(images, 64)


def test_one_picture_and_any_iterable():
    image = Image.new("RGB", (64, 64), "teal")
    one, many = process_images(image, 64), process_images((i for i in [image, image]), 64)
    assert one.shape == (1, 3, 64, 64) and many.shape == (2, 3, 64, 64) and torch.equal(many[1], one[0])


def test_normalize():
    x = normalize(torch.arange(256, dtype=torch.uint8))
    assert x.dtype == torch.float32 and x[0] == -1 and x[255] == 1
    torch.testing.assert_close(x.double(), torch.linspace(-1, 1, 256, dtype=torch.float64), atol=1e-6, rtol=0)
    assert torch.equal(((x + 1) * 127.5).round().to(torch.uint8), torch.arange(256, dtype=torch.uint8))


# ---- the set ----

def test_build_set_equals_a_slow_twin(splits, tokenizer):
    data = splits["validation"]
    got = build_set(data, tokenizer)
    row = 0
    for i in range(len(data)):
        picture = data[i]
        assert np.array_equal(got.images[i].permute(1, 2, 0).numpy(), np.asarray(picture["image"].convert("RGB")))
        n = len(picture["questions"])
        assert got.table[i, :n].tolist() == list(range(row, row + n)) and (got.table[i, n:] == -1).all()
        for q, a in zip(picture["questions"], picture["answers"]):
            ids, labels = encode_turn(tokenizer, q, a)
            assert got.input_ids[row].tolist() == ids + [0] * (got.input_ids.shape[1] - len(ids))
            assert got.labels[row].tolist() == labels + [-100] * (got.labels.shape[1] - len(ids))
            assert got.prompt[row] == labels.count(-100) and (got.questions[row], got.answers[row]) == (q, a)
            assert QUESTION_TYPES[got.types[row]] == question_type(q, a) and got.image_of[row] == i
            row += 1
    assert row == len(got.labels) == 3_854 and got.table.max(1).min() >= 0


def test_dtypes_of_the_set(train):
    for name, dtype in dict(images=torch.uint8, input_ids=torch.int64, labels=torch.int64, prompt=torch.int64).items():
        assert getattr(train, name).dtype == dtype
    for name in ("types", "table", "image_of"):
        assert getattr(train, name).dtype == np.int64
    assert train.images.shape == (3_600, 3, 64, 64) and train.input_ids.shape == train.labels.shape == (34_721, 12)
    counts = Counter(train.types.tolist())
    assert [counts[k] for k in range(4)] == [4_650, 4_493, 18_603, 6_975]


def test_build_set_refuses_broken_rows(splits, tokenizer):
    from datasets import Dataset
    picture = splits["test"][0]["image"]
    def broken(questions, answers):
        return Dataset.from_dict(dict(image=[picture] * len(questions), questions=questions, answers=answers))
    with pytest.raises(ValueError, match="data: picture 1 has 2 questions and 1 answers, need one answer a question"):
        build_set(broken([["is a circle present?"]] * 1 + [["is a circle present?"] * 2], [["no"], ["no"]]), tokenizer)
    with pytest.raises(ValueError, match="data: picture 0 has 0 questions"):
        build_set(broken([[], ["is a circle present?"]], [[], ["no"]]), tokenizer)
    with pytest.raises(ValueError, match="the tokenizer has no tokens for all of 'is a zebra present"):
        build_set(broken([["is a zebra present?"]], [["no"]]), tokenizer)
    with pytest.raises(ValueError, match="data: got no pictures"):
        build_set(splits["test"].select([]), tokenizer)


@settings(**FEW)
@given(st.lists(st.lists(st.integers(-5, 5)), min_size=1).filter(any), st.integers(-100, 0))
def test_pad_rows(rows, value):
    got = pad_rows(rows, value)
    assert got.shape == (len(rows), max(map(len, rows)))
    for row, padded in zip(rows, got.tolist()):
        assert padded[:len(row)] == row and set(padded[len(row):]) <= {value}


# ---- augmentation ----

def slow_augment(images, rng, shift):
    "Picture by picture: mirror, pad by repeating the border, cut."
    n, _, h, w = images.shape
    x, y = rng.integers(-shift, shift + 1, n), rng.integers(-shift, shift + 1, n)
    mirrored, out = rng.random(n) < 0.5, []
    for i in range(n):
        picture = images[i].numpy()
        padded = np.pad(picture, ((0, 0), (shift, shift), (shift, shift)), mode="edge")
        moved = padded[:, shift + y[i]:shift + y[i] + h]
        columns = range(w)[::-1] if mirrored[i] else range(w)
        out.append(np.stack([moved[:, :, shift + x[i] + c] for c in columns], -1))
    return torch.from_numpy(np.stack(out))


@settings(**FEW)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 6), st.integers(0, 99))
def test_augment_equals_a_slow_twin(n, c, h, w, shift, seed):
    images = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, c, h, w), dtype=np.uint8))
    before = images.clone()
    got = augment(images, np.random.default_rng(seed), shift)
    assert got.dtype == torch.uint8 and torch.equal(images, before)
    assert torch.equal(got, slow_augment(images, np.random.default_rng(seed), shift))


def test_augment_mirrors_half_and_moves_evenly():
    picture = torch.arange(49).view(1, 1, 7, 7).expand(6_000, -1, -1, -1)
    out = augment(picture, np.random.default_rng(0), 2)[:, 0]
    centre, right = out[:, 3, 3], out[:, 3, 4]
    assert abs((right < centre).float().mean().item() - 0.5) < 0.03
    rows, columns = centre // 7 - 3, centre % 7 - 3
    for moved in (rows, columns):
        counts = torch.bincount(moved + 2, minlength=5)
        assert moved.abs().max() == 2 and (counts - 1_200).abs().max() < 150
    assert (rows * columns).float().mean().abs() < 0.1                  # independent of each other


def test_augment_of_floats_and_nothing():
    images = torch.rand(3, 3, 5, 6)
    assert torch.equal(augment(images, np.random.default_rng(1), 0).sort(-1).values, images.sort(-1).values)
    assert augment(images[:0], np.random.default_rng(1)).shape == (0, 3, 5, 6)
    for bad, shift in ((images[0], 2), (images, -1)):
        with pytest.raises(ValueError, match=r"images, shift: got shape .*, need \(n, c, h, w\) and at least 0"):
            augment(bad, np.random.default_rng(0), shift)


# ---- drawing questions ----

@st.composite
def tables(draw):
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    types = np.array(draw(st.lists(st.integers(0, 4), min_size=sum(sizes), max_size=sum(sizes))))
    ends = np.cumsum(sizes)
    return pad_rows([list(range(end - size, end)) for end, size in zip(ends, sizes)], -1).numpy(), types, sizes


@settings(**FEW)
@given(tables(), st.integers(1, 9), st.integers(0, 99), st.lists(st.floats(1e-6, 1e6), min_size=5, max_size=5))
def test_draws_different_rows_of_the_picture(table, count, seed, weights):
    table, types, sizes = table
    rows = draw_questions(table, types, weights, count, np.random.default_rng(seed))
    assert rows.shape == (len(sizes), count)
    for line, own, n in zip(rows, table, sizes, strict=True):
        assert set(line) <= set(own[own >= 0]) and len(set(line)) == min(n, count)
        assert (line[n:] == line[0]).all()                              # too few: the first again
    assert np.array_equal(rows, draw_questions(table, types, weights, count, np.random.default_rng(seed)))


@settings(**FEW)
@given(tables(), st.integers(1, 9), st.integers(0, 99), st.sets(st.integers(0, 4), min_size=1, max_size=4),
       st.sampled_from([0.0, 1e-40, 1e-300]))
def test_weights_of_almost_nothing_come_last(table, count, seed, zero, tiny):
    table, types, _ = table
    weights = [tiny if k in zero else 0.5 for k in range(5)]
    rows = draw_questions(table, types, weights, count, np.random.default_rng(seed))
    for line, own in zip(rows, table):
        own = own[own >= 0]
        wanted = {r for r in own if types[r] not in zero}
        drawn = set(line)
        assert len(drawn & wanted) == min(len(wanted), count)           # none of the others while one of these is left
        assert len(drawn) == min(len(own), count)


def test_draws_have_the_probabilities_of_drawing_one_by_one():
    "First and second of four rows with weights 1, 2, 3, 4, against the exact probabilities."
    n, w = 60_000, np.array([1.0, 2.0, 3.0, 4.0])
    table, types = np.tile(np.arange(4), (n, 1)), np.arange(4)
    rows = draw_questions(table, types, [*w, 7.0], 2, np.random.default_rng(0))
    got = np.zeros((4, 4))
    np.add.at(got, tuple(rows.T), 1 / n)
    want = w[:, None] / 10 * w / (10 - w[:, None]) * (1 - np.eye(4))
    assert np.abs(got - want).max() < 0.006 and abs(want.sum() - 1) < 1e-12


def test_equal_rows_share_the_weight_of_their_type():
    table, types = np.tile(np.arange(5), (40_000, 1)), np.array([0, 0, 0, 1, 3])
    drawn = draw_questions(table, types, (1, 2, 9, 5, 3), 1, np.random.default_rng(0)).ravel()
    assert np.abs(np.bincount(drawn, minlength=5) / 40_000 - np.array([1, 1, 1, 2, 5]) / 10).max() < 0.01


def test_rows_of_weight_zero_are_still_drawn_evenly():
    table, types = np.tile(np.array([0, 1, 2, 3, -1]), (30_000, 1)), np.array([2, 2, 0, 2])
    rows = draw_questions(table, types, (5, 1, 0, 1, 1), 2, np.random.default_rng(0))
    assert (rows[:, 0] == 2).all()
    assert np.abs(np.bincount(rows[:, 1], minlength=4) / 30_000 - np.array([1, 1, 0, 1]) / 3).max() < 0.01


@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 1, 1, 1, -1), (0, 0, 0, 0, 0), (1, 1, 1, 1, float("nan")), (1, 1, 1, 1, float("inf")), 1])
def test_refuses_weights(weights):
    with pytest.raises(ValueError, match="weights: got .*, need a number for each type, none negative and not all 0"):
        draw_questions(np.array([[0]]), np.array([3]), weights, 1, np.random.default_rng(0))


def test_refuses_counts_and_pictures_without_rows():
    for table, count in ((np.array([[0]]), 0), (np.array([[0], [-1]]), 1)):
        with pytest.raises(ValueError, match=r"count, table: got \d and pictures \[1?\] without rows"):
            draw_questions(table, np.array([0]), (1, 1, 1, 1, 1), count, np.random.default_rng(0))

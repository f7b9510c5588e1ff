"""Conversations, templates, tokenizers and masks: what is learned is what the assistant said, for any text and any tokenizer."""
import random
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmamba_lite.data.conversations import (LONGEST_TEXT, SYSTEM, TEMPLATES, Codec, Conversation, SampleError,
                                             Template, ask_ids, build_tokenizer, byte_tokenizer, check_labels,
                                             encode_conversation, encode_prompt, join_turns, sample_error, show_turn)

FEW = {"deadline": None, "max_examples": 60, "derandomize": True}
PICTURE = Image.new("RGB", (8, 8), "teal")
WORDS = ["what", "color", "is", "the", "shape?", "A", "circle.", "teal,", "It's", "éà", "漢字", "🎉👩‍👩‍👧", "<|endoftext|>", "<|user|>", "USER:",
         "ASSISTANT:", "</s>", "<image>", "  ", "\n", "\n\n", "\t", "0.5", "don't", "x" * 30, "\x00", "\u200b", "ﷺ", "{eos}", "%s", "{}"]


def chat_tokenizer():
    texts = ["what color is the shape? It's a teal circle, don't you think?", SYSTEM, "<|user|>\n<|assistant|>\nUSER: ASSISTANT:"] * 3
    return byte_tokenizer(texts, 420)


def fast(tokenizer):
    from transformers import PreTrainedTokenizerFast
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end, unk_token=end)


@pytest.fixture(scope="module")
def raw():
    return chat_tokenizer()


@pytest.fixture(scope="module")
def neox():
    "As GPT-NeoX's: bos, eos and unk are one token, and there is no pad token."
    return fast(chat_tokenizer())


def prompt_ids(tokenizer, question, turns=(), template="zephyr"):
    "What a model is given after some turns; in `lite` and `plain` it knows no earlier ones."
    codec, form = Codec(tokenizer), TEMPLATES[template]
    turns = () if form.alone or not form.asks else turns
    return join_turns(codec, form, turns, "before")[0] + ask_ids(codec, form, question, "now", first=not turns)


def written(template, turns):
    "The text of a conversation as (text, learned) parts, written down once more and by hand."
    end = "<|endoftext|>"
    parts = []
    for i, (q, a) in enumerate(turns):
        if template == "zephyr":
            parts += [("\n" * (i > 0) + f"<|user|>\n{q}{end}\n<|assistant|>\n", False), (a + end, True)]
        elif template == "llava":
            parts += [(f"{SYSTEM} " * (i == 0) + f"USER: {q} ASSISTANT:", False), (f" {a}{end}", True)]
        elif template == "plain":
            parts += [("\n", False), (f"{a}\n", True)]
        else:
            parts += [(q, False), (a + end, True)]
    return parts


def learned_parts(tokenizer, row):
    "Decoded runs (text, learned), read from ids and labels alone and apart from the library's code."
    parts, ids, kind = [], [], None
    for token, label in zip(row.input_ids, row.labels, strict=True):
        assert label in (token, -100)
        if kind is not None and (label != -100) != kind:
            parts.append((tokenizer.decode(ids, skip_special_tokens=False), kind))
            ids = []
        kind = label != -100
        ids.append(token)
    return [*parts, (tokenizer.decode(ids, skip_special_tokens=False), kind)]


def random_text(rng):
    text = "".join(rng.choice(WORDS) + rng.choice(["", " ", " "]) for _ in range(rng.randint(1, 9)))
    return text if text.strip() else text + "ok"


def random_conversation(rng, i):
    turns = [(random_text(rng), random_text(rng)) for _ in range(rng.randint(1, 4))]
    return Conversation(str(i), [PICTURE] * rng.randint(0, 3), turns)


def test_ten_thousand_random_conversations(raw):
    rng = random.Random(0)
    for i in range(10_000):
        conversation, template = random_conversation(rng, i), rng.choice(["zephyr", "llava", "lite", "plain"])
        if template == "plain":
            conversation = Conversation(conversation.name, [PICTURE], conversation.turns[:1])
        rows = encode_conversation(conversation, raw, template)
        groups = [[turn] for turn in conversation.turns] if template == "lite" else [conversation.turns]
        assert len(rows) == len(groups)
        for row, turns in zip(rows, groups):
            assert learned_parts(raw, row) == written(template, turns)
            assert row.labels[0] == -100 and row.cut == 0 and row.images is conversation.images and row.name == str(i)


def test_a_transformers_tokenizer_gives_the_same_rows(raw, neox):
    rng = random.Random(1)
    for i in range(500):
        conversation = random_conversation(rng, i)
        for template in ("zephyr", "llava", "lite"):
            assert encode_conversation(conversation, neox, template) == encode_conversation(conversation, raw, template)


@settings(**FEW)
@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=4), st.sampled_from(["zephyr", "llava"]))
def test_any_unicode_or_a_named_error(neox, turns, template):
    conversation = Conversation("seven", [], turns)
    good = all(text.strip() and text.encode("utf-8", "replace").decode() == text for turn in turns for text in turn)
    if good:
        row, = encode_conversation(conversation, neox, template)
        assert learned_parts(neox, row) == written(template, turns)
    else:
        with pytest.raises(SampleError, match="^sample seven: ") as error:
            encode_conversation(conversation, neox, template)
        assert error.value.sample == "seven" and error.value.kind in ("empty", "text")


def llava_v1(turns, tokenizer, end="<|endoftext|>"):
    """LLaVA-1.5's prompt v1 and what of it is learned, by its own rules: roles USER and ASSISTANT, ": " behind a role that speaks and ":"
    behind one that is to speak, " " after the user and the end of text after the assistant; learned is what follows "ASSISTANT: ".
    The whole text is tokenized at once -> (ids, labels of all turns), ids of the prompt that asks the last question."""
    learned, text, asks = [], SYSTEM + " ", ""
    for q, a in turns:
        text += f"USER: {q} "
        asks = text + "ASSISTANT:"
        text += f"ASSISTANT: {a}{end}"
        learned.append((len(asks), len(text)))
    new = tokenizer.encode(text, add_special_tokens=False)
    labels = [i if any(a <= start and stop <= b for a, b in learned) else -100 for i, (start, stop) in zip(new.ids, new.offsets)]
    return new.ids, labels, tokenizer.encode(asks, add_special_tokens=False).ids


def random_turns(rng, most=4):
    "Turns of random words, marks and line breaks, no control token among them."
    words = [word for word in WORDS if word.strip() and word not in ("<|endoftext|>", "\x00", "\u200b")]

    def text():
        return "".join(f"{rng.choice(words)}{rng.choice([' ', ' ', ' ', '  ', chr(10), ', '])}" for _ in range(rng.integers(1, 9))).strip()
    return [(text(), text()) for _ in range(rng.integers(1, most, endpoint=True))]


def test_llava_is_llava_15s_v1_turn_by_turn(raw):
    "200 conversations, of which 150 or so have several turns: ids, labels and the prompt at use are those of the rules."
    rng, codec, several = np.random.default_rng(0), Codec(raw), 0
    for _ in range(200):
        turns = random_turns(rng)
        row, = encode_conversation(Conversation("1", [PICTURE], turns), raw, "llava")
        ids, labels, asks = llava_v1(turns, raw)
        assert (row.input_ids, row.labels) == (ids, labels)
        before = join_turns(codec, TEMPLATES["llava"], turns[:-1], "before")[0]
        assert before + ask_ids(codec, TEMPLATES["llava"], turns[-1][0], "now", first=len(turns) == 1) == asks
        several += len(turns) > 1
    assert several > 100


READ_BACK = {"zephyr": r"<\|user\|>\n(.*?)<\|endoftext\|>\n<\|assistant\|>\n(.*?)<\|endoftext\|>",
             "llava": r"USER: (.*?) ASSISTANT: (.*?)<\|endoftext\|>", "lite": r"(.*?\?)(.*?)<\|endoftext\|>", "plain": r"()\n(.*?)\n"}


@settings(**FEW)
@given(st.lists(st.tuples(st.text("abc é漢", min_size=1).map(lambda s: f"q{s}?"), st.text("abc é漢", min_size=1).map(lambda s: f"a{s}")),
                min_size=1, max_size=4), st.sampled_from(list(READ_BACK)))
def test_templates_make_the_round_trip(raw, turns, template):
    turns = turns[:1] if template == "plain" else turns
    rows = encode_conversation(Conversation("1", [PICTURE], turns), raw, template)
    text = "".join(raw.decode(row.input_ids, skip_special_tokens=False) for row in rows)
    assert re.findall(READ_BACK[template], text, re.S) == [("" if template == "plain" else q, a) for q, a in turns]


@pytest.mark.parametrize("template", ["zephyr", "llava", "lite", "plain"])
def test_a_prompt_is_the_beginning_of_a_training_row(raw, neox, template):
    rng = random.Random(2)
    for i in range(50):
        turns = random_conversation(rng, i).turns[:1 if template == "plain" else None]
        for tokenizer in (raw, neox):
            row = encode_conversation(Conversation("1", [PICTURE], turns), tokenizer, template)[-1]
            prompt = prompt_ids(tokenizer, turns[-1][0], turns[:-1], template)
            assert row.input_ids[:len(prompt)] == prompt and row.labels[len(prompt) - 1] == -100 != row.labels[len(prompt)]


def test_written_control_tokens_are_letters(raw, neox):
    for tokenizer in (raw, neox):
        row, = encode_conversation(Conversation("1", [], [("say <|endoftext|>", "<|endoftext|> it is")]), tokenizer, "zephyr")
        assert row.input_ids.count(0) == 2                      # one after the user, one after the answer: the template's
    assert not raw.encode_special_tokens                         # left as it was


def test_the_lite_template_is_question_answer_end():
    words = build_tokenizer(["what color is the shape?", "is it a circle?", "teal yes no"])
    turns = [("what color is the shape?", "teal"), ("is it a circle?", "no")]
    rows = encode_conversation(Conversation("1", [PICTURE], turns), words, "lite")
    for row, (question, answer) in zip(rows, turns, strict=True):
        prompt, reply = words.encode(question).ids, words.encode(answer + "<eos>").ids
        assert row.input_ids == prompt + reply and row.labels == [-100] * len(prompt) + reply
    assert prompt_ids(words, *turns[0][:1], template="lite") == encode_prompt(words, turns[0][0])


@pytest.mark.parametrize("turn, kind", [
    (("what color is it, zebra?", "teal"), "mask"), (("what color?", "zebra"), "mask"), (("what color?", "Teal"), "mask"),
    (("what color?", "teal."), "mask"), (("what <eos>?", "teal"), "mask"), (("what color?", "teal <eos>"), "mask"),
    (("what color?", "teal  teal"), "mask"), (("what color?", ""), "empty"), (("\n\t ", "teal"), "empty"), ((None, "teal"), "turns"),
    (("what?", b"teal"), "turns"), (("what?", "a" * (LONGEST_TEXT + 1)), "text"), (("what? \ud83d", "teal"), "text")])
def test_what_a_tokenizer_cannot_say_back_is_refused(turn, kind):
    words = build_tokenizer(["what color is it?", "teal"])
    with pytest.raises(SampleError, match="^sample n 7: ") as error:
        encode_conversation(Conversation("n 7", [PICTURE], [turn]), words, "lite")
    assert error.value.kind == kind and error.value.sample == "n 7" and len(str(error.value)) < 300


def test_no_turns_and_plain_with_too_much(raw):
    for turns, images, template in (([], [PICTURE], "zephyr"), ([("a", "b")] * 2, [PICTURE], "plain"), ([("a", "b")], [], "plain")):
        with pytest.raises(SampleError, match="sample 1: got") as error:
            encode_conversation(Conversation("1", images, turns), raw, template)
        assert error.value.kind == "turns"


def mask_of(raw, template="zephyr"):
    turns = [("what is it?", "a circle"), ("its color?", "teal")]
    row, = encode_conversation(Conversation("7", [], turns), raw, template)
    return Codec(raw), TEMPLATES[template], row.input_ids, row.labels, [a for _, a in turns]


@pytest.mark.parametrize("template", ["zephyr", "llava"])
def test_every_single_wrong_label_is_found(raw, template):
    codec, form, ids, labels, answers = mask_of(raw, template)
    check_labels(codec, form, ids, labels, answers, "7")
    for i in range(len(ids)):
        for wrong in (-100, ids[i], ids[i] + 1):
            if wrong != labels[i]:
                with pytest.raises(SampleError, match="^sample 7: "):
                    check_labels(codec, form, ids, [*labels[:i], wrong, *labels[i + 1:]], answers, "7")


def test_shifted_empty_and_full_masks_are_found(raw):
    codec, form, ids, labels, answers = mask_of(raw)
    for wrong in ([-100] * len(ids), list(ids), [*labels[1:], -100], [-100, *labels[:-1]]):
        with pytest.raises(SampleError, match="^sample 7: "):
            check_labels(codec, form, ids, wrong, answers, "7")
    for others in (answers[::-1], answers[:1], [*answers, "x"], []):
        with pytest.raises(SampleError, match="sample 7: answer"):
            check_labels(codec, form, ids, labels, others, "7")


def test_a_template_that_begins_with_a_learned_token_is_refused(raw):
    bare = Template(asks=False)
    with pytest.raises(SampleError, match="begins with a learned token"):
        encode_conversation(Conversation("7", [PICTURE], [("a", "b")]), raw, bare)
    words = build_tokenizer(["teal"])
    with pytest.raises(SampleError, match="sample 7"):                        # it has no line break: `plain` cannot be said
        encode_conversation(Conversation("7", [PICTURE], [("a", "teal")]), words, "plain")


@pytest.mark.parametrize("template", ["chatml", None, 3])
def test_unknown_templates(raw, template):
    with pytest.raises(ValueError, match="template: got .*, need a Template or one of plain, llava, zephyr, lite"):
        encode_conversation(Conversation("7", [], [("a", "b")]), raw, template)


def test_a_template_of_your_own(raw):
    form = replace(TEMPLATES["zephyr"], user="Q: ", assistant="\nA:", space=" ", between="\n\n")
    row, = encode_conversation(Conversation("7", [], [("a", "b"), ("c", "d")]), raw, form)
    assert raw.decode(row.input_ids, skip_special_tokens=False) == "Q:  a\nA: b<|endoftext|>\n\nQ:  c\nA: d<|endoftext|>"


@settings(**FEW)
@given(st.integers(1, 80), st.integers(0, 1000))
def test_every_learned_token_is_kept_or_counted(raw, max_length, seed):
    conversation = random_conversation(random.Random(seed), seed)
    whole, = encode_conversation(conversation, raw, "zephyr")
    learned = [y for y in whole.labels if y != -100]
    if all(y == -100 for y in whole.labels[:max_length]):
        with pytest.raises(SampleError, match=f"nothing is left to learn in {max_length} tokens; {len(learned)} learned tokens") as error:
            encode_conversation(conversation, raw, "zephyr", max_length)
        assert error.value.kind == "cut"
    else:
        row, = encode_conversation(conversation, raw, "zephyr", max_length)
        assert row.input_ids == whole.input_ids[:max_length] and row.labels == whole.labels[:max_length]
        assert sum(y != -100 for y in row.labels) + row.cut == len(learned)


def test_tokenizers_without_an_end_of_text():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    bare = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    for tokenizer in (bare, PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>")):
        with pytest.raises(ValueError, match="tokenizer: has no end-of-text token"):
            Codec(tokenizer)


def test_padding_ids(raw, neox):
    assert Codec(raw).pad_id == Codec(neox).pad_id == 0 == Codec(neox).eos_id
    words = Codec(build_tokenizer(["a"]))
    assert (words.pad_id, words.eos_id, words.special) == (0, 1, {0, 1, 2})
    padded = fast(chat_tokenizer())
    padded.add_special_tokens({"pad_token": "<pad>"})
    assert Codec(padded).pad_id == padded.pad_token_id != 0


def test_errors_survive_a_process_boundary():
    import pickle
    error = sample_error("7", "mask", "text")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.sample, again.kind) == ("sample 7: text", "7", "mask") and type(error)("x").args == ("x",)


def test_view_of_rows(raw):
    row, = encode_conversation(Conversation("7", [], [("what\nis it?", "a circle")]), raw, "zephyr")
    view = show_turn(raw, row.input_ids, row.labels)
    text, marks = repr(view).splitlines()
    learned = "".join(c for c, m in zip(text, marks.ljust(len(text))) if m == "^")
    assert learned == "a·circle<|endoftext|>" and "⏎" in text
    page = view._repr_html_()
    assert "&lt;|endoftext|&gt;" in page and "<|" not in page


def other_tokenizer(kind):
    "As Llama's (a space before every text, words joined by it) and as BERT's (word pieces, lower case)."
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    texts = ["what color is the shape? it is a teal circle.", SYSTEM, "<|user|> <|assistant|> USER: ASSISTANT:", "0123456789abcdefghijklmnopqrstuvwxyz\n"] * 3
    special = {"vocab_size": 400, "show_progress": False, "special_tokens": ["<unk>", "<s>", "</s>"]}
    if kind == "llama":
        tokenizer, trainer = Tokenizer(models.BPE(unk_token="<unk>")), trainers.BpeTrainer(**special)
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        tokenizer, trainer = Tokenizer(models.WordPiece(unk_token="<unk>")), trainers.WordPieceTrainer(**special)
        tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("template", ["zephyr", "llava", "lite", "plain"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_tokenizers_of_other_families(kind, template):
    "What they cannot say back is refused; what passes is learned as it was said."
    tokenizer, passed = other_tokenizer(kind), 0
    for answer in ("teal", "a teal circle", "it is a teal circle.", "Teal", "  teal", "te  al", "\nteal", "teal circle 漢", "what is it? 7"):
        conversation = Conversation("7", [PICTURE], [("what color is the shape?", answer)])
        try:
            row, = encode_conversation(conversation, tokenizer, template)
        except SampleError as error:
            assert error.kind == "mask" and "sample 7: " in str(error)
            continue
        run = [label for label in row.labels if label != -100]
        end = len(Codec(tokenizer).literal(TEMPLATES[template].end))
        assert tokenizer.decode(run[:-end]).strip() == answer.strip() and row.labels[0] == -100
        passed += 1
    assert passed >= (0 if template == "plain" else 3)                 # `plain` needs a line break, which BERT's does not have

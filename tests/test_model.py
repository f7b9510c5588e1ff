"""The whole model: a picture read once against the full sequence and against single steps; questions; models on disk."""
import json
import os
import pickle
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

from measures import rms_error
from model_cases import HYBRID, batch_of
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model

from vlmamba_lite.data.easy_vqa import VQABatches
from vlmamba_lite.data.batches import collate, collate_by_image, collate_packed
from vlmamba_lite.connectors.attention_maps import connector_maps
from vlmamba_lite.data.conversations import (EOS, Conversation, Row, ask_ids, byte_tokenizer, encode_conversation,
                                             encode_prompt)
from vlmamba_lite.data.pictures import normalize, process_images
from vlmamba_lite.evaluation.answers import answer
from vlmamba_lite.files import SWITCH, load_weights, save_together, saved_files, tensors_in, write_atomically
from vlmamba_lite.language.model import MambaConfig, load_state, next_token_loss, save_state
from vlmamba_lite.connectors.connectors import CONNECTORS
from vlmamba_lite.model.presets import MODEL_PRESETS, VLMambaConfig, lite_config, tiny_config
from vlmamba_lite.model.saving import empty_model, load_connector, model_card
from vlmamba_lite.model.vlmamba import VLMamba, picture_tokens
from vlmamba_lite.connectors.msc import MambaScanConnector
from vlmamba_lite.vision.towers import half_range, load_encoder, new_tower

COMBINATIONS = [(connector, mixer) for connector in CONNECTORS for mixer in ("mamba", "mamba2")]
QUESTION = "what color is the shape?"
FILES = ["config.json", "model.safetensors", "tokenizer.json"]


def inputs(vocab_size, pictures=2, questions=3, length=7, dtype=torch.float32):
    "Random pictures, ids, and labels with a question's part and some padding left out."
    g = torch.Generator().manual_seed(1)
    images = torch.randn(pictures, 3, 64, 64, generator=g).to(dtype)
    ids = torch.randint(3, vocab_size, (pictures * questions, length), generator=g)
    labels = ids.clone()
    labels[:, :2] = -100
    labels[::2, -1:] = -100
    return images, ids, labels


def full_sequence(model, images, ids):
    "[visual; text] of every row as one sequence, its picture encoded anew: equation 7 as it stands. -> logits of the text"
    visual = model.see(images.repeat_interleave(len(ids) // len(images), 0))
    x = torch.cat([visual, model.language.embed(ids)], 1)
    return model.language(inputs_embeds=x).logits[:, visual.shape[1]:]


def token_by_token(model, images, ids):
    "The same by the recurrence alone: each visual token and each word is one step of every layer."
    layers = model.language.backbone.layers
    visual = model.see(images).repeat_interleave(len(ids) // len(images), 0)
    states = [layer.mixer.empty_state(len(ids)) for layer in layers]
    logits = []
    for x in torch.cat([visual, model.language.embed(ids)], 1).unbind(1):
        for i, layer in enumerate(layers):
            x, states[i] = layer.step(x, states[i])
        logits.append(model.language.head(x))
    return torch.stack(logits[visual.shape[1]:], 1)


def values_and_gradients(model, call, labels):
    model.zero_grad()
    logits = call()
    next_token_loss(logits, labels).backward()
    return logits.detach(), gradients_of(model)


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# Reading once is reading every time

@pytest.mark.parametrize("connector, mixer", COMBINATIONS)
@torch.no_grad()
def test_a_picture_read_once_is_the_full_sequence(make_model, small, connector, mixer):
    model = make_model(connector, mixer, n_layer=2).eval()
    images, ids, _ = inputs(small.tokenizer.get_vocab_size())
    once = model(batch_of(images, ids)).logits
    assert once.shape == (6, 7, small.tokenizer.get_vocab_size())
    for twin in (model(batch_of(images.repeat_interleave(3, 0), ids)).logits, full_sequence(model, images, ids), token_by_token(model, images, ids)):
        assert rms_error(once, twin) < 1e-4


@pytest.mark.parametrize("preset", MODEL_PRESETS)
@torch.no_grad()
def test_a_picture_read_once_is_the_full_sequence_for_presets(small, preset):
    torch.manual_seed(0)
    model = VLMamba(MODEL_PRESETS[preset](small.tokenizer.get_vocab_size()), small.tokenizer).eval()
    images, ids, _ = inputs(small.tokenizer.get_vocab_size())
    assert rms_error(model(batch_of(images, ids)).logits, full_sequence(model, images, ids)) < 1e-4


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-4), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize("connector, mixer", COMBINATIONS)
def test_and_so_are_its_gradients(make_model, small, connector, mixer, dtype, limit):
    model = make_model(connector, mixer, n_layer=2).eval().to(dtype)
    images, ids, labels = inputs(small.tokenizer.get_vocab_size(), dtype=dtype)
    model(batch_of(images, ids, labels)).loss.backward()                       # logits of positions that learn, and of no others
    own = gradients_of(model)
    once, gradients = values_and_gradients(model, lambda: model(batch_of(images, ids)).logits, labels)
    assert max(rms_error(own[name], g) for name, g in gradients.items()) < limit
    for twin in (lambda: model(batch_of(images.repeat_interleave(3, 0), ids)).logits, lambda: full_sequence(model, images, ids)):
        logits, twins = values_and_gradients(model, twin, labels)
        assert rms_error(once, logits) < limit
        errors = {name: rms_error(gradients[name], g) for name, g in twins.items()}
        assert all(g.norm() > 0 for g in twins.values()) and max(errors.values()) < limit, errors


def test_in_training_the_batch_norm_sees_the_same_pictures(make_model, small):
    model = make_model().train()
    images, ids, _ = inputs(small.tokenizer.get_vocab_size())
    assert rms_error(model(batch_of(images, ids)).logits, full_sequence(model, images, ids)) < 1e-4
    assert rms_error(model(batch_of(images, ids)).logits, make_model().eval()(batch_of(images, ids)).logits) > 1e-3      # so it is a real test


@torch.no_grad()
def test_rows_belong_to_their_picture(make_model, small):
    model = make_model().eval()
    images, ids, _ = inputs(small.tokenizer.get_vocab_size())
    logits = model(batch_of(images, ids)).logits
    other = model(batch_of(torch.stack([images[0], -images[1]]), ids)).logits
    assert rms_error(other[:3], logits[:3]) < 1e-6 and rms_error(other[3:], logits[3:]) > 1e-3
    assert rms_error(model(batch_of(images.flip(0), torch.cat([ids[3:], ids[:3]]))).logits, torch.cat([logits[3:], logits[:3]])) < 1e-6


@torch.no_grad()
def test_padding_does_not_reach_a_row(make_model, small):
    model = make_model().eval()
    images, ids, _ = inputs(small.tokenizer.get_vocab_size())
    logits, pads = model(batch_of(images, ids)).logits, torch.zeros(6, 4, dtype=torch.long)
    assert rms_error(model(batch_of(images, torch.cat([ids, pads], 1))).logits[:, :7], logits) < 1e-5
    mask = torch.cat([pads.bool(), torch.ones_like(ids).bool()], 1)
    assert rms_error(model(batch_of(images, torch.cat([pads, ids], 1), mask=mask)).logits[:, 4:], logits) < 1e-5


@torch.no_grad()
def test_loss_by_hand(make_model, small):
    model = make_model().eval()
    images, ids, labels = inputs(small.tokenizer.get_vocab_size())
    out = model(batch_of(images, ids, labels))
    log_p = F.log_softmax(model(batch_of(images, ids)).logits.double(), -1)
    want = [-log_p[r, t - 1, labels[r, t]] for r in range(6) for t in range(1, 7) if labels[r, t] != -100]
    assert len(want) == 3 * 5 + 3 * 4 and abs(out.loss.item() - torch.stack(want).mean().item()) < 1e-5
    assert model(batch_of(images, ids)).loss is None


# Batches of any layout: several pictures a text, none, or texts that share a line

LAYOUTS = {"plain": collate, "by image": collate_by_image, "packed": collate_packed,
           "packed wide": lambda rows, pad: collate_packed(rows, pad, 4 * max(len(row.input_ids) for row in rows)),
           "one line": lambda rows, pad: collate_packed(rows, pad, sum(len(row.input_ids) for row in rows))}


def random_rows(count, seed, pictures=True):
    "Texts of 4 to 12 tokens about no picture, one or two of a pool of three, in bytes; some are learned from in places only."
    rng = np.random.default_rng(seed)
    pool = torch.from_numpy(rng.integers(0, 256, (3, 3, 64, 64), dtype=np.uint8))
    rows = []
    for n in range(count):
        ids = rng.integers(0, 30, rng.integers(4, 13)).tolist()
        labels = [-100] + [token if rng.random() < 0.7 else -100 for token in ids[1:-1]] + ids[-1:]
        chosen = rng.choice(3, rng.integers(0, 3), replace=False) if pictures else []
        rows.append(Row(f"text {n}", pool[list(chosen)], ids, labels))
    return rows


def one_by_one(model, rows):
    "The slow twin: every text alone, its pictures' tokens before it, and the mean over all learned tokens."
    total, count = 0., 0
    for row in rows:
        x = model.language.embed(torch.tensor([row.input_ids]))
        if len(row.images):
            x = torch.cat([model.see(normalize(row.images).to(model.dtype)).flatten(0, 1)[None], x], 1)
        labels = torch.tensor(row.labels)
        logits = model.language(inputs_embeds=x).logits[0, -len(labels):]
        total = total + F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
        count += (labels[1:] != -100).sum()
    return total / count


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "hybrid"])
@pytest.mark.parametrize("pictures", [True, False])
def test_every_layout_gives_the_loss_and_the_gradients_of_one_text_at_a_time(make_model, mixer, layout, pictures):
    model = make_model(mixer=mixer, n_layer=2, embedding_std=0.5).eval().double()
    params = list(model.parameters())
    for seed in range(2):
        rows = random_rows(6, seed, pictures)
        assert not pictures or {len(row.images) for row in rows} == {0, 1, 2}
        out, want = model(LAYOUTS[layout](rows, 0)), one_by_one(model, rows)
        torch.testing.assert_close(out.loss, want, rtol=1e-9, atol=0)
        got, expected = (torch.autograd.grad(loss, params, allow_unused=True) for loss in (out.loss, want))
        for g, e in zip(got, expected):
            torch.testing.assert_close(torch.zeros(()) if g is None else g, torch.zeros(()) if e is None else e, rtol=1e-6, atol=1e-11)


def test_packed_texts_do_not_go_on_from_their_neighbours(make_model):
    model = make_model(n_layer=2, embedding_std=0.5).eval()
    batch = collate_packed(random_rows(6, 1, pictures=False), 0, 200)
    assert len(batch.input_ids) == 1 and len(batch.prefix_of) == 6
    leaking = model.language(batch.input_ids, mask=batch.mask, labels=batch.labels).loss
    assert (leaking - model(batch).loss).abs() > 1e-4


# Asking

def picture(size=(64, 64), mode="RGB"):
    g = torch.Generator().manual_seed(2)
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=g, dtype=torch.uint8)
    return Image.fromarray(noise.numpy()).convert(mode)


def greedy(model, image, question, count):
    "The most likely token, again and again, each from the full sequence."
    ids = encode_prompt(model.tokenizer, question)
    pixels = normalize(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None])
    new = []
    while len(new) < count and EOS not in map(model.tokenizer.id_to_token, new):
        new.append(full_sequence(model, pixels, torch.tensor([ids + new]))[0, -1].argmax().item())
    return model.tokenizer.decode(new)


@pytest.mark.parametrize("connector, mixer", COMBINATIONS)
@torch.no_grad()
def test_ask_a_picture_or_its_state(make_model, small, connector, mixer):
    model = make_model(connector, mixer, n_layer=2).eval()
    image = small.rows[0]["image"]
    state = model.read_image(image)
    for question in dict.fromkeys(small.data.questions[:8]):
        answer = model.ask(image, question, 4)
        assert isinstance(answer, str) and answer == model.ask(state, question, 4) == greedy(model, image, question, 4)


def test_an_answer_ends_at_eos(make_model):
    model = make_model(tie_embeddings=False).eval()
    stop, red = (model.tokenizer.token_to_id(word) for word in (EOS, "red"))
    with torch.no_grad():                                     # a head that says red to everything but red, and <eos> to red
        model.language.lm_head.weight.zero_()
        model.language.lm_head.weight[stop, 0], model.language.lm_head.weight[red, 0] = 1., -1.
        model.language.backbone.embedding.weight[:, 0] = -1000.
        model.language.backbone.embedding.weight[red, 0] = 1000.
    assert model.ask(picture(), QUESTION) == "red"
    with torch.no_grad():
        model.language.lm_head.weight[stop] = 0
        model.language.backbone.embedding.weight[red, 0] = -1000.
    assert model.ask(picture(), QUESTION) == " ".join(["red"] * 8)
    assert model.ask(picture(), QUESTION, max_new_tokens=3) == "red red red"


def test_asking_leaves_the_state_as_it_was(make_model):
    for mixer in ("mamba", "mamba2"):
        model = make_model(mixer=mixer).eval()
        state = model.read_image(picture())
        before = [t.clone() for layer in state for t in layer]
        first = model.ask(state, QUESTION)
        model.ask(state, "is there a circle?")
        assert all(torch.equal(a, b) for a, b in zip(before, (t for layer in state for t in layer)))
        assert model.ask(state, QUESTION) == first and not any(t.requires_grad for layer in state for t in layer)


def test_asking_leaves_the_model_as_it_was(make_model):
    "Also one still in training mode, whose batch norm would otherwise answer from, and learn from, the one picture."
    model = make_model().train()
    with torch.no_grad():                                     # answers that depend on the picture
        model.language.backbone.embedding.weight.mul_(0.05)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = model.read_image(picture())
    answer = model.ask(picture(), QUESTION)
    assert all(part.training for part in model.modules()) and all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    wanted = model.eval().read_image(picture())
    assert all(torch.equal(a, b) for x, y in zip(state, wanted) for a, b in zip(x, y)) and answer == model.ask(wanted, QUESTION)


def test_a_state_has_one_size_for_every_picture(make_model):
    for mixer, numbers in (("mamba", 32 * (4 + 4)), ("mamba2", (32 + 2 * 8) * 4 + 4 * 8 * 8)):
        model = make_model(mixer=mixer, n_layer=2).eval()
        states = [model.read_image(picture(size, mode)) for size, mode in
                  [((64, 64), "RGB"), ((1, 1), "RGB"), ((37, 91), "L"), ((300, 200), "RGBA"), ((640, 480), "P"), ((65, 64), "CMYK")]]
        assert all(sum(t.numel() for layer in s for t in layer) == 2 * numbers for s in states)
        assert all(t.isfinite().all() for s in states for layer in s for t in layer)


@pytest.mark.parametrize("question, match", [
    ("", "^question: got '', need at least one word$"), (" \n ", "^question: got .* need at least one word$"),
    ("what colour is the lorry?", "^question: got words this model has never read: lorry; it knows: .*circle"),
    ("<pad> <nothing>", "^question: ")])
def test_a_question_it_cannot_read(make_model, question, match):
    model = make_model().eval()
    for seen in (picture(), model.read_image(picture())):
        with pytest.raises(ValueError, match=match) as error:
            model.ask(seen, question)
        assert "\n" not in str(error.value)


# Conversations, several pictures, batches: each against everything read at once

def talker(mixer="mamba2", dtype=torch.float32, n_layer=2):
    "A tiny model that speaks bytes, with random weights."
    config = tiny_config(257)
    args = {"mamba": dict(d_state=4), "mamba2": dict(d_state=8, headdim=8, chunk_size=32), "attention": dict(headdim=8)}
    kind = HYBRID if mixer == "hybrid" else dict(mixer=mixer, mixer_args=args[mixer])
    config.language = MambaConfig(16, n_layer, 257, 1, embedding_std=0.01, **kind)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return VLMamba(config, byte_tokenizer()).to(dtype).eval()


def pixels_of(image, model):
    return normalize(process_images([image], 64)).to(model.dtype)


def photos():
    return [picture((64, 64)), picture((30, 50), "L"), picture((90, 20))]


def same_state(got, want, limit):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert type(a) is type(b)
        assert all(torch.equal(x, y) if x.dtype == torch.bool else rms_error(x, y) < limit for x, y in zip(a, b))


@torch.no_grad()
def at_once(model, pieces):
    "Pictures and lists of ids as one sequence, with no state at all. -> logits of everything, the state behind it"
    x = [model.see(pixels_of(piece, model)) if isinstance(piece, Image.Image) else model.language.embed(torch.tensor([piece]))
         for piece in pieces if piece != []]
    out = model.language(inputs_embeds=torch.cat(x, 1))
    return out.logits[0], out.state


@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "attention", "hybrid"])
@pytest.mark.parametrize("template", ["zephyr", "llava"])
@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str)
def test_a_chat_is_one_sequence(mixer, template, dtype, limit):
    "Every turn's words, and the state in the end, are those of the whole conversation read in one piece."
    model, (first, second, _) = talker(mixer, dtype), photos()
    chat = model.chat(first, template=template)
    pieces, done = [first], 0
    for turn, text in enumerate(("Who?", "And this?", "Why, then?")):
        if turn == 1:
            pieces, done = [*pieces, chat.ids[done:], second], len(chat.ids)
            chat.show(second)
        before = list(chat.ids)
        answer = chat.say(text, 5)
        asked = ask_ids(chat.prompt.codec, chat.prompt.template, text, "", not before)
        spoken = chat.ids[len(before) + len(asked):]
        assert chat.ids[:len(before) + len(asked)] == before + asked and spoken[-1] == chat.prompt.codec.eos_id
        assert answer == model.tokenizer.decode(spoken).removeprefix(chat.prompt.template.space)
        logits, _ = at_once(model, [*pieces, chat.ids[done:]])
        wanted = logits[-len(spoken) - 1:-1].argmax(-1).tolist()                       # the most likely next token, everywhere
        assert wanted[:len(spoken) - 1] == spoken[:-1]
    same_state(chat.state, at_once(model, [*pieces, chat.ids[done:]])[1], limit)
    assert [text for text, _ in chat.turns] == ["Who?", "And this?", "Why, then?"]


def test_a_chat_repeats_the_rows_it_was_trained_on():
    "The ids of a conversation are those of chapter 15's training row of the same turns."
    for template in ("zephyr", "llava"):
        model, turns = talker(), [("Who is it?", "A cat."), ("Why?", "Because\u2026")]
        chat = model.chat(picture(), template=template)
        for text, reply in turns:
            space = "" if template == "zephyr" else " "
            ids = model.tokenizer.encode(space + reply, add_special_tokens=False).ids + [model.tokenizer.token_to_id("<|endoftext|>")]
            model.language.stream = lambda *_, ids=ids, **__: iter(torch.tensor(ids)[:, None])
            pieces = list(chat.stream(text))
            assert "".join(pieces) == reply == chat.turns[-1][1] and all("\ufffd" not in piece for piece in pieces)
        row, = encode_conversation(Conversation("c", [picture()], turns), model.tokenizer, template)
        assert chat.ids == row.input_ids


def test_a_turn_reads_only_its_own_tokens(monkeypatch):
    model, read = talker(n_layer=1), []
    hidden, step = model.language.hidden, model.language.step
    monkeypatch.setattr(model.language, "hidden", lambda input_ids=None, inputs_embeds=None, **rest: (
        read.append((input_ids if inputs_embeds is None else inputs_embeds).shape[1]), hidden(input_ids, inputs_embeds, **rest))[1])
    monkeypatch.setattr(model.language, "step", lambda *args: (read.append(0.5), step(*args))[1])
    chat = model.chat(picture())
    assert read == [64]
    lengths = []
    for _ in range(4):
        read.clear()
        before = len(chat.ids)
        chat.say("Who is it?", 6)
        lengths.append(sum(n for n in read if n != 0.5))
        assert sum(n == 0.5 for n in read) <= 5 and lengths[-1] <= len(chat.ids) - before + 10
    assert lengths[1] == lengths[2] == lengths[3]                                      # the fourth turn costs what the second did
    read.clear()
    waiting = len(chat.pending)
    assert chat.state is chat.state and read == [waiting] and waiting <= 8             # the last answer, its end, one token before it


@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "attention", "hybrid"])
def test_a_chat_goes_on_from_disk(tmp_path, mixer):
    "Saved in the middle and taken up by a model that was loaded, it ends as the one that was never interrupted."
    model = talker(mixer)
    model.save_pretrained(tmp_path / "model")
    straight, broken = model.chat(picture()), model.chat(picture())
    for chat in (straight, broken):
        chat.say("Who?", 4)
    save_state(broken.state, tmp_path / "chat.safetensors")
    later = VLMamba.from_pretrained(tmp_path / "model").chat(state=load_state(tmp_path / "chat.safetensors"), begun=True)
    assert later.say("And why?", 6) == straight.say("And why?", 6)
    same_state(later.state, straight.state, 1e-5)
    sizes = {sum(p.numel() for layer in s for p in layer) for s in (broken.state, straight.state, model.read_image(picture()))}
    assert (len(sizes) == 1) == (mixer not in ("attention", "hybrid"))


def test_a_picture_is_asked_again_from_disk(make_model, tmp_path):
    model = make_model().eval()
    save_state(model.read_image(picture()), tmp_path / "photo.safetensors")
    again = load_state(tmp_path / "photo.safetensors")
    for question in (QUESTION, "is there a circle?"):
        assert model.ask(again, question) == model.ask(picture(), question)
    assert (tmp_path / "photo.safetensors").stat().st_size < 20_000


@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "attention", "hybrid"])
def test_pictures_one_after_another(mixer):
    model, state = talker(mixer, torch.float64), None
    for image in photos():
        state = model.read_image(image, state)
    same_state(state, at_once(model, photos())[1], 1e-10)
    other = model.read_image(photos()[0], model.read_image(photos()[1]))
    assert rms_error(other[0][0].double(), model.read_image(photos()[1], model.read_image(photos()[0]))[0][0].double()) > 1e-3


def test_turns_that_stand_alone(make_model):
    "The template of our own models: each question continues the picture, as in training."
    model = make_model().eval()
    chat = model.chat(picture())
    for question in (QUESTION, "is there a circle?", QUESTION):
        assert chat.say(question, 4) == model.ask(picture(), question, 4)
    same_state(chat.state, model.read_image(picture()), 1e-6)
    assert len(chat.turns) == 3
    with pytest.raises(ValueError, match="^question: got words this model has never read"):
        chat.say("what colour is the lorry?")
    assert len(chat.turns) == 3 and chat.say(QUESTION, 4) == model.ask(picture(), QUESTION, 4)


def test_an_answer_that_is_not_waited_for():
    "A stream that is left in the middle: the conversation goes on from what was said."
    model = talker(dtype=torch.float64)
    chat = model.chat(picture())
    for piece in chat.stream("Tell me", 30, temperature=1., generator=torch.Generator().manual_seed(0)):
        if piece:
            break
    chat.say("Go on", 3)
    assert len(chat.turns) == 2
    same_state(chat.state, at_once(model, [picture(), chat.ids])[1], 1e-10)
    assert len(model.chat().say("No picture", 3)) >= 0                                 # nor does it need one


@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "attention", "hybrid"])
def test_a_batch_of_questions_is_each_alone(mixer):
    model, (a, b, c) = talker(mixer, torch.float64), photos()
    questions = ["Who?", "What is this, and why is it here?", "A", "Where is the other one?"]
    assert answer(model, [(a, question) for question in questions], max_new_tokens=6) == [model.ask(a, question, 6) for question in questions]
    state = model.read_image(b)
    g = torch.Generator().manual_seed(0)
    wild = [[type(s)(*(t if t.dtype == torch.bool else 3 * torch.randn(t.shape, generator=g, dtype=t.dtype) for t in s)) for s in state]
            for _ in questions]                                                        # as different as pictures can be
    for images in (state, [a, state, c, a], wild):
        each = images if images is not state else [state] * 4
        assert answer(model, list(zip(each, questions)), max_new_tokens=6) == [model.ask(image, question, 6) for image, question in zip(each, questions)]
    assert len(set(answer(model, [(state, "Who?") for state in wild], max_new_tokens=12))) == 4                         # each its own


def test_a_batch_reads_each_picture_once(make_model, monkeypatch):
    model, (a, b, _) = make_model().eval(), photos()
    calls, read = [], model.read
    monkeypatch.setattr(model, "read", lambda *args: (calls.append(len(args[0])), read(*args))[1])
    answers = answer(model, list(zip([a, b, a, a], [QUESTION, QUESTION, "is there a circle?", QUESTION])))
    assert calls == [2] and answers[0] == answers[3]


@pytest.mark.parametrize("other", [dict(mixer="mamba"), dict(n_layer=3), dict(mixer="attention"), dict(mixer="hybrid")], ids=str)
def test_a_state_of_another_model(other):
    model, state = talker(), talker(**other).read_image(picture())
    calls = (lambda: model.ask(state, "Who?"), lambda: model.chat(state=state), lambda: model.read_image(picture(), state),
             lambda: answer(model, [(state, "Who?")]), lambda: model.chat(state))
    for call in calls:
        with pytest.raises(ValueError, match="^state: got .* need 2 of Mamba2State .*; it is from another model$") as error:
            call()
        assert "\n" not in str(error.value)


def test_a_state_of_another_width_or_none_at_all(make_model):
    wide = VLMamba(lite_config(257), talker().tokenizer).eval().read_image(picture())
    for state in (wide, wide[:2], []):
        with pytest.raises(ValueError, match="it is from another model$"):
            talker().ask(state, "Who?")
    for junk in ("a.png", None, [1, 2], torch.zeros(2)):
        with pytest.raises(ValueError, match="^image: got .*, need a PIL picture, or a state from read_image$"):
            talker().ask(junk, "Who?")


# Configurations

def test_presets():
    assert set(MODEL_PRESETS) == {"lite", "tiny", "emoji"}
    sizes = {name: sum(p.numel() for p in VLMamba(preset(31)).parameters()) for name, preset in MODEL_PRESETS.items()}
    assert 350_000 < sizes["lite"] < 450_000 and sizes["tiny"] < 20_000
    config = lite_config(31)
    assert (config.connector, config.connector_args["scan"]) == ("vss_l2", "bsm")                 # the paper's final model
    assert tiny_config(9).language.vocab_size == 9 and tiny_config(9).language.mixer == "mamba2"


def test_a_configuration_survives_json():
    for preset in MODEL_PRESETS.values():
        config = preset(31)
        assert VLMambaConfig(**json.loads(json.dumps(asdict(config)))) == config
        assert isinstance(VLMambaConfig(**asdict(config)).language, MambaConfig)


def test_an_unknown_connector_is_named():
    with pytest.raises(ValueError, match=r"^connector: got 'cnn', need one of \['mlp', 'msc_advanced', 'msc_basic', 'vss_l2', 'vss_mlp'\]$"):
        VLMambaConfig({}, "cnn", {}, MambaConfig())


@pytest.mark.parametrize("connector, form", [("msc_basic", "basic"), ("msc_advanced", "advanced")])
def test_the_mamba2_scan_connector_by_name(make_model, tmp_path, connector, form):
    "Name and arguments reach it, from a configuration and from a saved model."
    model = make_model(connector).eval()
    assert isinstance(model.connector, MambaScanConnector) and (model.connector.form, model.connector.variant) == (form, "paper")
    assert sum("swiglu" in name for name in model.state_dict()) == (6 if form == "advanced" else 0)
    config = tiny_config(model.config.language.vocab_size)
    config.connector, config.connector_args = connector, dict(scan="csm", d_state=4, blocks=2, norm="layernorm", backend="quadratic")
    model = VLMamba(config, model.tokenizer).eval()
    model.save_pretrained(tmp_path)
    again = VLMamba.from_pretrained(tmp_path)
    scan = again.connector.blocks[1].mvss
    assert (len(again.connector.blocks), scan.scan, scan.backend, scan.d_state) == (2, "csm", "quadratic", 4)
    images = inputs(31)[0]
    assert again.see(images).shape == (2, 64, 16) and torch.equal(again.see(images), model.see(images))


def test_the_released_connector_is_an_argument():
    config = tiny_config(31)
    config.connector, config.connector_args = "msc_advanced", dict(variant="released", d_state=4)
    model = VLMamba(config)
    assert len(model.connector.blocks) == 2 and model.connector.variant == "released"
    assert model.see(inputs(31)[0]).shape == (2, 64, 16)


# What the connector sees

SCANNING = [connector for connector in CONNECTORS if connector != "mlp"]


@pytest.mark.parametrize("connector", SCANNING)
def test_picture_tokens_are_what_the_connector_reads(make_model, connector):
    model, image = make_model(connector).train(), picture((40, 90))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    tokens, size = picture_tokens(model, image)
    assert model.training and all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert tokens.shape == (1, 64, 16) and size == (8, 8) and not tokens.requires_grad
    pixels = normalize(process_images([image], 64))
    torch.testing.assert_close(model.eval().connector(tokens, size), model.see(pixels))


@pytest.mark.parametrize("connector", SCANNING)
def test_maps_show_what_training_changes(make_model, connector):
    fresh, model = make_model(connector), make_model(connector)
    images, ids, labels = inputs(model.config.language.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(batch_of(images, ids, labels)).loss.backward()
        optimizer.step()
    sights = [connector_maps(m.connector, *picture_tokens(m, picture()), (2, 5)) for m in (fresh, model)]
    for name, before in sights[0].items():
        after = sights[1][name]
        assert before.shape == after.shape == (8, 8) and after.isfinite().all() and rms_error(after, before) > 1e-3


# On disk

@pytest.mark.parametrize("connector, mixer", COMBINATIONS)
def test_there_and_back(make_model, tmp_path, connector, mixer):
    model = make_model(connector, mixer, n_layer=2)
    model(batch_of(*inputs(31)[:2]))                                    # the batch norm's averages are no longer what they start with
    model.eval().save_pretrained(tmp_path / "new" / "folder")
    again = VLMamba.from_pretrained(tmp_path / "new" / "folder")
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == FILES
    assert again.config == model.config and not again.training and again.device == torch.device("cpu")
    assert again.tokenizer.to_str() == model.tokenizer.to_str()
    ours, theirs = model.state_dict(), again.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)
    assert model.ask(picture(), QUESTION) == again.ask(picture(), QUESTION)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_still_tied(make_model, tmp_path, tied):
    model = make_model(tie_embeddings=tied)
    model.save_pretrained(tmp_path)
    again = VLMamba.from_pretrained(tmp_path)
    head, embedding = again.language.lm_head.weight, again.language.backbone.embedding.weight
    assert (head is embedding) == tied
    with torch.no_grad():
        head.fill_(7)
    assert (embedding == 7).all() == tied
    stored = {name for name in load_file(tmp_path / "model.safetensors") if "embedding" in name or "lm_head" in name}
    assert len(stored) == (1 if tied else 2)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())


def test_the_files_can_be_read_without_this_library(make_model, small, tmp_path):
    from tokenizers import Tokenizer
    model = make_model()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(weights[name], t) for name, t in model.state_dict().items() if name in weights)
    assert set(model.state_dict()) - set(weights) == {"language.lm_head.weight"}                 # tied: it is the embedding
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "vlmamba" and config["language"]["d_model"] == 16
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(QUESTION).ids == encode_prompt(small.tokenizer, QUESTION)


def test_saved_again_over_itself(make_model, tmp_path):
    make_model(seed=1).save_pretrained(tmp_path)
    model = make_model(connector="mlp", seed=2)
    model.save_pretrained(tmp_path)
    again = VLMamba.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert sorted(p.name for p in tmp_path.iterdir()) == FILES


def test_no_pickle_is_involved(make_model, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("pickle")
    for module, names in ((pickle, ("dump", "dumps", "load", "loads", "Pickler", "Unpickler")), (torch, ("save", "load"))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    model = make_model()
    model.save_pretrained(tmp_path)
    VLMamba.from_pretrained(tmp_path)


def test_files_are_as_readable_as_any_other(make_model, tmp_path):
    "A model in a shared folder is not for its owner alone: no file is stricter than one that was simply written."
    make_model().save_pretrained(tmp_path / "model")
    (tmp_path / "plain").write_text("")
    modes = {p.name: oct(p.stat().st_mode) for p in (tmp_path / "model").iterdir()}
    assert set(modes.values()) == {oct((tmp_path / "plain").stat().st_mode)}, modes


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "notes.txt"
    write_atomically(path, lambda part: part.write_text("old"))

    def fail(part):
        part.write_text("ne")
        assert path.read_text() == "old"                      # never a half-written file under the good name
        raise OSError("disk full")
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["notes.txt"]
    write_atomically(str(path), lambda part: part.write_text("new"))
    assert path.read_text() == "new" and [p.name for p in path.parent.iterdir()] == ["notes.txt"]


def test_a_save_that_fails_leaves_the_old_model(make_model, tmp_path, monkeypatch):
    old = make_model(seed=1)
    old.save_pretrained(tmp_path)

    def fail(_, path, **__):
        path.write_bytes(b"half")
        raise OSError("disk full")
    monkeypatch.setattr("vlmamba_lite.files.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        make_model(seed=2).save_pretrained(tmp_path)
    again = VLMamba.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(old.state_dict().values(), again.state_dict().values()))


@pytest.fixture(scope="module")
def saved(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    make_model().save_pretrained(folder)
    return folder


def refused(folder, kind, match):
    with pytest.raises(kind, match=match) as error:
        VLMamba.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_missing_files_are_named(saved, tmp_path):
    refused(tmp_path / "nowhere", FileNotFoundError, "^model: no folder .*nowhere$")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", FileNotFoundError, "^model: no folder .*file$")
    for missing in FILES:
        folder = shutil.copytree(saved, tmp_path / missing)
        (folder / missing).unlink()
        refused(folder, FileNotFoundError, f"^model: no .*{missing} in ")
    assert [p.name for p in empty_model(VLMamba, saved)[1]] == ["model.safetensors"]


@pytest.mark.parametrize("text", ['{"model_type": "llava"}', "{}", '{"vision": {}}'])
def test_a_config_of_something_else(saved, tmp_path, text):
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "config.json").write_text(text)
    refused(folder, ValueError, "config.json: got no model_type 'vlmamba', need a config.json written by save_pretrained$")


@pytest.mark.parametrize("change", [
    lambda c: "{", lambda c: "", lambda c: "[1]", lambda c: json.dumps({"model_type": "vlmamba"}),
    lambda c: json.dumps({**c, "colour": "red"}), lambda c: json.dumps({**c, "connector": "cnn"}),
    lambda c: json.dumps({**c, "connector_args": {"scam": "bsm"}}), lambda c: json.dumps({**c, "vision": {"dim": 16, "wdth": 8}})],
    ids=["torn", "empty", "list", "fields missing", "field too many", "connector", "connector_args", "vision"])
def test_a_damaged_config(saved, tmp_path, change):
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "config.json").write_text(change(json.loads((folder / "config.json").read_text())))
    refused(folder, ValueError, "config.json|connector: got 'cnn'")


@pytest.mark.parametrize("path, value", [
    ("vision", 5), ("vision.width", "a"), ("vision.image_size", 10 ** 30), ("connector", 3), ("connector_args", []), ("connector_args.d_state", -1),
    ("connector_args.expand", "x"), ("connector_args.hidden_dim", 10 ** 12), ("language.d_model", 10 ** 30), ("language.n_layer", 10 ** 9),
    ("language.norm_eps", float("nan")), ("language.norm_eps", "x"), ("language.mixer_args", None), ("language.mixer_args.chunk_size", "a"),
    ("language.tie_embeddings", "yes"), ("language.residual_in_fp32", None)])
def test_a_wrong_value_is_named_with_its_file(saved, tmp_path, path, value):
    folder = shutil.copytree(saved, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    *lead, name = path.split(".")
    part = config
    for key in lead:
        part = part[key]
    part[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, ValueError, rf"config.json: {name}: got .*, need ")


def test_the_tokenizer_of_another_model(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    refused(folder, ValueError, r"tokenizer.json: got 257 words, need at most \d+: it is another model's$")


@pytest.mark.parametrize("size", [0, 4, 100, -10])
def test_truncated_weights(saved, tmp_path, size):
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:size])
    refused(folder, ValueError, "model.safetensors")


@pytest.mark.parametrize("text", ["", "{", '{"version": 1}'])
def test_a_damaged_tokenizer(saved, tmp_path, text):
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "tokenizer.json").write_text(text)
    refused(folder, ValueError, "tokenizer.json")


@pytest.mark.parametrize("change", ["shape", "missing", "extra"])
def test_weights_that_do_not_fit_are_named(saved, tmp_path, change):
    folder, name = shutil.copytree(saved, tmp_path / "model"), "vision.position"
    weights = load_file(folder / "model.safetensors")
    if change == "shape":
        weights[name] = weights[name][:5].clone()
    elif change == "missing":
        del weights[name]
    else:
        weights[name := "vision.pose"] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors")
    refused(folder, ValueError, rf"model.safetensors.*{name}")


def test_another_connector_than_the_weights(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "connector": "mlp", "connector_args": {}}))
    refused(folder, ValueError, "model.safetensors.*connector")


# In shards, and filled tensor by tensor

def same_model(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)


def shards_of(folder):
    return sorted(p.name for p in folder.glob("*.safetensors"))


def test_one_file_is_what_safetensors_writes(make_model, tmp_path):
    for i, model in enumerate((make_model(), make_model("mlp", "mamba", tie_embeddings=False))):
        save_model(model, str(tmp_path / f"{i}.safetensors"))
        model.save_pretrained(tmp_path / str(i))
        assert (tmp_path / str(i) / "model.safetensors").read_bytes() == (tmp_path / f"{i}.safetensors").read_bytes()


def test_shards_are_named_as_transformers_names_them(make_model, tmp_path):
    model = make_model().eval()
    model.save_pretrained(tmp_path, max_shard_size=10_000)
    names, index = shards_of(tmp_path), json.loads((tmp_path / "model.safetensors.index.json").read_text())
    n = len(names)
    assert n > 2 and names == [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names, "config.json", "model.safetensors.index.json", "tokenizer.json"])
    held = {}
    for name in names:
        with safe_open(tmp_path / name, "pt") as file:
            held |= {tensor: name for tensor in file.keys()}
    assert held == index["weight_map"] and set(model.state_dict()) - set(held) == {"language.lm_head.weight"}
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for n, t in model.state_dict().items() if n in held)
    assert [p.name for p in empty_model(VLMamba, tmp_path)[1]] == names
    again = VLMamba.from_pretrained(tmp_path)
    assert same_model(model, again) and again.ask(picture(), QUESTION) == model.ask(picture(), QUESTION)
    assert again.language.lm_head.weight is again.language.backbone.embedding.weight
    assert same_model(load_connector(make_model(seed=5), tmp_path).connector, model.connector)


def test_what_transformers_reads_shards_with_reads_ours(make_model, tmp_path):
    from transformers.modeling_utils import load_state_dict
    from transformers.utils.hub import get_checkpoint_shard_files
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    files, _ = get_checkpoint_shard_files(str(tmp_path), str(tmp_path / "model.safetensors.index.json"))
    weights = {name: t for file in files for name, t in load_state_dict(file).items()}
    assert all(torch.equal(weights[name], t) for name, t in model.state_dict().items() if name in weights) and len(weights) > 20


def test_no_shard_of_an_earlier_save_is_left(make_model, tmp_path):
    models = {size: make_model(seed=i) for i, size in enumerate((8_000, 20_000, "5GB", 8_000))}
    counts = []
    for size, model in models.items():
        model.save_pretrained(tmp_path, max_shard_size=size)
        counts.append(len(shards_of(tmp_path)))
        assert same_model(VLMamba.from_pretrained(tmp_path), model)
        assert (tmp_path / "model.safetensors.index.json").exists() == (counts[-1] > 1)
        assert not list(tmp_path.glob("new.*")) and not (tmp_path / SWITCH).exists()
    assert counts[0] > counts[1] > counts[2] == 1


@pytest.mark.parametrize("size", ["large", "", None, []])
def test_a_shard_size_that_is_none(make_model, tmp_path, size):
    with pytest.raises(ValueError, match=r"^max_shard_size: got .*, need bytes as a number or like '5GB'$"):
        make_model().save_pretrained(tmp_path, max_shard_size=size)
    assert not list(tmp_path.iterdir())


def test_a_shard_that_is_missing_or_damaged(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "a", max_shard_size=10_000)
    first = shards_of(tmp_path / "a")[0]
    for damage, kind, match in ((lambda p: p.unlink(), FileNotFoundError, f"^model: no {first} in "),
                                (lambda p: p.write_bytes(p.read_bytes()[:-7]), ValueError, first)):
        folder = shutil.copytree(tmp_path / "a", tmp_path / "b", dirs_exist_ok=True)
        damage(folder / first)
        refused(folder, kind, match)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a"}}')
    refused(folder, ValueError, "index.json: got no weight_map of plain file names")


def test_a_tensor_that_is_in_two_shards(make_model, tmp_path):
    make_model().save_pretrained(tmp_path, max_shard_size=10_000)
    first, second = shards_of(tmp_path)[:2]
    ours, theirs = load_file(tmp_path / first), load_file(tmp_path / second)
    name = sorted(ours)[0]
    save_file({**theirs, name: ours[name]}, tmp_path / second)
    VLMamba.from_pretrained(tmp_path)                                    # twice the same is fine
    save_file({**theirs, name: ours[name] + 1}, tmp_path / second)
    refused(tmp_path, ValueError, rf"1 copies that differ: {name}")


def test_all_that_does_not_fit_is_in_one_error(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["vision.position"] = weights["vision.position"][:5].clone()
    weights["vision.pose"] = weights.pop("vision.norm.weight")
    del weights["vision.stages.0.1.running_mean"]                        # a buffer is as necessary as a parameter
    save_file(weights, folder / "model.safetensors")
    refused(folder, ValueError, r"2 missing: vision.norm.weight, vision.stages.0.1.running_mean; 1 unexpected: vision.pose; "
                                r"1 of another shape: vision.position: got \(5, 16\), need \(64, 16\)")


def test_loading_draws_no_random_number(saved):
    before = torch.get_rng_state()
    VLMamba.from_pretrained(saved)
    assert torch.equal(torch.get_rng_state(), before)


def resident(reset=False):
    "Bytes of this process in memory now, and the most there were since the last reset."
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    found = dict(re.findall(r"(VmHWM|VmRSS):\s+(\d+)", Path("/proc/self/status").read_text()))
    return int(found["VmRSS"]) * 1024, int(found["VmHWM"]) * 1024


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux, which tells the peak of a process")
@pytest.mark.parametrize("dtype, share", [(torch.float32, 1), (torch.bfloat16, 0.5)])
def test_loading_takes_the_weights_and_one_tensor(small, tmp_path, dtype, share):
    "Pages of the files that are mapped count, too."
    config = lite_config(small.tokenizer.get_vocab_size())
    config.language = MambaConfig(768, 6, 31, 1, mixer_args=dict(d_state=8))
    model = VLMamba(config, small.tokenizer)
    model.save_pretrained(tmp_path, max_shard_size="40MB")
    sizes = [t.numel() * t.element_size() for t in model.state_dict().values()]
    del model
    before, _ = resident(reset=True)
    again = VLMamba.from_pretrained(tmp_path, dtype=dtype)
    assert sum(sizes) > 60e6 and resident()[1] - before < share * sum(sizes) + max(sizes) + 8e6
    assert again.dtype == dtype


@pytest.mark.parametrize("wanted, kept", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (None, torch.bfloat16)])
def test_dtypes(make_model, tmp_path, wanted, kept):
    model = make_model().to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path)
    again = VLMamba.from_pretrained(tmp_path, dtype=wanted)
    assert {p.dtype for p in again.parameters()} == {kept} and again.dtype == kept
    counts = [t for name, t in again.state_dict().items() if "num_batches" in name]
    assert counts and all(t.dtype == torch.int64 for t in counts)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(again.parameters(), model.parameters()))


@pytest.mark.parametrize("kind", ["tiny-siglip", "tiny-clip", "tiny-dinov2", "tiny-dinov2-registers", "tiny-dinov2+tiny-siglip"])
def test_a_tower_is_whole_again(small, tmp_path, kind):
    "With the buffers that are in no file, frozen as it was, and blind to the random generator."
    parts = []
    for name in kind.split("+"):
        new_tower(name).save_pretrained(tmp_path / name)
        size = {"height": 32, "width": 32}
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(dict(size=size, image_mean=[.5] * 3, image_std=[.5] * 3)))
        parts.append(str(tmp_path / name))
    eye = half_range(load_encoder(" + ".join(parts)))
    config = tiny_config(small.tokenizer.get_vocab_size())
    config.vision = eye.spec()
    model = VLMamba(config, small.tokenizer).eval()
    model.vision.load_state_dict(eye.state_dict())
    model.save_pretrained(tmp_path / "model", max_shard_size=40_000)
    before = torch.get_rng_state()
    again = VLMamba.from_pretrained(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(t.is_meta for t in [*again.parameters(), *again.buffers()])
    buffers = dict(model.named_buffers())
    assert {n: t.tolist() for n, t in again.named_buffers()} == {n: t.tolist() for n, t in buffers.items()}
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    assert not any(p.requires_grad for p in again.vision.parameters()) and all(p.requires_grad for p in again.connector.parameters())
    assert again.ask(picture(), QUESTION) == model.ask(picture(), QUESTION)


def test_marks_of_parameters_stay(saved, make_model):
    marks = [{n for n, p in m.named_parameters() if getattr(p, "_no_weight_decay", False)} for m in (make_model(), VLMamba.from_pretrained(saved))]
    assert marks[0] == marks[1] != set()


def test_weights_are_copied_into_a_model_that_has_memory(make_model, saved):
    "Where they are, so that an optimizer still holds the same parameters, and in the dtype that is there."
    model = make_model(seed=7).double()
    params = list(model.parameters())
    load_weights(model, tensors_in(saved / "model.safetensors"))
    assert all(a is b for a, b in zip(params, model.parameters())) and model.dtype == torch.float64
    again = VLMamba.from_pretrained(saved)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    with pytest.raises(ValueError, match="^weights: the weights do not fit the model; .*of another shape: "):
        load_weights(make_model(d_model=8), tensors_in(saved / "model.safetensors"))


def test_a_save_is_all_or_nothing(tmp_path):
    "A reader sees the files of one save, at every moment of the next one."
    def files(text, *names):
        return {name: lambda path: path.write_text(text) for name in names}

    def content():
        find = saved_files(tmp_path)
        return {name: find(name).read_text() for name in ("a", "b", "model-1-of-2.safetensors") if find(name)}
    save_together(tmp_path, files("old", "a", "b", "model-1-of-2.safetensors"))
    old, new, seen = content(), {"a": "new", "b": "new"}, []

    def look(path):
        seen.append(content())
        path.write_text("new")
    save_together(tmp_path, {"a": look, "b": look})
    assert seen == [old, old] and content() == new
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    # killed after the switch: new files and old ones lie side by side, and the list says which count
    save_together(tmp_path, files("old", "a", "b", "model-1-of-2.safetensors"))
    (tmp_path / "a").write_text("new")
    (tmp_path / "new.b").write_text("new")
    (tmp_path / SWITCH).write_text('{"files": ["a", "b"]}')
    assert content() == new
    save_together(tmp_path, files("newer", "a"))                         # the next save first puts the last one into place
    assert content() == {"a": "newer", "b": "new"} and sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


# For others: the card and the Hub, whose API is a stand-in here

def test_a_card(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path, card="somebody/tiny")
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == sorted(["README.md", "example.png", *FILES])
    text = (tmp_path / "README.md").read_text()
    assert all((tmp_path / name).read_bytes() == (tmp_path / "plain" / name).read_bytes() for name in FILES)
    metadata, body = text.removeprefix("---\n").split("---\n", 1)
    example = [{"type": "image", "url": "example.png"}, {"type": "text", "text": "what color is the shape?"}]
    assert yaml.safe_load(metadata) == {"library_name": "vlmamba_lite", "pipeline_tag": "image-text-to-text", "tags": ["vl-mamba", "mamba2"],
                                        "widget": [{"example_title": "A picture and a question", "messages": [{"role": "user", "content": example}]}]}
    total = sum(p.numel() for p in model.parameters())
    assert f"{total:,}" in body and 'from_pretrained("somebody/tiny")' in body and "`vss_l2`" in body
    assert "\nimport vlmamba_lite\n" in body                             # nbdev rewrites imports, also those in a text
    assert "No accuracy was measured" in body and "%" not in body
    VLMamba.from_pretrained(tmp_path)


def test_metadata_is_what_the_hub_reads(make_model):
    from huggingface_hub import ModelCard
    for model in (make_model(), make_model("mlp", "mamba")):
        data = ModelCard(model_card(model)).data
        assert (data.library_name, data.pipeline_tag) == ("vlmamba_lite", "image-text-to-text")
        assert data.tags == ["vl-mamba", model.config.language.mixer]


def test_a_card_is_renewed_but_not_somebody_elses(make_model, tmp_path):
    make_model("mlp").save_pretrained(tmp_path, card="a/b")
    make_model("vss_l2").save_pretrained(tmp_path, card="a/c")
    assert "`vss_l2`" in (tmp_path / "README.md").read_text() and "a/c" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("# Mine")
    make_model().save_pretrained(tmp_path, card="a/d")
    assert (tmp_path / "README.md").read_text() == "# Mine"


class Hub:
    "What the tests need of `HfApi` and of downloads: repositories as folders."
    def __init__(self, folder):
        self.folder, self.calls = folder, []

    def api(self, token=None):
        self.calls.append(("api", token))
        return self

    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.calls.append(("create", repo_id, private, exist_ok))
        return SimpleNamespace(repo_id=f"me/{repo_id}")                                # the account's name is added there

    def upload_folder(self, repo_id, folder_path, commit_message, delete_patterns=()):
        self.calls.append(("upload", repo_id, commit_message))
        for path in [p for pattern in delete_patterns for p in (self.folder / repo_id).glob(pattern)]:
            path.unlink()
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)
        return f"https://hub/{repo_id}/commit/1"

    def download(self, model, name, revision=None, local_files_only=False):
        self.calls.append(("download", model, name))
        if not (self.folder / model / name).is_file():
            raise EntryNotFoundError("404")
        return str(self.folder / model / name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    there = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", there.api)
    monkeypatch.setattr("vlmamba_lite.files.hf_hub_download", there.download)
    return there


def test_to_the_hub_and_back(make_model, hub, tmp_path):
    model = make_model().eval()
    assert model.push_to_hub("tiny", private=True, token="secret", message="First") == "https://hub/me/tiny/commit/1"
    assert hub.calls == [("api", "secret"), ("create", "tiny", True, True), ("upload", "me/tiny", "First")]
    assert sorted(p.name for p in (hub.folder / "me" / "tiny").iterdir()) == sorted(["README.md", "example.png", *FILES])
    card = (hub.folder / "me" / "tiny" / "README.md").read_text()
    assert 'from_pretrained("me/tiny")' in card and "secret" not in card
    again = VLMamba.from_pretrained("me/tiny")
    assert again.ask(picture(), QUESTION) == model.ask(picture(), QUESTION)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_shards_from_the_hub(make_model, hub):
    model = make_model().eval()
    model.save_pretrained(hub.folder / "me" / "large", max_shard_size=10_000)
    assert same_model(VLMamba.from_pretrained("me/large"), model)
    assert same_model(load_connector(make_model(seed=3), "me/large").connector, model.connector)
    asked = [call[2] for call in hub.calls if call[0] == "download"]
    assert "model.safetensors.index.json" in asked and "model.safetensors" not in asked


def test_no_shard_of_an_earlier_upload_is_left(make_model, hub):
    make_model().save_pretrained(hub.folder / "me" / "tiny", max_shard_size=10_000)
    (hub.folder / "me" / "tiny" / "notes.txt").write_text("mine")
    model = make_model(seed=4)
    model.push_to_hub("tiny")
    assert sorted(p.name for p in (hub.folder / "me" / "tiny").iterdir()) == sorted(["README.md", "example.png", "notes.txt", *FILES])
    assert same_model(VLMamba.from_pretrained("me/tiny"), model)


def test_what_is_not_on_the_hub(hub, monkeypatch):
    refused("me/nothing", FileNotFoundError, "^model: no config.json in me/nothing$")

    def offline(*_, **__):
        raise OSError("no route to host")
    monkeypatch.setattr("vlmamba_lite.files.hf_hub_download", offline)
    refused("me/tiny", FileNotFoundError, r"^me/tiny: got no folder of that name here, and nothing from the Hugging Face Hub \(no route")


def test_a_local_folder_is_never_asked_of_the_hub(make_model, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("runs/tiny")
    VLMamba.from_pretrained("runs/tiny")
    for name in ("runs/other/deep", "./runs", "/no/such", "no"):
        refused(name, FileNotFoundError, "^model: no ")
    (tmp_path / "runs" / "empty").mkdir()
    refused("runs/empty", FileNotFoundError, "^model: no config.json in runs/empty$")
    refused(tmp_path.relative_to(tmp_path) / "a" / "b", FileNotFoundError, "^model: no folder a/b$")          # a Path is a folder
    assert not hub.calls


def test_a_model_without_a_tokenizer_says_so(make_model, small, tmp_path):
    model = make_model()
    model.tokenizer = None
    for call in (lambda: model.ask(small.rows[0]["image"], "what color is the shape?"), lambda: model.chat(small.rows[0]["image"]),
                 lambda: model.save_pretrained(tmp_path / "m")):
        with pytest.raises(ValueError, match="^tokenizer: got None, need one to (ask|save)"):
            call()
    assert not (tmp_path / "m").exists()


# one graph

class Answers(torch.nn.Module):
    "Pictures and questions to logits: what one would export."
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pictures, ids):
        return self.model.language(ids, state=self.model.read(pictures)).logits


def test_the_whole_model_is_one_graph(make_model, small):
    "torch.compile without a break, and torch.export, of the model; and export of its language model."
    model, batch = make_model().eval(), VQABatches(small.data, 5, 2)[0]
    assert torch.compile(model, fullgraph=True, backend="eager")(batch).loss.item() == pytest.approx(model(batch).loss.item(), rel=1e-5)
    pictures, ids = torch.rand(2, 3, 64, 64) * 2 - 1, torch.arange(10).view(2, 5)
    with torch.no_grad():
        for module, inputs in ((Answers(model), (pictures, ids)), (model.language, (ids,))):
            got, want = torch.export.export(module, inputs).module()(*inputs), module(*inputs)
            torch.testing.assert_close(getattr(got, "logits", got), getattr(want, "logits", want))

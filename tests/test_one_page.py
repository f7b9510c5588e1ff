"""Chapter 00 writes VL-Mamba anew in 250 lines: with the same weights it is the library's model, part by part, and a broken line shows."""
import types
from pathlib import Path

import pytest
import torch
from measures import rms_error

import vlmamba_lite
from vlmamba_lite import one_page
from vlmamba_lite.data.batches import Batch
from vlmamba_lite.model.presets import lite_config, preset_config
from vlmamba_lite.model.vlmamba import VLMamba

SOURCE = Path(one_page.__file__).read_text(encoding="utf-8")
VOCABULARY = ["<pad>", *"abcdefghijklmnopqrstuvwxyz?"]
BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}


def library_weights(page):
    "The weights of the page's model under the names of the library's."
    names = {"connector.mamba.": "connector.vss.mixers.0.", "language.embedding.": "language.backbone.embedding.",
             "language.norm_f.": "language.backbone.norm_f."}
    for i in range(3):
        names[f"language.norms.{i}."] = f"language.backbone.layers.{i}.norm."
        names[f"language.mixers.{i}."] = f"language.backbone.layers.{i}.mixer."
    weights = {}
    for name, tensor in page.state_dict().items():
        old = next((old for old in names if name.startswith(old)), "")
        weights[names.get(old, "") + name.removeprefix(old)] = tensor
    return weights | {"language.lm_head.weight": weights["language.backbone.embedding.weight"]}


def make_both(module, dtype, training=False):
    "The page's model and the library's with the same weights, none of them as tidy as at the start."
    torch.manual_seed(0)
    page = module.VLMamba(VOCABULARY).to(dtype)
    with torch.no_grad():
        for p in page.parameters():
            p += 0.05 * torch.randn_like(p)
    library = VLMamba(lite_config(len(VOCABULARY)), None).to(dtype)
    library.load_state_dict(library_weights(page))
    return page.train(training), library.train(training)


def example(dtype):
    images = torch.randn(2, 3, 64, 64, dtype=dtype)
    ids = torch.randint(1, len(VOCABULARY), (2, 3, 9))
    return images, ids, ids.masked_fill(torch.arange(9) < 6, -100)


def library_loss(library, images, ids, labels):
    batch = Batch.from_rows(images, ids.flatten(0, 1), labels.flatten(0, 1))
    loss, batch.labels = library(batch).loss, None                        # with labels it makes no logits but those that learn
    return library(batch).logits[:, :-1].unflatten(0, ids.shape[:2]), loss


def part_errors(module, dtype):
    "{part: relative error between page and library}."
    page, library = make_both(module, dtype)
    images, ids, labels = example(dtype)
    x = torch.randn(2, 17, 96, dtype=dtype)
    with torch.no_grad():
        patches, size = library.vision(images)
        found = {"encoder": (page.vision(images), patches), "connector": (page.connector(patches), library.connector(patches, size)),
                 "Mamba": (page.connector.mamba(x), library.connector.vss.mixers[0](x))}
        for i, (ours, theirs) in enumerate(zip(page.language.mixers, library.language.backbone.layers)):
            before = [torch.randn(2, *shape, dtype=dtype) for shape in ours.state_shapes]
            window = torch.cat([before[0][:, :1], before[0]], 1).mT                  # the library keeps one input more
            y, (_, h) = ours(x, before)
            y2, state = theirs.mixer(x, theirs.mixer.state_type(window, before[1]), return_state=True)
            found |= {f"Mamba-2, layer {i + 1}": (y, y2), f"its state, layer {i + 1}": (h, state.ssm)}
        (logits, loss), (logits2, loss2) = page(images, ids, labels), library_loss(library, images, ids, labels)
        found |= {"logits": (logits, logits2), "loss": (loss, loss2)}
    return {part: rms_error(*pair) for part, pair in found.items()}


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_every_part_equals_the_library(dtype):
    errors = part_errors(one_page, dtype)
    assert all(error < BOUND[dtype] for error in errors.values()), errors


def test_gradients_equal_the_library():
    page, library = make_both(one_page, torch.float64, training=True)
    batch = example(torch.float64)
    page(*batch)[1].backward()
    library_loss(library, *batch)[1].backward()
    theirs = dict(library.named_parameters())
    for name, gradient in library_weights(types.SimpleNamespace(state_dict=lambda: {n: p.grad for n, p in page.named_parameters()})).items():
        if name in theirs:
            assert rms_error(gradient, theirs[name].grad) < 1e-9, name


@pytest.mark.parametrize("old, new, part", [
    ("bidirectional_scan(self.mamba, F.gelu(v))", "F.gelu(bidirectional_scan(self.mamba, v))", "connector"),     # the GELU's place
    ("self.norm(scanned + v)", "self.norm(scanned + F.gelu(v))", "connector"),                                   # the skip's start
    ("mamba(x.flip(1)).flip(1)", "mamba(x.flip(1))", "connector"),                                               # the flip
    ("self.out_proj(y * F.silu(z))", "self.out_proj(y)", "Mamba"),                                               # the gate
    ("self.norm(y * F.silu(z))", "self.norm(y) * F.silu(z)", "Mamba-2, layer 1"),                                # gate and norm
    ("rearrange(dt[..., None] * x, ", "rearrange(x, ", "Mamba-2, layer 1"),                                                              # the step in the input
    ("[..., :x.shape[1]].mT", "[..., 3:].mT", "Mamba"),                                                          # a convolution that looks ahead
    ("labels[..., 1:].flatten()", "labels[..., :-1].flatten()", "loss"),                                         # the shift of the labels
])
def test_a_broken_line_shows(old, new, part):
    assert SOURCE.count(old) == 1
    broken = types.ModuleType("broken")
    exec(compile(SOURCE.replace(old, new), "broken", "exec"), broken.__dict__)
    assert part_errors(broken, torch.float64)[part] > 1e-3


def test_ask_equals_reading_everything_again():
    "Answers from the kept state are the greedy ones of the whole text read at once."
    torch.manual_seed(1)
    page = one_page.VLMamba(VOCABULARY).double().eval()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    said, question = page.ask(page.read(images), "a b c?").split(), [VOCABULARY.index(word) for word in "abc?"]
    with torch.no_grad():
        for word in said:
            text = torch.cat([page.connector(page.vision(images)), page.language.embedding(torch.tensor([question]))], 1)
            assert VOCABULARY[page.language(text)[0][0, -1].argmax()] == word
            question.append(VOCABULARY.index(word))
    assert len(said) == 5                                                          # there is no <eos> to stop it


def test_labels_are_the_answers():
    images, ids, labels, vocabulary = one_page.load_easy_vqa(Path(vlmamba_lite.__file__).parent.parent / "data" / "easy_vqa")
    assert images.shape == (4000, 3, 64, 64) and len(vocabulary) == 30 and vocabulary[0] == "<pad>"
    row = [vocabulary[i] for i in ids[0, 0] if i]
    assert row == "what is the blue shape ? rectangle <eos>".split()
    assert [vocabulary[i] for i in labels[0, 0] if i != -100] == ["rectangle", "<eos>"]
    there = ids[..., 0] > 0
    assert ((labels != -100).sum(-1) == 2 * there).all() and there.sum() == 38575


@pytest.mark.parametrize("name, layers, heads", [("vl-mamba-2.8b", 32, 2560), ("ml-mamba-2.7b", 32, 2560)])
def test_bytes_of_a_state(name, layers, heads):
    "The table of chapter 00 says what the presets have."
    with torch.device("meta"):
        model = VLMamba(preset_config(name))
    states = [layer.mixer.empty_state(1) for layer in model.language.backbone.layers]
    numbers = sum(part.numel() for state in states for part in state)
    text = (Path(vlmamba_lite.__file__).parent.parent / "nbs" / "00_one_page.ipynb").read_text(encoding="utf-8")
    assert f"{numbers:,}".replace(",", r"\\,") in text
    assert f"{numbers * 4 / 1e6:.3g} MB" in text and f"{numbers * 2 / 1e6:.3g} MB" in text
    assert f"{2 * layers * heads * 729 * 2 / 1e6:.0f} MB" in text

"""The papers' models by name: their parts, their sizes, every row of the ablation tables, overrides, and what is refused."""
import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from model_cases import batch_of
from PIL import Image

import vlmamba_lite
from vlmamba_lite.evaluation.cost import peak_bytes
from vlmamba_lite.data.conversations import byte_tokenizer
from vlmamba_lite.language.model import MambaConfig
from vlmamba_lite.model.memory import count_parameters, memory_estimate, memory_table, meta_model, parameter_table, whole_part
from vlmamba_lite.connectors.connectors import CONNECTORS
from vlmamba_lite.model.presets import (ABLATIONS, LANGUAGE_MODELS, MODEL_PRESETS, PAPER_PRESETS, VISION_ENCODERS,
                                        VLMambaConfig, check_connector, language_config, override, preset_config,
                                        vision_spec)
from vlmamba_lite.model.saving import find_tokenizer, load_connector
from vlmamba_lite.model.vlmamba import VLMamba
from vlmamba_lite.training.optimizers import build_optimizers
from vlmamba_lite.training.recipes import pick_recipe
from vlmamba_lite.vision.towers import half_range, load_encoder, new_tower


def one_line(call, match):
    with pytest.raises(ValueError, match=match) as error:
        call()
    assert "\n" not in str(error.value)


def meta(config):
    with torch.device("meta"):
        return VLMamba(config)


# Presets

def test_the_presets_are_the_papers():
    large, small, ml = (preset_config(name) for name in ("vl-mamba-2.8b", "vl-mamba-1.4b", "ml-mamba-2.7b"))
    for config in (large, small):
        assert config.vision == dict(kind="siglip", config="google/siglip-so400m-patch14-384")
        assert (config.connector, config.connector_args) == ("vss_l2", {"scan": "bsm"})
        assert (config.language.mixer, config.language.padded_vocab_size) == ("mamba", 50280)
    assert (large.language.d_model, large.language.n_layer) == (2560, 64)
    assert (small.language.d_model, small.language.n_layer) == (2048, 48)
    assert [tower["kind"] for tower in ml.vision["towers"]] == ["dinov2", "siglip"]                     # the order of the authors' code
    assert (ml.connector, ml.connector_args, ml.language.mixer) == ("msc_advanced", {"scan": "bsm"}, "mamba2")
    assert (ml.language.d_model, ml.language.n_layer, ml.language.padded_vocab_size) == (2560, 64, 50288)


# mamba-2.8b: embedding 50280 x 2560, 64 layers of the official parts, norms. By hand, not with the library's classes.
def mamba_by_hand(d, layers, rows, d_state=16, d_conv=4):
    inner, rank = 2 * d, -(-d // 16)
    mixer = (2 * inner * d) + inner * (d_conv + 1) + inner * (rank + 2 * d_state) + rank * inner + inner + inner * d_state + inner + inner * d
    return rows * d + layers * (mixer + d) + d


def mamba2_by_hand(d, layers, rows, d_state=128, headdim=64, d_conv=4):
    inner = 2 * d
    heads, conv = inner // headdim, inner + 2 * d_state
    mixer = d * (inner + conv + heads) + conv * (d_conv + 1) + 3 * heads + inner + inner * d
    return rows * d + layers * (mixer + d) + d


def test_sizes_by_hand_and_as_published():
    assert whole_part("mamba-2.8b-slimpj") == mamba_by_hand(2560, 64, 50280) and round(whole_part("mamba-2.8b") / 1e9, 2) == 2.77
    assert whole_part("mamba-1.4b") == mamba_by_hand(2048, 48, 50280)
    for name, d, layers in (("mamba2-780m", 1536, 48), ("mamba2-1.3b", 2048, 48), ("mamba2-2.7b", 2560, 64)):
        assert whole_part(name) == mamba2_by_hand(d, layers, 50288)
    d, h = 1152, 4304                                          # SigLIP-SO400M/14: 27 layers, a pooling head with its own MLP
    attention, mlp, norms = 4 * (d * d + d), 2 * d * h + h + d, 4 * d
    head = d + (3 * d * d + 3 * d) + (d * d + d) + 2 * d + mlp
    assert whole_part("siglip") == (3 * 14 * 14 * d + d) + 729 * d + 27 * (attention + mlp + norms) + 2 * d + head
    assert round(whole_part("siglip") / 1e9, 2) == 0.43 and round(whole_part("dinov2") / 1e6) == 304
    assert whole_part("dinov2+siglip") == whole_part("dinov2") + whole_part("siglip")
    sizes = {"mamba-2.8b": 2.77e9, "mamba-2.8b-slimpj": 2.77e9, "siglip": 0.43e9, "dinov2": 0.304e9, "mamba-1.4b": 1.4e9,
             "mamba2-780m": 0.78e9, "mamba2-1.3b": 1.3e9, "mamba2-2.7b": 2.7e9}
    for name, size in sizes.items():
        assert abs(whole_part(name) / size - 1) < 0.04, name


def test_connector_sizes_by_hand():
    d, v, N = 2560, 1152, 16                                   # VSS-L2: Linear, one Mamba layer for both directions, norm, Linear
    layer = mamba_by_hand(d, 1, 0) - 2 * d
    sizes = count_parameters(preset_config("vl-mamba-2.8b"))
    assert sizes["connector"] == (v * d + d) + layer + d + (d * d + d) and N == 16
    assert sizes["language"] == whole_part("mamba-2.8b") and sizes["total"] == sum(sizes[n] for n in ("vision", "connector", "language"))
    assert count_parameters(preset_config("vl-mamba/t4/mlp"))["connector"] == (v * d + d) + (d * d + d)
    released = count_parameters(preset_config("ml-mamba-2.7b", connector_args=dict(variant="released")))["connector"]
    assert abs(released / 184e6 - 1) < 0.01


def test_a_tower_is_cut_before_its_last_layer():
    d, h = 1152, 4304
    assert count_parameters(preset_config("vl-mamba-2.8b"))["vision"] == (
        (3 * 14 * 14 * d + d) + 729 * d + 26 * (4 * (d * d + d) + 2 * d * h + h + d + 4 * d))


@pytest.mark.parametrize("preset", PAPER_PRESETS)
def test_a_preset_on_the_meta_device(preset):
    model = meta(preset_config(preset))
    assert all(p.is_meta for p in model.parameters()) and model.device.type == "meta"
    assert count_parameters(model) == count_parameters(model.config)
    assert count_parameters(model)["total"] == sum(p.numel() for p in model.parameters())       # the tied head counts once
    assert model.vision.preprocess.size == (384, 384) and model.vision.preprocess.mean == (0.5, 0.5, 0.5)
    assert model.connector.vision_dim == {"siglip": 1152, "dinov2+siglip": 2176}[PAPER_PRESETS[preset]["vision"]]


@torch.no_grad()
def test_a_picture_through_the_large_presets_has_729_tokens():
    "With shapes alone: no numbers are computed on the meta device."
    for preset in PAPER_PRESETS:
        config = preset_config(preset)
        config.language.n_layer = 1
        encoder = meta(config).vision
        size = [image // 14 for image in encoder.preprocess.size]
        assert size == [27, 27]


def test_little_memory_and_no_network():
    "A process of its own, in which every connection fails: three billion parameters are counted, and what training them takes, in less than 2 GiB."
    code = """if True:
        import re, resource, socket
        from pathlib import Path
        def refuse(*_, **__):
            raise AssertionError("network")
        socket.socket.connect = socket.getaddrinfo = refuse
        from vlmamba_lite.model.memory import count_parameters, memory_estimate
        from vlmamba_lite.model.presets import preset_config
        assert memory_estimate(preset_config("ml-mamba/t6/mlp"), checkpointing=True)["total"] > 2 ** 35
        total, status = count_parameters(preset_config("ml-mamba/t6/mlp"))["total"], Path("/proc/self/status")
        # Linux hands ru_maxrss down from the parent; the high water mark of the process itself stands in /proc
        peak = re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1] if status.exists() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(total, peak)"""
    total, peak = map(int, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert 3.4e9 < total < 3.6e9 and peak < 2 * 2 ** 20                                           # KiB


def test_the_table_of_sizes(make_model):
    model = make_model()
    lines = parameter_table({"vl-mamba-2.8b": preset_config("vl-mamba-2.8b"), "tiny": model}).splitlines()
    assert lines[0].split() == ["vision", "connector", "language", "total"]
    assert lines[1].split() == ["vl-mamba-2.8b", "397.7", "50.8", "2,768.3", "3,216.8"] and lines[2].split()[0] == "tiny"
    assert count_parameters(model)["total"] == sum(p.numel() for p in model.parameters())


# What training takes

def small_model(mixer, connector="vss_l2", layers=6):
    args = {"mamba": dict(d_state=16), "mamba2": dict(d_state=32, headdim=32, chunk_size=64), "attention": dict(headdim=32)}
    mixer, args = (["mamba2", "attention", "mamba"] * 2, args) if mixer == "hybrid" else (mixer, args[mixer])
    torch.manual_seed(0)
    vision = dict(dim=64, width=16, image_size=64)
    return VLMamba(VLMambaConfig(vision, connector, {}, MambaConfig(128, layers, 500, 1, mixer, args)))


PARTS = [("connector",), ("connector", "language"), ("vision", "connector", "language"), ("language",)]


def train_only(model, parts):
    for name, part in model.named_children():
        part.requires_grad_(name in parts)
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("trains", PARTS, ids="+".join)
def test_bytes_of_parameters_are_exact(trains):
    model = small_model("mamba2", layers=2)
    images, ids = torch.randn(2, 3, 64, 64), torch.randint(0, 500, (2, 9))
    for optimizer in ("adamw", "muon"):
        trained = train_only(model, trains)
        optimizers = [torch.optim.AdamW(trained)] if optimizer == "adamw" else build_optimizers(model, pick_recipe("lite")[0])
        model(batch_of(images, ids, ids)).loss.backward()
        for o in optimizers:
            o.step()
        held = [t for o in optimizers for state in o.state.values() for t in state.values() if t.ndim]
        found = memory_estimate(model.config, trains, length=9, precision="fp32", optimizer=optimizer, ema=True)
        assert found["weights"] == sum(4 * p.numel() for p in model.parameters())
        assert found["gradients"] == found["ema"] == sum(4 * p.grad.numel() for p in trained)
        assert found["optimizer"] == sum(t.numel() * t.element_size() for t in held)
        assert found["total"] == sum(size for name, size in found.items() if name != "total")
        model.zero_grad()


@pytest.mark.parametrize("mixer, connector, trains, checkpointing, precision", [
    ("mamba", "vss_l2", PARTS[0], False, "bf16"), ("mamba", "msc_basic", PARTS[2], True, "fp32"),
    ("mamba2", "msc_advanced", PARTS[1], False, "bf16"), ("mamba2", "mlp", PARTS[3], False, "fp32"), ("attention", "mlp", PARTS[1], True, "bf16"),
    ("hybrid", "mlp", PARTS[1], False, "bf16")])
def test_activations_are_near_what_a_step_holds(mixer, connector, trains, checkpointing, precision):
    model = small_model(mixer, connector)
    train_only(model, trains)
    model.language.backbone.recompute = checkpointing
    for layer in model.modules():
        if hasattr(layer, "conv_backend"):                       # the estimate is of PyTorch's operations; the C++ kernels keep less
            layer.backend, layer.conv_backend = "chunked", "shifted_sums"
    images, ids = torch.randn(4, 3, 64, 64), torch.randint(0, 500, (4, 64))

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(batch_of(images, ids, ids)).loss
        loss.backward()
    step()                                                       # from now on gradients are there, as in accumulation
    found = memory_estimate(model.config, trains, 4, 64, precision, checkpointing=checkpointing)
    ratio = (found["activations"] + found["logits"] + found["copies"]) / peak_bytes(step)
    assert 0.85 < ratio < 1.25, ratio


def test_an_estimate_grows_with_what_it_should():
    config = preset_config("tiny", 500, connector="mlp")
    one, rows = memory_estimate(config), memory_estimate(config, batch_size=3)
    assert rows["activations"] == 3 * one["activations"] and rows["logits"] == 3 * one["logits"] == 3 * 12 * 2048 * 500
    assert {n: rows[n] for n in ("weights", "gradients", "optimizer", "copies")} == {n: one[n] for n in ("weights", "gradients", "optimizer", "copies")}
    shared = memory_estimate(config, processes=4, sharded=True, ema=True)
    assert memory_estimate(config, processes=4) == one
    for name in ("weights", "gradients", "optimizer"):
        assert shared[name] == -(-one[name] // 4)
    assert memory_estimate(config, checkpointing=True)["activations"] < one["activations"] * 1.1
    assert memory_estimate(config, optimizer="none")["optimizer"] == 0 and memory_estimate(config, precision="fp32")["copies"] < one["copies"]


def test_an_estimate_leaves_everything_as_it_was():
    config, before = preset_config("tiny", 500), torch.get_rng_state()
    memory_estimate(config, ("language",))
    memory_estimate(config, ("connector",))
    assert torch.equal(torch.get_rng_state(), before) and config == preset_config("tiny", 500)
    model = meta_model(config)
    assert all(p.is_meta and p.requires_grad for p in model.parameters()) and len(model.language.backbone.layers) == 1


def test_the_table_of_bytes():
    sizes = {"weights": 3 * 2 ** 30, "total": 5 * 2 ** 29}
    assert memory_table(sizes).splitlines() == ["weights          3.0 GiB", "total            2.5 GiB"]
    assert memory_table(sizes, 24 * 2 ** 30).splitlines()[-1] == "fits in 24.0 GiB"
    assert memory_table(sizes, 2 ** 30).splitlines()[-1] == "does not fit in 1.0 GiB"


@pytest.mark.parametrize("arguments, match", [
    (dict(trains=("ears",)), "^trains: got .'ears',., need some of"), (dict(trains=()), "^trains: got"), (dict(trains="language"), "^trains: got 'language'"),
    (dict(precision="fp16"), "^precision: got 'fp16', need one of"), (dict(optimizer="sgd"), "^optimizer: got 'sgd'"),
    (dict(batch_size=0), "^batch_size: got 0, need a whole number from 1"), (dict(length=1.5), "^length: got 1.5"), (dict(processes=-1), "^processes: got -1")])
def test_an_estimate_of_nonsense(arguments, match):
    one_line(lambda: memory_estimate(preset_config("tiny", 500), **arguments), match)


# Ablations and overrides

def test_every_row_of_both_papers():
    counts = {"vl-mamba/t2": 3, "vl-mamba/t3": 2, "vl-mamba/t4": 3, "vl-mamba/t5": 2,
              "ml-mamba/t4": 3, "ml-mamba/t5": 3, "ml-mamba/t6": 3, "ml-mamba/t7": 2}
    found = [name.rpartition("/")[0] for name in ABLATIONS]
    assert {table: found.count(table) for table in found} == counts
    for name in ABLATIONS:
        config = preset_config(name)
        assert VLMambaConfig(**json.loads(json.dumps(asdict(config)))) == config
        assert count_parameters(config)["total"] > 1e9, name


def test_rows_that_are_one_model_are_one_configuration():
    "The same model stands in several tables (the best row of one is the fixed part of the next)."
    vl, ml = ({name: preset_config(f"{paper}/{name}") for name in names} for paper, names in (
        ("vl-mamba", ["t2/mamba-2.8b-slimpj", "t3/clip", "t3/siglip", "t4/mlp", "t4/vss_l2", "t5/bsm"]),
        ("ml-mamba", ["t4/mamba2-2.7b", "t5/dinov2+siglip", "t6/msc_advanced", "t7/bsm"])))
    assert vl["t2/mamba-2.8b-slimpj"] == vl["t3/clip"] != vl["t3/siglip"] == vl["t4/mlp"]
    assert vl["t4/vss_l2"] == vl["t5/bsm"] == preset_config("vl-mamba-2.8b") != preset_config("vl-mamba/t5/csm")
    assert all(config == preset_config("ml-mamba-2.7b") for config in ml.values())


def test_what_the_rows_change():
    assert preset_config("vl-mamba/t5/csm").connector_args == {"scan": "csm"}
    assert preset_config("vl-mamba/t4/vss_mlp").connector == "vss_mlp"
    assert preset_config("vl-mamba/t2/mamba-1.4b").language.d_model == 2048
    assert preset_config("vl-mamba/t2/mamba-1.4b").vision["kind"] == "clip"
    assert preset_config("ml-mamba/t4/mamba2-780m").language.d_model == 1536
    alone = preset_config("ml-mamba/t5/dinov2")
    model = meta(alone)
    assert model.vision.dim == 1024 and model.vision.preprocess.size == (384, 384)               # 729 tokens, as for the others
    assert model.vision.towers[0].skip == 5                                                      # class token, four registers
    mlp = meta(preset_config("ml-mamba/t6/mlp")).connector
    assert len(mlp.blocks) == 0 and sum(isinstance(m, torch.nn.Linear) for m in mlp.modules()) == 3
    assert preset_config("ml-mamba/t6/msc_basic").connector == "msc_basic"


def test_overrides_of_a_small_preset():
    plain = preset_config("tiny", 31)
    assert plain == MODEL_PRESETS["tiny"](31)
    changed = preset_config("tiny", 31, connector="vss_mlp", scan="csm", connector_args=dict(d_state=8))
    assert (changed.connector, changed.connector_args) == ("vss_mlp", {"scan": "csm", "d_state": 8})
    assert preset_config("tiny", 31, scan="csm").connector_args == {"scan": "csm", "d_state": 4, "expand": 1}
    assert preset_config("tiny", 31, connector="mlp").connector_args == {}
    assert plain == MODEL_PRESETS["tiny"](31)                                                    # nothing is changed in place
    tower = override(plain, vision="tiny-siglip + tiny-dinov2")
    assert tower.vision["kind"] == "fused" and VLMamba(tower).see(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 16)
    assert override(plain, vision=dict(dim=8, width=8, image_size=64)).vision["dim"] == 8
    assert override(plain, language="mamba2-780m").language == language_config("mamba2-780m", 31)
    assert override(plain, language=plain.language).language == plain.language
    wider = override(plain, language=dict(d_model=32)).language                                  # a dict changes what is there
    assert (wider.d_model, wider.mixer, wider.mixer_args, wider.vocab_size) == (32, "mamba2", plain.language.mixer_args, 31)
    other = override(plain, language=dict(mixer="mamba3", mixer_args=dict(headdim=8))).language
    assert (other.d_model, other.mixer, other.mixer_args) == (16, "mamba3", dict(headdim=8))
    assert override(plain, language=dict(mixer="mamba")).language.mixer_args == {}                # those of Mamba-2 do not fit
    hybrid = override(plain, language=dict(n_layer=2, mixer=["mamba3", "attention"], mixer_args=dict(mamba3=dict(headdim=8), attention=dict(headdim=8)))).language
    assert hybrid.mixers == ["mamba3", "attention"]
    for connector, args in (("vss_l2", dict(mixer="mamba3", headdim=8, d_state=4)), ("vss_mlp", dict(mixer="mamba2", headdim=8)), ("msc_advanced", dict(mixer="mamba3", headdim=8))):
        assert VLMamba(override(plain, connector=connector, connector_args=args)).see(torch.zeros(1, 3, 64, 64)).shape == (1, 64, 16)


@pytest.mark.parametrize("connector", CONNECTORS)
def test_every_connector_can_be_named(connector):
    config = preset_config("tiny", 31, connector=connector)
    assert VLMamba(config).see(torch.zeros(1, 3, 64, 64)).shape == (1, 64, 16)
    assert preset_config("vl-mamba-2.8b", connector=connector).connector == connector


def test_a_new_connector_without_a_scan_gets_none(monkeypatch, make_model):
    class Pooled(CONNECTORS["mlp"]):
        "All of it."
    monkeypatch.setitem(CONNECTORS, "pooled", Pooled)
    assert preset_config("tiny", 31, connector="pooled").connector_args == {} and isinstance(make_model("pooled").connector, Pooled)
    one_line(lambda: preset_config("tiny", 31, connector="pooled", scan="csm"), "^scan: got one for the connector 'pooled', which does not scan")


@pytest.mark.parametrize("call, match", [
    (lambda: preset_config("vl-mamba-7b"), r"^preset: got 'vl-mamba-7b', need one of \['emoji', 'lite', 'ml-mamba-2.7b', 'tiny', "),
    (lambda: preset_config("vl-mamba/t9/mlp"), "^preset: got 'vl-mamba/t9/mlp', need one of"),
    (lambda: preset_config("lite"), "^vocab_size: got None, need the number of words for the preset 'lite'$"),
    (lambda: preset_config("vl-mamba-2.8b", colour="red"), "^override: got colour, need some of vision, connector, connector_args, scan, language$"),
    (lambda: preset_config("vl-mamba-2.8b", connector="cnn"), "^connector: got 'cnn', need one of"),
    (lambda: preset_config("vl-mamba-2.8b", scan="spiral"), "^scan: got .spiral., need one of"),
    (lambda: preset_config("vl-mamba-2.8b", connector="mlp", scan="csm"), "^scan: got one for the connector 'mlp'"),
    (lambda: preset_config("vl-mamba-2.8b", language="mamba-7b"), "^language: got 'mamba-7b', need one of"),
    (lambda: preset_config("tiny", 31, language=dict(width=3)), "^language: got 'width', need some of d_model"),
    (lambda: preset_config("tiny", 31, language=dict(mixer="gru")), "^mixer: got 'gru', need one of"),
    (lambda: preset_config("vl-mamba-2.8b", vision="eva"), "^vision: got 'eva', need one of"),
    (lambda: preset_config("vl-mamba-2.8b", vision="siglip + eva"), "^vision: got 'siglip', need one of"),
    (lambda: preset_config("vl-mamba-2.8b", connector_args=dict(scam=1)), "^connector_args: got 'scam', need some of .*scan, "),
    (lambda: preset_config("vl-mamba/t4/mlp", connector_args=dict(scan="bsm")), "^connector_args: mlp got an unexpected .* 'scan'$")])
def test_what_is_refused(call, match):
    one_line(call, match)


def test_names_lead_to_parts():
    assert set(LANGUAGE_MODELS) == {"mamba-1.4b", "mamba-2.8b", "mamba-2.8b-slimpj", "mamba2-780m", "mamba2-1.3b", "mamba2-2.7b"}
    assert LANGUAGE_MODELS["mamba-2.8b-slimpj"] == "state-spaces/mamba-2.8b-slimpj"
    assert set(VISION_ENCODERS) == {"siglip", "clip", "dinov2", "dinov2+siglip"} and vision_spec("clip")["kind"] == "clip"
    assert check_connector(preset_config("tiny", 9)).connector == "vss_l2"


# Parts from folders

def towers(folder, *names):
    "Random towers as transformers saves them, each with its image processor."
    import transformers
    kinds = {"tiny-siglip": transformers.SiglipImageProcessor, "tiny-dinov2-registers": transformers.BitImageProcessor,
             "tiny-clip": transformers.CLIPImageProcessor}
    for name in names:
        new_tower(name).save_pretrained(folder / name)
        size = dict(height=32, width=32) if name == "tiny-siglip" else dict(shortest_edge=32)
        kinds[name](size=size, crop_size=dict(height=32, width=32)).save_pretrained(folder / name)
    return " + ".join(str(folder / name) for name in names)


def language(folder, kind="mamba", width=16):
    "A random language model as transformers saves it, with a tokenizer of bytes."
    import transformers
    if kind == "mamba":
        config = transformers.MambaConfig(vocab_size=260, hidden_size=width, state_size=4, num_hidden_layers=2, time_step_rank=2)
        model = transformers.MambaForCausalLM(config)
    else:
        config = transformers.Mamba2Config(vocab_size=260, hidden_size=width, state_size=8, num_hidden_layers=2, head_dim=8,
                                           num_heads=width // 4, n_groups=1, chunk_size=16, tie_word_embeddings=True)
        model = transformers.Mamba2ForCausalLM(config)
    model.save_pretrained(folder / kind)
    byte_tokenizer().save(str(folder / kind / "tokenizer.json"))
    return model.eval()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    "A folder of toy parts, and the transformers models they were saved from."
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    towers(folder, "tiny-siglip", "tiny-dinov2-registers", "tiny-clip")
    return folder, {kind: language(folder, kind) for kind in ("mamba", "mamba2")}


CASES = [("vl-mamba-2.8b", ["tiny-siglip"], "mamba"), ("ml-mamba-2.7b", ["tiny-dinov2-registers", "tiny-siglip"], "mamba2"),
         ("vl-mamba/t2/mamba-1.4b", ["tiny-clip"], "mamba"), ("vl-mamba/t5/csm", ["tiny-siglip"], "mamba")]


@pytest.mark.parametrize("preset, eyes, kind", CASES)
@torch.no_grad()
def test_parts_by_a_preset(parts, tmp_path, preset, eyes, kind):
    folder, models = parts
    weights = dict(vision=" + ".join(str(folder / eye) for eye in eyes), language=str(folder / kind))
    torch.manual_seed(1)
    model = VLMamba.from_preset(preset, weights=weights)
    wanted = preset_config(preset)
    assert (model.config.connector, model.config.connector_args) == (wanted.connector, wanted.connector_args)
    assert not any(p.is_meta for p in model.parameters()) and not model.training
    assert model.vision.dim == 32 * len(eyes) == model.connector.vision_dim and model.connector.language_dim == 16
    ids = torch.randint(0, 257, (2, 9))
    theirs = models[kind](ids).logits[..., :257]
    assert model.config.language.vocab_size == 257                                               # the tokenizer's, not the 260 rows
    torch.testing.assert_close(model.language(ids).logits, theirs, rtol=1e-4, atol=1e-4)
    encoder = half_range(load_encoder(weights["vision"]))
    photo = Image.new("RGB", (50, 40), "red")
    pixels = encoder.preprocess(photo)
    torch.testing.assert_close(model.see(pixels), model.connector(*encoder(pixels)))
    answer = model.ask(photo, "what is it?", 5)
    model.save_pretrained(tmp_path)
    again = VLMamba.from_pretrained(tmp_path)
    assert again.ask(photo, "what is it?", 5) == answer and torch.equal(again.see(pixels), model.see(pixels))
    assert json.loads(json.dumps(asdict(again.config))) == json.loads(json.dumps(asdict(model.config)))


def test_parts_in_other_dtypes(parts):
    folder, _ = parts
    model = VLMamba.from_parts(folder / "tiny-siglip", folder / "mamba", "mlp", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert isinstance(model.ask(Image.new("RGB", (8, 8)), "who?", 3), str)


def test_random_weights_by_name(small):
    torch.manual_seed(0)
    model = VLMamba.from_preset("tiny", small.tokenizer)
    torch.manual_seed(0)
    plain = VLMamba(MODEL_PRESETS["tiny"](small.tokenizer.get_vocab_size()), small.tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values()))
    assert VLMamba.from_preset("vl-mamba-1.4b", device="meta").device.type == "meta"
    assert VLMamba.from_preset("tiny", small.tokenizer, dtype=torch.float64).language.lm_head.weight.dtype == torch.float64


def test_a_connector_is_taken_over(parts, tmp_path):
    folder, _ = parts
    first = VLMamba.from_parts(folder / "tiny-siglip", folder / "mamba")
    first.save_pretrained(tmp_path / "stage1")
    weights = dict(vision=folder / "tiny-siglip", language=folder / "mamba2", connector=tmp_path / "stage1")
    second = VLMamba.from_preset("vl-mamba-2.8b", weights=weights)
    assert all(torch.equal(a, b) for a, b in zip(first.connector.state_dict().values(), second.connector.state_dict().values()))
    one_line(lambda: VLMamba.from_preset("vl-mamba/t4/mlp", weights=weights),
             "^connector: got vss_l2 from width 32 to 16 in .*stage1, need mlp from width 32 to 16$")
    both = folder / "tiny-siglip", folder / "tiny-dinov2-registers"
    wide = weights | dict(vision=" + ".join(map(str, both)))
    one_line(lambda: VLMamba.from_preset("vl-mamba-2.8b", weights=wide), "need vss_l2 from width 64 to 16$")


def test_parts_that_are_missing(parts, tmp_path):
    folder, _ = parts
    eye, words = folder / "tiny-siglip", folder / "mamba"
    for call, match in [
            (lambda: VLMamba.from_parts(tmp_path / "no", words), "^vision: no folder .*no$"),
            (lambda: VLMamba.from_parts(f"{eye} + {tmp_path}/no", words), "^vision: no folder .*no$"),
            (lambda: VLMamba.from_parts(eye, "./no"), "^language: no folder ./no$"),
            (lambda: VLMamba.from_parts(eye, words, tokenizer=tmp_path / "no"), "^tokenizer: no folder .*no$"),
            (lambda: VLMamba.from_parts(eye, eye), "^tokenizer: no tokenizer.json in .*tiny-siglip, need one"),
            (lambda: load_connector(VLMamba.from_parts(eye, words), tmp_path / "no"), "^model: no folder")]:
        with pytest.raises(FileNotFoundError, match=match) as error:
            call()
        assert "\n" not in str(error.value)


def test_parts_that_are_something_else(parts):
    folder, _ = parts
    eye, words = folder / "tiny-siglip", folder / "mamba"
    one_line(lambda: VLMamba.from_parts(words, words), "got a model of type 'mamba'")
    one_line(lambda: VLMamba.from_parts(eye, eye, tokenizer=byte_tokenizer()), "model_type: got ")
    one_line(lambda: VLMamba.from_parts(eye, words, tokenizer=byte_tokenizer(["a cat sat on the mat with a hat"] * 9, 270)), "^.*vocab_size: got [0-9]+, need 1 to 260")
    one_line(lambda: VLMamba.from_parts(eye, words, "cnn"), "^connector: got 'cnn'")
    one_line(lambda: VLMamba.from_parts(eye, words, connector_args=dict(scam=1)), "^connector_args: got 'scam', need some of ")
    one_line(lambda: VLMamba.from_preset("vl-mamba-2.8b", weights="mine"), "^weights: got 'mine', need 'random', 'published', or a dict")
    one_line(lambda: VLMamba.from_preset("vl-mamba-2.8b", weights=dict(eye=1)), r"^weights: got \['eye'\], need")
    one_line(lambda: VLMamba.from_preset("tiny", weights="published"), "^weights: got 'published' for the preset 'tiny', which has none")


@pytest.mark.parametrize("name", [*PAPER_PRESETS, *ABLATIONS])
def test_published_weights_come_from_the_named_places(monkeypatch, name):
    asked = {}
    monkeypatch.setattr(VLMamba, "from_parts", classmethod(lambda cls, **given: asked.update(given)))
    VLMamba.from_preset(name, weights="published")
    config = preset_config(name)
    assert asked["language"] in LANGUAGE_MODELS.values() and asked["vision"] in VISION_ENCODERS.values()
    assert vision_spec(asked["vision"]) == config.vision
    assert language_config(asked["language"].removeprefix("state-spaces/")) == config.language
    assert (asked["connector"], asked["connector_args"]) == (config.connector, config.connector_args)
    assert asked["image_size"] == (384 if name == "ml-mamba/t5/dinov2" else None)


def test_the_tokenizer_of_published_models(monkeypatch, tmp_path):
    "A Hub model without one gets GPT-NeoX's; no network here, so the Hub is a function."
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    asked = []

    def hub(source, name, revision=None, local_files_only=False):
        asked.append(source)
        if source != "EleutherAI/gpt-neox-20b":
            raise EntryNotFoundError("404")
        return str(tmp_path / name)
    monkeypatch.setattr("vlmamba_lite.files.hf_hub_download", hub)
    assert find_tokenizer(None, "state-spaces/mamba-2.8b-slimpj").get_vocab_size() == 257
    assert list(dict.fromkeys(asked)) == ["state-spaces/mamba-2.8b-slimpj", "EleutherAI/gpt-neox-20b"]
    assert find_tokenizer(tmp_path / "tokenizer.json", "x").get_vocab_size() == 257
    (tmp_path / "tokenizer.json").write_text("{")
    one_line(lambda: find_tokenizer(tmp_path / "tokenizer.json", "x"), "tokenizer.json")


# Names at the top

@pytest.mark.parametrize("name", vlmamba_lite.__all__)
def test_public_names_are_importable_from_the_top(name):
    assert getattr(vlmamba_lite, name).__name__ == name and name in dir(vlmamba_lite)


def test_the_top_loads_nothing_by_itself():
    code = "import sys, vlmamba_lite; assert 'torch' not in sys.modules; from vlmamba_lite import VLMamba; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'VLMumba'"):
        vlmamba_lite.VLMumba

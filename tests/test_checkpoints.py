"""Published layouts against transformers: logits, continuations, the report, memory, and what is refused."""
import json
import math
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from measures import lively
from safetensors.torch import load_file, save_file

from vlmamba_lite.files import KeyReport
from vlmamba_lite.language.checkpoints import published_config, save_pretrained
from vlmamba_lite.language.model import MambaConfig, MambaLM

transformers.utils.logging.disable_progress_bar()
NO_TOKENS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
V = 40
from_pretrained = MambaLM.from_pretrained
# name -> arguments of the transformers configuration, and how it is saved
MODELS = {
    "mamba": dict(kind="mamba", tie_word_embeddings=True),
    "mamba_untied_bias": dict(kind="mamba", tie_word_embeddings=False, use_bias=True, time_step_rank=3),
    "mamba_sharded_no_conv_bias": dict(kind="mamba", tie_word_embeddings=True, use_conv_bias=False, expand=3, shard="4KB"),
    "mamba_bf16": dict(kind="mamba", tie_word_embeddings=False, save_dtype=torch.bfloat16),
    "mamba2": dict(kind="mamba2", tie_word_embeddings=False),
    "mamba2_tied_groups": dict(kind="mamba2", tie_word_embeddings=True, n_groups=2, use_bias=True),
    "mamba2_sharded_limits": dict(kind="mamba2", tie_word_embeddings=True, time_step_limit=(0.02, 0.5), shard="4KB",
                                  layer_norm_epsilon=1e-3),
    "mamba2_bf16_groups": dict(kind="mamba2", tie_word_embeddings=True, n_groups=4, use_conv_bias=False, conv_kernel=3,
                               save_dtype=torch.bfloat16),
}
every = pytest.mark.parametrize("name", MODELS)


def write_peer(folder, kind, shard="1GB", save_dtype=torch.float32, **config):
    "A random transformers model, saved by transformers; returned in float32, with the weights as saved."
    torch.manual_seed(0)
    config = dict(vocab_size=V, hidden_size=16, num_hidden_layers=3, state_size=6, **NO_TOKENS) | config
    if kind == "mamba":
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**config))
    else:
        config = dict(num_heads=4, head_dim=8, n_groups=1, chunk_size=8) | config
        model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**config))
    model = lively(model).to(save_dtype).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    return model.float()


def original_fields(config):
    "The config.json that the authors' code would have written for a transformers configuration."
    ssm = dict(d_state=config.state_size, d_conv=config.conv_kernel, expand=config.expand, bias=config.use_bias,
               conv_bias=config.use_conv_bias)
    if config.model_type == "mamba":
        ssm |= dict(layer="Mamba1", dt_rank=config.time_step_rank)
    else:
        ssm |= dict(layer="Mamba2", headdim=config.head_dim, ngroups=config.n_groups, chunk_size=config.chunk_size,
                    dt_limit=list(config.time_step_limit))
    return dict(d_model=config.hidden_size, n_layer=config.num_hidden_layers, vocab_size=config.vocab_size - 3, ssm_cfg=ssm,
                rms_norm=True, residual_in_fp32=True, fused_add_norm=True, pad_vocab_size_multiple=8,
                tie_embeddings=config.tie_word_embeddings)


def write_original(folder, peer, legacy=False, **fields):
    "The same weights in the original layout, the tied head as a second name."
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(original_fields(peer.config) | fields))
    weights = {name.replace("embeddings", "embedding"): w for name, w in peer.state_dict().items()}
    assert "lm_head.weight" in weights
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)


def tokens(*shape, seed=1, high=V):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def assert_speaks_like(ours, theirs, real=V):
    ids = tokens(3, 29, high=real)
    want = theirs(ids, use_cache=False).logits[..., :real]
    assert (ours(ids).logits - want).abs().max() < 1e-4
    theirs.lm_head.weight[real:] = 0.                   # transformers may choose a padded token: here it may not
    whole = getattr(theirs.config, "time_step_limit", None) == (0.02, 0.5)       # its single step forgets the limits, its forward pass does not
    prompt = ids[:2, :5]
    want = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False, use_cache=not whole)
    assert torch.equal(ours.generate(prompt, 64), want)


# --- both layouts ----------------------------------------------------------------------------------------------------

@every
def test_a_checkpoint_of_transformers(name, tmp_path):
    theirs = write_peer(tmp_path, **MODELS[name])
    ours = MambaLM.from_pretrained(tmp_path)
    assert not ours.training and ours.config.mixer == MODELS[name]["kind"] and ours.config.vocab_size == V
    assert_speaks_like(ours, theirs)


@every
def test_the_same_weights_in_the_original_layout(name, tmp_path):
    theirs = write_peer(tmp_path / "hf", **MODELS[name] | dict(layer_norm_epsilon=1e-5))     # the only one that this layout has
    write_original(tmp_path / "original", theirs)
    ours = from_pretrained(tmp_path / "original")
    assert_speaks_like(ours, theirs, real=V - 3)
    assert ours.config.vocab_size == V - 3 and ours.config.padded_vocab_size == V


@every
@pytest.mark.parametrize("shard", ["5GB", "3KB"])
def test_round_trip(name, shard, tmp_path):
    theirs = write_peer(tmp_path / "hf", **MODELS[name])
    ours = from_pretrained(tmp_path / "hf", dtype=None)
    assert {p.dtype for p in ours.parameters()} == {MODELS[name].get("save_dtype", torch.float32)}
    ours.save_pretrained(tmp_path / "ours", max_shard_size=shard)
    assert (len(list((tmp_path / "ours").glob("*.safetensors"))) > 1) == (shard == "3KB")
    again = from_pretrained(tmp_path / "ours", dtype=None)
    assert again.config == ours.config
    got, want = again.state_dict(), ours.state_dict()
    assert list(got) == list(want) and all(torch.equal(got[n], want[n]) and got[n].dtype == want[n].dtype for n in want)
    back = type(theirs).from_pretrained(tmp_path / "ours", dtype=torch.float32)
    got, want = back.state_dict(), theirs.state_dict()
    assert set(got) == set(want) and all(torch.equal(got[n], want[n]) for n in want)
    with torch.no_grad():
        assert torch.equal(back(tokens(2, 9)).logits, theirs(tokens(2, 9)).logits)


def test_tied_head_is_one_parameter_and_absent_in_the_file(tmp_path):
    write_peer(tmp_path, "mamba", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    ours = from_pretrained(tmp_path)
    assert ours.lm_head.weight is ours.backbone.embedding.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, None])
@pytest.mark.parametrize("layout", ["hf", "original"])
def test_dtype_and_device(layout, dtype, tmp_path):
    theirs = write_peer(tmp_path / "hf", "mamba", tie_word_embeddings=False, save_dtype=torch.bfloat16)
    write_original(tmp_path / "original", theirs.bfloat16())
    ours = from_pretrained(tmp_path / layout, device="cpu", dtype=dtype)
    assert {p.dtype for p in ours.parameters()} == {dtype or torch.bfloat16} and {p.device.type for p in ours.parameters()} == {"cpu"}
    assert torch.equal(ours.lm_head.weight.bfloat16(), theirs.lm_head.weight)
    meta = from_pretrained(tmp_path / layout, device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_weights_do_not_share_memory_with_the_files(layout, tmp_path):
    write_original(tmp_path / "original", write_peer(tmp_path / "hf", "mamba2", tie_word_embeddings=True))
    ours = from_pretrained(tmp_path / layout)
    want = [p.detach().clone() for p in ours.parameters()]
    file = tmp_path / layout / {"hf": "model.safetensors", "original": "pytorch_model.bin"}[layout]
    size = file.stat().st_size
    with file.open("r+b") as f:                          # the file is written over in place: the model must not notice
        f.write(bytes(size))
    assert all(map(torch.equal, ours.parameters(), want))


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_marks_for_the_optimizer_survive(kind, tmp_path):
    write_peer(tmp_path, kind, tie_word_embeddings=True)
    ours, fresh = from_pretrained(tmp_path), MambaLM(from_pretrained(tmp_path).config)
    marks = [{n for n, p in lm.named_parameters() if getattr(p, "_no_weight_decay", False)} for lm in (ours, fresh)]
    assert marks[0] == marks[1] and len(marks[0]) == 3 * (2 if kind == "mamba" else 3)
    assert all(p.requires_grad and p.is_leaf for p in ours.parameters())
    ours(tokens(1, 5), labels=tokens(1, 5)).loss.backward()


def test_loading_draws_no_random_numbers(tmp_path):
    write_peer(tmp_path, "mamba2", tie_word_embeddings=True)
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    from_pretrained(tmp_path)
    assert torch.equal(torch.rand(3), want)


def test_codestral_names(tmp_path):
    "Its keys begin with `model.`, and the embedding has the original name in one of its files and that of transformers in the other."
    theirs = write_peer(tmp_path, "mamba2", tie_word_embeddings=False, n_groups=2)
    weights = load_file(tmp_path / "model.safetensors")
    for embedding in ("embeddings", "embedding"):
        save_file({f"model.{n}".replace("embeddings", embedding): w for n, w in weights.items()}, tmp_path / "model.safetensors")
        assert torch.equal(from_pretrained(tmp_path).backbone.embedding.weight, theirs.backbone.embeddings.weight)
    assert_speaks_like(from_pretrained(tmp_path), theirs)


def test_real_vocabulary(tmp_path):
    theirs = write_peer(tmp_path, "mamba", tie_word_embeddings=True)
    ours = from_pretrained(tmp_path, vocab_size=37)
    assert ours.config.vocab_size == 37 and ours(tokens(1, 3)[:, :1]).logits.shape[-1] == 37
    assert_speaks_like(ours, theirs, real=37)
    for wrong in (0, 41):
        with pytest.raises(ValueError, match=f"vocab_size: got {wrong}, need 1 to 40"):
            from_pretrained(tmp_path, vocab_size=wrong)


def test_old_pickles_and_pickles_in_shards(tmp_path):
    theirs = write_peer(tmp_path / "hf", "mamba", tie_word_embeddings=True)
    write_original(tmp_path / "legacy", theirs, legacy=True)
    assert_speaks_like(from_pretrained(tmp_path / "legacy"), theirs, real=37)
    shards = tmp_path / "shards"
    write_original(shards, theirs)
    weights = torch.load(shards / "pytorch_model.bin", weights_only=True)
    names = {name: f"part{i % 2}.bin" for i, name in enumerate(weights)}
    for part in set(names.values()):
        torch.save({n: w for n, w in weights.items() if names[n] == part}, shards / part)
    (shards / "pytorch_model.bin").unlink()
    (shards / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    assert_speaks_like(from_pretrained(shards), theirs, real=37)


# --- configurations --------------------------------------------------------------------------------------------------

def test_published_configurations():
    mamba = {"d_model": 2560, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
             "fused_add_norm": True, "pad_vocab_size_multiple": 8}
    c = MambaConfig(**published_config(mamba))
    assert (c.mixer, c.d_model, c.n_layer, c.padded_vocab_size, c.tie_embeddings, c.mixer_args) == ("mamba", 2560, 64, 50280, True, {})
    with torch.device("meta"):
        parameters = sum(p.numel() for p in MambaLM(c).parameters())
    assert parameters == 2_768_345_600                   # "2.8b"
    c = MambaConfig(**published_config({**mamba, "ssm_cfg": {"layer": "Mamba2", "d_state": 64}, "pad_vocab_size_multiple": 16}))
    assert (c.mixer, c.padded_vocab_size, c.mixer_args) == ("mamba2", 50288, {"d_state": 64})
    codestral = transformers.Mamba2Config().to_dict()
    c = MambaConfig(**published_config(codestral))
    assert (c.d_model, c.vocab_size, c.tie_embeddings, c.mixer_args["ngroups"]) == (4096, 32768, False, 8)
    assert c.mixer_args["dt_limit"] == (0., math.inf)


def test_a_configuration_with_words_of_both_layouts():
    "That of mamba-130m-hf holds the original fields too, no word on ties, and many that say nothing about the model."
    fields = {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "d_model": 768, "d_inner": 1536, "n_layer": 24, "ssm_cfg": {},
              "hidden_size": 768, "num_hidden_layers": 24, "state_size": 16, "intermediate_size": 1536, "expand": 2, "conv_kernel": 4,
              "time_step_rank": 48, "vocab_size": 50280, "pad_vocab_size_multiple": 8, "rms_norm": True, "fused_add_norm": True,
              "hidden_act": "silu", "layer_norm_epsilon": 1e-05, "residual_in_fp32": True, "use_bias": False, "use_conv_bias": True}
    c = MambaConfig(**published_config(fields, vocab_size=50277))
    assert (c.mixer, c.d_model, c.n_layer, c.vocab_size, c.padded_vocab_size, c.tie_embeddings) == ("mamba", 768, 24, 50277, 50280, True)
    with torch.device("meta"):
        assert sum(p.numel() for p in MambaLM(c).parameters()) == 129_135_360


@pytest.mark.parametrize("limit, want", [([0.0, {"__float__": "Infinity"}], (0., math.inf)), ([0.0, math.inf], (0., math.inf)), ([0.1, 2], (0.1, 2.))])
def test_infinity_is_written_in_two_ways(limit, want):
    fields = json.loads(json.dumps(transformers.Mamba2Config().to_dict() | {"time_step_limit": limit}))
    assert published_config(fields)["mixer_args"]["dt_limit"] == want


ORIGINAL = {"d_model": 16, "n_layer": 1, "vocab_size": 40, "ssm_cfg": {}}
HF = {"model_type": "mamba2", "hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 40, "state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1}
HYBRID = {"d_model": 16, "n_layer": 3, "vocab_size": 37, "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 6}, "attn_layer_idx": [1],
          "attn_cfg": {"causal": True, "num_heads": 4, "head_dim": 8, "num_heads_kv": 2, "rotary_emb_dim": 4, "d_conv": 3, "qkv_proj_bias": False}}


def attention(**fields):
    return HYBRID | {"attn_cfg": HYBRID["attn_cfg"] | fields}


def test_configuration_of_the_published_hybrid():
    "config.json of state-spaces/mamba2attn-2.7b; its parameters counted by hand."
    fields = {"d_model": 2560, "d_intermediate": 0, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [9, 18, 27, 36, 45, 56],
              "attn_cfg": {"causal": True, "d_conv": 4, "head_dim": 128, "num_heads": 30, "out_proj_bias": False, "qkv_proj_bias": False, "rotary_emb_dim": 64},
              "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16, "tie_embeddings": True}
    c = MambaConfig(**published_config(fields))
    assert [i for i, name in enumerate(c.mixers) if name == "attention"] == [9, 18, 27, 36, 45, 56] and c.mixers.count("mamba2") == 58
    with torch.device("meta"):
        lm = MambaLM(c)
    d, inner, heads, N, qkv = 2560, 5120, 80, 128, 3 * 30 * 128
    mamba2 = d * (2 * inner + 2 * N + heads) + 5 * (inner + 2 * N) + 3 * heads + inner + inner * d + d        # with the norms before it and inside
    attn = d * qkv + 5 * qkv + 30 * 128 * d + d
    assert sum(p.numel() for p in lm.parameters()) == 58 * mamba2 + 6 * attn + 50288 * d + d == 2_697_590_880
    layer = dict(lm.backbone.layers[9].mixer.named_parameters())
    assert {name: tuple(p.shape) for name, p in layer.items()} == {
        "in_proj.weight": (11520, 2560), "conv1d.weight": (11520, 1, 4), "conv1d.bias": (11520,), "out_proj.weight": (2560, 3840)}
    assert (lm.backbone.layers[9].mixer.rope_dim, lm.backbone.layers[9].mixer.rope_base) == (64, 10000.)


def test_a_hybrid_is_that_of_transformers():
    "Nemotron-H: Mamba-2 and attention without positions, in our weights."
    torch.manual_seed(0)
    config = transformers.NemotronHConfig(
        vocab_size=V, hidden_size=16, layers_block_type=["linear_attention", "full_attention", "linear_attention"], num_attention_heads=4, num_key_value_heads=2,
        head_dim=6, ssm_state_size=6, mamba_num_heads=4, mamba_head_dim=8, n_groups=2, chunk_size=8, time_step_min=1e-30, residual_in_fp32=True, **NO_TOKENS)
    theirs = lively(transformers.NemotronHForCausalLM(config)).eval()
    ours = MambaLM(MambaConfig(16, 3, V, 1, ["mamba2", "attention", "mamba2"], dict(
        mamba2=dict(d_state=6, headdim=8, ngroups=2, chunk_size=8), attention=dict(headdim=6, nheads=4, nheads_kv=2, rope_dim=0)), tie_embeddings=False))
    weights = {name.replace("model.", "backbone.").replace("embeddings", "embedding"): w for name, w in theirs.state_dict().items()}
    at = "backbone.layers.1.mixer."
    weights[at + "in_proj.weight"] = torch.cat([weights.pop(f"{at}{x}_proj.weight") for x in "qkv"])
    weights[at + "out_proj.weight"] = weights.pop(at + "o_proj.weight")
    ours.load_state_dict(weights, strict=True)
    assert_speaks_like(ours, theirs)


def test_a_hybrid_in_the_original_layout(tmp_path):
    "What is written there is read; transformers has no layout that it fits."
    torch.manual_seed(0)
    lm = lively(MambaLM(MambaConfig(**published_config(HYBRID | {"d_intermediate": 12}))))
    (tmp_path / "config.json").write_text(json.dumps(HYBRID | {"d_intermediate": 12}))
    torch.save(lm.state_dict(), tmp_path / "pytorch_model.bin")
    again = from_pretrained(tmp_path)
    assert again.config == lm.config and again.config.mixers == ["mamba2", "attention", "mamba2"]
    assert torch.equal(again.generate(tokens(2, 5, high=37), 20), lm.generate(tokens(2, 5, high=37), 20))
    with pytest.raises(ValueError, match=r"mixer: got \['mamba2', 'attention', 'mamba2'\], need 'mamba' or 'mamba2': transformers has no layout for it"):
        lm.save_pretrained(tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("fields, message", [
    ({"model_type": "llama", "hidden_size": 16}, "model_type: got 'llama', need 'mamba' or 'mamba2'"),
    ({"model_type": "falcon_mamba", "hidden_size": 16}, "model_type: got 'falcon_mamba'"),
    ({"model_type": "vlmamba"}, "model_type: got 'vlmamba'"), ({}, "model_type: got None"),
    ({"d_model": 16, "vocab_size": 40}, "configuration: got no n_layer, need them all"),
    (ORIGINAL | {"rms_norm": False}, "rms_norm: got False, need True"), (ORIGINAL | {"d_intermediate": 2.5}, "d_intermediate: got 2.5, need a whole number"),
    (HYBRID | {"attn_layer_idx": [0, 3]}, r"attn_layer_idx: got \[0, 3\], need numbers of layers, 0 to 2"), (HYBRID | {"attn_layer_idx": ["1"]}, "attn_layer_idx: got"),
    (HYBRID | {"attn_cfg": {}}, "configuration: got no num_heads"), (HYBRID | {"attn_cfg": {"num_heads": 2}}, "attn_cfg: got {'num_heads': 2}, need causal=True"),
    (attention(mlp_dim=64), "mlp_dim: got 64, need 0"), (attention(softmax_scale=.1), "softmax_scale: got 0.1, need None"),
    (attention(rotary_emb_interleaved=True), "rotary_emb_interleaved: got True"), (attention(window=8), "attn_cfg: got"), (attention(causal=False), "causal: got False, need True"),
    (attention(num_heads_kv=3), "nheads_kv: got 3, need a divisor of nheads = 4"), (attention(rotary_emb_dim=5), "rope_dim: got 5"),
    (ORIGINAL | {"ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg.layer: got 'Mamba3'"),
    (ORIGINAL | {"ssm_cfg": {"d_stat": 3}}, r"ssm_cfg: got \['d_stat'\], need arguments of Mamba"),
    (ORIGINAL | {"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}, "rmsnorm: got False, need True"),
    (ORIGINAL | {"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "D_has_hdim: got True, need False"),
    (ORIGINAL | {"n_layer": 0}, "n_layer: got 0"), (HF | {"hidden_act": "relu"}, "hidden_act: got 'relu', need 'silu'"),
    (HF | {"num_heads": 3}, "num_heads: got 3 of 8, need 32 channels together"), (HF | {"n_groups": 3}, "ngroups: got 3"),
    ({n: v for n, v in HF.items() if n != "state_size"}, "configuration: got no state_size"),
    ({n: v for n, v in HF.items() if n != "n_groups"}, "configuration: got no n_groups")])
def test_configurations_that_are_refused(fields, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        from_pretrained(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "config.json")) and "\n" not in str(caught.value)


# --- the report ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layout", ["hf", "original"])
def test_the_report_names_everything_that_does_not_fit(layout, tmp_path):
    theirs = write_peer(tmp_path / "hf", "mamba", tie_word_embeddings=True, vocab_size=40)
    write_original(tmp_path / "original", theirs)
    folder = tmp_path / layout
    file = folder / ("model.safetensors" if layout == "hf" else "pytorch_model.bin")
    weights = load_file(file) if layout == "hf" else torch.load(file, weights_only=True)
    weights["backbone.layers.3.extra"] = torch.zeros(1)
    weights["backbone.layers.0.mixer.A_logs"] = weights.pop("backbone.layers.0.mixer.A_log")
    del weights["backbone.norm_f.weight"]
    weights["backbone.layers.1.mixer.D"] = torch.ones(3)
    save_file(weights, file) if layout == "hf" else torch.save(weights, file)
    with pytest.raises(KeyReport) as caught:
        from_pretrained(folder)
    report = caught.value
    assert report.missing == ["backbone.layers.0.mixer.A_log", "backbone.norm_f.weight"]
    assert report.unexpected == ["backbone.layers.0.mixer.A_logs", "backbone.layers.3.extra"]
    assert report.misshaped == {"backbone.layers.1.mixer.D": ((3,), (32,))}
    text = str(report)
    assert text.startswith(f"{folder}: the weights do not fit the model; 2 missing: ") and len(text.splitlines()) == 1
    for name in (*report.missing, *report.unexpected, *report.misshaped):
        assert name in text


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_copies_that_differ_are_reported(layout, tmp_path):
    "Found as the values are read, which happens only if all names and shapes fit."
    theirs = write_peer(tmp_path / "hf", "mamba", tie_word_embeddings=True, vocab_size=40)
    write_original(tmp_path / "original", theirs)
    file = tmp_path / layout / ("model.safetensors" if layout == "hf" else "pytorch_model.bin")
    weights = load_file(file) if layout == "hf" else torch.load(file, weights_only=True)
    table = next(n for n in weights if "embedding" in n)
    weights["lm_head.weight"] = weights[table] + 1.
    save_file(weights, file) if layout == "hf" else torch.save(weights, file)
    with pytest.raises(KeyReport, match="copies that differ") as caught:
        from_pretrained(tmp_path / layout)
    assert caught.value.unequal in (["lm_head.weight"], [table])


def test_another_size_is_reported_in_few_lines(tmp_path):
    write_peer(tmp_path, "mamba2", tie_word_embeddings=False)
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": 40, "state_size": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(KeyReport, match=r"and \d+ more") as caught:
        from_pretrained(tmp_path)
    assert len(caught.value.missing) == 37 * 9 and len(caught.value.misshaped) == 9 and len(str(caught.value)) < 1500


def test_a_head_that_is_missing_is_missing(tmp_path):
    write_peer(tmp_path, "mamba", tie_word_embeddings=True)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(KeyReport, match="1 missing: lm_head.weight"):
        from_pretrained(tmp_path)


# --- damaged and hostile files ---------------------------------------------------------------------------------------

class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle has run')",))


@pytest.mark.parametrize("content", [b"", b"{}", "cut", "header"])
def test_damaged_safetensors(content, tmp_path):
    write_peer(tmp_path, "mamba", tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[:-50], "header": whole[:30]}.get(content, content))
    with pytest.raises(ValueError, match="model.safetensors: ") as caught:
        from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"text", "cut", Hostile(), [torch.zeros(1)], {"a": 1}])
def test_damaged_and_hostile_pickles(content, tmp_path):
    theirs = write_peer(tmp_path / "hf", "mamba", tie_word_embeddings=True)
    write_original(tmp_path, theirs)
    file = tmp_path / "pytorch_model.bin"
    if content == "cut":
        file.write_bytes(file.read_bytes()[:-200])
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match="pytorch_model.bin: got a") as caught:
        from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", ["", "[1]", "{", '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_damaged_json(name, content, tmp_path):
    write_peer(tmp_path, "mamba", tie_word_embeddings=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
        from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there(tmp_path):
    write_peer(tmp_path, "mamba", tie_word_embeddings=True, shard="4KB")
    shard = next(tmp_path.glob("model-00002*"))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"no {shard.name} in "):
        from_pretrained(tmp_path)
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors.index.json or model.safetensors or pytorch_model.bin"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json in "):
        from_pretrained(tmp_path)


# --- the Hub ---------------------------------------------------------------------------------------------------------

def no_network(*args, **kwargs):
    raise AssertionError("the network was asked")


@pytest.mark.parametrize("shard", ["5GB", "3KB"])
def test_a_save_that_breaks_off_never_mixes_old_and_new_weights(shard, tmp_path, monkeypatch):
    "The old model is loaded after it, also where some shards of the new one were complete."
    first, second = (MambaLM(MambaConfig(16, 2, V, mixer_args=dict(d_state=5))) for _ in range(2))
    first.save_pretrained(tmp_path, max_shard_size=shard)
    written = []

    def breaks(tensors, path, **kwargs):
        if written:
            raise OSError("no space left")
        written.append(save_file(tensors, path, **kwargs))
    monkeypatch.setattr("vlmamba_lite.files.save_file", breaks)
    if shard == "5GB":
        written.append(None)
    with pytest.raises(OSError, match="no space left"):
        second.save_pretrained(tmp_path, max_shard_size=shard)
    assert all(map(torch.equal, from_pretrained(tmp_path).parameters(), first.parameters()))


def test_a_folder_needs_no_network(tmp_path, monkeypatch):
    write_peer(tmp_path, "mamba", tie_word_embeddings=True)
    monkeypatch.setattr("vlmamba_lite.files.hf_hub_download", no_network)
    from_pretrained(tmp_path)


def fake_cache(cache, folder, repo="someone/tiny-mamba"):
    "A cache of the Hub that holds the files of a folder."
    snapshot = cache / ("models--" + repo.replace("/", "--")) / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    return repo


@pytest.mark.parametrize("shard", ["1GB", "4KB"])
def test_a_model_in_the_cache_needs_no_network(shard, tmp_path, monkeypatch):
    theirs = write_peer(tmp_path / "hf", "mamba", tie_word_embeddings=True, shard=shard)
    repo, real = fake_cache(tmp_path / "cache", tmp_path / "hf"), huggingface_hub.hf_hub_download

    def cached(*args, local_files_only, **kwargs):
        assert local_files_only, "the network was asked"
        return real(*args, local_files_only=True, cache_dir=tmp_path / "cache", **kwargs)

    monkeypatch.setattr("vlmamba_lite.files.hf_hub_download", cached)
    assert_speaks_like(from_pretrained(repo), theirs)


@pytest.mark.parametrize("name", ["someone/not-in-the-cache", "no_folder", "./no/such/folder", "a b c"])
def test_no_folder_and_no_hub(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    match = "got no folder of that name here, and nothing from the Hugging Face Hub" if name.startswith("someone/") else "^model: no folder "
    with pytest.raises(FileNotFoundError, match=match) as caught:
        from_pretrained(name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_that_is_missing_beside_others_is_not_looked_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr("vlmamba_lite.files.hf_hub_download", lambda *args, **options: pytest.fail("the Hub was asked"))
    with pytest.raises(FileNotFoundError, match="^model: no folder runs/lite-seed1$"):
        from_pretrained("runs/lite-seed1")


def test_a_gpu_that_is_not_there_is_named(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    write_peer(tmp_path, "mamba", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="^device: got 'cuda', need 'cpu'"):
        from_pretrained(tmp_path, device="cuda")


def test_mamba_130m_says_what_it_says():
    "The published numbers: transformers' test of mamba-130m-hf."
    files = [huggingface_hub.try_to_load_from_cache("state-spaces/mamba-130m-hf", name) for name in ("config.json", "model.safetensors", "tokenizer.json")]
    if not all(isinstance(f, str) for f in files):
        pytest.skip("the weights of state-spaces/mamba-130m-hf are not in the local Hugging Face cache, and tests download nothing")
    from tokenizers import Tokenizer
    tokenizer, lm = Tokenizer.from_file(files[2]), MambaLM.from_pretrained("state-spaces/mamba-130m-hf", vocab_size=50277)
    ids = torch.tensor([tokenizer.encode("Hey how are you doing?").ids])
    with torch.no_grad():
        first = lm(ids).logits[0, 0, :4]
    torch.testing.assert_close(first, torch.tensor([-55.6909, -69.7903, -49.8981, -51.7581]), rtol=1e-3, atol=1e-3)
    assert tokenizer.decode(lm.generate(ids, 10)[0].tolist()) == "Hey how are you doing?\n\nI'm so glad you're here."


# --- memory ----------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, torch
torch.set_num_threads(1)
from vlmamba_lite.language.model import MambaLM
from_pretrained = MambaLM.from_pretrained
def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) / 1024
from_pretrained(sys.argv[1])                           # once small, so that everything is imported and warm
before = peak()
lm = from_pretrained(sys.argv[2], dtype=None)
print(peak() - before, sum(p.numel() * p.element_size() for p in lm.parameters()) / 2 ** 20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc, which only Linux has")
@pytest.mark.parametrize("layout", ["sharded", "pickle"])
def test_memory_is_weights_and_one_shard(layout, tmp_path):
    write_peer(tmp_path / "small", "mamba", tie_word_embeddings=True)
    big = MambaLM(MambaConfig(384, 16, 4000))
    if layout == "sharded":
        save_pretrained(big, tmp_path / "big", max_shard_size="8MB")
        files = list((tmp_path / "big").glob("*.safetensors"))
        assert len(files) > 5
    else:
        (tmp_path / "big").mkdir()
        (tmp_path / "big" / "config.json").write_text(json.dumps({"d_model": 384, "n_layer": 16, "vocab_size": 4000, "ssm_cfg": {}}))
        torch.save(big.state_dict(), tmp_path / "big" / "pytorch_model.bin")
        files = [tmp_path / "big" / "pytorch_model.bin"]
    del big
    run = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "big")], capture_output=True, text=True, check=True)
    used, weights = map(float, run.stdout.split())
    shard = max(f.stat().st_size for f in files) / 2 ** 20
    assert weights > 60
    assert used <= weights + shard + 10, (used, weights, shard)          # 10 MB for Python's own


# --- saving ----------------------------------------------------------------------------------------------------------

def test_a_smaller_save_leaves_nothing_of_a_larger_one(tmp_path):
    def names():
        return sorted(f.name for f in tmp_path.iterdir())

    large, small = (MambaLM(MambaConfig(16, n, 40)) for n in (5, 2))
    large.save_pretrained(tmp_path, max_shard_size="8KB")
    (tmp_path / "notes.txt").write_text("mine")
    assert "model.safetensors.index.json" in names()
    small.save_pretrained(tmp_path)
    assert names() == ["config.json", "model.safetensors", "notes.txt"]
    large.save_pretrained(tmp_path, max_shard_size="8KB")
    assert "model.safetensors" not in names() and from_pretrained(tmp_path).config.n_layer == 5


def test_a_save_that_fails_leaves_the_old_model(tmp_path, monkeypatch):
    lm = MambaLM(MambaConfig(16, 2, 40))
    lm.save_pretrained(tmp_path)
    want = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def full_disk(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr("vlmamba_lite.files.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        MambaLM(MambaConfig(16, 3, 40)).save_pretrained(tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == want


@pytest.mark.parametrize("config, message", [
    (dict(mixer="attention", mixer_args=dict(headdim=8)), "mixer: got 'attention', need 'mamba' or 'mamba2'"),
    (dict(d_intermediate=8), "d_intermediate: got 8, need 0"),
    (dict(mixer="mamba2", mixer_args=dict(headdim=8, norm_before_gate=True)), "norm_before_gate: got True, need False")])
def test_what_the_layout_cannot_describe(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        MambaLM(MambaConfig(16, 1, 40, **config)).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_fields_of_ones_own(tmp_path):
    MambaLM(MambaConfig(16, 1, 37, pad_vocab_size_multiple=8)).save_pretrained(tmp_path, eos_token_id=3)
    theirs = transformers.MambaForCausalLM.from_pretrained(tmp_path)
    assert theirs.config.eos_token_id == 3 and theirs.config.pad_token_id is None and theirs.config.vocab_size == 40
    assert MambaLM.from_pretrained(tmp_path).config == MambaConfig(16, 1, 37, mixer_args=dict(
        d_state=16, d_conv=4, expand=2, bias=False, conv_bias=True, dt_rank=1))


def test_a_subclass_loads_itself(tmp_path):
    class Mine(MambaLM):
        pass

    MambaLM(MambaConfig(16, 1, 40)).save_pretrained(tmp_path)
    assert type(Mine.from_pretrained(tmp_path)) is Mine

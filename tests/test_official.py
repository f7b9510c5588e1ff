"""The blocks against the official reference functions of mamba_ssm and causal_conv1d, and our named backends around those packages.

Both packages import their CUDA extensions first thing. Here they are loaded without: the extensions are replaced by empty modules and
the packages' own __init__ is skipped. Where they are not installed the tests are skipped.
"""
import importlib
import importlib.util
import sys
import types

from measures import lively, rms_error
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import vlmamba_lite.layers.mamba as mamba
import vlmamba_lite.ops.ssd as ssd_module
from vlmamba_lite.language.checkpoints import published_config
from vlmamba_lite.language.model import MambaConfig, MambaLM
from vlmamba_lite.layers.mamba import Mamba, MambaState, causal_conv1d, conv_backends, conv_step
from vlmamba_lite.layers.mamba2 import Mamba2, Mamba2State
from vlmamba_lite.ops.reference import scan_step
from vlmamba_lite.ops.ssd import ssd, ssd_backends, ssd_chunked, ssd_recurrent

EXTENSIONS = {"mamba_ssm": "selective_scan_cuda", "causal_conv1d": "causal_conv1d_cuda"}


def theirs_in(modules):
    return [name for name in modules if name.split(".")[0] in (*EXTENSIONS, *EXTENSIONS.values())]


@pytest.fixture
def official():
    "official(package, module): a module of an installed package, without its CUDA extension; gone again after the test."
    before = {name: sys.modules.pop(name) for name in theirs_in(list(sys.modules))}

    def load(package, module):
        spec = importlib.util.find_spec(package)
        if spec is None:
            pytest.skip(f"{package} is not installed")
        bare = types.ModuleType(package)
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules[package] = bare
        if importlib.util.find_spec(EXTENSIONS[package]) is None:
            sys.modules[EXTENSIONS[package]] = types.ModuleType(EXTENSIONS[package])
        try:
            return importlib.import_module(f"{package}.{module}")
        except ImportError as problem:
            pytest.skip(f"{package} does not import: {problem}")
    yield load
    for name in theirs_in(list(sys.modules)):
        del sys.modules[name]
    sys.modules.update(before)


# --- the convolution ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("L, K, bias, window", [(1, 4, True, True), (13, 4, True, False), (13, 2, False, True), (40, 3, True, True)])
def test_causal_conv1d(official, L, K, bias, window):
    peer = official("causal_conv1d", "causal_conv1d_interface")
    x, w, b, before = torch.randn(2, L, 5), torch.randn(5, 1, K), torch.randn(5) if bias else None, torch.randn(2, 5, K) if window else None
    want = peer.causal_conv1d_ref(x.mT, w[:, 0], b, initial_states=before[..., 1:] if window else None, activation="silu")
    y, seen = causal_conv1d(x, w, b, before)
    assert rms_error(F.silu(y), want.mT) < 1e-6
    state = torch.zeros(2, 5, K) if before is None else before.clone()
    for t in range(L):                                              # the official step keeps its window in place
        y_t, ours = conv_step(x[:, t], state.clone(), w, b)
        assert rms_error(F.silu(y_t), peer.causal_conv1d_update_ref(x[:, t], state, w[:, 0], b, activation="silu")) < 1e-6
        assert_close(ours, state)
    assert_close(mamba.next_window(seen, K), state)


# --- the steps -----------------------------------------------------------------------------------------------------------

def test_selective_state_update_mamba(official):
    update = official("mamba_ssm", "ops.triton.selective_state_update").selective_state_update_ref
    torch.manual_seed(0)
    B, D, N = 3, 7, 5
    h, u, dt, z, bias = torch.randn(B, D, N), torch.randn(B, D), torch.randn(B, D), torch.randn(B, D), torch.randn(D)
    A, Bm, C, skip = -torch.rand(D, N), torch.randn(B, N), torch.randn(B, N), torch.randn(D)
    state = h.clone()
    want = update(state, u, dt, A, Bm, C, skip, z, bias, dt_softplus=True)
    new, y = scan_step(h, u, F.softplus(dt + bias), A, Bm[:, None], C[:, None])
    assert rms_error((y + skip * u) * F.silu(z), want) < 1e-6 and rms_error(new, state) < 1e-6


def test_selective_state_update_mamba_block(official):
    "Mamba.step, with the recurrence done by the official function."
    update = official("mamba_ssm", "ops.triton.selective_state_update").selective_state_update_ref
    torch.manual_seed(0)
    block = Mamba(12, d_state=5)
    x, state = torch.randn(3, 12), MambaState(torch.randn(3, 24, 4), torch.randn(3, 24, 5))
    with torch.no_grad():
        y, after = block.step(x, state)
        u, z = block.in_proj(x).chunk(2, -1)
        u = F.silu(conv_step(u, state.conv, block.conv1d.weight, block.conv1d.bias)[0])
        code, B, C = block.x_proj(u).split([block.dt_rank, 5, 5], -1)
        h = state.ssm.clone()
        want = update(h, u, F.linear(code, block.dt_proj.weight), -block.A_log.exp(), B, C, block.D, z, block.dt_proj.bias, dt_softplus=True)
        assert rms_error(y, block.out_proj(want)) < 1e-6 and rms_error(after.ssm, h) < 1e-6


@pytest.mark.parametrize("groups", [1, 2])
def test_selective_state_update_mamba2_block(official, groups):
    "Mamba2.step, with the recurrence done by the official function: heads of P channels that share a step size."
    update = official("mamba_ssm", "ops.triton.selective_state_update").selective_state_update_ref
    torch.manual_seed(0)
    block = Mamba2(16, d_state=6, headdim=8, ngroups=groups)
    x, state = torch.randn(3, 16), Mamba2State(torch.randn(3, 32 + 12 * groups, 4), torch.randn(3, 4, 8, 6))
    def heads(v):
        return v[:, None].expand(4, 8)
    with torch.no_grad():
        y, after = block.step(x, state)
        z, xBC, dt = block.in_proj(x).split([32, 32 + 12 * groups, 4], -1)
        xBC = F.silu(conv_step(xBC, state.conv, block.conv1d.weight, block.conv1d.bias)[0])
        u, B, C = xBC.split([32, 6 * groups, 6 * groups], -1)
        h = state.ssm.clone()
        A = (-block.A_log.exp())[:, None, None].expand(4, 8, 6)
        want = update(h, u.unflatten(1, (4, 8)), dt[..., None].expand(3, 4, 8), A, B.unflatten(1, (groups, 6)), C.unflatten(1, (groups, 6)),
                      heads(block.D), None, heads(block.dt_bias), dt_softplus=True)
        assert rms_error(y, block.out_proj(block.norm(want.flatten(1), z))) < 1e-6 and rms_error(after.ssm, h) < 1e-6


# --- attention ------------------------------------------------------------------------------------------------------------

class Rotary(torch.nn.Module):
    "flash_attn's RotaryEmbedding, which the official attention takes: the first `dim` channels of q and k turn, halves paired."
    def __init__(self, dim, base, interleaved, device):
        super().__init__()
        self.speed = base ** (-torch.arange(0, dim, 2) / dim)

    def forward(self, q, kv, seqlen_offset=0, max_seqlen=None):
        turn = torch.polar(torch.ones(()), torch.arange(q.shape[1])[:, None] * self.speed)[:, None]
        def rotated(x):
            n = len(self.speed)
            z = torch.complex(x[..., :n], x[..., n:2 * n]) * turn
            return torch.cat([z.real, z.imag, x[..., 2 * n:]], -1)
        return rotated(q), torch.stack([rotated(kv[:, :, 0]), kv[:, :, 1]], 2)


@pytest.mark.parametrize("attn_cfg", [dict(num_heads=2), dict(num_heads=4, head_dim=6, num_heads_kv=2, d_conv=4, qkv_proj_bias=False, out_proj_bias=False),
                                      dict(num_heads=3, head_dim=8, rotary_emb_dim=4, rotary_emb_base=100., d_conv=3, qkv_proj_bias=False)])
def test_hybrid_of_official_attention(official, monkeypatch, attn_cfg):
    "Values, gradients and greedy text of a small hybrid, with MHA of the official code in its place."
    mha = official("mamba_ssm", "modules.mha")
    monkeypatch.setattr(mha, "RotaryEmbedding", Rotary)
    monkeypatch.setattr(mha, "causal_conv1d_fn", None)
    fields = dict(d_model=16, n_layer=3, vocab_size=37, ssm_cfg=dict(layer="Mamba2", headdim=8, d_state=6), attn_layer_idx=[1], attn_cfg=dict(causal=True, **attn_cfg))
    torch.manual_seed(0)
    lm, twin = (lively(MambaLM(MambaConfig(**published_config(fields)))) for _ in range(2))
    theirs = mha.MHA(16, causal=True, **attn_cfg)
    twin.load_state_dict(lm.state_dict())
    theirs.load_state_dict(lm.backbone.layers[1].mixer.state_dict())          # with official names and shapes
    monkeypatch.setattr(twin.backbone.layers[1].mixer, "forward", lambda x, state=None, mask=None, return_state=False: (theirs(x), None) if return_state else theirs(x))
    ids = torch.randint(37, (2, 21), generator=torch.Generator().manual_seed(1))
    want, got = twin(ids).logits, lm(ids).logits
    assert (got - want).abs().max() < 1e-4 and rms_error(got, want) < 1e-5
    for p, w in zip(torch.autograd.grad(got.square().sum(), list(lm.backbone.layers[1].mixer.parameters())),
                    torch.autograd.grad(want.square().sum(), [dict(theirs.named_parameters())[name] for name, _ in lm.backbone.layers[1].mixer.named_parameters()])):
        assert rms_error(p, w) < 1e-4
    text = ids[:, :5]
    for _ in range(30):
        text = torch.cat([text, twin(text).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(lm.generate(ids[:, :5], 30), text)


# --- SSD ------------------------------------------------------------------------------------------------------------------

def ssd_inputs(L, H=4, P=8, G=1, N=16, b=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    def r(*shape):
        return torch.randn(*shape, generator=g)
    return dict(x=r(b, L, H, P), dt=r(b, L, H), A=-r(H).exp(), B=r(b, L, G, N), C=r(b, L, G, N)), dict(D=r(H), z=r(b, L, H, P), dt_bias=r(H))


@pytest.mark.parametrize("G", [1, 2, 4])
@pytest.mark.parametrize("L, chunk", [(32, 32), (96, 16), (128, 64)])
def test_ssd_chunk_scan_combined(official, L, chunk, G):
    "Values and gradients. (The official reference wants whole chunks.)"
    peer = official("mamba_ssm", "ops.triton.ssd_combined").ssd_chunk_scan_combined_ref
    args, more = ssd_inputs(L, G=G)
    leaves = [v.requires_grad_() for v in (*args.values(), *more.values())]
    want = peer(*args.values(), chunk, **more, dt_softplus=True)
    g = torch.randn_like(want)
    right = torch.autograd.grad(want, leaves, g)
    for form in (ssd_recurrent, ssd_chunked):
        y = form(**args, **more, dt_softplus=True, chunk_size=chunk)
        assert rms_error(y, want) < 2e-6
        assert max(rms_error(a, b) for a, b in zip(torch.autograd.grad(y, leaves, g), right)) < 1e-5


def test_ssd_minimal_discrete(official):
    "The listing of the paper; it takes the inputs already multiplied by their step sizes, and float64."
    peer = official("mamba_ssm", "modules.ssd_minimal").ssd_minimal_discrete
    args, _ = ssd_inputs(48)
    x, dt, A, B, C = (v.double() for v in args.values())
    dt = F.softplus(dt)
    B, C = (v.expand(-1, -1, 4, -1) for v in (B, C))
    want, last = peer(x * dt[..., None], dt * A, B, C, 16)
    y, h = ssd_chunked(x, dt, A, B, C, return_final_states=True)
    assert rms_error(y, want) < 1e-12 and rms_error(h, last) < 1e-12


# --- named backends -------------------------------------------------------------------------------------------------------

def test_backends_say_why_not():
    assert ssd_backends()["chunked"] is None and conv_backends()["shifted_sums"] is None
    if not torch.cuda.is_available():
        assert "CUDA" in ssd_backends()["mamba_ssm"] and "CUDA" in conv_backends()["causal_conv1d"]
        for block, message in ((Mamba(8, conv_backend="causal_conv1d"), "conv_backend 'causal_conv1d' cannot run here: needs a CUDA GPU"),
                               (Mamba2(8, headdim=4, backend="mamba_ssm"), "backend 'mamba_ssm' cannot run here: needs a CUDA GPU")):
            with pytest.raises(RuntimeError, match=message):
                block(torch.randn(1, 3, 8))
    for block in (Mamba(8, conv_backend="fast"), Mamba2(8, headdim=4, conv_backend="fast"), Mamba2(8, headdim=4, backend="fast")):
        with pytest.raises(ValueError, match="backend: got 'fast', need 'auto' or one of"):
            block(torch.randn(1, 3, 8))


@pytest.mark.parametrize("backend", ["recurrent", "quadratic", "chunked", "auto"])
def test_ssd_by_name(backend):
    args, more = ssd_inputs(21, G=2)
    first = torch.randn(2, 4, 8, 16)
    options = dict(**more, dt_softplus=True, dt_limit=(0.01, 1.0), initial_states=first, return_final_states=True)
    for got, want in zip(ssd(**args, **options, backend=backend), ssd_recurrent(**args, **options)):
        assert rms_error(got, want) < 2e-6
    block, named = Mamba2(16, headdim=8), Mamba2(16, headdim=8, backend=backend)
    named.load_state_dict(block.state_dict())
    x = torch.randn(2, 21, 16)
    assert rms_error(named(x), block(x)) < 1e-5


def test_ssd_of_mamba_ssm_gets_what_it_wants(monkeypatch):
    "With a stand-in that records: dtypes, names and the options, on tensors that claim to be on a GPU."
    calls = []
    def scan(x, dt, A, B, C, chunk_size, **options):
        calls.append((A.dtype, chunk_size, options))
        return "result"
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.ssd_combined", types.SimpleNamespace(mamba_chunk_scan_combined=scan))
    monkeypatch.setitem(ssd_module._SSD_BACKENDS, "mamba_ssm", (ssd_module._ssd_mamba_ssm, lambda: None))
    args, more = ssd_inputs(8)
    with pytest.raises(RuntimeError, match="backend 'mamba_ssm': got torch.float32 on cpu, needs"):
        ssd(**args, **more, backend="mamba_ssm")
    with pytest.raises(ValueError, match="^x: "):
        ssd(**{**args, "x": torch.randn(2, 8, 4)}, backend="mamba_ssm")
    monkeypatch.setattr(ssd_module, "check_ssd_inputs", lambda *_: None)
    class OnGPU:
        device, dtype = types.SimpleNamespace(type="cuda"), torch.bfloat16
    half = {name: v.bfloat16() for name, v in args.items()} | {"x": OnGPU()}
    first = torch.randn(2, 4, 8, 16)
    assert ssd(**half, D=more["D"].bfloat16(), dt_softplus=True, initial_states=first, return_final_states=True, chunk_size=128,
               backend="mamba_ssm") == "result"
    dtype, chunk, options = calls[0]
    assert dtype == torch.float32 and chunk == 128 and options["D"].dtype == torch.float32 and options["initial_states"] is first
    assert options["dt_softplus"] and options["return_final_states"] and options["dt_limit"] == (0.0, float("inf")) and options["z"] is None


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("make", [Mamba, lambda *args, **kwargs: Mamba2(*args, headdim=8, **kwargs)])
def test_conv_of_causal_conv1d(official, monkeypatch, make, K):
    "The block through the official reference in place of the kernel: the same sequence, whole and in two pieces."
    peer = official("causal_conv1d", "causal_conv1d_interface")
    def kernel(x, weight, bias=None, initial_states=None, activation=None):
        assert x.stride(1) == 1 and (initial_states is None or initial_states.stride(1) == 1)      # channels side by side
        return peer.causal_conv1d_ref(x, weight, bias, initial_states=initial_states, activation=activation)
    sys.modules["causal_conv1d"].causal_conv1d_fn = kernel
    monkeypatch.setitem(mamba._CONV_BACKENDS, "causal_conv1d", (mamba._official_conv, lambda: None))
    torch.manual_seed(0)
    ours = make(16, d_state=4, d_conv=K)
    theirs = make(16, d_state=4, d_conv=K, conv_backend="causal_conv1d")
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 9, 16)
    y = ours(x)
    assert rms_error(theirs(x), y) < 1e-6
    first, state = theirs(x[:, :4], return_state=True)
    assert rms_error(torch.cat([first, theirs(x[:, 4:], state)], 1), y) < 1e-5

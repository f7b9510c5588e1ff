"""Chapter 05: the convolution, packing, how a Mamba block starts, and the block against transformers'; what all blocks share is in test_blocks.py."""
import pytest
import torch
import torch.nn.functional as F
from block_cases import KINDS, assert_peers
from hypothesis import given, settings
from hypothesis import strategies as st
from measures import rms_error
from torch.testing import assert_close

from vlmamba_lite.layers import mamba
from vlmamba_lite.layers.mamba import (
    Mamba,
    MambaState,
    causal_conv1d,
    conv_backends,
    conv_step,
    init_dt_bias,
    next_window,
    pack_tokens,
    unpack_tokens,
)


CONVS = [name for name, reason in conv_backends().items() if reason is None]


# --- the convolution ---

@settings(deadline=None, max_examples=20, derandomize=True)
@given(L=st.integers(1, 9), K=st.integers(1, 5), D=st.integers(1, 4), bias=st.booleans(), cut=st.integers(0, 9), backend=st.sampled_from(CONVS))
def test_conv_is_pytorchs_and_can_be_cut(L, K, D, bias, cut, backend):
    torch.manual_seed(L * K + D)
    x, w, b = torch.randn(2, L, D, dtype=torch.float64), torch.randn(D, 1, K).double(), torch.randn(D).double() if bias else None
    before = torch.randn(2, D, K).double()
    y, seen = causal_conv1d(x, w, b, before, backend)
    assert_close(y, F.conv1d(torch.cat([before, x.mT], 2), w, b, groups=D)[..., 1:].mT)
    assert_close(causal_conv1d(x, w, b, before, backend, silu=True)[0], F.silu(y))
    assert_close(causal_conv1d(x, w, b, backend=backend)[0], F.conv1d(x.mT, w, b, padding=K - 1, groups=D)[..., :L].mT)
    window, ys = before, []
    for t in range(L):
        y_t, window = conv_step(x[:, t], window, w, b)
        ys.append(y_t)
    assert_close(torch.stack(ys, 1), y)
    assert_close(next_window(seen, K), window)
    if 0 < cut < L:
        first, seen = causal_conv1d(x[:, :cut], w, b, before, backend)
        assert_close(torch.cat([first, causal_conv1d(x[:, cut:], w, b, next_window(seen, K), backend)[0]], 1), y)


@pytest.mark.skipif("cpp" not in CONVS, reason="needs a C++ compiler")
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("L, K, D, bias", [(1, 4, 3, True), (37, 4, 64, True), (9, 1, 65, False), (5, 7, 200, True)])
def test_conv_in_cpp_is_the_sums_values_and_gradients(L, K, D, bias, silu):
    "Blocks of channels that are whole and that are not, sequences shorter than the taps; float32 as near to float64 as the sums are."
    torch.manual_seed(L)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, L, D), (D, 1, K), (D,), (3, D, K))]
    def all_of(backend, dtype):
        x, w, b, before = (i.to(dtype) for i in inputs)
        y, _ = causal_conv1d(x, w, b if bias else None, before, backend, silu)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return y, *torch.autograd.grad(y, [i for i in inputs if bias or i.ndim > 1], g)
    want = all_of("shifted_sums", torch.float64)
    for got, expected in zip(all_of("cpp", torch.float64), want, strict=True):
        assert rms_error(got, expected) < 1e-13
    for got, sums, expected in zip(all_of("cpp", torch.float32), all_of("shifted_sums", torch.float32), want, strict=True):
        assert rms_error(got, expected) < 2 * rms_error(sums, expected) + 2e-7


def test_auto_convolves_with_what_can_run(monkeypatch):
    called = []
    def note(name, works):
        monkeypatch.setitem(mamba._CONV_BACKENDS, name, (lambda seen, *_: called.append(name) or seen[:, 2:], lambda: None if works else "no"))
    x, w = torch.randn(1, 5, 2), torch.randn(2, 1, 2)
    class OnCuda(torch.Tensor):
        is_cuda = True
    for works in (True, False):
        for name in ("cpp", "causal_conv1d"):
            note(name, works)
        note("shifted_sums", True)
        for i in (x, x.as_subclass(OnCuda), x.to("meta")):
            causal_conv1d(i, w.to(i.device))
    assert called == ["cpp", "causal_conv1d", "shifted_sums", *3 * ["shifted_sums"]]


def test_convolution_in_cpp_has_no_second_gradient():
    x, w = torch.randn(1, 5, 2, requires_grad=True), torch.randn(2, 1, 3, requires_grad=True)
    for backend in CONVS:
        first, = torch.autograd.grad(causal_conv1d(x, w, backend=backend)[0].sum(), x, create_graph=True)
        if backend == "cpp":
            with pytest.raises(RuntimeError, match="FusedConv: its gradient can be taken once, not twice"):
                torch.autograd.grad(first.sum(), w)
        else:
            assert torch.autograd.grad(first.sum(), w)[0].abs().sum() > 0


@pytest.mark.parametrize("backend", CONVS)
def test_conv_sums_in_float32_and_windows_are_copies(backend):
    x, w = torch.randn(2, 50, 3), torch.randn(3, 1, 4)
    half, _ = causal_conv1d(x.bfloat16(), w.bfloat16(), backend=backend)
    want, seen = causal_conv1d(x.bfloat16().float(), w.bfloat16().float(), backend=backend)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, want.bfloat16())                                # one rounding, at the end
    step, _ = conv_step(x[:, 0].bfloat16(), torch.zeros(2, 3, 4), w.bfloat16())
    assert torch.equal(step, half[:, 0])
    for window in (next_window(seen, 4), next_window(seen, 4, torch.tensor([3, 0])), next_window(seen[:, :5], 1)):
        assert window.untyped_storage().nbytes() == window.numel() * 4       # it does not hold on to the sequence


def test_window_at_the_last_real_token():
    seen = torch.arange(14.).view(2, 7, 1)
    assert next_window(seen, 3, torch.tensor([4, 0]))[..., 0, :].tolist() == [[4., 5., 6.], [7., 8., 9.]]


# --- packing ---

@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_packing_keeps_order_and_comes_back(rows):
    mask = torch.tensor(rows)
    x = torch.randn(*mask.shape, 3).masked_fill(~mask[..., None], torch.nan)
    packed, real, order = pack_tokens(x, mask)
    for i in range(len(rows)):
        n = mask[i].sum()
        assert real[i].tolist() == [True] * n + [False] * (5 - n)
        assert torch.equal(packed[i, :n], x[i][mask[i]])
        assert not packed[i, n:].any()
    assert torch.equal(unpack_tokens(packed, real, order), x.nan_to_num(0))


# --- how it starts ---

def test_initialisation_is_the_official_one():
    torch.manual_seed(0)
    dt = F.softplus(init_dt_bias(20000).double())
    assert 1e-3 * 0.999 < dt.min() < 1.01e-3
    assert 0.099 < dt.max() < 0.1001
    share = [((dt > lo) & (dt <= lo * 10 ** 0.5)).double().mean() for lo in (1e-3, 10 ** -2.5, 1e-2, 10 ** -1.5)]
    assert_close(torch.stack(share), torch.full((4,), 0.25).double(), atol=0.02, rtol=0)     # the logarithm is uniform
    assert_close(F.softplus(init_dt_bias(100, 1e-6, 1e-5)), torch.full((100,), 1e-4), rtol=1e-3, atol=0)       # the floor
    block = Mamba(100, d_state=5)
    assert (block.d_inner, block.dt_rank, block.dt_proj.weight.abs().max() <= 7 ** -0.5) == (200, 7, True)
    assert block.dt_proj.weight.abs().max() > 0.98 * 7 ** -0.5
    assert_close(-block.A_log.exp(), -torch.arange(1., 6).expand(200, 5))
    assert torch.equal(block.D, torch.ones(200))
    assert block.dt_proj.bias._no_reinit


def test_names_and_shapes_are_the_official_ones():
    got = {name: tuple(p.shape) for name, p in Mamba(32, d_state=8, d_conv=3, dt_rank=5, bias=True).state_dict().items()}
    assert got == {"A_log": (64, 8), "D": (64,), "in_proj.weight": (128, 32), "in_proj.bias": (128,), "conv1d.weight": (64, 1, 3),
                   "conv1d.bias": (64,), "x_proj.weight": (21, 64), "dt_proj.weight": (64, 5), "dt_proj.bias": (64,),
                   "out_proj.weight": (32, 64), "out_proj.bias": (32,)}
    assert {"in_proj.bias", "out_proj.bias"}.isdisjoint(Mamba(32).state_dict())
    assert "conv1d.bias" not in Mamba(32, conv_bias=False).state_dict()


# --- peers ---

@pytest.mark.parametrize("options", KINDS["mamba"].configs[:5])
def test_transformers_peer(options):
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    config = pytest.importorskip("transformers").MambaConfig
    names = {"d_state": "state_size", "d_conv": "conv_kernel", "bias": "use_bias", "conv_bias": "use_conv_bias",
             "dt_rank": "time_step_rank", "expand": "expand"}
    ours = KINDS["mamba"].random(20, **options)
    theirs = modeling.MambaMixer(config(hidden_size=20, num_hidden_layers=1, **{names[k]: v for k, v in options.items()}), 0)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_peers(ours, theirs, 20)


def test_backends_agree():
    fast, slow = KINDS["mamba"].random(), KINDS["mamba"].random(backend="reference")
    x = torch.randn(2, 21, 18)
    assert rms_error(fast(x), slow(x)) < 1e-5
    with pytest.raises(ValueError, match="^backend: "):
        Mamba(8, backend="fast")(torch.randn(1, 2, 8))


def test_the_middle_part_alone():
    "Module vss calls `ssm` without a gate; forward is its projections around it."
    block, x = KINDS["mamba"].random(), torch.randn(2, 6, 18)
    u, z = block.in_proj(x).chunk(2, -1)
    y, state = block.ssm(u)
    assert isinstance(state, MambaState)
    assert_close(block.out_proj(y * F.silu(z)), block(x))
    assert block.ssm(u, z, return_state=False)[1] is None

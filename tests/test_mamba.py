"""Chapter 05: the Mamba block against its equations in float64, against transformers, and against itself fed in other ways."""
import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from vlmamba_lite.mamba import (
    Mamba,
    MambaState,
    causal_conv1d,
    conv_step,
    init_dt_bias,
    next_window,
    pack_tokens,
    unpack_tokens,
)
from vlmamba_lite.scan_reference import selective_scan_reference

CONFIGS = [{}, {"d_state": 8, "expand": 1}, {"d_conv": 2, "conv_bias": False}, {"d_conv": 3, "bias": True, "dt_rank": 3},
           {"d_state": 64, "dt_rank": 7}, {"d_state": 1, "d_conv": 1}]


def error(got, want):
    "Relative RMS error."
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()


def random_block(d_model=18, seed=0, **options):
    "A block none of whose parameters has its tidy first value."
    torch.manual_seed(seed)
    block = Mamba(d_model, **options)
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return block


def random_state(block, batch, requires_grad=False):
    return MambaState(*(torch.randn_like(s).requires_grad_(requires_grad) for s in block.empty_state(batch)))


def by_the_book(p, x, state=None):
    "The block in the paper's words, from any state."
    L = x.shape[1]
    window, h = state or p.empty_state(x.shape[0])
    u, z = p.in_proj(x).mT.chunk(2, 1)
    seen = torch.cat([window, u], 2)
    u = F.silu(F.conv1d(seen, p.conv1d.weight, p.conv1d.bias, groups=p.d_inner)[..., -L:])
    code, B, C = p.x_proj(u.mT).mT.split([p.dt_rank, p.d_state, p.d_state], 1)
    delta = F.softplus(p.dt_proj(code.mT)).mT
    y, h = selective_scan_reference(u, delta, -torch.exp(p.A_log), B, C, p.D, z, initial_state=h, return_last_state=True)
    return p.out_proj(y.mT), MambaState(seen[..., -p.d_conv:], h)


def by_token(block, x, state):
    ys = []
    for x_t in x.unbind(1):
        y_t, state = block.step(x_t, state)
        ys.append(y_t)
    return torch.stack(ys, 1), state


def gradients(block, outputs, inputs):
    loss = sum((o.double() * torch.linspace(-1, 1, o.numel()).double().view_as(o)).sum() for o in outputs)
    return torch.autograd.grad(loss, [*inputs, *block.parameters()])


# --- the convolution ---

@settings(deadline=None, max_examples=20, derandomize=True)
@given(L=st.integers(1, 9), K=st.integers(1, 5), D=st.integers(1, 4), bias=st.booleans(), cut=st.integers(0, 9))
def test_conv_is_pytorchs_and_can_be_cut(L, K, D, bias, cut):
    torch.manual_seed(L * K + D)
    x, w, b = torch.randn(2, L, D, dtype=torch.float64), torch.randn(D, 1, K).double(), torch.randn(D).double() if bias else None
    before = torch.randn(2, D, K).double()
    y, seen = causal_conv1d(x, w, b, before)
    assert_close(y, F.conv1d(torch.cat([before, x.mT], 2), w, b, groups=D)[..., 1:].mT)
    assert_close(causal_conv1d(x, w, b)[0], F.conv1d(x.mT, w, b, padding=K - 1, groups=D)[..., :L].mT)
    window, ys = before, []
    for t in range(L):
        y_t, window = conv_step(x[:, t], window, w, b)
        ys.append(y_t)
    assert_close(torch.stack(ys, 1), y)
    assert_close(next_window(seen, K), window)
    if 0 < cut < L:
        first, seen = causal_conv1d(x[:, :cut], w, b, before)
        assert_close(torch.cat([first, causal_conv1d(x[:, cut:], w, b, next_window(seen, K))[0]], 1), y)


def test_convolution_has_no_second_gradient():
    x, w = torch.randn(1, 5, 2, requires_grad=True), torch.randn(2, 1, 3, requires_grad=True)
    first, = torch.autograd.grad(causal_conv1d(x, w)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="ShiftedSums: its gradient can be taken once, not twice"):
        torch.autograd.grad(first.sum(), w)


def test_conv_sums_in_float32_and_windows_are_copies():
    x, w = torch.randn(2, 50, 3), torch.randn(3, 1, 4)
    half, _ = causal_conv1d(x.bfloat16(), w.bfloat16())
    want, seen = causal_conv1d(x.bfloat16().float(), w.bfloat16().float())
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


def test_A_log_and_D_are_not_decayed():
    block = Mamba(8)
    marked = {name for name, p in block.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"A_log", "D"}
    before = copy.deepcopy(block.state_dict())
    groups = [{"params": [p for n, p in block.named_parameters() if n in marked], "weight_decay": 0.},
              {"params": [p for n, p in block.named_parameters() if n not in marked], "weight_decay": 0.5}]
    for p in block.parameters():
        p.grad = torch.zeros_like(p)
    torch.optim.AdamW(groups, lr=0.1).step()
    assert {name for name, p in block.named_parameters() if torch.equal(p, before[name])} == marked
    assert all(getattr(p, "_no_weight_decay", False) for p in (block.double().A_log, block.D))      # casting keeps the marks


# --- values and gradients ---

@pytest.mark.parametrize("options", CONFIGS)
@pytest.mark.parametrize("L", [1, 7, 40])
def test_block_is_the_book(options, L):
    block = random_block(**options).double()
    x = torch.randn(3, L, 18).double().requires_grad_()
    for state in (None, random_state(block, 3, requires_grad=True)):
        (y, end), (want, want_end) = block(x, state, return_state=True), by_the_book(block, x, state)
        assert_close((y, *end), (want, *want_end))
        assert_close(block(x, state), y)
        inputs = [x, *(state or ())]
        for got, right in zip(gradients(block, (y, *end), inputs), gradients(block, (want, *want_end), inputs)):
            assert_close(got, right)


def test_float64_is_float64_throughout():
    "A single float32 rounding inside (of A, D or the bias, say) would show at 1e-8."
    block, x = random_block().double(), torch.randn(2, 30, 18).double()
    start = random_state(block, 2)
    assert start.ssm.dtype == torch.float64
    want, want_end = by_the_book(block, x, start)
    for y, end in (block(x, start, return_state=True), by_token(block, x, start)):
        assert y.dtype == end.ssm.dtype == torch.float64
        assert error(y, want) < 1e-13
        assert error(end.ssm, want_end.ssm) < 1e-13


@pytest.mark.parametrize("options", CONFIGS[:5])
def test_transformers_peer(options):
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    config = pytest.importorskip("transformers").MambaConfig
    names = {"d_state": "state_size", "d_conv": "conv_kernel", "bias": "use_bias", "conv_bias": "use_conv_bias",
             "dt_rank": "time_step_rank", "expand": "expand"}
    ours = random_block(20, **options)
    theirs = modeling.MambaMixer(config(hidden_size=20, num_hidden_layers=1, **{names[k]: v for k, v in options.items()}), 0)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for L in (1, 37):
        x = torch.randn(3, L, 20, requires_grad=True)
        y, want = ours(x), theirs(x)
        assert error(y, want) < 1e-5
        got, right = gradients(ours, [y], [x]), gradients(theirs, [want], [x])
        right = [right[0], *(dict(zip(dict(theirs.named_parameters()), right[1:]))[n] for n, _ in ours.named_parameters())]
        assert max(error(g, r) for g, r in zip(got, right)) < 1e-4


@pytest.mark.parametrize("step", [False, True])
def test_gradcheck_with_state_and_pads(step):
    block = random_block(3, d_state=2, d_conv=3, expand=1, dt_rank=1).double()
    names, values = zip(*block.named_parameters())
    mask = torch.tensor([[True, True, False, True], [False, True, True, False]])

    def sequence(x, conv, ssm, *values):
        y, state = torch.func.functional_call(block, dict(zip(names, values)), (x, MambaState(conv, ssm), mask, True))
        return y, *state

    def one(x, conv, ssm):
        y, state = block.step(x[:, 0], MambaState(conv, ssm))
        return y, *state
    inputs = torch.randn(2, 4, 3).double().requires_grad_(), *random_state(block, 2, requires_grad=True)
    assert torch.autograd.gradcheck(one, inputs) if step else torch.autograd.gradcheck(sequence, (*inputs, *values))


def test_backends_agree():
    fast, slow = random_block(), random_block(backend="reference")
    x = torch.randn(2, 21, 18)
    assert error(fast(x), slow(x)) < 1e-5
    with pytest.raises(ValueError, match="^backend: "):
        Mamba(8, backend="fast")(torch.randn(1, 2, 8))


# --- fed in other ways ---

def test_steps_equal_the_parallel_form_after_512_tokens():
    block, x = random_block(24), torch.randn(2, 512, 24)
    with torch.no_grad():
        y, end = block(x, return_state=True)
        got, got_end = by_token(block, x, block.empty_state(2))
    assert error(got, y) < 1e-5
    assert error(got[:, -1], y[:, -1]) < 1e-5
    assert error(got_end.ssm, end.ssm) < 1e-5
    assert error(got_end.conv, end.conv) < 1e-6


@pytest.mark.parametrize("d_conv", [1, 2, 4])
def test_split_anywhere(d_conv):
    block, x = random_block(d_conv=d_conv).double(), torch.randn(2, 12, 18).double()
    start = random_state(block, 2)
    want = block(x, start, return_state=True)
    for cut in range(1, 12):
        a, state = block(x[:, :cut], start, return_state=True)
        b, state = block(x[:, cut:], state, return_state=True)
        assert_close((torch.cat([a, b], 1), state), want)
    assert_close(by_token(block, x, start), want)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(rows=st.lists(st.lists(st.booleans(), min_size=11, max_size=11), min_size=2, max_size=4), carry=st.booleans())
def test_pads_anywhere_change_nothing(rows, carry):
    mask, block = torch.tensor(rows), random_block(d_conv=4, bias=True).double()
    x = torch.randn(len(rows), 11, 18).double()
    start = random_state(block, len(rows)) if carry else block.empty_state(len(rows))
    y, end = block(x.masked_fill(~mask[..., None], torch.nan), start, mask, True)
    assert not y[~mask].any()
    for i in range(len(rows)):
        own = MambaState(start.conv[i:i+1], start.ssm[i:i+1])
        want, want_end = block(x[i:i+1, mask[i]], own, return_state=True) if mask[i].any() else (x.new_zeros(1, 0, 18), own)
        assert_close(y[i:i+1, mask[i]], want)
        assert_close((end.conv[i:i+1], end.ssm[i:i+1]), tuple(want_end))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pads", [1, 5, 40])
def test_any_number_of_pads_float32(side, pads):
    block, x = random_block(), torch.randn(2, 9, 18)
    around = (pads, 0) if side == "left" else (0, pads)
    mask = F.pad(torch.ones(2, 9, dtype=torch.bool), around)
    y, end = block(F.pad(x, (0, 0, *around), value=3.), None, mask, True)
    want, want_end = block(x, return_state=True)
    assert error(y[mask], want.flatten(0, 1)) < 1e-6
    assert error(end.ssm, want_end.ssm) < 1e-6
    assert error(end.conv, want_end.conv) < 1e-6


def test_pads_get_no_gradient_and_give_none():
    block = random_block()
    x = torch.randn(2, 6, 18, requires_grad=True)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()
    y, end = block(x, None, mask, True)
    (y.square().sum() + end.ssm.square().sum()).backward()
    assert x.grad[mask].abs().min() > 0
    assert not x.grad[~mask].any()


def test_the_middle_part_alone():
    "Module vss calls `ssm` without a gate; forward is its projections around it."
    block, x = random_block(), torch.randn(2, 6, 18)
    u, z = block.in_proj(x).chunk(2, -1)
    y, state = block.ssm(u)
    assert isinstance(state, MambaState)
    assert_close(block.out_proj(y * F.silu(z)), block(x))
    assert block.ssm(u, z, return_state=False)[1] is None


# --- half precision ---

@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_keeps_its_state_in_float32(autocast):
    block, x = random_block(32), torch.randn(2, 65, 32)
    want, _ = block(x, return_state=True)
    half = block if autocast else copy.deepcopy(block).bfloat16()
    start = half.empty_state(2)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), torch.no_grad():
        x = x if autocast else x.bfloat16()
        y, end = half(x, return_state=True)
        by_step, step_end = by_token(half, x, start)
    assert {s.ssm.dtype for s in (start, end, step_end)} == {torch.float32}
    assert error(y, want) < 0.02
    assert error(by_step, y) < 0.02
    assert error(step_end.ssm, end.ssm) < 0.02


def test_small_steps_survive_autocast():
    "The bias of the step sizes is added in float32: bfloat16 has no number near -6.89 and would be off by 1.6 %."
    block, x = Mamba(32), torch.randn(4, 100, 32)
    with torch.no_grad():
        block.dt_proj.weight.zero_()
        block.dt_proj.bias.fill_(-6.890625)                                  # a step of 0.001
    want = copy.deepcopy(block).double()(x.double(), return_state=True)[1].ssm
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        by_scan = block(x, return_state=True)[1].ssm
        by_step = by_token(block, x, block.empty_state(4))[1].ssm
    for got in (by_scan, by_step):
        scale = (got * want).sum() / want.square().sum()                     # rounding elsewhere averages out, this would not
        assert abs(scale - 1) < 3e-3


def test_training_under_autocast_follows_float32():
    def train(autocast):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 16), Mamba(16, d_state=4), nn.Linear(16, 6))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(40):
            x = torch.randn(8, 20, 6)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = F.mse_loss(model(x)[:, 2:].float(), x[:, :-2])        # say what came two tokens ago
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()
    full, half = train(False), train(True)
    assert full < 0.9
    assert abs(half / full - 1) < 0.02


# --- bad input ---

@pytest.mark.parametrize("call, message", [
    (lambda b: b(torch.zeros(2, 5, 17)), r"^x: got \(2, 5, 17\), need"),
    (lambda b: b(torch.zeros(5, 18)), r"^x: got \(5, 18\), need"),
    (lambda b: b(torch.zeros(2, 0, 18)), r"^x: got \(2, 0, 18\), need"),
    (lambda b: b(torch.zeros(2, 5, 18), b.empty_state(1)), r"^state.conv: got \(1, 36, 4\), need \(2, 36, 4\)"),
    (lambda b: b(torch.zeros(1, 5, 18), MambaState(b.empty_state(1).conv, torch.zeros(1, 36, 8))), r"^state.ssm: got \(1, 36, 8\)"),
    (lambda b: b(torch.zeros(2, 5, 18), mask=torch.ones(2, 5)), r"^mask: got torch.float32"),
    (lambda b: b(torch.zeros(2, 5, 18), mask=torch.ones(2, 4).bool()), r"^mask: got torch.bool \(2, 4\), need bool \(2, 5\)"),
    (lambda b: b.step(torch.zeros(2, 1, 18), b.empty_state(2)), r"^x_t: got \(2, 1, 18\), need \(batch, 18\)"),
    (lambda b: b.step(torch.zeros(2, 18), b.empty_state(3)), r"^state.conv: "),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(Mamba(18))

"""The Mamba and Mamba-2 blocks (chapters 05 and 06) against their equations in float64, and against themselves fed in other ways."""
import copy
from inspect import signature

import pytest
import torch
import torch.nn.functional as F
from block_cases import KINDS, by_token
from hypothesis import given, settings
from hypothesis import strategies as st
from measures import gradients, rms_error
from torch import nn
from torch.testing import assert_close

from vlmamba_lite.layers.mamba import Mamba


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request):
    return request.param


def cases(field):
    "(kind, options) of all kinds, for a field that lists options."
    return [pytest.param(kind, options, id=f"{name}-{i}") for name, kind in KINDS.items() for i, options in enumerate(getattr(kind, field))]


def test_marked_parameters_are_not_decayed(kind):
    block = kind.random()
    marked = {name for name, p in block.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == set(kind.undecayed)
    before = copy.deepcopy(block.state_dict())
    groups = [{"params": [p for n, p in block.named_parameters() if n in marked], "weight_decay": 0.},
              {"params": [p for n, p in block.named_parameters() if n not in marked], "weight_decay": 0.5}]
    for p in block.parameters():
        p.grad = torch.zeros_like(p)
    torch.optim.AdamW(groups, lr=0.1).step()
    assert {name for name, p in block.named_parameters() if torch.equal(p, before[name])} == marked
    assert all(getattr(dict(block.double().named_parameters())[name], "_no_weight_decay", False) for name in marked)    # casting keeps the marks


# --- values and gradients ---

@pytest.mark.parametrize("kind, options", cases("configs"))
@pytest.mark.parametrize("L", [1, 7, 40])
def test_block_is_the_book(kind, options, L):
    block = kind.random(**options).double()
    x = torch.randn(3, L, kind.width).double().requires_grad_()
    for state in (None, kind.random_state(block, 3, requires_grad=True)):
        (y, end), (want, want_end) = block(x, state, return_state=True), kind.by_the_book(block, x, state)
        assert_close((y, *end), (want, *want_end))
        assert_close(block(x, state), y)
        inputs = [x, *(state or ()), *block.parameters()]
        for got, right in zip(gradients((y, *end), inputs), gradients((want, *want_end), inputs)):
            assert_close(got, right)


@pytest.mark.parametrize("step", [False, True])
def test_gradcheck_with_state_and_pads(kind, step):
    block = kind.random(3, **kind.tiny).double()
    names, values = zip(*block.named_parameters())
    mask = torch.tensor([[True, True, False, True], [False, True, True, False]])

    def sequence(x, conv, ssm, *values):
        y, state = torch.func.functional_call(block, dict(zip(names, values)), (x, kind.state(conv, ssm), mask, True))
        return y, *state

    def one(x, conv, ssm):
        y, state = block.step(x[:, 0], kind.state(conv, ssm))
        return y, *state
    inputs = torch.randn(2, 4, 3).double().requires_grad_(), *kind.random_state(block, 2, requires_grad=True)
    assert torch.autograd.gradcheck(one, inputs) if step else torch.autograd.gradcheck(sequence, (*inputs, *values))


def test_float64_is_float64_throughout(kind):
    "A single float32 rounding inside (of A, D or the bias, say) would show at 1e-8."
    block, x = kind.random(**kind.halved).double(), torch.randn(2, 30, kind.width).double()
    start = kind.random_state(block, 2)
    assert start.ssm.dtype == torch.float64
    want, want_end = kind.by_the_book(block, x, start)
    for y, end in (block(x, start, return_state=True), by_token(block, x, start)):
        assert y.dtype == end.ssm.dtype == torch.float64
        assert rms_error(y, want) < 1e-13
        assert rms_error(end.ssm, want_end.ssm) < 1e-13


class Adapter(nn.Module):
    "A low-rank adapter (LoRA) around a projection."

    def __init__(self, base, rank=2):
        super().__init__()
        self.base, self.bias = base, base.bias
        self.down, self.up = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("kind, names", [(KINDS["mamba"], ("in_proj", "x_proj", "dt_proj", "out_proj")),
                                         (KINDS["mamba2"], ("in_proj", "out_proj"))])
def test_projections_are_called_so_adapters_work(kind, names):
    block, x = kind.random().double(), torch.randn(2, 9, kind.width).double()
    merged = copy.deepcopy(block)
    for name in names:
        adapter = Adapter(getattr(block, name)).double()
        setattr(block, name, adapter)
        getattr(merged, name).weight.data += adapter.up.weight @ adapter.down.weight
    y, end = block(x, return_state=True)
    assert_close((y, end), merged(x, return_state=True))
    assert_close(by_token(block, x, block.empty_state(2)), (y, end))
    y.sum().backward()
    assert all(getattr(block, name).up.weight.grad.any() for name in names)


# --- fed in other ways ---

@pytest.mark.parametrize("kind, options", [(KINDS["mamba"], {}), (KINDS["mamba2"], {}), (KINDS["mamba2"], {"ngroups": 2, "norm_before_gate": True})])
def test_steps_equal_the_parallel_form_after_512_tokens(kind, options):
    block, x = kind.random(**options), torch.randn(2, 512, kind.width)
    with torch.no_grad():
        y, end = block(x, return_state=True)
        got, got_end = by_token(block, x, block.empty_state(2))
    assert rms_error(got, y) < 1e-5
    assert rms_error(got[:, -1], y[:, -1]) < 1e-5
    assert rms_error(got_end.ssm, end.ssm) < 1e-5
    assert rms_error(got_end.conv, end.conv) < 1e-6


@pytest.mark.parametrize("kind, options", [(KINDS["mamba"], {"d_conv": n}) for n in (1, 2, 4)] + [
    (KINDS["mamba2"], {"d_conv": n, "chunk_size": chunk, "ngroups": 2}) for n, chunk in ((1, 4), (2, 256), (4, 5))])
def test_split_anywhere(kind, options):
    block, x = kind.random(**options).double(), torch.randn(2, 12, kind.width).double()
    start = kind.random_state(block, 2)
    want = block(x, start, return_state=True)
    for cut in range(1, 12):
        a, state = block(x[:, :cut], start, return_state=True)
        b, state = block(x[:, cut:], state, return_state=True)
        assert_close((torch.cat([a, b], 1), state), want)
    assert_close(by_token(block, x, start), want)


@pytest.mark.parametrize("kind, options", cases("padded"))
@settings(deadline=None, max_examples=20, derandomize=True)
@given(rows=st.lists(st.lists(st.booleans(), min_size=11, max_size=11), min_size=2, max_size=4), carry=st.booleans())
def test_pads_anywhere_change_nothing(kind, options, rows, carry):
    mask, block = torch.tensor(rows), kind.random(**options).double()
    x = torch.randn(len(rows), 11, kind.width).double()
    start = kind.random_state(block, len(rows)) if carry else block.empty_state(len(rows))
    y, end = block(x.masked_fill(~mask[..., None], torch.nan), start, mask, True)
    assert not y[~mask].any()
    for i in range(len(rows)):
        own = kind.state(start.conv[i:i+1], start.ssm[i:i+1])
        want, want_end = block(x[i:i+1, mask[i]], own, return_state=True) if mask[i].any() else (x.new_zeros(1, 0, kind.width), own)
        assert_close(y[i:i+1, mask[i]], want)
        assert_close((end.conv[i:i+1], end.ssm[i:i+1]), tuple(want_end))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pads", [1, 5, 40])
def test_any_number_of_pads_float32(kind, side, pads):
    block, x = kind.random(), torch.randn(2, 9, kind.width)
    around = (pads, 0) if side == "left" else (0, pads)
    mask = F.pad(torch.ones(2, 9, dtype=torch.bool), around)
    y, end = block(F.pad(x, (0, 0, *around), value=3.), None, mask, True)
    want, want_end = block(x, return_state=True)
    limit = 2e-6 if kind is KINDS["mamba2"] else 1e-6                        # SSD's chunks begin elsewhere
    assert rms_error(y[mask], want.flatten(0, 1)) < limit
    assert rms_error(end.ssm, want_end.ssm) < limit
    assert rms_error(end.conv, want_end.conv) < 1e-6


def test_pads_get_no_gradient_and_give_none(kind):
    block = kind.random()
    x = torch.randn(2, 6, kind.width, requires_grad=True)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()
    y, end = block(x, None, mask, True)
    (y.square().sum() + end.ssm.square().sum()).backward()
    assert x.grad[mask].abs().min() > 0
    assert not x.grad[~mask].any()


# --- half precision ---

@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_keeps_its_state_in_float32(kind, autocast):
    block, x = kind.random(32, **kind.halved), torch.randn(2, 65, 32)
    want, _ = block(x, return_state=True)
    half = block if autocast else copy.deepcopy(block).bfloat16()
    start = half.empty_state(2)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), torch.no_grad():
        x = x if autocast else x.bfloat16()
        y, end = half(x, return_state=True)
        by_step, step_end = by_token(half, x, start)
    assert {s.ssm.dtype for s in (start, end, step_end)} == {torch.float32}
    assert rms_error(y, want) < 0.02
    assert rms_error(by_step, y) < 0.02
    assert rms_error(step_end.ssm, end.ssm) < 0.02


def test_small_steps_survive_autocast(kind):
    "The bias of the step sizes is added in float32: bfloat16 has no number near -6.89 and would be off by 1.6 %."
    block, x = kind.random(32), torch.randn(4, 100, 32)
    with torch.no_grad():
        kind.step_of(block, -6.890625)                                       # a step of 0.001
    want = copy.deepcopy(block).double()(x.double(), return_state=True)[1].ssm
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        by_scan = block(x, return_state=True)[1].ssm
        by_step = by_token(block, x, block.empty_state(4))[1].ssm
    for got in (by_scan, by_step):
        scale = (got * want).sum() / want.square().sum()                     # rounding elsewhere averages out, this would not
        assert abs(scale - 1) < 3e-3


def test_training_under_autocast_follows_float32(kind):
    def train(autocast):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 16), kind.block(16, **kind.small | kind.halved), nn.Linear(16, 6))
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

def zeros_like(state, i, *shape):
    "A state whose part i has another shape."
    return type(state)(*(torch.zeros(shape) if i == k else part for k, part in enumerate(state)))


@pytest.mark.parametrize("call, message", [
    (lambda b, w: b(torch.zeros(2, 5, w - 1)), r"^x: got \(2, 5, {less}\), need"),
    (lambda b, w: b(torch.zeros(5, w)), r"^x: got \(5, {width}\), need"),
    (lambda b, w: b(torch.zeros(2, 0, w)), r"^x: got \(2, 0, {width}\), need"),
    (lambda b, w: b(torch.zeros(2, 5, w), b.empty_state(1)), r"^state.conv: got \(1, {conv}, 4\), need \(2, {conv}, 4\)"),
    (lambda b, w: b(torch.zeros(1, 5, w), zeros_like(b.empty_state(1), 1, 1, 2)), r"^state.ssm: got \(1, 2\)"),
    (lambda b, w: b(torch.zeros(2, 5, w), mask=torch.ones(2, 5)), r"^mask: got torch.float32"),
    (lambda b, w: b(torch.zeros(2, 5, w), mask=torch.ones(2, 4).bool()), r"^mask: got torch.bool \(2, 4\), need bool \(2, 5\)"),
    (lambda b, w: b.step(torch.zeros(2, 1, w), b.empty_state(2)), r"^x_t: got \(2, 1, {width}\), need \(batch, {width}\)"),
    (lambda b, w: b.step(torch.zeros(2, w), b.empty_state(3)), r"^state.conv: "),
])
def test_bad_input_is_named(kind, call, message):
    block = kind.random()
    with pytest.raises(ValueError, match=message.format(width=kind.width, less=kind.width - 1, conv=block.conv1d.weight.shape[0])):
        call(block, kind.width)


@pytest.mark.parametrize("wrong", [dict(d_state=0), dict(d_state="4"), dict(d_model=0), dict(d_model="16"), dict(d_conv=0), dict(expand=0)], ids=str)
def test_sizes_that_are_none_are_named(kind, wrong):
    name, = wrong
    if name not in signature(type(kind.random())).parameters:
        pytest.skip("it has none")
    with pytest.raises(ValueError, match=f"^({name}|expand . d_model|headdim): got "):
        type(kind.random())(**{"d_model": 16, **({} if "headdim" not in signature(type(kind.random())).parameters else {"headdim": 8}), **wrong})


def test_a_rank_of_nothing_is_named():
    with pytest.raises(ValueError, match="^dt_rank: got 0, need a whole number of at least 1$"):
        Mamba(16, dt_rank=0)


def test_a_step_without_a_state_is_named(kind):
    block = kind.random()
    with pytest.raises(ValueError, match="^state: got None, need the state before the token"):
        block.step(torch.zeros(1, block.d_model), None)

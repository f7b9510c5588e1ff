"""Chapter 09: the Mamba-2 block against its equations in float64, against transformers, and against itself fed in other ways."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from vlmamba_lite.mamba2 import GatedRMSNorm, Mamba2, Mamba2State
from vlmamba_lite.ssd import ssd_recurrent

CONFIGS = [{}, {"d_state": 8, "expand": 1}, {"ngroups": 2, "d_conv": 2, "conv_bias": False}, {"ngroups": 4, "d_conv": 3, "bias": True},
           {"ngroups": 2, "norm_before_gate": True, "chunk_size": 7}, {"dt_limit": (0.02, 0.3), "headdim": 16}, {"d_conv": 1, "headdim": 32}]


def error(got, want):
    "Relative RMS error."
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()


def random_block(d_model=32, seed=0, **options):
    "A block none of whose parameters has its tidy first value."
    torch.manual_seed(seed)
    block = Mamba2(d_model, **{"d_state": 6, "headdim": 8} | options)
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return block


def random_state(block, batch, requires_grad=False):
    return Mamba2State(*(torch.randn_like(s).requires_grad_(requires_grad) for s in block.empty_state(batch)))


def group_norm(y, z, weight, groups, before):
    "The gated norm, one group at a time."
    gate = z * torch.sigmoid(z)
    parts = (y if before else y * gate).chunk(groups, -1)
    out = torch.cat([p / (p.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() for p in parts], -1) * weight
    return out * gate if before else out


def by_the_book(p, x, state=None):
    "The block in the paper's words, from any state."
    b, L, _ = x.shape
    D, GN, G = p.d_inner, p.ngroups * p.d_state, p.ngroups
    window, h = state or p.empty_state(b)
    z, xBC, dt = p.in_proj(x).split([D, D + 2 * GN, p.nheads], -1)
    seen = torch.cat([window, xBC.mT], 2)
    xBC = F.silu(F.conv1d(seen, p.conv1d.weight, p.conv1d.bias, groups=D + 2 * GN)[..., -L:]).mT
    u, B, C = (i.reshape(b, L, n, -1) for i, n in zip(xBC.split([D, GN, GN], -1), (p.nheads, G, G)))
    dt = F.softplus(dt + p.dt_bias).clamp(*p.dt_limit)
    y, h = ssd_recurrent(u, dt, -torch.exp(p.A_log), B, C, D=p.D, initial_states=h, return_final_states=True)
    y = group_norm(y.flatten(2), z, p.norm.weight, G, p.norm.norm_before_gate)
    return p.out_proj(y), Mamba2State(seen[..., -p.d_conv:], h)


def by_token(block, x, state):
    ys = []
    for x_t in x.unbind(1):
        y_t, state = block.step(x_t, state)
        ys.append(y_t)
    return torch.stack(ys, 1), state


def gradients(block, outputs, inputs):
    loss = sum((o.double() * torch.linspace(-1, 1, o.numel()).double().view_as(o)).sum() for o in outputs)
    return torch.autograd.grad(loss, [*inputs, *block.parameters()])


# --- the gated norm ---

@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("before", [False, True])
def test_gated_norm(groups, before):
    norm = GatedRMSNorm(12, groups, before).double()
    norm.weight.data.normal_()
    y, z = torch.randn(2, 3, 5, 12).double().requires_grad_()
    assert_close(norm(y, z), group_norm(y, z, norm.weight, groups, before))
    assert torch.autograd.gradcheck(norm, (y[0], z[0]))
    half = norm.bfloat16()(y.bfloat16() * 1e3, z.bfloat16())
    assert half.dtype == torch.bfloat16
    want = group_norm(y.bfloat16().double() * 1e3, z.bfloat16().double(), norm.weight.double(), groups, before)
    assert error(half, want) < 5e-3


def test_norm_orders_and_groups_differ():
    y, z = torch.randn(2, 4, 12)
    a, b, c = GatedRMSNorm(12)(y, z), GatedRMSNorm(12, norm_before_gate=True)(y, z), GatedRMSNorm(12, 3)(y, z)
    assert min(error(a, b), error(a, c)) > 0.05
    with pytest.raises(ValueError, match="^groups: got 5, need a divisor of dim = 12"):
        GatedRMSNorm(12, 5)


# --- how it starts ---

def test_initialisation_is_the_official_one():
    torch.manual_seed(0)
    block = Mamba2(1024, headdim=1)                                          # 2048 heads
    A, dt = block.A_log.exp(), F.softplus(block.dt_bias)
    assert 1 <= A.min() < 1.1 and 15.9 < A.max() <= 16
    assert_close(A.mean(), torch.tensor(8.5), atol=0.3, rtol=0)              # uniform in A, not in its logarithm
    assert 0.00099 < dt.min() < 0.00105 and 0.095 < dt.max() < 0.1001
    assert_close(dt.log().mean(), torch.tensor(math.log(0.01)), atol=0.1, rtol=0)
    assert torch.equal(block.D, torch.ones(2048)) and torch.equal(block.norm.weight, torch.ones(2048))
    assert (block.norm.norm_before_gate, block.norm.eps) == (False, 1e-5)
    default = Mamba2(128)
    assert (default.d_state, default.headdim, default.ngroups, default.d_conv, default.d_inner, default.chunk_size) == (128, 64, 1, 4, 256, 256)


def test_names_and_shapes_are_the_official_ones():
    got = {name: tuple(p.shape) for name, p in Mamba2(32, d_state=16, d_conv=3, headdim=8, ngroups=2, bias=True).state_dict().items()}
    assert got == {"dt_bias": (8,), "A_log": (8,), "D": (8,), "in_proj.weight": (64 + 128 + 8, 32), "in_proj.bias": (200,),
                   "conv1d.weight": (128, 1, 3), "conv1d.bias": (128,), "norm.weight": (64,), "out_proj.weight": (32, 64),
                   "out_proj.bias": (32,)}
    assert {"in_proj.bias", "out_proj.bias"}.isdisjoint(Mamba2(32).state_dict())
    assert "conv1d.bias" not in Mamba2(32, conv_bias=False).state_dict()


def test_marked_parameters_are_not_decayed():
    block = random_block()
    marked = {name for name, p in block.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"A_log", "D", "dt_bias"}
    before = copy.deepcopy(block.state_dict())
    groups = [{"params": [p for n, p in block.named_parameters() if n in marked], "weight_decay": 0.},
              {"params": [p for n, p in block.named_parameters() if n not in marked], "weight_decay": 0.5}]
    for p in block.parameters():
        p.grad = torch.zeros_like(p)
    torch.optim.AdamW(groups, lr=0.1).step()
    assert {name for name, p in block.named_parameters() if torch.equal(p, before[name])} == marked


# --- values and gradients ---

@pytest.mark.parametrize("options", CONFIGS)
@pytest.mark.parametrize("L", [1, 7, 40])
def test_block_is_the_book(options, L):
    block = random_block(**options).double()
    x = torch.randn(3, L, 32).double().requires_grad_()
    for state in (None, random_state(block, 3, requires_grad=True)):
        (y, end), (want, want_end) = block(x, state, return_state=True), by_the_book(block, x, state)
        assert_close((y, *end), (want, *want_end))
        assert_close(block(x, state), y)
        inputs = [x, *(state or ())]
        for got, right in zip(gradients(block, (y, *end), inputs), gradients(block, (want, *want_end), inputs)):
            assert_close(got, right)


class NormOverGroups(nn.Module):
    "For a transformers whose gated norm takes one mean over all groups: the official norm, in its place."

    def __init__(self, weight, groups):
        super().__init__()
        self.weight, self.groups, self.variance_epsilon = weight, groups, 1e-5

    def forward(self, y, gate=None):
        return group_norm(y, gate, self.weight, self.groups, False)


# At least two heads a group: the norm does not feel the scale of a group, so with one head and one token the gradients of D and
# dt_bias cancel to nearly nothing, and a relative error of them says nothing about either side.
@pytest.mark.parametrize("d_model, d_state, headdim, ngroups, expand, d_conv, conv_bias", [
    (64, 128, 64, 1, 2, 4, True), (64, 64, 32, 1, 1, 4, False), (64, 16, 32, 2, 2, 3, True), (128, 8, 32, 4, 2, 2, True),
    (128, 32, 64, 2, 2, 4, False)])
def test_transformers_peer(d_model, d_state, headdim, ngroups, expand, d_conv, conv_bias):
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    config = pytest.importorskip("transformers").Mamba2Config
    chunk = 16
    ours = random_block(d_model, d_state=d_state, headdim=headdim, ngroups=ngroups, expand=expand, d_conv=d_conv, conv_bias=conv_bias,
                        chunk_size=chunk)
    theirs = modeling.Mamba2Mixer(config(
        hidden_size=d_model, state_size=d_state, head_dim=headdim, num_heads=ours.nheads, n_groups=ngroups, expand=expand, conv_kernel=d_conv,
        use_conv_bias=conv_bias, use_bias=False, chunk_size=chunk, num_hidden_layers=1, layer_norm_epsilon=1e-5), 0)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    if ngroups > 1 and not hasattr(theirs.norm, "group_size"):
        theirs.norm = NormOverGroups(theirs.norm.weight, ngroups)
    names = [n for n, _ in ours.named_parameters()]
    for L in (1, 37):
        x = torch.randn(3, L, d_model, requires_grad=True)
        y, want = ours(x), theirs(x)
        assert error(y, want) < 1e-5
        got, right = gradients(ours, [y], [x]), gradients(theirs, [want], [x])
        right = [right[0], *(dict(zip(dict(theirs.named_parameters()), right[1:]))[n] for n in names)]
        assert max(error(g, r) for g, r in zip(got, right)) < 1e-4


@pytest.mark.parametrize("step", [False, True])
def test_gradcheck_with_state_and_pads(step):
    block = random_block(3, d_state=2, d_conv=3, headdim=3, chunk_size=2).double()
    names, values = zip(*block.named_parameters())
    mask = torch.tensor([[True, True, False, True], [False, True, True, False]])

    def sequence(x, conv, ssm, *values):
        y, state = torch.func.functional_call(block, dict(zip(names, values)), (x, Mamba2State(conv, ssm), mask, True))
        return y, *state

    def one(x, conv, ssm):
        y, state = block.step(x[:, 0], Mamba2State(conv, ssm))
        return y, *state
    inputs = torch.randn(2, 4, 3).double().requires_grad_(), *random_state(block, 2, requires_grad=True)
    assert torch.autograd.gradcheck(one, inputs) if step else torch.autograd.gradcheck(sequence, (*inputs, *values))


def test_float64_is_float64_throughout():
    "A single float32 rounding inside (of A, D or the bias, say) would show at 1e-8."
    block, x = random_block(ngroups=2).double(), torch.randn(2, 30, 32).double()
    start = random_state(block, 2)
    assert start.ssm.dtype == torch.float64
    want, want_end = by_the_book(block, x, start)
    for y, end in (block(x, start, return_state=True), by_token(block, x, start)):
        assert y.dtype == end.ssm.dtype == torch.float64
        assert error(y, want) < 1e-13
        assert error(end.ssm, want_end.ssm) < 1e-13


# --- fed in other ways ---

@pytest.mark.parametrize("ngroups, before", [(1, False), (2, True)])
def test_steps_equal_the_parallel_form_after_512_tokens(ngroups, before):
    block, x = random_block(ngroups=ngroups, norm_before_gate=before), torch.randn(2, 512, 32)
    with torch.no_grad():
        y, end = block(x, return_state=True)
        got, got_end = by_token(block, x, block.empty_state(2))
    assert error(got, y) < 1e-5
    assert error(got[:, -1], y[:, -1]) < 1e-5
    assert error(got_end.ssm, end.ssm) < 1e-5
    assert error(got_end.conv, end.conv) < 1e-6


@pytest.mark.parametrize("d_conv, chunk", [(1, 4), (2, 256), (4, 5)])
def test_split_anywhere(d_conv, chunk):
    block, x = random_block(d_conv=d_conv, chunk_size=chunk, ngroups=2).double(), torch.randn(2, 12, 32).double()
    start = random_state(block, 2)
    want = block(x, start, return_state=True)
    for cut in range(1, 12):
        a, state = block(x[:, :cut], start, return_state=True)
        b, state = block(x[:, cut:], state, return_state=True)
        assert_close((torch.cat([a, b], 1), state), want)
    assert_close(by_token(block, x, start), want)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(rows=st.lists(st.lists(st.booleans(), min_size=11, max_size=11), min_size=2, max_size=4), carry=st.booleans(),
       limit=st.sampled_from([(0., math.inf), (0.05, 0.5)]))
def test_pads_anywhere_change_nothing(rows, carry, limit):
    mask, block = torch.tensor(rows), random_block(ngroups=2, bias=True, dt_limit=limit, chunk_size=4).double()
    x = torch.randn(len(rows), 11, 32).double()
    start = random_state(block, len(rows)) if carry else block.empty_state(len(rows))
    y, end = block(x.masked_fill(~mask[..., None], torch.nan), start, mask, True)
    assert not y[~mask].any()
    for i in range(len(rows)):
        own = Mamba2State(start.conv[i:i+1], start.ssm[i:i+1])
        want, want_end = block(x[i:i+1, mask[i]], own, return_state=True) if mask[i].any() else (x.new_zeros(1, 0, 32), own)
        assert_close(y[i:i+1, mask[i]], want)
        assert_close((end.conv[i:i+1], end.ssm[i:i+1]), tuple(want_end))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pads", [1, 5, 40])
def test_any_number_of_pads_float32(side, pads):
    block, x = random_block(), torch.randn(2, 9, 32)
    around = (pads, 0) if side == "left" else (0, pads)
    mask = F.pad(torch.ones(2, 9, dtype=torch.bool), around)
    y, end = block(F.pad(x, (0, 0, *around), value=3.), None, mask, True)
    want, want_end = block(x, return_state=True)
    assert error(y[mask], want.flatten(0, 1)) < 2e-6
    assert error(end.ssm, want_end.ssm) < 2e-6
    assert error(end.conv, want_end.conv) < 1e-6


# --- half precision ---

@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_keeps_its_state_in_float32(autocast):
    block, x = random_block(ngroups=2), torch.randn(2, 65, 32)
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
    block, x = random_block(), torch.randn(4, 100, 32)
    with torch.no_grad():
        block.in_proj.weight[-block.nheads:] = 0
        block.dt_bias.fill_(-6.890625)                                       # a step of 0.001
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
        model = nn.Sequential(nn.Linear(6, 16), Mamba2(16, d_state=8, headdim=8, ngroups=2), nn.Linear(16, 6))
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
    (lambda b: b(torch.zeros(2, 5, 31)), r"^x: got \(2, 5, 31\), need"),
    (lambda b: b(torch.zeros(5, 32)), r"^x: got \(5, 32\), need"),
    (lambda b: b(torch.zeros(2, 0, 32)), r"^x: got \(2, 0, 32\), need"),
    (lambda b: b(torch.zeros(2, 5, 32), b.empty_state(1)), r"^state.conv: got \(1, 76, 4\), need \(2, 76, 4\)"),
    (lambda b: b(torch.zeros(1, 5, 32), Mamba2State(b.empty_state(1).conv, torch.zeros(1, 8, 6, 8))), r"^state.ssm: got \(1, 8, 6, 8\)"),
    (lambda b: b(torch.zeros(2, 5, 32), mask=torch.ones(2, 5)), r"^mask: got torch.float32"),
    (lambda b: b.step(torch.zeros(2, 1, 32), b.empty_state(2)), r"^x_t: got \(2, 1, 32\), need \(batch, 32\)"),
    (lambda b: b.step(torch.zeros(2, 32), b.empty_state(3)), r"^state.conv: "),
    (lambda b: Mamba2(32, headdim=48), "^headdim: got 48, need a divisor of d_inner = 64"),
    (lambda b: Mamba2(32, headdim=8, ngroups=3), "^ngroups: got 3, need a divisor of nheads = 8"),
    (lambda b: Mamba2(32, headdim=8, ngroups=0), "^ngroups: got 0"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(random_block())

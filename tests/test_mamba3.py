"""Mamba-3 against golden results of the official references, in float64 against its own recurrence, and fed in other ways."""
import math
import sys
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from block_cases import by_token
from hypothesis import given, settings
from hypothesis import strategies as st
from measures import gradients, rms_error
from safetensors.torch import load_file
from torch.testing import assert_close

from vlmamba_lite.layers import mamba3
from vlmamba_lite.layers.mamba3 import FORMS, Mamba3, Mamba3State, mamba3_backends, running_angle, trapezoid_by_ssd, trapezoid_recurrent, turn
from vlmamba_lite.ops.ssd import chunked_form, quadratic_form, recurrent_form, ssd_chunked

close = partial(assert_close, rtol=1e-12, atol=1e-12)


def random_block(seed=0, width=16, **options):
    "A block none of whose parameters has its tidy first value."
    torch.manual_seed(seed)
    block = Mamba3(width, **dict(d_state=8, headdim=8, chunk_size=5) | options)
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return block


def random_state(block, batch, requires_grad=False):
    return Mamba3State(*(torch.randn_like(s).requires_grad_(requires_grad) for s in block.empty_state(batch)))


CONFIGS = {"siso": {}, "groups": dict(headdim=4, ngroups=2, rope_fraction=1., A_activation="heavy_tail"),
           "mimo": dict(is_mimo=True, mimo_rank=2), "mimo norm": dict(is_mimo=True, mimo_rank=4, is_outproj_norm=True, ngroups=2),
           "norm": dict(is_outproj_norm=True, rope_fraction=.25)}


# --- the official references ---

@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["siso0", "siso1", "siso2", "mimo0", "mimo1", "mimo2"])
def test_golden(golden, name, form):
    "Outputs, last states and gradients of the references in data/golden/README.md. There all pairs are neighbours, and k, v have R axes in MIMO only."
    case = {key.split(".")[1]: value for key, value in golden.items() if key.startswith(name)}
    mimo, (b, _, H, P), N = name.startswith("mimo"), case["V"].shape, case["Q"].shape[-1]
    R, G, S = case["Q"].shape[2] if mimo else 1, case["Q"].shape[-2], case["Angles"].shape[-1]
    block = Mamba3(H * P // 2, N, headdim=P, ngroups=G, rope_fraction=2 * S / N, is_mimo=mimo, mimo_rank=R,
                   is_outproj_norm="norm_weight" in case, chunk_size=8)
    block.halves = False
    leaves = {key: value.requires_grad_() for key, value in case.items() if f"grad_{key}" in case}
    spread = (lambda i: i) if mimo else (lambda i: i.unsqueeze(i.ndim - 1))              # ([R], N) -> (R, N)
    for ours, theirs in dict(B_bias="K_bias", C_bias="Q_bias", D="D", mimo_x="MIMO_V", mimo_z="MIMO_Z", mimo_o="MIMO_O").items():
        if theirs in case:
            delattr(block, ours)
            setattr(block, ours, spread(leaves[theirs]) if "bias" in ours else leaves[theirs])
    if "norm_weight" in case:
        del block.norm.weight
        block.norm.weight = leaves.get("norm_weight", case["norm_weight"]).flatten()
    state = block.empty_state(b)
    if "state0" in case:
        angle, ssm, k, v = (leaves[f"state{i}"] for i in range(4))
        state = Mamba3State(angle, ssm, spread(k).transpose(1, 2), v if not mimo else torch.zeros(b, H, P))
        if mimo:                                         # the reference takes a state of R values that are not those of one input
            widen = block.widen
            block.widen = lambda u: v if u.ndim == 3 else widen(u)
    B, C = (i if mimo else i.unsqueeze(2) for i in (leaves["K"], leaves["Q"]))
    dt, a, trap = leaves["DT"].mT, leaves["ADT"].mT, leaves["Trap"].mT
    y, end = block.ssm(leaves["V"], leaves["Z"], B, C, dt, a, trap, leaves["Angles"], state, backend=form)
    assert rms_error(y, case["y"]) < 1e-5
    assert rms_error(end.ssm, case["final1"]) < 1e-5
    assert rms_error(end.k.transpose(1, 2), spread(case["final2"])) < 1e-5
    assert rms_error(end.v if not mimo else end.v.unsqueeze(2) * block.mimo_x, case["final3"]) < 1e-5
    assert (end.angle - case["final0"]).sin().abs().max() < 1e-5          # theirs is not always modulo 2 pi
    for key, grad in zip(leaves, torch.autograd.grad((y * case["w"]).sum(), list(leaves.values()))):
        assert rms_error(grad, case[f"grad_{key}"]) < 1e-4, key


@pytest.fixture(scope="module")
def golden():
    return load_file("data/golden/mamba3.safetensors")


# --- one recurrence, three forms ---

def random_inputs(seed, b, L, H, R, P=3, N=4):
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    dt = F.softplus(randn(b, L, H) - 1)
    inputs = randn(b, L, H, R, N), randn(b, L, H, R, N), randn(b, L, H, R, P), dt, -dt * F.softplus(randn(b, L, H)), torch.sigmoid(randn(b, L, H))
    return [i.requires_grad_() for i in inputs], [i.requires_grad_() for i in (randn(b, H, P, N), randn(b, H, R, N), randn(b, H, R, P))]


@settings(deadline=None, max_examples=40)
@given(L=st.integers(1, 130), chunk=st.integers(1, 70), R=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
def test_forms_are_the_recurrence(L, chunk, R, seed):
    inputs, state = random_inputs(seed, 2, L, 2, R)
    want = trapezoid_recurrent(*inputs, state)
    right = gradients(want, [*inputs, *state])
    for form in (recurrent_form, quadratic_form, partial(chunked_form, chunk_size=chunk)):
        got = trapezoid_by_ssd(form, *inputs, state)
        assert max(rms_error(g, w) for g, w in zip(got, want)) < 1e-12
        assert max(rms_error(g, w) for g, w in zip(gradients(got, [*inputs, *state]), right)) < 1e-11


def test_the_recurrence_is_the_papers():
    "One head, one entry of each, by the formula of alpha, beta and gamma."
    inputs, state = random_inputs(0, 1, 9, 1, 1, P=1, N=1)
    q, k, v, dt, a, lam = (i.flatten() for i in inputs)
    h, k_last, v_last = (i.flatten() for i in state)
    for t in range(9):
        alpha, gamma = a[t].exp(), lam[t] * dt[t]
        h = alpha * h + (1 - lam[t]) * dt[t] * alpha * k_last * v_last + gamma * k[t] * v[t]
        close(trapezoid_recurrent(*inputs, state)[0].flatten()[t:t + 1], h * q[t])
        k_last, v_last = k[t], v[t]


@pytest.mark.parametrize("L", [1, 7, 64])
def test_without_its_three_changes_it_is_mamba2(L):
    (q, k, v, dt, _, _), _ = random_inputs(1, 2, L, 4, 1)
    A, D = -torch.rand(4).double(), torch.randn(4).double()
    start = torch.randn(2, 4, 3, 4).double()
    zeros = torch.zeros(2, 4, 1, 4).double(), torch.zeros(2, 4, 1, 3).double()
    y, h = trapezoid_by_ssd(partial(chunked_form, chunk_size=16), q, k, v, dt, dt * A, torch.ones_like(dt), (start, *zeros))
    want = ssd_chunked(v[..., 0, :], dt, A, k[..., 0, :], q[..., 0, :], D=D, chunk_size=16, initial_states=start, return_final_states=True)
    close((y[..., 0, :] + D[:, None] * v[..., 0, :], h), want)


# --- rotation ---

@pytest.mark.parametrize("halves", [False, True])
def test_rotation_is_a_complex_product(halves):
    x, angle = torch.randn(5, 8).double(), torch.randn(5, 3).double()
    pairs = torch.complex(*(x.view(5, 2, 4).unbind(1) if halves else x.view(5, 4, 2).unbind(2)))
    turned = torch.cat([pairs[:, :3] * torch.polar(torch.ones_like(angle), angle), pairs[:, 3:]], 1)
    parts = torch.view_as_real(turned)
    close(turn(x, angle, halves), (parts.mT if halves else parts).flatten(1))


def test_a_long_sum_of_angles_keeps_its_digits():
    dt, theta = torch.full((1, 65536, 1), 0.1), torch.full((1, 65536, 1, 1), 3.)
    got = running_angle(torch.zeros(1, 1, 1), dt, theta)
    want = torch.arange(1, 65537).double().mul(dt[0, 0, 0].mul(3.).double()).remainder(2 * math.pi)
    assert (got.flatten().double() - want).sin().abs().max() < 1e-5       # 2e-2 if summed in float32


# --- the block ---

def by_the_book(p, x):
    "The block in the paper's words, one input a head, one group, neighbours turned, from nothing."
    b, L, _ = x.shape
    H, P, N, S = p.nheads, p.headdim, p.d_state, p.angles
    z, u, B, C, dt, A, lam, theta = p.in_proj(x).split([H * P, H * P, N, N, H, H, H, S], -1)
    dt, A, lam = F.softplus(dt + p.dt_bias), -F.softplus(A).clamp(min=p.A_floor), torch.sigmoid(lam)
    B, C = (i / (i.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight for i, norm in ((B, p.B_norm), (C, p.C_norm)))
    ys = []
    for n in range(H):
        h, phi, last = torch.zeros(b, P, N, dtype=x.dtype), torch.zeros(b, S, dtype=x.dtype), 0.
        for t in range(L):
            phi = phi + dt[:, t, n, None] * math.pi * torch.tanh(theta[:, t])
            k, q = (turn(i[:, t] + bias[n, 0], phi) for i, bias in ((B, p.B_bias), (C, p.C_bias)))
            v = u[:, t, n * P:(n + 1) * P]
            step, decay, part = dt[:, t, n, None, None], (dt[:, t, n] * A[:, t, n]).exp()[:, None, None], lam[:, t, n, None, None]
            new = v[:, :, None] * k[:, None]
            h, last = decay * h + (1 - part) * step * decay * last + part * step * new, new
            ys.append(((h @ q[:, :, None])[..., 0] + p.D[n] * v) * F.silu(z[:, t, n * P:(n + 1) * P]))
    y = torch.stack(ys).unflatten(0, (H, L)).permute(2, 1, 0, 3).flatten(2)
    return p.out_proj(y)


@pytest.mark.parametrize("L", [1, 7, 40])
def test_block_is_the_book(L):
    block, x = random_block().double(), torch.randn(3, L, 16).double().requires_grad_()
    want = by_the_book(block, x)
    right = gradients([want], [x, *block.parameters()])
    for form in FORMS:
        block.backend = form
        close(block(x), want)
        for got, w in zip(gradients([block(x)], [x, *block.parameters()]), right):
            assert_close(got, w)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_sequence_pieces_steps_and_pads_agree(options):
    block, x = random_block(**options).double(), torch.randn(3, 33, 16).double()
    start = random_state(block, 3)
    with torch.no_grad():
        whole, end = block(x, start, return_state=True)
        close(by_token(block, x, start), (whole, end))
        for cut in (1, 16, 32):
            first, state = block(x[:, :cut], start, return_state=True)
            then, state = block(x[:, cut:], state, return_state=True)
            close((torch.cat([first, then], 1), state), (whole, end))
        mask = torch.rand(3, 60, generator=torch.Generator().manual_seed(1)) < 0.6
        mask[0], mask[1, :27], mask[1, 27:] = False, False, True          # nothing at all, pads on the left, pads anywhere
        padded = torch.full((3, 60, 16), torch.nan).double()
        for row in range(3):
            padded[row, mask[row]] = torch.randn(int(mask[row].sum()), 16).double()
        y, state = block(padded, start, mask, return_state=True)
        for row in (1, 2):
            alone = block(padded[row:row + 1, mask[row]], Mamba3State(*(s[row:row + 1] for s in start)), return_state=True)
            close((y[row:row + 1, mask[row]], Mamba3State(*(s[row:row + 1] for s in state))), alone)
        close([s[:1] for s in state[1:]], [s[:1] for s in start[1:]])     # a row without tokens keeps its state
        assert not y[~mask].any() and not y.isnan().any()


@settings(deadline=None, max_examples=25)
@given(L=st.integers(1, 130), chunk=st.integers(1, 70), groups=st.sampled_from([1, 2, 4]), R=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
def test_blocks_of_any_length_chunk_groups_and_mask(L, chunk, groups, R, seed):
    "From a state, in chunks and as the recurrence; and its last row as if it were alone and had no pads."
    block = random_block(seed, headdim=4, ngroups=groups, is_mimo=R > 1, mimo_rank=R, chunk_size=chunk).double()
    x, start, mask = torch.randn(2, L, 16).double(), random_state(block, 2), torch.rand(2, L) < 0.7
    mask[1, -1] = True
    with torch.no_grad():
        y, end = block(x, start, mask, return_state=True)
        block.backend = "recurrent"
        close((y, end), block(x, start, mask, return_state=True))
        alone, last = block(x[1:, mask[1]], Mamba3State(*(s[1:] for s in start)), return_state=True)
    close((y[1:, mask[1]], Mamba3State(*(s[1:] for s in end))), (alone, last))


@pytest.mark.parametrize("options", [CONFIGS["siso"], CONFIGS["mimo norm"]], ids=["siso", "mimo"])
def test_gradcheck_with_state_and_pads(options):
    block = random_block(width=2, **options | dict(d_state=4, headdim=2, expand=2, chunk_size=2)).double()
    names, values = zip(*block.named_parameters())
    mask = torch.tensor([[True, True, False, True], [False, True, True, False]])

    def sequence(x, *rest):
        state, values = Mamba3State(*rest[:4]), rest[4:]
        y, state = torch.func.functional_call(block, dict(zip(names, values)), (x, state, mask, True))
        return y, state.angle.sin(), *state[1:]                           # an angle is modulo 2 pi
    assert torch.autograd.gradcheck(sequence, (torch.randn(2, 4, 2).double().requires_grad_(), *random_state(block, 2, True), *values))


def test_steps_equal_the_parallel_form_after_512_tokens():
    block, x = random_block(), torch.randn(2, 512, 16)
    with torch.no_grad():
        y, end = block(x, return_state=True)
        got, state = by_token(block, x, block.empty_state(2))
    assert rms_error(got, y) < 1e-5 and rms_error(state.ssm, end.ssm) < 1e-5


@pytest.mark.parametrize("options", [CONFIGS["siso"], CONFIGS["mimo"]], ids=["siso", "mimo"])
def test_bfloat16(options):
    block, x = random_block(**options), torch.randn(2, 60, 16)
    want = block.double()(x.double())
    y, state = block.bfloat16()(x.bfloat16(), return_state=True)
    assert y.dtype == torch.bfloat16 and all(s.dtype == torch.float32 for s in state)
    assert rms_error(y.double(), want) < 3e-2


def test_parameters_of_the_official_layer():
    "Names and shapes of mamba_ssm/modules/mamba3.py for d_model = 768; and about 6 d_model^2 of them."
    siso = {name: tuple(p.shape) for name, p in Mamba3(768).named_parameters()}
    assert siso == {"dt_bias": (24,), "B_bias": (24, 1, 128), "C_bias": (24, 1, 128), "D": (24,), "in_proj.weight": (3432, 768),
                    "B_norm.weight": (128,), "C_norm.weight": (128,), "out_proj.weight": (768, 1536)}
    mimo = {name: tuple(p.shape) for name, p in Mamba3(768, is_mimo=True, is_outproj_norm=True).named_parameters()}
    assert mimo["in_proj.weight"] == (2 * 1536 + 8 * 128 + 72 + 32, 768) and mimo["mimo_x"] == mimo["mimo_z"] == mimo["mimo_o"] == (24, 4, 64)
    assert mimo["norm.weight"] == (1536,)
    marked = {name for name, p in Mamba3(64).named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"dt_bias", "D"}


@pytest.mark.parametrize("options, words", [(dict(headdim=5), "headdim: got 5"), (dict(A_activation="relu"), "A_activation: got 'relu'"),
                                            (dict(backend="cpp"), "backend: got 'cpp'"), (dict(headdim="auto"), "headdim: got 'auto'"), (dict(rope_fraction=0), "rope_fraction: got 0"),
                                            (dict(rope_fraction=1.5), "rope_fraction: got 1.5"), (dict(is_mimo=True, mimo_rank=0), "mimo_rank: got 0")])
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        Mamba3(16, **dict(d_state=8, headdim=8) | options)


def test_a_decays_at_least_by_the_floor_and_grows_as_the_activation_says():
    for name, by_hand in (("softplus", lambda x: math.log1p(math.exp(x))), ("heavy_tail", lambda x: 1 + x if x >= 0 else 1 / (1 - x))):
        block = Mamba3(4, d_state=4, headdim=8, A_activation=name, A_floor=0.3).double()
        for x in (-20., -1., 0., 2.):
            with torch.no_grad():
                block.in_proj.weight.zero_()
                block.in_proj.weight[-3, 0] = x            # the last rows: dt, A, lambda of the one head, one angle
                _, _, _, _, dt, a, _, _ = block.project(torch.tensor([[[1., 0, 0, 0]]]).double())
            assert (a / dt).item() == pytest.approx(-max(by_hand(x), 0.3))


@pytest.mark.parametrize("width, d_state, options, wanted", [
    (768, 128, {}, 24 * (768 * 3432 + 1536 * 768 + 24 * 128 * 2 + 256 + 48)), (1024, 128, {}, 24 * (1024 * 4480 + 2048 * 1024 + 32 * 128 * 2 + 256 + 64)),
    (2048, 128, dict(is_mimo=True), 24 * (2048 * 9440 + 4096 * 2048 + 64 * 4 * (128 * 2 + 64 * 3) + 256 + 128))])
def test_parameters_at_the_papers_sizes(width, d_state, options, wanted):
    "24 layers of the widths of its smallest, its second and its largest models, counted by hand: in_proj, out_proj, biases, norms, D and dt_bias, MIMO."
    with torch.device("meta"):
        got = sum(p.numel() for _ in range(24) for p in Mamba3(width, d_state, **options).parameters())
    assert got == wanted and got / 24 == pytest.approx(6 * width ** 2, rel=0.25)


# --- the official kernels ---

def official_by_loop(Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D, Z, chunk_size, Input_States=None, return_final_states=False,
                     MIMO_V=None, MIMO_Z=None, MIMO_Out=None, rotary_dim_divisor=None, dtype=None, return_state=False):
    "What the official kernels promise, one token after the other: SISO with the axes that they have, or MIMO if there is MIMO_V."
    mimo = MIMO_V is not None
    b, L, H, P = V.shape
    assert Z is None and MIMO_Out is None and (return_state if mimo else return_final_states) and Angles.shape[:3] == (b, L, H)
    assert not mimo or rotary_dim_divisor == Q.shape[-1] / Angles.shape[-1]
    if not mimo:
        Q, K, Q_bias, K_bias = Q.unsqueeze(2), K.unsqueeze(2), Q_bias.unsqueeze(1), K_bias.unsqueeze(1)
    heads = [i.repeat_interleave(H // i.shape[3], 3).transpose(2, 3) + bias for i, bias in ((Q, Q_bias), (K, K_bias))]      # (b, L, H, R, N)
    up = MIMO_V if mimo else torch.ones_like(V[0, 0, :, None])
    zeros = V.new_zeros
    angle, h, k_last, v_last = Input_States or (zeros(b, H, Angles.shape[-1]), zeros(b, H, P, Q.shape[-1]), zeros(b, H, Q.shape[-1]), zeros(b, H, P))
    k_last, v_last, ys = k_last[:, :, None].expand(-1, -1, up.shape[1], -1), v_last[:, :, None] * up, []
    for t in range(L):
        dt, a, lam = DT[:, :, t], ADT[:, :, t], torch.sigmoid(Trap[:, :, t])
        angle = angle + dt[..., None] * math.pi * torch.tanh(Angles[:, t])
        q, k = (turn(i[:, t], angle[:, :, None], halves=mimo) for i in heads)
        v = V[:, t, :, None] * up
        h = a.exp()[..., None, None] * (h + ((1 - lam) * dt)[..., None, None] * v_last.mT @ k_last) + (lam * dt)[..., None, None] * v.mT @ k
        ys.append(q @ h.mT + D[:, None, None] * v)
        k_last, v_last = k, v
    y = torch.stack(ys, 1)                                                # (b, L, H, R, P)
    return (y.transpose(2, 3) if mimo else y.squeeze(3)), angle, h, k, v


@pytest.fixture
def official(monkeypatch):
    "The official kernels as installed, on tensors that may lie anywhere."
    module = types.SimpleNamespace(mamba3_siso_combined=official_by_loop, mamba3_mimo=official_by_loop)
    for mimo, name in mamba3._OFFICIAL.items():
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(mamba3._BACKENDS[mimo], "mamba_ssm", (mamba3.scan_mamba_ssm, lambda: None))
    monkeypatch.setattr(mamba3, "_on_gpu", lambda u: True)


@pytest.mark.parametrize("options", [{}, dict(ngroups=2, rope_fraction=1.), dict(is_outproj_norm=True), dict(is_mimo=True, mimo_rank=2, ngroups=2),
                                     dict(is_mimo=True, mimo_rank=4, is_outproj_norm=True)])
def test_the_official_kernels_get_what_they_want(official, options):
    "With a stand-in that does what they promise: the same values, states and gradients, with pads, from a state."
    options = dict(headdim=4) | options
    ours, theirs = random_block(**options), random_block(**options, backend="mamba_ssm")
    x, mask = torch.randn(2, 21, 16), torch.ones(2, 21, dtype=torch.bool)
    mask[0, :4], mask[1, 9:12] = False, False
    with torch.no_grad():
        for state in [None] if ours.is_mimo else [None, random_state(ours, 2)]:
            for m in (None, mask):
                (y, end), (want, last) = (block(x, state, m, True) for block in (theirs, ours))
                assert rms_error(y, want) < 1e-5 and max(rms_error(a, b) for a, b in zip(end[1:], last[1:])) < 1e-5
                assert (end.angle - last.angle).sin().abs().max() < 1e-5
    if not ours.is_mimo:
        got, want = (gradients([block(x, mask=mask)], block.parameters()) for block in (theirs, ours))
        assert max(map(rms_error, got, want)) < 1e-4


def test_what_the_official_kernels_cannot_do(official, monkeypatch):
    x = torch.randn(1, 5, 16)
    for options, words in ((dict(rope_fraction=.25), "got 1 angles for d_state 8"), (dict(d_state=12, rope_fraction=.5), "got d_state 12, headdim 8"),
                           (dict(is_mimo=True), "got several inputs and a gradient")):
        with pytest.raises(RuntimeError, match=f"backend 'mamba_ssm': {words}"):
            random_block(**options, backend="mamba_ssm")(x)
    block = random_block(is_mimo=True, backend="mamba_ssm")
    with torch.no_grad(), pytest.raises(RuntimeError, match="got several inputs and a first state"):
        block(x, block.empty_state(1))
    monkeypatch.undo()
    assert mamba3_backends() == dict.fromkeys(FORMS) | {"mamba_ssm": mamba3_backends(True)["mamba_ssm"]}
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="backend 'mamba_ssm' cannot run here: needs a CUDA GPU"):
            random_block(backend="mamba_ssm")(x)

"""The connectors against their equations written out, at several grids, dtypes and options; the cost against PyTorch's counter.

What holds for every connector is tried on all of the registry: a new one is among them as soon as it has a name there."""
import copy
import inspect

from measures import rms_error
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vlmamba_lite.connectors.msc  # noqa: F401 - adds its connectors to the registry
from vlmamba_lite.connectors.connectors import CONNECTORS as REGISTRY
from vlmamba_lite.connectors.connectors import MLPConnector, VSSL2Connector, VSSMLPConnector, connector_flops
from vlmamba_lite.connectors.vss import VSS, choose, scan_order, vss_directions

CONNECTORS = [MLPConnector, VSSMLPConnector, VSSL2Connector]


def make(kind, **args):
    torch.manual_seed(0)
    if kind is not MLPConnector:
        args = {"d_state": 4, "expand": 1, "dt_rank": 3} | args
    return kind(12, 20, **args)


def arguments(name):
    return inspect.signature(REGISTRY[name]).parameters


def small(name, **args):
    "A connector of the registry; those that scan take the arguments of the layer inside."
    torch.manual_seed(0)
    return REGISTRY[name](12, 20, **({"d_state": 4, "expand": 1} if "scan" in arguments(name) else {}) | args)


def linear(x, p, name):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def rms_norm(x, weight):
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5)


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / 2 ** 0.5))


def written_out(connector, x, size):
    "The equations, on the parameters alone; the scan by its definition."
    p = dict(connector.named_parameters())
    def scan(v):
        return vss_directions(connector.vss.mixers, v, scan_order(*size, connector.vss.scan)).sum(1)
    if isinstance(connector, VSSL2Connector):
        v = linear(x, p, "linear1")
        return linear(rms_norm(scan(gelu(v)) + v, p["norm.weight"]), p, "linear2")
    v = rms_norm(scan(x) + x, p["norm.weight"]) if isinstance(connector, VSSMLPConnector) else x
    return linear(gelu(linear(v, p, "mlp.0")), p, "mlp.2")


@pytest.mark.parametrize("scan", ["bsm", "csm"])
@pytest.mark.parametrize("kind", CONNECTORS)
def test_connectors_are_their_equations(kind, scan):
    connector = make(kind, **({} if kind is MLPConnector else {"scan": scan})).double()
    for p in connector.parameters():
        p.data += 0.1 * torch.randn_like(p)                  # no weight is left at a value that hides it (a norm's 1, a bias' 0)
    x = torch.randn(2, 15, 12, dtype=torch.float64, requires_grad=True)
    outs = [connector(x, (3, 5)), written_out(connector, x, (3, 5))]
    weights = torch.linspace(-1, 1, outs[0].numel(), dtype=torch.float64).view(outs[0].shape)
    inputs = [x, *connector.parameters()]
    found, wanted = ([y, *torch.autograd.grad((y * weights).sum(), inputs)] for y in outs)
    for a, b in zip(found, wanted):
        assert a.shape == b.shape and rms_error(a, b) < 1e-6


def test_vss_l2_with_the_identity_has_a_closed_form():
    torch.manual_seed(0)
    connector = VSSL2Connector(12, 20, scan="csm", mixer=nn.Identity)
    x = torch.randn(2, 15, 12)
    v = connector.linear1(x)
    want = connector.linear2(F.rms_norm(4 * F.gelu(v) + v, (20,), eps=1e-5))
    torch.testing.assert_close(connector(x, (3, 5)), want)


@pytest.mark.parametrize("size", [(7, 7), (1, 1), (9, 5), (1, 13), (24, 24), (27, 27), (27, 30)])
@pytest.mark.parametrize("name", REGISTRY)
def test_any_grid(name, size):
    y = small(name)(torch.randn(1, size[0] * size[1], 12), size)
    assert y.shape == (1, size[0] * size[1], 20) and y.isfinite().all()


@pytest.mark.parametrize("name", REGISTRY)
def test_bfloat16(name):
    connector, x = small(name), torch.randn(2, 35, 12)
    want = connector(x, (5, 7))
    got = connector.bfloat16()(x.bfloat16(), (5, 7))
    assert got.dtype == torch.bfloat16 and rms_error(got, want) < 0.03


@pytest.mark.parametrize("name", REGISTRY)
def test_rows_of_a_batch_do_not_meet(name):
    connector, x = small(name), torch.randn(3, 12, 12)
    torch.testing.assert_close(connector(x, (3, 4))[1:2], connector(x[1:2], (3, 4)))


@pytest.mark.parametrize("kind", CONNECTORS)
def test_which_patches_meet(kind):
    connector, x = make(kind), torch.randn(1, 12, 12, requires_grad=True)
    g, = torch.autograd.grad(connector(x, (3, 4))[0, 5].square().sum(), x)
    assert (g[0].abs().sum(-1) > 0).sum() == (1 if kind is MLPConnector else 12)


def test_choose():
    assert choose("form", "a", {"a": 1}) == 1 and choose("form", "a", ("b", "a")) == "a"
    with pytest.raises(ValueError, match=r"^form: got 'c', need one of \['a', 'b'\]$"):
        choose("form", "c", ("b", "a"))


@pytest.mark.parametrize("kind", [VSSMLPConnector, VSSL2Connector])
def test_options_reach_their_parts(kind):
    connector = make(kind, scan="csm", shared=False, merge="mean", norm="layernorm", hidden_dim=24, backend="reference", d_state=3)
    vss = connector.vss
    assert (vss.scan, vss.shared, vss.merge, len(vss.mixers)) == ("csm", False, "mean", 4)
    assert vss.mixers[0].backend == "reference" and vss.mixers[0].d_state == 3
    assert isinstance(connector.norm, nn.LayerNorm)
    assert vss.dim == (24 if kind is VSSL2Connector else 12)
    assert connector(torch.randn(1, 6, 12), (2, 3)).shape == (1, 6, 20)
    if kind is VSSMLPConnector:
        assert connector.mlp[0].out_features == 24 and isinstance(make(kind, activation="silu").mlp[1], nn.SiLU)


def test_names_of_the_parameters():
    assert set(make(MLPConnector).state_dict()) == {f"mlp.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")}
    names = {n for n in make(VSSL2Connector).state_dict() if not n.startswith("vss.")}
    assert names == {"linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias", "norm.weight"}
    names = {n for n in make(VSSMLPConnector).state_dict() if not n.startswith("vss.")}
    assert names == {"mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias", "norm.weight"}


def test_errors_name_the_argument():
    x = torch.randn(1, 6, 12)
    calls = {
        r"norm: got 'batch'": lambda: VSSL2Connector(12, 20, norm="batch"),
        r"activation: got 'tanh'": lambda: MLPConnector(12, 20, activation="tanh"),
        r"scan: got 'spiral'": lambda: VSSMLPConnector(12, 20, scan="spiral"),
        r"vss: got a mixer Identity": lambda: connector_flops(VSSL2Connector(12, 20, mixer=nn.Identity), (2, 3)),
    }
    for match, call in calls.items():
        with pytest.raises(ValueError, match=match):
            call()
    for name in REGISTRY:
        with pytest.raises(ValueError, match=r"tokens: got shape \(1, 6, 12\), need \(batch, 2 \* 4, 12\)"):
            small(name)(x, (2, 4))


@pytest.mark.parametrize("size", [(-4, -3), (0, 5), (4.0, 3.0), 12, (1, 4, 3), None, "43", (12,)])
@pytest.mark.parametrize("name", REGISTRY)
def test_refuses_grids_that_are_none(name, size):
    with pytest.raises(ValueError, match=r"^size: got .*, need \(height, width\), whole numbers of at least 1$"):
        small(name)(torch.randn(1, 12, 12), size)


@pytest.mark.parametrize("tokens, said", [(torch.zeros(1, 12, 12, dtype=torch.int32), "got torch.int32, need floating point"),
                                          (torch.zeros(0, 12, 12), r"got shape \(0, 12, 12\)"), (torch.zeros(12, 12), "got shape"),
                                          (torch.zeros(1, 12, 11), "got shape"), (torch.zeros(1, 11, 12), "got shape")], ids=range(5))
@pytest.mark.parametrize("name", REGISTRY)
def test_refuses_tokens_that_do_not_fit(name, tokens, said):
    with pytest.raises(ValueError, match=f"^tokens: {said}"):
        small(name)(tokens, (4, 3))


@pytest.mark.parametrize("value", [0, -3, 8.5, "8", None])
@pytest.mark.parametrize("name", REGISTRY)
def test_refuses_widths_that_are_none(name, value):
    for which, args in (("vision_dim", (value, 20)), ("language_dim", (12, value))):
        with pytest.raises(ValueError, match=f"^{which}: got {value!r}, need a whole number of at least 1$"):
            REGISTRY[name](*args)
    if value is not None and "hidden_dim" in arguments(name):
        with pytest.raises(ValueError, match=f"^hidden_dim: got {value!r}, need a whole number of at least 1$"):
            REGISTRY[name](12, 20, hidden_dim=value)


# --- every Linear is a module that is called: adapters, hooks and quantization take hold of it -----------------------

OPTIONS = [{}, {"scan": "csm"}, {"scan": "csm", "shared": False}, {"scan": "csm", "shared": True, "merge": "mean", "bias": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", REGISTRY)
def test_a_low_rank_adapter_on_any_linear_learns(name, options):
    "As LoRA adds it, by a forward hook: each is called and gets a gradient."
    if options and "scan" not in arguments(name):
        pytest.skip("it does not scan")
    connector, x, adapters = small(name, **options), torch.randn(2, 12, 12), {}
    for path, layer in connector.named_modules():
        if isinstance(layer, nn.Linear):
            adapters[path] = 0.1 * torch.randn(layer.in_features, layer.out_features)
            adapters[path].requires_grad_()
            layer.register_forward_hook(lambda _, args, y, extra=adapters[path]: y + args[0] @ extra)
    connector(x, (3, 4)).square().sum().backward()
    dead = [path for path, extra in adapters.items() if extra.grad is None or not extra.grad.norm() > 0]
    assert adapters and not dead


# --- whole graphs ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", REGISTRY)
def test_compiles_whole(name):
    "One graph for each batch and grid."
    connector = small(name)
    compiled = torch.compile(connector, fullgraph=True, backend="eager", dynamic=False)
    for batch, size in ((2, (3, 4)), (1, (5, 2))):
        x = torch.randn(batch, size[0] * size[1], 12, requires_grad=True)
        results = []
        for f in (connector, compiled):
            y = f(x, size)
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, *connector.parameters()])])
        for got, want in zip(*results):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", REGISTRY)
def test_exports(name):
    "torch.export for one batch and grid: the scans plan their work by the shape."
    connector, x = small(name).eval(), torch.randn(2, 12, 12)
    with torch.no_grad():
        exported = torch.export.export(connector, (torch.randn(2, 12, 12), (3, 4))).module()
        torch.testing.assert_close(exported(x, (3, 4)), connector(x, (3, 4)))


@pytest.mark.parametrize("scan, shared", [("bsm", True), ("csm", True), ("csm", False)])
@pytest.mark.parametrize("kind", CONNECTORS)
def test_flops_are_those_pytorch_counts(kind, scan, shared):
    connector = make(kind, **({} if kind is MLPConnector else {"scan": scan, "shared": shared}))
    ours, scans = connector_flops(connector, (3, 5)), 2 if scan == "bsm" else 4
    counted = {}
    for grid in ((3, 5), (5, 3)):                            # the shape of the grid does not matter, only its tokens
        with FlopCounterMode(display=False) as counter:
            connector(torch.randn(1, 15, 12), grid)
        counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(ours.get(part, 0) for part in ("linear", "projections", "scan projections"))
    in_the_scan = 0 if kind is MLPConnector else 2 * scans * 15 * connector.vss.mixers[0].d_inner * 4        # C h, a product too
    assert products + in_the_scan == sum(counted.values())


def test_flops_of_the_scan_by_hand():
    vss = VSS(8, "csm", d_state=4, expand=2, d_conv=3, dt_rank=1)
    assert vss.flops((2, 5)) == {"projections": 10 * 2 * 8 * (32 + 16), "scan projections": 4 * 10 * 2 * 16 * (1 + 8 + 1),
                                  "convolution": 4 * 10 * 16 * 2 * 3, "scan": 4 * 10 * 16 * (7 * 4 + 3)}


def test_paper_size():
    with torch.device("meta"):
        counts = [sum(p.numel() for p in kind(1152, 2560).parameters()) for kind in CONNECTORS]
    def vss(d):
        e, R, N = 2 * d, -(-d // 16), 16
        return d * 2 * e + e * 4 + e + e * (R + 2 * N) + R * e + e + e * N + e + e * d
    mlp = 1152 * 2560 + 2560 + 2560 * 2560 + 2560
    assert counts == [mlp, mlp + vss(1152) + 1152, mlp + vss(2560) + 2560]


@pytest.mark.parametrize("name", REGISTRY)
def test_a_connector_learns(name):
    connector, x = small(name), torch.randn(4, 12, 12)
    target = torch.randn(4, 12, 20)
    optimizer = torch.optim.AdamW(connector.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(connector(x, (3, 4)), target)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in connector.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_copy_through_its_state_dict_is_the_same_connector():
    connector = make(VSSL2Connector)
    other = copy.deepcopy(connector)
    for p in other.parameters():
        nn.init.zeros_(p)
    other.load_state_dict(connector.state_dict())
    x = torch.randn(1, 6, 12)
    assert torch.equal(connector(x, (2, 3)), other(x, (2, 3)))


def test_a_connector_may_count_itself():
    connector = make(VSSL2Connector)
    connector.flops = lambda size: {"linear": 7 * size[0]}
    assert connector_flops(connector, (2, 3)) == {"linear": 14}


def test_the_registry_holds_them():
    assert {"mlp": MLPConnector, "vss_mlp": VSSMLPConnector, "vss_l2": VSSL2Connector}.items() <= REGISTRY.items()

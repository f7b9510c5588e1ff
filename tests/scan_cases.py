"""Random arguments of a selective scan and the measures the scan tests share."""
import torch
from measures import rms_error

from vlmamba_lite.ops.selective_scan import backends

REFERENCE = "reference"
OURS = [name for name, reason in backends().items() if reason is None and name not in ("triton", "mamba_ssm")]     # plain PyTorch or C++, in float64 too
FAST = [name for name in OURS if name != REFERENCE]
DEVICE = torch.device("cpu")                                       # triton_interpreted.py, run on a GPU, sets another
DIFFERENTIABLE = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def draw(batch=2, channels=4, length=37, n=3, b_form=1, c_form=1, optional=("D", "z", "delta_bias", "initial_state"),
         softplus=True, seed=0):
    """Arguments by name, float64 but exactly representable in float32. b_form, c_form: "constant", "step" or a number of groups."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, device="cpu").double().to(DEVICE)

    def matrix(form):
        if form == "constant":
            return randn(channels, n)
        return randn(batch, n, length) if form == "step" else randn(batch, form, n, length)

    args = {"u": randn(batch, channels, length), "delta": randn(batch, channels, length) - 1,
            "A": -randn(channels, n).exp().float().double(), "B": matrix(b_form), "C": matrix(c_form)}
    extra = {"D": randn(channels), "z": randn(batch, channels, length), "delta_bias": randn(channels),
             "initial_state": randn(batch, channels, n)}
    if not softplus:                                                # then delta itself has to be positive
        args["delta"], extra["delta_bias"] = args["delta"].abs() / 4, extra["delta_bias"].abs() / 4
    return {**args, **{k: v for k, v in extra.items() if k in optional}, "delta_softplus": softplus}


def cast(args, dtype):
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in args.items()}


def outputs_and_gradients(scan, args, dtype=torch.float64, **kwargs):
    "y, the last state, and the gradient of every tensor argument under one fixed random loss that uses both."
    args = cast(args, dtype)
    leaves = {k: v.clone().requires_grad_() for k, v in args.items() if isinstance(v, torch.Tensor)}
    y, last = scan(**{**args, **leaves}, return_last_state=True, **kwargs)
    g = torch.Generator().manual_seed(7)
    loss = sum((x * torch.randn(x.shape, generator=g, device="cpu").bfloat16().to(x)).sum() for x in (y, last))  # exact in every dtype
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"y": y.detach(), "last_state": last.detach()}, dict(zip(leaves, grads))


def assert_near(got, want, limit):
    "Every tensor of `got` within `limit` of the one of that name in `want`."
    errors = {name: rms_error(got[name], want[name]) for name in want}
    assert got.keys() == want.keys() and all(e <= limit for e in errors.values()), errors

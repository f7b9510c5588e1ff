"""What many tests share: measures, models without tidy numbers, and the mark of what needs a GPU."""
import pytest
import torch


def cuda(test):
    "A test that needs a CUDA GPU: skipped without one, and what `pytest -m cuda` and `vlmamba bench gpu` run."
    return pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")(test))


def lively(model, seed=0):
    "Every parameter moved a little, so that nothing is one or zero by initialisation."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=g).to(p)
    return model


def rms_error(got, want):
    "Relative error as a ratio of root mean squares, measured in float64; where `want` is nothing, the size of `got` itself."
    got, want = got.double(), want.double()
    assert got.shape == want.shape
    size = want.norm()
    return ((got - want).norm() / (size if size > 1e-30 else 1.)).item()


def gradients(outputs, inputs):
    "Gradients of some inputs under one fixed loss in which every number of the outputs has a weight of its own."
    weights = [torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view(y.shape) for y in outputs]
    return torch.autograd.grad(sum((y.double() * w).sum() for y, w in zip(outputs, weights)), inputs)


def value_and_gradients(f, x, *parameters):
    "y = f(x), and the gradients of x and of parameters of f."
    x = x.detach().clone().requires_grad_()
    y = f(x)
    return [y, *gradients([y], [x, *parameters])]


def assert_same(found, wanted, tolerance=1e-10):
    "Two lists of tensors, each within `tolerance` of the other's."
    assert len(found) == len(wanted)
    errors = [rms_error(a, b) for a, b in zip(found, wanted)]
    assert all(e < tolerance for e in errors), errors

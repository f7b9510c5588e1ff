"""What a scan costs in memory and in recorded operations: measured, and deterministic."""
import pytest
import torch
from scan_cases import cast, draw

from vlmamba_lite.evaluation.cost import peak_bytes
from vlmamba_lite.ops.selective_scan import selective_scan


def in_inputs(n, length, channels=64, form=1, **kwargs):
    "Peak memory of forward and backward, in tensors of the size of u."
    args = cast(draw(2, channels, length, n, form, form), torch.float32)
    leaves = [v.requires_grad_() for v in args.values() if isinstance(v, torch.Tensor)]
    g = torch.randn_like(args["u"])
    peak = peak_bytes(lambda: torch.autograd.grad(selective_scan(**args, **kwargs), leaves, g))
    return peak / (g.numel() * g.element_size())


def test_the_measure_itself():
    x = torch.zeros(1000)
    assert 4000 <= peak_bytes(lambda: x + 1) < 4200
    assert 8000 <= peak_bytes(lambda: (x + 1) + 1) < 8400


@pytest.mark.parametrize("form", [1, "constant"])
def test_chunked_grows_with_BDL_only(form):
    short, long = (in_inputs(16, length, form=form) for length in (256, 1024))
    assert long <= short < 18                                       # per token it gets cheaper, never dearer
    assert in_inputs(16, 1024, channels=128, form=form) < 1.1 * long
    # four times the states cost less than twice as much, where the loop needs four times as much:
    assert in_inputs(64, 1024, form=form) < 1.9 * long
    assert in_inputs(64, 64, form=form, backend="reference") > 3.5 * in_inputs(16, 64, form=form, backend="reference")


def test_chunked_is_a_small_part_of_the_others():
    chunked = in_inputs(16, 256)
    for backend in ("reference", "hillis_steele", "blelloch"):
        assert in_inputs(16, 256, backend=backend) > 4 * chunked, backend


def test_without_gradients_nothing_is_kept():
    args = cast(draw(2, 64, 1024, 16), torch.float32)
    with torch.no_grad():
        peak = peak_bytes(lambda: selective_scan(**args))
    assert peak < 8 * args["u"].numel() * 4


def graph_nodes(y):
    seen, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return len(seen)


def test_recorded_operations_do_not_grow_with_the_length():
    nodes = []
    for length in (16, 256):
        args = draw(length=length)
        for v in args.values():
            if isinstance(v, torch.Tensor):
                v.requires_grad_()
        nodes.append(graph_nodes(selective_scan(**args)))
    assert nodes[0] == nodes[1] < 60

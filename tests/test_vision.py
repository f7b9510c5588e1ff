"""The vision encoder: shapes, what a token can see, a slow twin in float64, what it refuses."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmamba_lite.vision import ConvEncoder, conv_stage


def relative_error(x, y):
    return ((x.double() - y.double()).square().mean().sqrt() / y.double().square().mean().sqrt()).item()


def encoder(dim=12, width=4, image_size=32, seed=0, trained=True):
    "A small encoder whose BatchNorms are not the identity."
    torch.manual_seed(seed)
    model = ConvEncoder(dim, width, image_size)
    if trained:
        for m in model.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(m.weight, 0.5, 2)
                torch.nn.init.normal_(m.bias)
                torch.nn.init.normal_(m.running_mean)
                torch.nn.init.uniform_(m.running_var, 0.5, 2)
    return model


def slow_twin(model, images, training=False):
    "Every layer written out, channel last in nothing, in the dtype of the pictures."
    x = images
    for stage in model.stages:
        conv, norm = stage[0], stage[1]
        kernel = conv.weight.to(x.dtype)
        n, _, h, w = x.shape
        windows = F.unfold(x, 3, padding=1, stride=2)                        # (n, channels * 9, h/2 * w/2)
        x = (kernel.flatten(1) @ windows).view(n, -1, h // 2, w // 2)
        mean = x.mean((0, 2, 3)) if training else norm.running_mean.to(x.dtype)
        var = x.var((0, 2, 3), unbiased=False) if training else norm.running_var.to(x.dtype)
        scale = (norm.weight.to(x.dtype) / (var + norm.eps).sqrt())[:, None, None]
        x = ((x - mean[:, None, None]) * scale + norm.bias.to(x.dtype)[:, None, None]).clamp(min=0)
    padded = F.pad(x, (1, 1, 1, 1))
    kernel, side = model.refine.weight.to(x.dtype), model.side
    tokens = [torch.einsum("ocij,ncij->no", kernel, padded[:, :, r:r + 3, c:c + 3]) for r in range(side) for c in range(side)]
    x = torch.stack(tokens, 1) + model.refine.bias.to(x.dtype) + model.position.to(x.dtype)
    return x / (x.square().mean(-1, keepdim=True) + model.norm.eps).sqrt() * model.norm.weight.to(x.dtype)


@pytest.mark.parametrize("batch,size", [(1, 8), (2, 24), (3, 64)])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_equals_the_slow_twin(batch, size, training):
    if training and batch == 1:
        batch = 2                                                            # one position: BatchNorm needs two pictures
    model = encoder(image_size=size).train(training)
    images = torch.rand(batch, 3, size, size) * 2 - 1
    want = slow_twin(model, images.double(), training)
    tokens, grid = model(images)
    assert tokens.shape == (batch, (size // 8) ** 2, 12) and grid == (size // 8, size // 8)
    assert relative_error(tokens, want) < 1e-5


def test_gradients_equal_the_slow_twin():
    model = encoder(image_size=16).eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    weight = torch.randn(2, 4, 12)
    grads = torch.autograd.grad((model(images)[0] * weight).sum(), list(model.parameters()))
    want = torch.autograd.grad((slow_twin(model, images.double()) * weight).sum(), list(model.parameters()))
    for (name, _), g, w in zip(model.named_parameters(), grads, want):
        assert relative_error(g, w) < 1e-4, name


def test_gradcheck():
    model = encoder(dim=3, width=2, image_size=8).double().eval()
    images = (torch.rand(1, 3, 8, 8, dtype=torch.float64) * 2 - 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model(x)[0], images)


@pytest.mark.parametrize("row,column", [(0, 0), (3, 3), (7, 7), (0, 5)])
def test_a_token_sees_31_pixels_round_its_corner(row, column):
    model = encoder(dim=32, width=16, image_size=64).eval()
    images = torch.randn(4, 3, 64, 64, requires_grad=True)
    token = model(images)[0][:, 8 * row + column]
    seen = torch.autograd.grad(token.square().sin().sum(), images)[0].abs().sum((0, 1)) > 0
    rows, columns = seen.nonzero().T
    for got, centre in ((rows, 8 * row), (columns, 8 * column)):
        assert (got.min().item(), got.max().item()) == (max(centre - 15, 0), min(centre + 15, 63))


def test_moving_the_picture_by_a_cell_moves_the_tokens():
    model = encoder(image_size=64).eval()
    torch.nn.init.zeros_(model.position)                                     # what is seen, without where
    images = torch.randn(2, 3, 64, 64)
    here, there = (model(torch.roll(images, (8 * k, 8 * k), (2, 3)))[0].unflatten(1, (8, 8)) for k in (0, 1))
    torch.testing.assert_close(there[:, 3:-2, 3:-2], here[:, 2:-3, 2:-3])


def test_position_tells_equal_cells_apart():
    model = encoder(image_size=64, trained=False).eval()
    tokens = model(torch.zeros(1, 3, 64, 64))[0].unflatten(1, (8, 8))[0, 3:5, 3:5].flatten(0, 1)
    assert (tokens[0] - tokens[1:]).abs().amax(1).min() > 1e-3


def test_every_token_has_scale_one():
    for gain in (0.1, 1.0):
        tokens = encoder(image_size=64, trained=False)(gain * torch.randn(4, 3, 64, 64))[0]
        torch.testing.assert_close(tokens.square().mean(-1).sqrt(), torch.ones(4, 64), atol=2e-2, rtol=0)


def test_in_eval_mode_a_picture_is_its_own():
    model, images = encoder(image_size=64).eval(), torch.randn(5, 3, 64, 64)
    torch.testing.assert_close(model(images)[0][2:3], model(images[2:3])[0])


def test_memory_layout_does_not_matter():
    model, images = encoder().eval(), torch.randn(2, 3, 32, 32)
    for other in (images.contiguous(memory_format=torch.channels_last), images.mT.contiguous().mT, images.flip(0).flip(0)):
        torch.testing.assert_close(model(other)[0], model(images)[0])


def test_bfloat16():
    model, images = encoder().eval(), torch.rand(2, 3, 32, 32) * 2 - 1
    want = model(images)[0]
    got = model.to(torch.bfloat16)(images.to(torch.bfloat16))[0]
    assert got.dtype == torch.bfloat16 and relative_error(got, want) < 0.05


def test_parameter_names_and_shapes():
    shapes = {name: tuple(x.shape) for name, x in ConvEncoder(96).state_dict().items() if x.ndim}
    assert shapes["stages.0.0.weight"] == (32, 3, 3, 3) and shapes["stages.1.0.weight"] == (64, 32, 3, 3)
    assert shapes["stages.2.0.weight"] == (96, 64, 3, 3) and shapes["refine.weight"] == (96, 96, 3, 3)
    assert shapes["refine.bias"] == (96,) and shapes["position"] == (64, 96) and shapes["norm.weight"] == (96,)
    assert sum(p.numel() for p in ConvEncoder(96).parameters()) == 164_256


@settings(deadline=None, max_examples=12, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 20), st.integers(1, 20))
def test_a_stage_halves_and_rounds_up(n, h, w):
    out = conv_stage(3, 5).eval()(torch.randn(n, 3, h, w))
    assert out.shape == (n, 5, (h + 1) // 2, (w + 1) // 2) and out.min() >= 0


@pytest.mark.parametrize("size", [0, -8, 4, 63, 100, 64.0, "64", None])
def test_refuses_image_sizes(size):
    with pytest.raises(ValueError, match=r"image_size: got .*, need a positive multiple of 8"):
        ConvEncoder(8, image_size=size)


@pytest.mark.parametrize("shape", [(2, 3, 64, 32), (2, 3, 32, 64), (2, 1, 64, 64), (2, 4, 64, 64), (3, 64, 64), (2, 64, 64, 3),
                                   (2, 3, 128, 128), (1, 2, 3, 64, 64)])
def test_refuses_other_pictures(shape):
    with pytest.raises(ValueError, match=r"images: got shape .*, need \(batch, 3, 64, 64\)"):
        ConvEncoder(8, 4)(torch.zeros(shape))


def test_refuses_bytes():
    with pytest.raises(ValueError, match=r"images: got torch.uint8, need floating point in \[-1, 1\]"):
        ConvEncoder(8, 4)(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_learns_a_colour():
    "Which of the three channels is lit, from the mean of the tokens."
    torch.manual_seed(0)
    model, head = ConvEncoder(16, 8, 16), torch.nn.Linear(16, 3)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], 1e-2)
    for _ in range(30):
        labels = torch.randint(3, (32,))
        images = torch.randn(32, 3, 16, 16) * 0.3 + F.one_hot(labels, 3)[..., None, None]
        loss = F.cross_entropy(head(model(images)[0].mean(1)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1

"""The vision encoders: slow twins in float64, the models and image processors of transformers as peers, what they refuse."""
import json
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib

from measures import rms_error
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmamba_lite.data.pictures import open_image, to_rgb
from vlmamba_lite.vision.encoders import ConvEncoder, ViT, conv_stage, resize_positions
from vlmamba_lite.vision.images import CLIP_COLOURS, Preprocess, load_preprocess, preprocess_from_config
from vlmamba_lite.vision.towers import (
    CLIP, TIMM_NAMES, TOWER_SHAPES, DINOv2, FusedEncoder, SigLIP, attention_map, build_encoder, half_range,
    load_encoder, new_tower, tower_config, tower_name)


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
    assert rms_error(tokens, want) < 1e-5


def test_gradients_equal_the_slow_twin():
    model = encoder(image_size=16).eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    weight = torch.randn(2, 4, 12)
    grads = torch.autograd.grad((model(images)[0] * weight).sum(), list(model.parameters()))
    want = torch.autograd.grad((slow_twin(model, images.double()) * weight).sum(), list(model.parameters()))
    for (name, _), g, w in zip(model.named_parameters(), grads, want):
        assert rms_error(g, w) < 1e-4, name


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
    assert got.dtype == torch.bfloat16 and rms_error(got, want) < 0.05


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


# ---- the vision transformer

def vit(dim=12, depth=2, heads=3, patch_size=4, image_size=16, seed=0):
    torch.manual_seed(seed)
    model = ViT(dim, depth, heads, patch_size, image_size)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def slow_vit(model, images):
    "Patch by patch, head by head, in the dtype of the pictures."
    p, dtype = model.patch_size, images.dtype
    n, _, height, width = images.shape
    grid = (height // p, width // p)
    rows = []
    for r in range(grid[0]):
        for c in range(grid[1]):
            patch = images[:, :, r * p:(r + 1) * p, c * p:(c + 1) * p].flatten(1)
            rows.append(patch @ model.patches.weight.to(dtype).flatten(1).T + model.patches.bias.to(dtype))
    x = torch.stack(rows, 1) + resize_positions(model.position.to(dtype), model.side, grid)

    def norm(x, layer):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt()
        return scaled * layer.weight.to(dtype) + layer.bias.to(dtype)

    def linear(x, layer):
        return x @ layer.weight.to(dtype).T + layer.bias.to(dtype)

    for block in model.blocks:
        q, k, v = linear(norm(x, block.norm1), block.qkv).chunk(3, -1)
        heads = []
        for h in range(block.heads):
            d = q.shape[-1] // block.heads
            part = slice(h * d, (h + 1) * d)
            scores = q[..., part] @ k[..., part].mT / d ** 0.5
            heads.append((scores.exp() / scores.exp().sum(-1, keepdim=True)) @ v[..., part])
        x = x + linear(torch.cat(heads, -1), block.out)
        hidden = linear(norm(x, block.norm2), block.mlp[0])
        x = x + linear(hidden * (1 + torch.erf(hidden / 2 ** 0.5)) / 2, block.mlp[2])
    return norm(x, model.norm)


@pytest.mark.parametrize("size", [(16, 16), (4, 4), (4, 20), (28, 8), (36, 20)])
def test_vit_equals_the_slow_twin(size):
    model, images = vit(), torch.randn(2, 3, *size)
    tokens, grid = model(images)
    assert grid == (size[0] // 4, size[1] // 4) and tokens.shape == (2, grid[0] * grid[1], 12)
    weight = torch.randn_like(tokens)
    grads = torch.autograd.grad((tokens * weight).sum(), list(model.parameters()))
    want = slow_vit(model, images.double())
    wanted = torch.autograd.grad((want * weight).sum(), list(model.parameters()))
    assert rms_error(tokens, want) < 1e-5
    for (name, _), g, w in zip(model.named_parameters(), grads, wanted):
        assert (g - w).abs().max() < 1e-4 * max(1, w.abs().max()), name


def test_vit_gradcheck():
    model = vit(dim=4, depth=1, heads=2, image_size=8).double()
    images = torch.randn(1, 3, 8, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: model(x)[0], images)


def test_vit_equals_a_peer():
    transformers = pytest.importorskip("transformers")
    config = transformers.SiglipVisionConfig(hidden_size=12, intermediate_size=48, num_hidden_layers=2, num_attention_heads=3,
                                             image_size=16, patch_size=4, hidden_act="gelu", vision_use_head=False)
    peer, model = transformers.SiglipVisionModel(config).eval(), vit()
    core = getattr(peer, "vision_model", peer)
    pairs = [(core.embeddings.patch_embedding, model.patches), (core.post_layernorm, model.norm)]
    core.embeddings.position_embedding.weight.data = model.position.data
    for theirs, ours in zip(core.encoder.layers, model.blocks):
        for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
            layer = getattr(theirs.self_attn, name)
            layer.weight.data, layer.bias.data = ours.qkv.weight.data.chunk(3)[i], ours.qkv.bias.data.chunk(3)[i]
        pairs += [(theirs.layer_norm1, ours.norm1), (theirs.layer_norm2, ours.norm2), (theirs.self_attn.out_proj, ours.out),
                  (theirs.mlp.fc1, ours.mlp[0]), (theirs.mlp.fc2, ours.mlp[2])]
    for theirs, ours in pairs:
        theirs.load_state_dict(ours.state_dict())
    images = torch.randn(3, 3, 16, 16)
    assert rms_error(model(images)[0], peer(images).last_hidden_state) < 1e-5


def test_vit_bfloat16_and_learning():
    model, images = vit(), torch.randn(2, 3, 16, 24)
    got = model.bfloat16()(images.bfloat16())[0]
    assert got.dtype == torch.bfloat16 and rms_error(got, model.float()(images)[0]) < 0.1
    model = vit().train()
    model(images)[0].square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("arguments", [dict(dim=10, heads=4), dict(dim=8, image_size=20), dict(dim=0), dict(dim=8, patch_size=0),
                                       dict(dim=8.0), dict(dim=8, heads="2")])
def test_vit_refuses_shapes(arguments):
    with pytest.raises(ValueError, match=r"(dim|heads|image_size|patch_size)[\w, ]*: got .* need"):
        ViT(**arguments)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.integers(1, 7), st.integers(1, 9), st.integers(1, 9))
def test_positions_keep_a_constant_and_follow_rows(side, height, width):
    rows = torch.arange(side, dtype=torch.float64).repeat_interleave(side)
    got = resize_positions(torch.stack([torch.ones(side * side), rows], 1), side, (height, width)).view(height, width, 2)
    torch.testing.assert_close(got[..., 0], torch.ones_like(got[..., 0]))
    assert (got[..., 1] - got[:, :1, 1]).abs().max() < 1e-9                  # the same in every column
    if height == side:
        torch.testing.assert_close(got[:, 0, 1], rows[::side])
    turned = resize_positions(rows.view(side, side).T.reshape(-1, 1), side, (width, height)).view(width, height)
    torch.testing.assert_close(turned.T, got[..., 1])                        # rows and columns are treated alike


def test_positions_on_their_own_grid_are_untouched():
    positions = torch.randn(9, 4, requires_grad=True)
    assert resize_positions(positions, 3, (3, 3)) is positions
    got = resize_positions(positions.bfloat16(), 3, (2, 5))
    assert got.dtype == torch.bfloat16 and rms_error(got, resize_positions(positions, 3, (2, 5))) < 0.01


def test_positions_equal_a_peer():
    transformers = pytest.importorskip("transformers")
    peer = transformers.Dinov2WithRegistersModel(tower_config("tiny-dinov2-registers")).embeddings
    torch.nn.init.normal_(peer.position_embeddings)
    for grid in ((4, 4), (3, 7), (9, 2), (1, 1)):
        want = peer.interpolate_pos_encoding(torch.zeros(1, grid[0] * grid[1] + 1, 32), 8 * grid[0], 8 * grid[1])[0, 1:]
        torch.testing.assert_close(resize_positions(peer.position_embeddings[0, 1:], 4, grid), want)


# ---- pictures to tensors

def picture(width, height, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def peer_processor(name, **settings):
    "An image processor of transformers that works with Pillow."
    transformers = pytest.importorskip("transformers")
    return (getattr(transformers, name + "Pil", None) or getattr(transformers, name))(**settings)


PEERS = {
    "siglip": ("SiglipImageProcessor", dict(size={"height": 30, "width": 30}), SigLIP.published(30)),
    "clip": ("CLIPImageProcessor", dict(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}), CLIP.published(30)),
    "dinov2": ("BitImageProcessor", dict(size={"shortest_edge": 34}, crop_size={"height": 30, "width": 30},
                                         image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]), DINOv2.published(30)),
    "small crop": ("CLIPImageProcessor", dict(size={"shortest_edge": 21}, crop_size={"height": 33, "width": 30}),
                   Preprocess(21, (33, 30), *CLIP_COLOURS)),
    "bilinear": ("SiglipImageProcessor", dict(size={"height": 17, "width": 40}, resample=2), Preprocess((17, 40), resample="bilinear")),
    "llava": ("LlavaImageProcessor", dict(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}, do_pad=True),
              Preprocess(30, (30, 30), *CLIP_COLOURS, pad_to_square=True))}


@pytest.mark.parametrize("name", PEERS)
def test_pixels_equal_the_processors_of_transformers(name):
    processor, own = peer_processor(PEERS[name][0], **PEERS[name][1]), PEERS[name][2]
    for i, size in enumerate([(64, 64), (30, 30), (31, 47), (200, 33), (5, 7), (7, 5), (1, 1), (1, 60), (333, 500)]):
        image = picture(*size, seed=i)
        want = processor(image, return_tensors="pt")["pixel_values"]
        got = own(image)
        assert got.shape == want.shape and got.dtype == torch.float32
        assert (got - want).abs().max() < 1e-5, size
        assert torch.equal(own(np.asarray(image)), got)                      # bytes, as array or tensor
        assert torch.equal(own(torch.from_numpy(np.array(image)).permute(2, 0, 1)), got)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.sampled_from(["siglip", "clip", "dinov2", "llava"]), st.integers(1, 90), st.integers(1, 90))
def test_pixels_equal_the_processors_at_any_size(name, width, height):
    processor = peer_processor(PEERS[name][0], **PEERS[name][1])
    want = processor(picture(width, height), return_tensors="pt")["pixel_values"]
    assert (PEERS[name][2](picture(width, height)) - want).abs().max() < 1e-5


@pytest.mark.parametrize("name,size", [("siglip", 384), ("clip", 336), ("dinov2", 224)])
def test_published_settings(name, size):
    "At the real sizes, on a photograph-like picture."
    family = {"siglip": SigLIP, "clip": CLIP, "dinov2": DINOv2}[name]
    shape = {"siglip": dict(size={"height": size, "width": size}), "clip": dict(size={"shortest_edge": size}),
             "dinov2": dict(size={"shortest_edge": 256}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])}[name]
    if name != "siglip":
        shape["crop_size"] = {"height": size, "width": size}
    want = peer_processor(PEERS[name][0], **shape)(picture(640, 427), return_tensors="pt")["pixel_values"]
    assert (family.published(size)(picture(640, 427)) - want).abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "CMYK"])
def test_picture_modes(mode):
    image = picture(40, 50, mode)
    want = peer_processor("SiglipImageProcessor", size={"height": 30, "width": 30})(image, return_tensors="pt")["pixel_values"]
    assert (SigLIP.published(30)(image) - want).abs().max() < 1e-5


@pytest.mark.parametrize("name", PEERS)
def test_settings_are_read_from_the_file(name, tmp_path):
    processor = peer_processor(PEERS[name][0], **PEERS[name][1])
    processor.save_pretrained(tmp_path)
    assert load_preprocess(tmp_path) == PEERS[name][2]
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings, "processor_class": "X"}))
    assert load_preprocess(tmp_path) == PEERS[name][2]


def test_old_settings_and_refused_ones(tmp_path):
    old = {"crop_size": 336, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 336,
           "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": CLIP_COLOURS[0], "image_std": list(CLIP_COLOURS[1])}
    assert preprocess_from_config(old) == CLIP.published(336)
    for change in (dict(do_rescale=False), dict(do_resize=False), dict(do_normalize=False), dict(do_pad=True), dict(resample=9),
                   dict(rescale_factor=1 / 127.5), dict(size={"longest_edge": 512}), dict(image_mean=None), dict(image_std=[0.5, 0.5]),
                   dict(image_std=[0.5, 0, 0.5]), dict(crop_size="large"), dict(size=None)):
        with pytest.raises(ValueError, match="got .* need"):
            preprocess_from_config({**old, **change})
    with pytest.raises(ValueError, match=r"no preprocessor_config.json, need one, or preprocess=Preprocess"):
        load_preprocess(tmp_path)


def test_settings_from_the_hub(monkeypatch, tmp_path):
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    (tmp_path / "settings").write_text(json.dumps({"image_processor": dict(size=32, image_mean=[0, 0, 0], image_std=[1, 1, 1])}))

    def download(source, name, revision, local_files_only):
        if source == "some/offline":
            raise LocalEntryNotFoundError("no network")
        if source != "some/model" or name != "processor_config.json":
            raise EntryNotFoundError("no such file")
        return str(tmp_path / "settings")

    monkeypatch.setattr("vlmamba_lite.files.hf_hub_download", download)
    assert load_preprocess("some/model") == Preprocess(32, None, (0, 0, 0), (1, 1, 1))
    with pytest.raises(ValueError, match="no preprocessor_config.json.*no preprocessor_config.json or processor_config.json in some/other"):
        load_preprocess("some/other")
    with pytest.raises(ValueError, match="no preprocessor_config.json.*no network"):             # not known is not the same as not there
        load_preprocess("some/offline")


@pytest.mark.parametrize("bad,message", [
    (torch.rand(3, 8, 8), "got float32"), (np.zeros((8, 8)), "got float64"), (np.zeros((8, 8, 4), np.uint8), "need bytes with 3 channels"),
    (torch.zeros(1, 8, 8, dtype=torch.uint8), "need bytes with 3 channels"), ("cat.png", "got str"), ([], "got none"), (None, "NoneType"),
    (np.zeros((0, 8, 3), np.uint8), "at least 1x1"), ([[1, 2]], "got list"), (Image.new("RGB", (1, 500)), "100 to 1"),
    (torch.zeros(3, 8, 8, dtype=torch.bfloat16), "got bfloat16"), (Image.new("F", (8, 8), 0.5), "got a picture of mode F, need 8 bits a channel"),
    (Image.new("I;16", (8, 8), 900), "got a picture of mode I;16"), (Image.new("I", (8, 8), 900), "got a picture of mode I,")])
def test_preprocess_refuses(bad, message):
    with pytest.raises(ValueError, match=f"images: .*{message}"):
        Preprocess(8, (8, 8))(bad if isinstance(bad, list) or getattr(bad, "ndim", 0) == 3 or isinstance(bad, Image.Image) else [bad])


def test_preprocess_batches():
    own = Preprocess((8, 8))
    images = [picture(9, 12, seed=i) for i in range(3)]
    assert torch.equal(own(images), torch.cat([own(image) for image in images]))
    assert own.pixels(images).dtype == torch.uint8 and own.pixels(images).shape == (3, 3, 8, 8)
    with pytest.raises(ValueError, match=r"images: got sizes \[\(8, 8\), \(16, 8\)\] after resizing, need one"):
        Preprocess(8)([picture(20, 20), picture(20, 40)])
    for bad in (dict(size=0), dict(size=(8,)), dict(size=8, crop=8), dict(size=8, mean=(1, 2)), dict(size=8, std=(0, 1, 1)),
                dict(size=8, resample="cubic"), dict(size=True)):
        with pytest.raises(ValueError, match="(size|crop|mean|std|resample): got"):
            Preprocess(**bad)


# ---- files of pictures

def png(width, height):
    "A small file whose header tells of a picture this large; its pixels are not all there."
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(3 * width + 1))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("width,height", [(8_000, 8_000), (10_000, 10_000), (13_000, 13_000), (20_000, 20_000)])
def test_a_picture_too_large_is_refused_by_its_header_in_one_line(width, height, tmp_path):
    "Between Pillow's two limits (89 and 178 megapixels) it warns of its own accord; 20,000 x 20,000 is above both."
    (tmp_path / "large.png").write_bytes(png(width, height))
    tracemalloc.start()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match=r"^image: .*large.png cannot be read: .*(pixels, need at most 50,000,000|exceeds limit)[^\n]*$"):
            open_image(tmp_path / "large.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not said and peak < 2 ** 20


@pytest.mark.parametrize("levels", [np.linspace(0, 1, 64), np.linspace(0, 255, 64)], ids=["0 to 1", "0 to 255"])
def test_floating_point_tiffs_keep_their_levels(levels, tmp_path):
    Image.fromarray(levels.reshape(8, 8).astype(np.float32)).save(tmp_path / "float.tiff")
    got = np.asarray(to_rgb(open_image(tmp_path / "float.tiff")))
    want = 255 * levels.reshape(8, 8) / levels.max()
    assert got.shape == (8, 8, 3) and np.abs(got - want[..., None]).max() < 1 and got.max() == 255


@pytest.mark.parametrize("levels", [[[0, np.nan]], [[-0.1, 1]], [[0, 256.0]], [[0, np.inf]]])
def test_floating_point_pictures_of_other_levels_are_refused(levels):
    with pytest.raises(ValueError, match="^image: got levels from .* to .*, need 8 or 16 bits$"):
        to_rgb(Image.fromarray(np.array(levels, np.float32)))


# ---- pretrained towers

TOYS = {"tiny-siglip": SigLIP, "tiny-clip": CLIP, "tiny-dinov2": DINOv2, "tiny-dinov2-registers": DINOv2}


def toy(name, seed=0, **options):
    torch.manual_seed(seed)
    tower = TOYS[name](name, **options)
    for p in tower.parameters():
        torch.nn.init.normal_(p, std=0.2)                                    # class token, registers and LayerScale too
    return tower


def peer_of(tower, name):
    "The whole model of transformers with the weights of the tower."
    pytest.importorskip("transformers")
    peer = new_tower(name).eval()
    core = getattr(peer, "vision_model", peer)
    missing, unexpected = core.load_state_dict(tower.model.state_dict(), strict=False)
    assert not unexpected
    return peer


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("layer", [-2, -1, 1, 0])
def test_tower_equals_the_hidden_state_of_its_peer(name, layer):
    tower = toy(name, layer=layer)
    peer, skip = peer_of(tower, name), {"tiny-siglip": 0, "tiny-clip": 1, "tiny-dinov2": 1, "tiny-dinov2-registers": 5}[name]
    for size in ((32, 32), (8, 8), (40, 24), (37, 63), (8, 64)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            want = peer(images, output_hidden_states=True, **tower.options).hidden_states[layer][:, skip:]
        tokens, grid = tower(images)
        assert grid == (size[0] // 8, size[1] // 8) and tokens.shape == (2, grid[0] * grid[1], 32)
        assert rms_error(tokens, want) < 1e-5


@pytest.mark.parametrize("name", TOYS)
def test_tower_from_picture_to_tokens(name):
    "The whole way: our preparation and our tower against theirs."
    tower = toy(name)
    config = {"tiny-siglip": ("siglip", dict(size={"height": 32, "width": 32})),
              "tiny-clip": ("clip", dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}))}.get(
        name, ("dinov2", dict(size={"shortest_edge": 37}, crop_size={"height": 32, "width": 32},
                              image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])))
    image = picture(50, 41)
    pixel_values = peer_processor(PEERS[config[0]][0], **config[1])(image, return_tensors="pt")["pixel_values"]
    want = peer_of(tower, name)(pixel_values, output_hidden_states=True).hidden_states[-2][:, tower.skip:]
    assert rms_error(tower(tower.preprocess(image))[0], want) < 1e-5


@pytest.mark.parametrize("name", TOYS)
def test_tower_bfloat16(name):
    tower, images = toy(name), torch.randn(2, 3, 40, 24)
    want = tower(images)[0]
    half = tower.bfloat16()
    assert half(images)[0].dtype == torch.float32 and half(images.bfloat16())[0].dtype == torch.bfloat16
    assert rms_error(half(images)[0], want) < 0.1


@pytest.mark.parametrize("name,millions,tokens", [("google/siglip-so400m-patch14-384", 428.2, 729), ("facebook/dinov2-large", 304.4, 1369),
                                                  ("openai/clip-vit-large-patch14-336", 303.5, 576),
                                                  ("facebook/dinov2-with-registers-large", 304.4, 1369)])
def test_published_sizes(name, millions, tokens):
    "Parameters as on the model cards (SigLIP's image encoder 428 M) and in the ML-Mamba paper (DINOv2 304 M); tokens at the native size."
    pytest.importorskip("transformers")
    whole = new_tower(name, device="meta")
    assert abs(sum(p.numel() for p in whole.parameters()) / 1e6 - millions) < 0.1
    assert {p.device.type for p in whole.parameters()} == {"meta"}
    shape = TOWER_SHAPES[name]
    tower = next(f for f in (SigLIP, CLIP, DINOv2) if shape["model_type"] in f.model_types)(name, device="meta")
    assert tower.layer == shape["num_hidden_layers"] - 1
    out, grid = tower(torch.zeros(1, 3, shape["image_size"], shape["image_size"], device="meta"))
    assert out.shape == (1, tokens, shape["hidden_size"]) and grid[0] * grid[1] == tokens


@pytest.mark.parametrize("name", TOYS)
def test_frozen_is_frozen(name):
    tower, images = toy(name), torch.randn(2, 3, 32, 32)
    before = {key: p.clone() for key, p in tower.state_dict().items()}
    holder = torch.nn.ModuleList([tower, torch.nn.Linear(32, 1)]).train().requires_grad_(True)
    assert not any(m.training for m in tower.modules()) and holder[1].training
    optimizer = torch.optim.AdamW(holder.parameters(), lr=0.1, weight_decay=0.5)
    holder[1](tower(images)[0]).sum().backward()
    optimizer.step()
    assert all(p.grad is None for p in tower.parameters()) and holder[1].weight.grad.abs().sum() > 0
    assert all(torch.equal(p, before[key]) for key, p in tower.state_dict().items())
    assert not any(p.requires_grad for p in toy(name).parameters())
    images.requires_grad_(True)
    assert torch.autograd.grad(tower(images)[0].square().sum(), images)[0].abs().sum() > 0


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("layer", [-2, -1])
def test_trained_towers_train_every_weight(name, layer):
    tower = toy(name, frozen=False, layer=layer)
    assert tower.training and not tower.eval().training and tower.train().training
    tower(torch.randn(2, 3, 32, 32))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tower.parameters())      # nothing that waits in vain
    before = {key: p.clone() for key, p in tower.named_parameters()}
    torch.optim.SGD(tower.parameters(), 0.1).step()
    assert not all(torch.equal(p, before[key]) for key, p in tower.named_parameters())


@pytest.mark.parametrize("name", TOYS)
def test_loads_from_a_folder(name, tmp_path):
    pytest.importorskip("transformers")
    torch.manual_seed(1)
    whole, family = new_tower(name).eval(), TOYS[name]
    whole.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no preprocessor_config.json"):
        family.from_pretrained(tmp_path)
    own = Preprocess(33, (32, 32), *CLIP_COLOURS)
    tower = family.from_pretrained(tmp_path, preprocess=own, layer=1, frozen=False)
    assert tower.preprocess == own and tower.layer == 1 and not tower.frozen
    peer_processor("CLIPImageProcessor", size={"shortest_edge": 33}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    tower = load_encoder(tmp_path)
    assert type(tower) is family and tower.preprocess == own and tower.layer == 2 and tower.frozen and not tower.training
    images = torch.randn(1, 3, 32, 40)
    want = whole(images, output_hidden_states=True, **tower.options).hidden_states[2][:, tower.skip:]
    assert rms_error(tower(images)[0], want) < 1e-6
    assert load_encoder(tmp_path, image_size=48).preprocess == Preprocess((48, 48), None, *CLIP_COLOURS)
    assert load_encoder(tmp_path, pad_to_square=True).preprocess == Preprocess(33, (32, 32), *CLIP_COLOURS, pad_to_square=True)
    assert next(load_encoder(tmp_path, dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16
    assert next(tower.parameters()).dtype == torch.float32


@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_takes_the_vision_half_of_a_whole_model(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20, max_position_embeddings=8)
    vision = {k: v for k, v in TOWER_SHAPES[f"tiny-{name}"].items() if k != "model_type"}
    config, model = {"siglip": (transformers.SiglipConfig, transformers.SiglipModel), "clip": (transformers.CLIPConfig, transformers.CLIPModel)}[name]
    whole = model(config(text_config=text, vision_config=vision)).eval()
    whole.save_pretrained(tmp_path)
    tower = load_encoder(tmp_path, preprocess=Preprocess((32, 32)))
    images = torch.randn(1, 3, 32, 32)
    want = whole.vision_model(images, output_hidden_states=True).hidden_states[-2][:, tower.skip:]
    assert rms_error(tower(images)[0], want) < 1e-6


def test_loading_refuses(tmp_path):
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file
    new_tower("tiny-clip").save_pretrained(tmp_path)
    own = Preprocess((32, 32))
    with pytest.raises(ValueError, match=r"got a model of type 'clip_vision_model', need one of \('siglip_vision_model',\)"):
        SigLIP.from_pretrained(tmp_path, preprocess=own)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(key for key in weights if "layers.1.mlp.fc1.weight" in key)
    save_file({key: value for key, value in weights.items() if key != lost}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="got no weights for 1 parameters, the first is .*layers.1.mlp.fc1.weight"):
        CLIP.from_pretrained(tmp_path, preprocess=own)
    (tmp_path / "text").mkdir()
    transformers.GPT2Config().save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="got a model of type 'gpt2', need one of"):
        load_encoder(tmp_path / "text")
    (tmp_path / "empty").mkdir()
    for load in (load_encoder, lambda source: CLIP.from_pretrained(source, preprocess=own)):
        with pytest.raises(ValueError, match="empty: cannot be read as a model of transformers"):
            load(tmp_path / "empty")


@pytest.mark.parametrize("make,message", [
    (lambda: SigLIP("google/siglip-of-nobody"), "config: got 'google/siglip-of-nobody', need a dict or one of"),
    (lambda: CLIP("tiny-siglip"), "config: got model_type 'siglip_vision_model', need one of"),
    (lambda: DINOv2(dict(hiden_size=32)), r"config: got unknown fields \['hiden_size'\]"),
    (lambda: DINOv2(dict(model_type="vit")), "config: got model_type 'vit'"),
    (lambda: SigLIP({**TOWER_SHAPES["tiny-siglip"], "num_channels": 1}), "config: got num_channels 1, need 3"),
    (lambda: SigLIP("tiny-siglip", layer=4), "layer: got 4, need a whole number from -4 to 3"),
    (lambda: SigLIP("tiny-siglip", layer=-5), "layer: got -5"), (lambda: SigLIP("tiny-siglip", layer=1.0), "layer: got 1.0"),
    (lambda: SigLIP(), "config: got None, need a dict or one of"),
    (lambda: build_encoder({"kind": "sigclip"}), r"kind: got 'sigclip', need one of \['clip', 'conv'"),
    (lambda: build_encoder({"kind": ["conv"]}), r"kind: got \['conv'\], need one of"),
    (lambda: build_encoder({"dim": 8, "dims": 3}), "vision: .*unexpected keyword argument 'dims'"),
    (lambda: build_encoder({"dim": 0}), "dim: got 0, need a whole number of at least 1"),
    (lambda: build_encoder({"kind": "vit", "dim": 8, "depth": "4"}), "depth: got '4', need a whole number"),
    (lambda: build_encoder(["conv"]), "vision: "), (lambda: build_encoder({"kind": "fused"}), "vision: 'towers'"),
    (lambda: build_encoder({"kind": "fused", "towers": "abc"}), "vision: "), (lambda: build_encoder({"kind": "fused", "towers": []}), "towers: got none"),
    (lambda: build_encoder({"kind": "clip", "config": "tiny-clip", "preprocess": {"sizes": 8}}), "vision: .*'sizes'"),
    (lambda: build_encoder({"kind": "clip", "config": {"hidden_size": "x"}}), "vision: .*"),
    (lambda: build_encoder({"kind": "clip", "config": {"hidden_size": 30, "num_attention_heads": 4}}), "vision: .*"),
    (lambda: build_encoder({"kind": "clip", "config": {"hidden_act": "nix"}}), "vision: .*nix")])
def test_towers_refuse(make, message):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoder", ["tower", "vit"])
@pytest.mark.parametrize("images,message", [
    (torch.zeros(1, 1, 32, 32), r"got shape \(1, 1, 32, 32\), need \(batch, 3, height, width\)"), (torch.zeros(3, 32, 32), "got shape"),
    (torch.zeros(1, 4, 32, 32), "got shape"), (torch.zeros(1, 3, 7, 32), "at least 8 pixels"), (torch.zeros(1, 32, 32, 3), "got shape"),
    (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "got torch.uint8, need floating point"),
    (torch.full((1, 3, 32, 32), 255.), "got values up to 255, need normalised"), (torch.full((1, 3, 32, 32), torch.nan), "up to nan")])
def test_encoders_refuse_pictures(encoder, images, message):
    model = toy("tiny-clip") if encoder == "tower" else ViT(8, 1, 2)
    with pytest.raises(ValueError, match=f"images: .*{message}"):
        model(images)


def test_vit_refuses_part_patches():
    with pytest.raises(ValueError, match=r"images: got \(33, 32\) pixels, need multiples of the patch size 8"):
        ViT(8, 1, 2)(torch.zeros(1, 3, 33, 32))


# ---- several towers, specs, names

def test_fused_is_side_by_side():
    dino, siglip = toy("tiny-dinov2-registers"), toy("tiny-siglip", seed=1)
    fused, image = FusedEncoder([dino, siglip]), picture(50, 41)
    assert fused.preprocess == Preprocess((32, 32)) and fused.dim == 64
    tokens, grid = fused(fused.preprocess(image))
    assert tokens.shape == (1, 16, 64) and grid == (4, 4)
    pixels = fused.preprocess.pixels(image)                                  # the same bytes in each tower's colours
    want = torch.cat([tower(tower.preprocess.normalize(pixels))[0] for tower in (dino, siglip)], -1)
    assert rms_error(tokens, want) < 1e-5
    swapped = FusedEncoder([siglip, dino], preprocess=fused.preprocess)(fused.preprocess(image))[0]
    torch.testing.assert_close(swapped, tokens.roll(32, -1))
    clip = FusedEncoder([toy("tiny-clip")])                                  # one tower that takes pictures in [-1, 1]
    torch.testing.assert_close(clip(clip.preprocess(image))[0], clip.towers[0](clip.towers[0].preprocess(image))[0], atol=1e-5, rtol=1e-4)


def test_half_range():
    clip, siglip, conv = toy("tiny-clip"), toy("tiny-siglip"), encoder()
    assert half_range(siglip) is siglip and half_range(conv) is conv and half_range(fused := half_range(clip)) is fused
    pixels = clip.preprocess.pixels(picture(40, 50))
    want = clip(clip.preprocess.normalize(pixels))[0]
    assert rms_error(fused(pixels.float() / 127.5 - 1)[0], want) < 1e-5
    assert fused.preprocess == Preprocess(32, (32, 32)) and fused.dim == 32


def test_fused_refuses_different_grids():
    fused = FusedEncoder([toy("tiny-dinov2"), SigLIP({**TOWER_SHAPES["tiny-siglip"], "patch_size": 4})])
    with pytest.raises(ValueError, match=r"towers: got grids \[\(4, 4\), \(8, 8\)\] from pictures of \(32, 32\) pixels"):
        fused(torch.zeros(1, 3, 32, 32))


def test_fused_freezes_each_for_itself():
    fused = FusedEncoder([toy("tiny-dinov2", frozen=False), toy("tiny-siglip")]).train()
    assert fused.towers[0].training and not fused.towers[1].training
    fused(torch.randn(1, 3, 32, 32))[0].sum().backward()
    assert all(p.grad is not None for p in fused.towers[0].parameters()) and all(p.grad is None for p in fused.towers[1].parameters())


@pytest.mark.parametrize("name", [*TOYS, "fused"])
def test_built_again_from_its_spec(name):
    pytest.importorskip("transformers")
    encoder = FusedEncoder([toy("tiny-dinov2"), toy("tiny-siglip", frozen=False)]) if name == "fused" else toy(name, layer=1, frozen=False)
    again = build_encoder(json.loads(json.dumps(encoder.spec())))
    again.load_state_dict(encoder.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(images)[0], encoder(images)[0]) and again.preprocess == encoder.preprocess
    assert again.spec() == encoder.spec()
    for tower in getattr(encoder, "towers", [encoder]):                      # what was cut off is not built again
        assert tower.spec()["config"]["num_hidden_layers"] == tower.layer
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in encoder.parameters()]


def test_build_knows_the_small_ones():
    assert isinstance(build_encoder(dict(dim=16, width=8, image_size=64)), ConvEncoder)
    assert isinstance(build_encoder(dict(kind="vit", dim=16, depth=1)), ViT)
    torch.manual_seed(0)
    want = ConvEncoder(16, 8)
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(build_encoder(dict(dim=16, width=8)).parameters(), want.parameters()))


def test_several_names_make_one(tmp_path):
    pytest.importorskip("transformers")
    for name in ("tiny-dinov2", "tiny-siglip"):
        new_tower(name).save_pretrained(tmp_path / name)
    fused = load_encoder(f"{tmp_path}/tiny-dinov2 + {tmp_path}/tiny-siglip", preprocess=DINOv2.published(32), image_size=32)
    assert [tower.kind for tower in fused.towers] == ["dinov2", "siglip"] and fused.preprocess == Preprocess((32, 32))


def test_names_of_timm():
    assert tower_name("vit_so400m_patch14_siglip_384") == tower_name("timm/vit_so400m_patch14_siglip_384.webli") == "google/siglip-so400m-patch14-384"
    assert tower_name("vit_large_patch14_reg4_dinov2.lvd142m") == "facebook/dinov2-with-registers-large"
    assert tower_name("/some/folder") == "/some/folder" and set(TIMM_NAMES.values()) < set(TOWER_SHAPES)


def test_timm_knows_them():
    timm = pytest.importorskip("timm", reason="timm is not installed; its names are translated without it")
    assert all(timm.is_model(name.split(".")[0]) for name in TIMM_NAMES)


# ---- maps

@pytest.mark.parametrize("name", TOYS)
def test_attention_equals_the_peer(name):
    tower, images = toy(name), torch.randn(2, 3, 32, 24)
    core = getattr(peer := peer_of(tower, name), "vision_model", peer)
    core.config._attn_implementation = "eager"
    want = core(images, output_attentions=True, **tower.options).attentions[1][..., tower.skip:]
    usual = tower.model.config._attn_implementation
    got = attention_map(tower, images, (2, 1))
    assert got.shape == (2, 4, 4, 3) and tower.model.config._attn_implementation == usual
    torch.testing.assert_close(got, want[:, :, tower.skip + 7].unflatten(-1, (4, 3)))
    rows = want[:, :, 0] if tower.skip else want.mean(2)
    torch.testing.assert_close(attention_map(tower, images), rows.unflatten(-1, (4, 3)))
    for bad in (dict(layer=2), dict(layer=-3), dict(patch=(4, 0)), dict(patch=(0, -1))):
        with pytest.raises(ValueError, match="(layer|patch): got"):
            attention_map(tower, images, **bad)


def test_attention_of_the_vit():
    "The weights give the block's output: they are what it used."
    model, images = vit(), torch.randn(2, 3, 16, 8)
    x, grid = model.hidden(images, 1)
    block = model.blocks[1]
    weights = block.attention(x)
    y = x + block.out((weights @ block.split(x)[2]).transpose(1, 2).flatten(2))
    assert rms_error(block(x), y + block.mlp(block.norm2(y))) < 1e-5
    torch.testing.assert_close(attention_map(model, images, (3, 1)), weights[:, :, 7].unflatten(-1, grid))
    torch.testing.assert_close(attention_map(model, images).sum((2, 3)), torch.ones(2, 3))


# ---- whole graphs

GRAPHS = {"conv": lambda: encoder().eval(), "vit": lambda: vit(image_size=32), "fused": lambda: FusedEncoder([toy("tiny-dinov2"), toy("tiny-siglip")]),
          **{name: lambda name=name: toy(name) for name in TOYS}}


@pytest.mark.parametrize("name", GRAPHS)
def test_compiles_whole(name):
    "One graph; the small encoders with the gradients of their weights."
    model = GRAPHS[name]()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for batch in (2, 3):
        images, results = torch.rand(batch, 3, 32, 32) * 2 - 1, []
        for f in (model, compiled):
            tokens, grid = f(images)
            grads = torch.autograd.grad(tokens.square().sum(), list(model.parameters())) if tokens.requires_grad else ()
            results.append([tokens, *grads])
            assert tuple(grid) in ((4, 4), (8, 8))
        for got, want in zip(*results):
            assert rms_error(got, want) < 1e-4


@pytest.mark.parametrize("name", GRAPHS)
def test_exports(name):
    "torch.export for any batch of pictures of one size."
    model, batch = GRAPHS[name]().eval(), torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        exported = torch.export.export(model, (torch.rand(2, 3, 32, 32) * 2 - 1,), dynamic_shapes=({0: batch},)).module()
        for n in (1, 2, 5):
            images = torch.rand(n, 3, 32, 32) * 2 - 1
            torch.testing.assert_close(exported(images)[0], model(images)[0], rtol=1e-4, atol=1e-4)


# ---- light

def test_import_is_light():
    code = "import sys, vlmamba_lite.vision.towers; print([m for m in ('transformers', 'timm', 'huggingface_hub', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ---- inside the whole model

@pytest.mark.parametrize("name", ["tiny-siglip", "tiny-clip", "fused"])
def test_whole_model_with_a_pretrained_encoder(name, small, tmp_path):
    "Trained one step, saved, loaded without the Hub, asked: the tower keeps its weights and its own preparation of pictures."
    pytest.importorskip("transformers")
    from vlmamba_lite.data.batches import Batch
    from vlmamba_lite.data.pictures import normalize
    from vlmamba_lite.model.presets import tiny_config
    from vlmamba_lite.model.vlmamba import VLMamba
    from vlmamba_lite.training.optimizers import build_optimizers
    from vlmamba_lite.training.recipes import pick_recipe
    tower = half_range(FusedEncoder([toy("tiny-dinov2"), toy("tiny-siglip", seed=1)]) if name == "fused" else toy(name))
    config = tiny_config(small.tokenizer.get_vocab_size())
    config.vision = tower.spec()
    torch.manual_seed(0)
    model = VLMamba(config, small.tokenizer).train()
    model.vision.load_state_dict(tower.state_dict())
    before = {key: p.clone() for key, p in model.vision.state_dict().items()}
    data = small.data
    images = normalize(data.images[:2])
    loss = model(Batch.from_rows(images, data.input_ids[:2], data.labels[:2])).loss
    loss.backward()
    for optimizer in build_optimizers(model, pick_recipe("lite")[0]):
        optimizer.step()
    assert loss.isfinite() and all(torch.equal(p, before[key]) for key, p in model.vision.state_dict().items())
    assert all(p.grad is not None for p in model.connector.parameters())
    model.save_pretrained(tmp_path)
    again = VLMamba.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
    photo = picture(90, 50)
    want = again.connector(*tower(tower.preprocess(photo)))
    torch.testing.assert_close(again.read(tower.preprocess(photo))[0][0], again.read_image(photo)[0][0])
    torch.testing.assert_close(again.see(tower.preprocess(photo)), want)
    assert again.ask(photo, "what color is the shape?") == again.ask(again.read_image(photo), "what color is the shape?")

"""torchvision's MViT with the fused attention in place of its softmax over all frames."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torchvision.models import resnet18
from torchvision.models.video import MViT, mvit_v1_b, mvit_v2_s, swin3d_t
from torchvision.models.video.mvit import MSBlockConfig

from stat_kernels.integrations.torchvision import ClipAttention, convert

FRAMES = 8  # of the input; the stem halves them
EVERY_KEY = {"window": 7, "short_stride": 1, "long": "none"}
V1 = {"residual_pool": False, "residual_with_cls_embed": True, "rel_pos_embed": False}
V2 = {"residual_pool": True, "residual_with_cls_embed": False, "rel_pos_embed": True}


def block(heads, channels, out, q, kv, kernel=3):
    kernels = [[kernel] * 3] * 2
    return MSBlockConfig(heads, channels, out, *kernels, [1, q, q], [1, kv, kv])


def make(version, size=64):
    """Three blocks of two stages, parameters far from their special values."""
    if version == 1:
        blocks = [block(1, 32, 32, 1, 4), block(1, 32, 64, 1, 4), block(2, 64, 64, 2, 2)]
    else:
        blocks = [block(1, 32, 32, 1, 4), block(2, 32, 64, 2, 2), block(2, 64, 64, 1, 2)]
    options = V1 if version == 1 else V2
    model = MViT(
        (size, size), FRAMES, blocks, num_classes=5, proj_after_attn=version == 2, **options
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def clips(count=2, size=64):
    return torch.randn(count, 3, FRAMES, size, size)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [64, 96])
def test_with_every_key_it_is_the_original(version, size):
    """Pooling, shortcut, class token and MViTv2's relative positions in time, height and width."""
    model = make(version, size)
    x = clips(size=size)
    expected = model(x)
    assert convert(model, **EVERY_KEY) is model
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("frames", [5, 12])
def test_clips_of_other_lengths(version, frames):
    """With every key it is the original whose positions were interpolated."""
    model, size = make(version), (frames + 1) // 2
    twin = copy.deepcopy(model)
    convert(model, window=2 * size - 1, short_stride=1, long="none", frames=frames)
    encoding = twin.pos_encoding
    encoding.temporal_size = size
    if version == 1:
        old = encoding.temporal_pos.detach()
        place = ((torch.arange(size) + 0.5) * 4 / size - 0.5).clamp(0, 3)  # of four frames
        low, part = place.floor().long(), (place % 1)[:, None]
        new = old[low] * (1 - part) + old[(low + 1).clamp(max=3)] * part
        encoding.temporal_pos = torch.nn.Parameter(new)
    x = torch.randn(1, 3, frames, 64, 64)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("version", [1, 2])
def test_frames_of_other_sizes(version):
    """Positions that are a ramp stay one inside; with every key the rest is the original."""
    model = make(version)
    if version == 1:
        ramp, slope = torch.arange(16.0), torch.randn(32)
        model.pos_encoding.spatial_pos.data = ramp.repeat_interleave(16)[:, None] * slope
    twin = convert(copy.deepcopy(model), **EVERY_KEY, size=(64, 96))
    x = torch.randn(1, 3, FRAMES, 64, 96)
    encoding = model.pos_encoding
    encoding.spatial_size = (16, 24)
    if version == 1:
        encoding.spatial_pos.data = ramp.repeat_interleave(24)[:, None] * slope
    torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [mvit_v1_b, mvit_v2_s])
def test_torchvisions_own_models(build):
    model = build().eval()
    before = {name: value.shape for name, value in model.state_dict().items()}
    convert(model)
    assert {name: value.shape for name, value in model.state_dict().items()} == before
    replaced = [b.attn for b in model.blocks if isinstance(b.attn, ClipAttention)]
    assert len(replaced) == 16
    assert {a.head_dim for a in replaced} == {96}


@pytest.mark.parametrize("version", [1, 2])
def test_by_default_the_frames_are_joined(version):
    model = make(version)
    x = clips()
    before = model(x)
    after = convert(model)(x)
    assert 1e-4 < (after - before).norm() / before.norm() < 0.5


@pytest.mark.parametrize("version", [1, 2])
def test_a_window_of_one_leaves_the_other_frames_out(version):
    """But for the pooling convolutions, which reach one frame far."""
    attention = convert(make(version), window=1, long="none").blocks[0].attn
    x = torch.randn(1, 1 + 4 * 16 * 16, 32)
    other = x.clone()
    other[:, -16 * 16 :] += torch.randn(16 * 16, 32)
    first, second = (attention(tokens, (4, 16, 16))[0] for tokens in (x, other))
    changed = ((first - second).abs().amax((0, 2)) > 1e-6)[1:].view(4, -1)
    assert changed[2:].all()
    assert not changed[:2].any()


def test_stage_by_stage():
    def kinds(model):
        return [type(b.attn).__name__ for b in model.blocks]

    model = convert(make(2), stages=[1])
    assert kinds(model) == ["MultiscaleAttention", "ClipAttention", "ClipAttention"]
    assert kinds(convert(make(1), stages=[0])) == ["ClipAttention"] * 2 + ["MultiscaleAttention"]
    convert(model, stages=[0])
    assert set(kinds(model)) == {"ClipAttention"}
    with pytest.raises(ValueError, match=r"stages must be among \[0, 1\], got \[2\]"):
        convert(make(1), stages=[2])


def gradients(model, run, x):
    model.zero_grad()
    run(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("version", [1, 2])
def test_gradients_with_every_key_are_the_originals(version):
    model = make(version)
    x = clips()
    expected = gradients(model, model, x)
    convert(model, **EVERY_KEY)
    for a, b in zip(gradients(model, model, x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_compile_in_one_graph():
    torch._dynamo.reset()
    model = convert(make(2))
    x = clips()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_export_with_any_batch():
    model = convert(make(2))
    shapes = {"x": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (clips(),), dynamic_shapes=shapes)
    other = clips(5)
    torch.testing.assert_close(program.module()(other), model(other))


@pytest.mark.parametrize("version", [1, 2])
def test_autocast_and_copies(version):
    model = convert(make(version))
    x = clips()
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x) - expected).norm() / expected.norm() < 0.05


def shrinks_time():
    model = make(1)
    model.blocks[0].attn.pool_k.pool.stride = (2, 4, 4)
    return model


@pytest.mark.parametrize(
    ("build", "options", "error", "message"),
    [
        (resnet18, {}, TypeError, "torchvision's MViT .* got ResNet"),
        (swin3d_t, {}, TypeError, "got SwinTransformer3d"),
        (lambda: convert(make(1)), {}, TypeError, "got one converted already"),
        (partial(make, 1), {"long": "class"}, ValueError, "'mean' or 'none' work"),
        (partial(make, 1), {"window": 2}, ValueError, "window must be odd, got 2"),
        (partial(make, 2), {"frames": 0}, ValueError, "frames must be an int of at least 1, got 0"),
        (partial(make, 2), {"size": 96}, ValueError, r"size must be \(height, width\) in pixels"),
        (shrinks_time, {}, ValueError, r"pool_k must keep the number of frames .* \(2, 4, 4\)"),
    ],
)
def test_what_cannot_be_converted(build, options, error, message):
    with pytest.raises(error, match=message):
        convert(build(), **options)

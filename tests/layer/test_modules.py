"""The layer against a slow re-implementation of the contract, its options, and PyTorch's tools."""

import copy
import io
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from stat_kernels import ShrinkingTemporalAttention

BACKENDS = ("reference", "cpu")


def slow_norm(x, norm):
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + 1e-6).sqrt() * norm.weight + norm.bias


def slow_pool(tokens, pool, grid, stride):
    """(T, h * w, D) of one head of one clip -> (T, h' * w', D), a convolution by its definition."""
    (h, w), (kt, kh, kw) = grid, pool.weight.shape[2:]
    video = tokens.unflatten(1, grid)  # (T, h, w, D)
    padded = F.pad(video, (0, 0, kw // 2, kw // 2, kh // 2, kh // 2, kt // 2, kt // 2))
    rows = []
    for t, y, x in itertools.product(range(len(video)), range(0, h, stride), range(0, w, stride)):
        patch = padded[t : t + kt, y : y + kh, x : x + kw]
        rows.append((patch * pool.weight[:, 0].movedim(0, -1)).sum((0, 1, 2)))
    return torch.stack(rows).unflatten(0, (len(video), -1)), (
        len(range(0, h, stride)),
        len(range(0, w, stride)),
    )


def slow_average(tokens, grid, stride):
    """(h * w, D) -> means of the stride x stride cells, the last ones smaller if need be."""
    image = tokens.unflatten(0, grid)
    cells = itertools.product(range(0, grid[0], stride), range(0, grid[1], stride))
    return torch.stack([image[y : y + stride, x : x + stride].mean((0, 1)) for y, x in cells])


def slow_layer(layer, x, grid):
    """The layer, clip by clip, head by head, frame by frame."""
    has_class = x.shape[2] == grid[0] * grid[1] + 1
    first = 1 if has_class else 0
    batches = []
    for clip in F.linear(x, layer.qkv.weight, layer.qkv.bias):
        heads = []
        for head in range(layer.num_heads):
            columns = torch.arange(layer.head_dim) + head * layer.head_dim
            q, k, v = (clip[..., columns + part * layer.dim] for part in range(3))
            if layer.q_stride > 1:
                spatial, _ = slow_pool(q[:, first:], layer.pool_q, grid, layer.q_stride)
                q = slow_norm(torch.cat((q[:, :first], spatial), 1), layer.pool_q.norm)
            cls = {}
            cur = {}
            for name, t, pool in (("k", k, layer.pool_k), ("v", v, layer.pool_v)):
                pooled, kv_grid = slow_pool(t[:, first:], pool, grid, layer.kv_stride)
                cur[name] = slow_norm(pooled, pool.norm)
                cls[name] = slow_norm(t[:, 0], pool.norm) if has_class else None
                if layer.long == "mean":
                    cls[name] = cur[name].mean(1)
            frames = []
            for i in range(len(q)):
                keys, values = [cur["k"][i]], [cur["v"][i]]
                window = layer.window
                left, right = window if isinstance(window, tuple) else (window // 2, window // 2)
                for j in range(i - left, i + right + 1):
                    if layer.short and j != i and 0 <= j < len(q):
                        keys.append(slow_average(cur["k"][j], kv_grid, layer.short_stride))
                        values.append(slow_average(cur["v"][j], kv_grid, layer.short_stride))
                if layer.long != "none":
                    seen = i + 1 if layer.causal_long else len(q)
                    keys.append(cls["k"][:seen])
                    values.append(cls["v"][:seen])
                scores = q[i] @ torch.cat(keys).T / math.sqrt(layer.head_dim)
                weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
                frames.append(weights @ torch.cat(values))
            heads.append(torch.stack(frames))
        batches.append(torch.cat(heads, -1))
    return F.linear(torch.stack(batches), layer.proj.weight, layer.proj.bias)


def perturbed(layer):
    """Norm weights and biases away from 1 and 0, so that a mixed-up norm is seen."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def make(class_token=True, batch=2, frames=4, grid=(5, 7), dim=16, heads=2, dtype=None, **options):
    layer = perturbed(ShrinkingTemporalAttention(dim, heads, **options).to(dtype))
    tokens = grid[0] * grid[1] + class_token
    return layer, torch.randn(batch, frames, tokens, dim, dtype=dtype)


OPTIONS = {
    "defaults": {},
    "window 1": {"window": 1},
    "window beyond the clip": {"window": 11},
    "window of one side": {"window": (0, 2)},
    "online": {"window": (2, 0), "causal_long": True, "long": "mean", "kv_stride": 2},
    "one frame": {"frames": 1},
    "one head": {"heads": 1},
    "query pooling": {"q_stride": 2, "kv_stride": 4},
    "keys of the paper": {"grid": (14, 14), "kv_stride": 2, "batch": 1, "frames": 3},
    "pooling over time": {"pool_kernel": (3, 3, 3), "q_stride": 2, "kv_stride": 2},
    "long pooling kernel": {"pool_kernel": (1, 5, 1), "kv_stride": 3},
    "long pooling kernel over time": {"pool_kernel": (5, 1, 3), "kv_stride": 2},
    "no short": {"short": False},
    "short as fine as current": {"short_stride": 1},
    "short of one token": {"short_stride": 9},
    "no bias": {"qkv_bias": False},
    "mean": {"long": "mean", "q_stride": 2},
    "none": {"long": "none", "q_stride": 2},
    "current only": {"long": "none", "short": False},
    "mean, no class tokens": {"long": "mean", "class_token": False, "q_stride": 2},
    "none, no class tokens": {"long": "none", "class_token": False, "kv_stride": 2},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_layer_is_what_the_slow_one_says(options, backend):
    layer, x = make(**{"window": 3, "backend": backend, "dtype": torch.float64, **options})
    grid = options.get("grid", (5, 7))
    y, grid_out = layer(x, grid)
    torch.testing.assert_close(y, slow_layer(layer, x, grid), rtol=1e-9, atol=1e-9)
    stride = layer.q_stride
    assert grid_out == (-(-grid[0] // stride), -(-grid[1] // stride))
    assert y.shape[2] == grid_out[0] * grid_out[1] + options.get("class_token", True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_the_slow_layer(backend):
    options = {"q_stride": 2, "kv_stride": 2, "window": 3, "frames": 3, "dtype": torch.float64}
    layer, x = make(**options, backend=backend)
    grad = torch.randn_like(layer(x, (5, 7))[0])
    inputs = [x.requires_grad_(), *layer.parameters()]
    ours = torch.autograd.grad(layer(x, (5, 7))[0], inputs, grad)
    slow = torch.autograd.grad(slow_layer(layer, x, (5, 7)), inputs, grad)
    for a, b in zip(ours, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def changed_frames(layer, x, grid, frame, tokens):
    """Frames of the output that change with some tokens of one frame of the input."""
    other = x.clone()
    other[:, frame, tokens] += 1.0
    with torch.no_grad():
        difference = (layer(x, grid)[0] - layer(other, grid)[0]).abs().amax((0, 2, 3))
    return set(torch.nonzero(difference > 1e-9).flatten().tolist())


@pytest.mark.parametrize(
    ("options", "reach"),
    [
        ({"window": 1, "long": "none"}, 0),
        ({"window": 7, "short": False, "long": "none"}, 0),
        ({"window": 3, "long": "none"}, 1),
        ({"window": 5, "long": "none"}, 2),
        ({"window": 5, "long": "class"}, 2),  # spatial tokens do not enter the class tokens' keys
        ({"window": 5, "long": "none", "pool_kernel": (3, 3, 3)}, 3),
        ({"window": 3, "long": "mean"}, 99),
    ],
)
@pytest.mark.parametrize("frame", [0, 3, 7])
def test_spatial_tokens_reach_the_frames_of_the_window(options, reach, frame):
    layer, x = make(frames=8, batch=1, dtype=torch.float64, backend="reference", **options)
    expected = {i for i in range(8) if abs(i - frame) <= reach}
    assert changed_frames(layer, x, (5, 7), frame, slice(1, None)) == expected


@pytest.mark.parametrize(("long", "expected"), [("class", set(range(8))), ("none", {3})])
def test_class_tokens_reach_the_clip(long, expected):
    layer, x = make(frames=8, batch=1, dtype=torch.float64, backend="reference", long=long)
    assert changed_frames(layer, x, (5, 7), 3, slice(0, 1)) == expected


def test_clips_of_a_batch_do_not_mix():
    layer, x = make(batch=3)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(layer(x[order], (5, 7))[0], layer(x, (5, 7))[0][order])


def test_one_layer_takes_any_clip_length_grid_and_batch():
    layer, _ = make()
    for batch, frames, grid in ((1, 1, (1, 1)), (2, 9, (3, 8)), (3, 2, (14, 14))):
        y, _ = layer(torch.randn(batch, frames, 1 + grid[0] * grid[1], 16), grid)
        assert y.shape == (batch, frames, 1 + grid[0] * grid[1], 16)
        assert y.isfinite().all()


def test_strided_input():
    layer, x = make()
    strided = torch.empty(2, 36, 4, 16, 3).copy_(x.transpose(1, 2)[..., None])[..., 1]
    torch.testing.assert_close(layer(strided.transpose(1, 2), (5, 7))[0], layer(x, (5, 7))[0])


def test_bfloat16_autocast():
    layer, x = make(window=3)
    expected, _ = layer(x, (5, 7))
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(x, (5, 7))
    assert y.dtype == torch.bfloat16
    error = (y.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 0.03
    y.float().square().mean().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def gradients(layer, x, run):
    for parameter in layer.parameters():
        parameter.grad = None
    y = run(x, (5, 7))[0]
    y.square().sum().backward()
    return [y.detach()] + [p.grad.clone() for p in layer.parameters()]


@pytest.mark.parametrize(
    ("compiler", "options"),
    [
        ("aot_eager", {"q_stride": 2, "backend": "reference"}),
        ("aot_eager", {"q_stride": 2}),
        ("aot_eager", {"long": "mean", "class_token": False, "pool_kernel": (3, 3, 3)}),
        ("inductor", {}),  # the slow one: it compiles C++
    ],
)
def test_compile_in_one_graph(compiler, options):
    torch._dynamo.reset()
    layer, x = make(window=3, kv_stride=2, **options)
    compiled = torch.compile(layer, backend=compiler, fullgraph=True)
    for a, b in zip(gradients(layer, x, compiled), gradients(layer, x, layer), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_export_with_any_batch():
    layer, x = make(window=3, kv_stride=2)
    shapes = {"x": {0: torch.export.Dim("batch")}, "grid": (None, None)}
    program = torch.export.export(layer, (x, (5, 7)), dynamic_shapes=shapes)
    other = torch.randn(5, *x.shape[1:])
    torch.testing.assert_close(program.module()(other, (5, 7))[0], layer(other, (5, 7))[0])


def test_checkpointing_changes_nothing():
    layer, x = make()
    again = lambda x, grid: checkpoint(layer, x, grid, use_reentrant=False)  # noqa: E731
    for a, b in zip(gradients(layer, x, again), gradients(layer, x, layer), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_copies_are_the_same_layer():
    layer, x = make()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x, (5, 7))[0], layer(x, (5, 7))[0])


def test_meta_device():
    with torch.device("meta"):
        layer = ShrinkingTemporalAttention(192, 2, q_stride=2, kv_stride=4)
        y, grid = layer(torch.empty(8, 32, 785, 192), (28, 28))
    assert y.shape == (8, 32, 197, 192)
    assert grid == (14, 14)


def test_repr_tells_the_options():
    text = repr(ShrinkingTemporalAttention(192, 2, window=5, kv_stride=4, long="mean"))
    for part in ("dim=192", "num_heads=2", "window=5", "kv_stride=4", "long='mean'"):
        assert part in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim must be an int of at least 1, got 0"),
        ({"num_heads": 3}, "dim must be divisible by num_heads 3, got 16"),
        ({"num_heads": True}, "num_heads must be an int of at least 1, got True"),
        ({"causal_long": True, "long": "none"}, "causal_long needs long keys, got long='none'"),
        ({"q_stride": 0}, "q_stride must be an int of at least 1, got 0"),
        ({"kv_stride": 1.5}, "kv_stride must be an int of at least 1, got 1.5"),
        ({"short_stride": 0}, "short_stride must be an int of at least 1, got 0"),
        (
            {"pool_kernel": (1, 2, 3)},
            "pool_kernel must be three odd ints (time, height, width), got (1, 2, 3)",
        ),
        (
            {"pool_kernel": (3, 3)},
            "pool_kernel must be three odd ints (time, height, width), got (3, 3)",
        ),
        ({"pool_kernel": 3}, "pool_kernel must be three odd ints (time, height, width), got 3"),
        ({"long": "max"}, "long must be one of 'class', 'mean', 'none', got 'max'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        ShrinkingTemporalAttention(**{"dim": 16, "num_heads": 2, **options})
    assert str(error.value) == message


def test_a_bad_window_is_refused_at_birth():
    with pytest.raises(ValueError, match=r"window must be odd and at least 1 .*, got 4"):
        ShrinkingTemporalAttention(16, 2, window=4)


@pytest.mark.parametrize(
    ("long", "shape", "grid", "message"),
    [
        ("class", (2, 36, 16), (5, 7), "x must be (B, T, N, 16), got (2, 36, 16)"),
        ("class", (1, 2, 36, 8), (5, 7), "x must be (B, T, N, 16), got (1, 2, 36, 8)"),
        (
            "class",
            (1, 2, 35, 16),
            (5, 7),
            "x must be (B, T, 36, 16), a class token and then the 5 x 7 grid's tokens, "
            "got (1, 2, 35, 16)",
        ),
        (
            "none",
            (1, 2, 34, 16),
            (5, 7),
            "x must be (B, T, N, 16) with N 35 or, with class tokens, 36 for the 5 x 7 grid, "
            "got (1, 2, 34, 16)",
        ),
        ("class", (1, 2, 36, 16), 6, "grid must be (height, width), two ints of at least 1, got 6"),
        (
            "class",
            (1, 2, 1, 16),
            (0, 7),
            "grid must be (height, width), two ints of at least 1, got (0, 7)",
        ),
    ],
)
def test_bad_input(long, shape, grid, message):
    layer = ShrinkingTemporalAttention(16, 2, long=long)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        layer(torch.randn(shape), grid)
    assert str(error.value) == message

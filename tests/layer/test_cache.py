"""The layer frame by frame with cached keys, against one call on the whole clip."""

import gc

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from stat_kernels import KVCache, ShrinkingTemporalAttention

GRID, FRAMES = (4, 6), 12


def make(window=(2, 0), long="class", batch=2, dtype=torch.float32, **options):
    """An online layer, its norms and biases away from 1 and 0, and a clip's tokens."""
    options = {"kv_stride": 2, "causal_long": long != "none", **options}
    layer = ShrinkingTemporalAttention(32, 2, window=window, long=long, **options).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    tokens = GRID[0] * GRID[1] + (long == "class")
    return layer, torch.randn(batch, FRAMES, tokens, 32, dtype=dtype)


@torch.no_grad()
def stream(layer, x, cache, chunk=1):
    outs = [layer(frames, GRID, cache=cache)[0] for frames in x.split(chunk, dim=1)]
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("long", ["class", "mean", "none"])
@pytest.mark.parametrize("left", [0, 1, 2, 5, FRAMES + 3])
def test_frame_by_frame_is_the_whole_clip(left, long, backend):
    layer, x = make((left, 0), long, backend=backend)
    expected, _ = layer(x, GRID)
    torch.testing.assert_close(stream(layer, x, KVCache()), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"q_stride": 2},
        {"short": False, "window": 7},
        {"short_stride": 1},
        {"pool_kernel": (1, 5, 1)},
        {"kv_stride": 1, "batch": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("chunk", [1, 5])
def test_other_layers_and_several_frames_at_a_time(options, chunk):
    layer, x = make(dtype=torch.float64, **options)
    expected, _ = layer(x, GRID)
    torch.testing.assert_close(stream(layer, x, KVCache(), chunk), expected)


def test_one_cache_for_all_layers_of_a_model():
    first, x = make()
    second, _ = make((3, 0))
    cache = KVCache()
    with torch.no_grad():
        expected, _ = second(first(x, GRID)[0], GRID)
        found = [
            second(first(frame, GRID, cache=cache)[0], GRID, cache=cache)[0]
            for frame in x.split(1, dim=1)
        ]
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-5, atol=2e-6)
    assert cache.frames == FRAMES
    del second
    gc.collect()
    used = cache.nbytes
    del first
    gc.collect()
    assert cache.nbytes == 0 < used  # a layer's keys go with it


def test_memory_is_bounded_by_long_frames():
    """The last three class tokens count: the whole clip with a long part cut to them agrees."""
    layer, x = make((1, 0), batch=1)
    cache, sizes = KVCache(long_frames=3), []
    for frame in torch.cat((x, x), dim=1).split(1, dim=1):
        stream(layer, frame, cache)
        sizes.append(cache.nbytes)
    short, long = 2 * 2 * 2 * 32 * 4, 2 * 3 * 32 * 4  # two frames of 1 x 2 tokens, three of one
    assert sizes == [short + long] * (2 * FRAMES)

    clip, _ = make((0, 0), short=False)
    clip.load_state_dict(layer.state_dict())
    layer.short = False
    cache.reset()
    last = stream(layer, x, cache)[:, -1:]
    expected, _ = clip(x[:, -3:], GRID)
    torch.testing.assert_close(last, expected[:, -1:], rtol=1e-5, atol=2e-6)


def test_long_keys_grow_by_doubling():
    layer, x = make((1, 0), batch=1)
    cache, sizes = KVCache(), []
    for frame in x.split(1, dim=1):
        stream(layer, frame, cache)
        sizes.append(cache.nbytes - 2 * 2 * 2 * 32 * 4)
    assert sizes == [8 * 2 * 32 * 4] * 8 + [16 * 2 * 32 * 4] * 4


def test_reset_starts_a_new_video():
    layer, x = make()
    cache = KVCache()
    first = stream(layer, x, cache)
    assert cache.frames == FRAMES
    cache.reset()
    assert (cache.frames, cache.nbytes) == (0, 0)
    assert torch.equal(stream(layer, x, cache), first)
    stream(layer, x[:1, :1], KVCache())  # another batch, another cache


@pytest.mark.parametrize("fused", [True, False])
def test_under_autocast_and_in_inference_mode(fused):
    layer, x = make((2, 0))
    layer.fused = fused  # PyTorch's own norm gives float32 under autocast
    cache = KVCache()
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = layer(x, GRID)
        with torch.inference_mode():
            found = [layer(x[:, :1], GRID, cache=cache)[0]]
        found.append(stream(layer, x[:, 1:], cache))
    found = torch.cat([f.clone() for f in found], 1)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    keys = 3 * 2 + 16  # short tokens of three frames, room for 16 class tokens
    assert cache.nbytes == 2 * 2 * keys * 32 * 2  # two clips, keys and values, in two bytes each


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 3}, r"window=\(left, 0\) with short keys .* got window=3, causal_long=True"),
        ({"window": (1, 1)}, r"got window=\(1, 1\), causal_long=True"),
        ({"causal_long": False}, r"got window=\(2, 0\), causal_long=False"),
        ({"pool_kernel": (3, 3, 3)}, r"pool_kernel of one frame in time, got \(3, 3, 3\)"),
    ],
)
def test_layers_that_see_later_frames(options, message):
    layer, x = make(**options)
    with pytest.raises(ValueError, match=message):
        stream(layer, x, KVCache())


def test_misuse():
    layer, x = make()
    cache = KVCache()
    with pytest.raises(RuntimeError, match=r"a cache is for inference: call .* torch.no_grad\(\)"):
        layer(x[:, :1], GRID, cache=cache)
    stream(layer, x[:, :1], cache)
    for other in (x[:1, 1:2], x[:, 1:2].double()):
        with pytest.raises(ValueError, match=r"k_short must be \(2, 2, 2, 16\) a frame in torch.f"):
            stream(layer.to(other.dtype), other, cache)
    layer.float().window = (3, 0)
    with pytest.raises(
        ValueError, match=r"window must stay \(2, 0\) until reset\(\), got \(3, 0\)"
    ):
        stream(layer, x[:, 1:2], cache)
    with pytest.raises(ValueError, match=r"int of at least 1 or None, got 0"):
        KVCache(long_frames=0)


def test_a_compiled_model():
    torch._dynamo.reset()
    layer, x = make()
    expected, _ = layer(x, GRID)
    compiled, cache = torch.compile(layer, backend=(graphs := CompileCounter())), KVCache()
    found = [stream(compiled, x[:, :2], cache)]
    count = graphs.frame_count
    found.append(stream(compiled, x[:, 2:], cache))
    assert graphs.frame_count == count  # no graph for every frame
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-5, atol=2e-6)

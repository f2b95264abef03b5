"""Keys averaged out of other models' keys, against attention written out with every key."""

import pytest
import torch
import torch.nn.functional as F

from stat_kernels.integrations import TemporalAttentionConfig, frame_attention, sequence_attention

B, T, GRID, H, D = 2, 4, (4, 6), 2, 16
N = GRID[0] * GRID[1]


def tokens(count, *front):
    return [torch.randn(*front, count, H, D, dtype=torch.float64) for _ in range(3)]


def pooled(x, stride):
    """(..., h * w, H, D) averaged over stride x stride, written with slices."""
    grid = x.unflatten(-3, GRID)
    cells = [
        grid[..., i : i + stride, j : j + stride, :, :].mean((-4, -3))
        for i in range(0, GRID[0], stride)
        for j in range(0, GRID[1], stride)
    ]
    return torch.stack(cells, -3)


def softmax_attention(q, k, v, scale=None):
    """(N, H, D) queries and keys of one frame."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(0, 1)


@pytest.mark.parametrize("long", ["class", "mean", "none"])
@pytest.mark.parametrize(
    ("kv_stride", "short_stride", "window"), [(1, 4, 3), (2, 1, 5), (2, 3, 3), (1, 2, 1)]
)
def test_frames_with_class_and_register_tokens(long, kv_stride, short_stride, window):
    prefix = 3
    q, k, v = tokens(prefix + N, B, T)
    temporal = TemporalAttentionConfig(window, kv_stride, short_stride, long)
    out = frame_attention(q, k, v, GRID, temporal, prefix)
    for b in range(B):
        for i in range(T):
            keys = []
            for x in (k[b], v[b]):
                own = pooled(x[:, prefix:], kv_stride)
                coarse = pooled(x[:, prefix:], kv_stride * short_stride)
                near = [j for j in range(T) if 0 < abs(i - j) <= window // 2]
                parts = [x[i, :prefix], own[i], *(coarse[j] for j in near)]
                if long == "class":  # the frame's own class token is among its prefix already
                    parts += [x[j, :1] for j in range(T) if j != i]
                if long == "mean":
                    parts.append(own.mean(1))
                keys.append(torch.cat(parts))
            torch.testing.assert_close(out[b, i], softmax_attention(q[b, i], *keys))


@pytest.mark.parametrize(
    ("class_token", "registers"), [(True, 0), (False, 0), (True, 3), (False, 2)]
)
def test_a_sequence_with_every_key_is_full_attention(class_token, registers):
    q, k, v = tokens(class_token + registers + T * N, B)
    temporal = TemporalAttentionConfig(window=2 * T - 1, short_stride=1, long="none")
    out = sequence_attention(q, k, v, T, GRID, temporal, class_token, 0.3, registers)
    expected = torch.stack([softmax_attention(q[b], k[b], v[b], 0.3) for b in range(B)])
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("long", ["mean", "none"])
def test_a_sequence_with_a_class_token(long, registers):
    prefix = 1 + registers
    q, k, v = tokens(prefix + T * N, B)
    temporal = TemporalAttentionConfig(window=3, kv_stride=2, short_stride=2, long=long)
    out = sequence_attention(q, k, v, T, GRID, temporal, True, registers=registers)
    i = 1
    keys = []
    for x in (k[0], v[0]):
        frames = x[prefix:].unflatten(0, (T, N))
        own, coarse = pooled(frames, 2), pooled(frames, 4)
        keys.append(torch.cat([x[:prefix], own[i], coarse[i - 1], coarse[i + 1]]))
        if long == "mean":
            keys[-1] = torch.cat([keys[-1], own.mean(1)])
    frame = slice(prefix + i * N, prefix + (i + 1) * N)
    torch.testing.assert_close(out[0, frame], softmax_attention(q[0, frame], *keys))
    expected = torch.stack([softmax_attention(q[b, :prefix], k[b], v[b]) for b in range(B)])
    torch.testing.assert_close(out[:, :prefix], expected)


def test_gradients_of_both():
    temporal = TemporalAttentionConfig(window=3, long="class")
    frame = [x[:1, :2, : 1 + 4].requires_grad_() for x in tokens(1 + N, B, T)]
    assert torch.autograd.gradcheck(
        lambda *x: frame_attention(*x, (2, 2), temporal), frame, fast_mode=True
    )
    temporal = TemporalAttentionConfig(window=3, long="mean")
    clip = [x[:1, : 1 + 8].requires_grad_() for x in tokens(1 + N, B)]
    assert torch.autograd.gradcheck(
        lambda *x: sequence_attention(*x, 2, (2, 2), temporal, True), clip, fast_mode=True
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 4}, "window must be odd, got 4"),
        ({"window": 0}, "window must be an int of at least 1, got 0"),
        ({"kv_stride": True}, "kv_stride must be an int of at least 1, got True"),
        ({"long": "max"}, "long must be one of 'class', 'mean', 'none', got 'max'"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        TemporalAttentionConfig(**settings)


def test_sizes_are_checked():
    q, k, v = tokens(1 + N, B, T)
    with pytest.raises(ValueError, match=r"kv_stride must divide the 4 x 6 grid .*\(1, 2 would\)"):
        frame_attention(q, k, v, GRID, TemporalAttentionConfig(kv_stride=4))
    with pytest.raises(ValueError, match="k must hold 0 \\+ 4 x 6 tokens a frame"):
        frame_attention(q, k, v, GRID, TemporalAttentionConfig(long="mean"), prefix=0)
    with pytest.raises(ValueError, match="long='class' needs a class token"):
        frame_attention(
            q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], GRID, TemporalAttentionConfig(), prefix=0
        )
    with pytest.raises(ValueError, match="v must have the shape of k"):
        frame_attention(q, k, v[:, :1], GRID, TemporalAttentionConfig())
    q, k, v = tokens(1 + T * N, B)
    with pytest.raises(ValueError, match="k must hold 1 \\+ 5 frames x 4 x 6 tokens a clip"):
        sequence_attention(q, k, v, 5, GRID, TemporalAttentionConfig(long="mean"), class_token=True)
    with pytest.raises(ValueError, match="q must hold a multiple of 4 frames"):
        sequence_attention(
            q, k[:, 1:], v[:, 1:], T, GRID, TemporalAttentionConfig(long="mean"), False
        )
    with pytest.raises(ValueError, match="'mean' and 'none' work"):
        sequence_attention(q, k, v, T, GRID, TemporalAttentionConfig(), class_token=True)
    for grid in (54, (4,), (4, 0), (4.0, 6), None):
        with pytest.raises(ValueError, match=r"grid must be \(height, width\) of a frame's tokens"):
            sequence_attention(q, k, v, T, grid, TemporalAttentionConfig(long="mean"), True)

"""Keys of three granularities out of a plain transformer's keys, by averaging alone.

The layers of other libraries project their tokens to queries, keys and values and attend. The two
functions here take over the second half. They hold no parameters: a neighbour's coarse keys and a
frame's long-term key are averages of the keys that the model already has, so its weights stay
what they are.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stat_kernels.functional import shrinking_temporal_attention

LONG_MODES = ("class", "mean", "none")


@dataclass(frozen=True)
class TemporalAttentionConfig:
    """How the frames of a clip are joined.

    Args:
        window: t_o, odd: the frame itself and ``window // 2`` neighbours on either side.
        kv_stride: average pooling of a frame's own keys; must divide the grid.
        short_stride: average pooling from those to the neighbours' keys; a partial window at the
            grid's edge is averaged over what it holds.
        long: every frame's "class" token, the "mean" of every frame's own keys, or "none".
        backend: of the operation (see `stat_kernels.explain`); None is the best usable one.

    Raises:
        ValueError: a setting is off; the message names it.
    """

    window: int = 3
    kv_stride: int = 1
    short_stride: int = 2
    long: str = "class"
    backend: str | None = None

    def __post_init__(self) -> None:
        for name in ("window", "kv_stride", "short_stride"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        if self.window % 2 == 0:
            raise ValueError(f"window must be odd, got {self.window}")
        if self.long not in LONG_MODES:
            raise ValueError(f"long must be one of 'class', 'mean', 'none', got {self.long!r}")

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raises ValueError where ``grid`` is no (h, w) or ``kv_stride`` does not divide it."""
        pair = isinstance(grid, (tuple, list, torch.Size)) and len(grid) == 2
        if not pair or not all(isinstance(n, (int, torch.SymInt)) and n >= 1 for n in grid):
            raise ValueError(f"grid must be (height, width) of a frame's tokens, got {grid!r}")
        if grid[0] % self.kv_stride or grid[1] % self.kv_stride:
            fits = [s for s in range(1, min(grid) + 1) if grid[0] % s == grid[1] % s == 0]
            raise ValueError(
                f"kv_stride must divide the {grid[0]} x {grid[1]} grid of tokens "
                f"({', '.join(map(str, fits))} would), got {self.kv_stride}"
            )


def frame_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    temporal: TemporalAttentionConfig,
    prefix: int = 1,
    scale: float | None = None,
) -> Tensor:
    """Attention where every frame has class (and register) tokens of its own, as a ViT's has.

    Each key counts once: with ``long="class"`` a frame's class token is one of the long-term keys
    and not one of its own. So a clip of one frame is attended to as the image would be, and so is
    every frame with ``window=1, long="none"``, both with ``kv_stride=1``.

    Args:
        q, k, v: (B, T, N, H, D), N = prefix + h * w, class token first.
        grid: (h, w).
        temporal: window, strides, long.
        prefix: tokens of a frame before the spatial ones; registers are read by their frame only.
        scale: factor of the scores; None is ``D ** -0.5``.

    Returns:
        (B, T, N, H, D), contiguous.

    Raises:
        ValueError: sizes do not fit; the message names them.
    """
    _check_tokens(q, k, v)
    temporal.check_grid(grid)
    if k.shape[2] != prefix + grid[0] * grid[1]:
        raise ValueError(
            f"k must hold {prefix} + {grid[0]} x {grid[1]} tokens a frame, got {tuple(k.shape)}"
        )
    if temporal.long == "class" and not prefix:
        raise ValueError("long='class' needs a class token in each frame; 'mean' or 'none' do not")
    k_cur, k_short, k_long = _granularities(k, grid, temporal, prefix)
    v_cur, v_short, v_long = _granularities(v, grid, temporal, prefix)
    return shrinking_temporal_attention(
        q, k_cur, v_cur, k_short, v_short, k_long, v_long,
        window=temporal.window, scale=scale, backend=temporal.backend,
    )  # fmt: skip


def sequence_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    frames: int,
    grid: tuple[int, int],
    temporal: TemporalAttentionConfig,
    class_token: bool,
    scale: float | None = None,
    registers: int = 0,
) -> Tensor:
    """Attention over one sequence of a clip's tokens, frame after frame, as video models keep it.

    The queries of the clip's class and register tokens attend to every key (a few rows, as before),
    and every other query to its frame, its neighbours, those tokens, and what ``long`` says.

    Args:
        q: (B, P + T * Nq, H, D), P = class_token + registers tokens of the clip first.
        k, v: (B, P + T * h * w, H, D).
        frames: T.
        grid: (h, w) of a frame's keys.
        temporal: window, strides; long is "mean" or "none", a class token a frame there is not.
        class_token: whether the sequences start with the clip's class token.
        scale: factor of the scores; None is ``D ** -0.5``.
        registers: how many register tokens of the clip follow.

    Returns:
        as q.

    Raises:
        ValueError: sizes do not fit; the message names them.
    """
    prefix = int(class_token) + registers
    _check_sequence(q, k, v, frames, grid, temporal, prefix)
    per_frame = (frames, grid[0] * grid[1])
    k_cur, k_short, k_long = _granularities(
        k[:, prefix:].unflatten(1, per_frame), grid, temporal, 0
    )
    v_cur, v_short, v_long = _granularities(
        v[:, prefix:].unflatten(1, per_frame), grid, temporal, 0
    )
    if prefix:
        k_long = k[:, :prefix] if k_long is None else torch.cat((k[:, :prefix], k_long), dim=1)
        v_long = v[:, :prefix] if v_long is None else torch.cat((v[:, :prefix], v_long), dim=1)
    out = shrinking_temporal_attention(
        q[:, prefix:].unflatten(1, (frames, -1)),
        k_cur, v_cur, k_short, v_short, k_long, v_long,
        window=temporal.window, scale=scale, backend=temporal.backend,
    ).flatten(1, 2)  # fmt: skip
    if not prefix:
        return out
    # A frame of a few queries and every key. Not scaled_dot_product_attention: torch.compile may
    # give its CPU kernel a query whose last stride is not 1, which it misreads (docs/versions.md).
    first = shrinking_temporal_attention(
        *(x[:, None] for x in (q[:, :prefix], k, v)),
        window=1, scale=scale, backend=temporal.backend,
    )  # fmt: skip
    return torch.cat((first[:, 0], out), dim=1)


def _granularities(
    tokens: Tensor, grid: tuple[int, int], temporal: TemporalAttentionConfig, prefix: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Keys (or values) of the frame (B, T, Nc, H, D), its neighbours (Ns), the clip (no N)."""
    spatial = average(tokens[:, :, prefix:], grid, temporal.kv_stride)
    grid = (grid[0] // temporal.kv_stride, grid[1] // temporal.kv_stride)
    long, first = None, 0
    if temporal.long == "class":
        long, first = tokens[:, :, 0], 1  # among the clip's keys, so no longer the frame's own
    elif temporal.long == "mean":
        long = spatial.mean(dim=2)
    if temporal.kv_stride == 1:  # the frame's own tokens lie side by side already: no copy
        current = tokens[:, :, first:]
    else:
        current = torch.cat((tokens[:, :, first:prefix], spatial), dim=2)
    short = average(spatial, grid, temporal.short_stride) if temporal.window > 1 else None
    return current, short, long


def average(tokens: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """(B, T, h * w, H, D) -> the same of the grid over ``stride``, partial windows averaged too."""
    if stride == 1:
        return tokens
    b, t, _, h, d = tokens.shape
    images = tokens.reshape(b * t, *grid, h * d).permute(0, 3, 1, 2)
    pooled = F.avg_pool2d(images, stride, ceil_mode=True, count_include_pad=False)
    return pooled.flatten(2).transpose(1, 2).reshape(b, t, -1, h, d)


def _check_tokens(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 5:
            raise ValueError(f"{name} must be (B, T, N, H, D), got {tuple(tensor.shape)}")
    if k.shape != v.shape:
        raise ValueError(f"v must have the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")


def _check_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    frames: int,
    grid: tuple[int, int],
    temporal: TemporalAttentionConfig,
    prefix: int,
) -> None:
    temporal.check_grid(grid)
    if temporal.long == "class":
        raise ValueError(
            "long='class' needs a class token in each frame, and a sequence has at most one for "
            "the clip; 'mean' and 'none' work, the clip's class token is attended to in both"
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (B, N, H, D), got {tuple(tensor.shape)}")
    if k.shape != v.shape:
        raise ValueError(f"v must have the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")
    start = f"{prefix} + " if prefix else ""
    if k.shape[1] != prefix + frames * grid[0] * grid[1]:
        raise ValueError(
            f"k must hold {start}{frames} frames x {grid[0]} x {grid[1]} tokens a clip, "
            f"got {k.shape[1]}"
        )
    if (q.shape[1] - prefix) % frames:
        raise ValueError(
            f"q must hold {start}a multiple of {frames} frames' tokens a clip, got {q.shape[1]}"
        )

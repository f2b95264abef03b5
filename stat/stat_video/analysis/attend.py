"""Where a trained model looks: attention weights from queries and keys, and their shares.

A fused kernel never has its weights in memory, so they are computed again, in plain PyTorch, from
the queries and keys of each layer, which are caught while the model classifies a clip.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stat_kernels import ShrinkingTemporalAttention, modules
from stat_kernels.integrations import tokens
from stat_video.data.preprocess import Preprocess
from stat_video.data.reading import read_video
from stat_video.data.sampling import sample_frames
from stat_video.data.transforms import effective_short_side, normalise
from stat_video.data.video import Video
from stat_video.devices import prepare_device
from stat_video.errors import UserError, named
from stat_video.evaluate.backend import check_backend
from stat_video.evaluate.loading import LoadedModel
from stat_video.model.building import Model
from stat_video.model.image import ImageModel

Grid = tuple[int, int]  # height and width of spatial tokens

PARTS = ("current", "short", "long")  # CA, SA and LA of the paper


@dataclass(frozen=True)
class Weights:
    """One layer's softmax over one clip, split by the kinds of keys; float32, on the CPU.

    Attributes:
        current: (T, H, Nq, Nc) weights of the frame's own keys.
        short: (T, H, Nq, 2r, Ns) weights of the neighbour frames' coarser keys, 0 for a neighbour
            outside the clip; without short-term attention Ns is 0.
        long: (T, H, Nq, L) weights of the clip's long keys; L is 0 without long-term attention.
        query_grid, key_grid, short_grid: (height, width) of the spatial tokens.
        prefix: queries of a frame before the spatial ones, the class token first.
        offsets: (2r,) distances of the neighbour frames, ascending.
        extras: the frame's own keys before the spatial ones (register tokens).
    """

    current: Tensor
    short: Tensor
    long: Tensor
    query_grid: Grid
    key_grid: Grid
    short_grid: Grid
    prefix: int
    offsets: tuple[int, ...]
    extras: int = 0

    def masses(self) -> dict[str, Tensor]:
        """(T, H, Nq) share of every query's attention that goes to each of PARTS; together 1."""
        return {
            "current": self.current.sum(-1),
            "short": self.short.sum((-2, -1)),
            "long": self.long.sum(-1),
        }

    def uniform(self) -> dict[str, float]:
        """The parts' shares of a softmax that knows nothing: their shares of the keys."""
        frames, keys = self.current.shape[0], self.current.shape[-1]
        near = [sum(0 <= t + offset < frames for offset in self.offsets) for t in range(frames)]
        counts = [(keys, n * self.short.shape[-1], self.long.shape[-1]) for n in near]
        shares = torch.tensor([[c / sum(three) for c in three] for three in counts]).mean(0)
        return dict(zip(PARTS, shares.tolist(), strict=True))


@dataclass(frozen=True)
class Attention:
    """A clip and what a model attended to in it.

    Attributes:
        images: (T, S, S, 3) uint8, the first video frame of each token frame, cropped to what the
            model saw but in the video's own resolution.
        layers: the weights of each layer, first to last.
        stages: of which stage each layer is, from 0.
        long: what the long keys are: "class" tokens, "mean" tokens, "none".
        guess: the most probable class and its probability.
    """

    images: Tensor
    layers: list[Weights]
    stages: list[int]
    long: str
    guess: tuple[str, float]


def watch(video: str | Path, loaded: LoadedModel, *, device: str = "auto") -> Attention:
    """Classifies a video as `stat-video predict` does, and keeps what every layer attended to.

    Raises VideoError when the video cannot be used, UserError for the device and for a model whose
    probabilities are not finite.
    """
    config = loaded.model.config
    source = Video(Path(*named("VIDEO", str(video))), label=-1)
    images = read_video(source, lambda length: sample_frames(length, config.frames), threads=0)
    clip = loaded.preprocess.transform()(torch.from_numpy(images).permute(0, 3, 1, 2))
    target = prepare_device(device)
    check_backend(loaded.model, target)
    model = loaded.model.to(target).eval()
    with torch.inference_mode(), record(model) as layers:
        shares = model(normalise(clip[None].to(target))).float().softmax(-1)[0].cpu()
    if not shares.isfinite().all():
        raise UserError("the model's probabilities are not finite; its weights may be damaged")
    stride = -(-config.frames // config.token_frames)
    label = int(shares.argmax())
    return Attention(
        images=_cropped(torch.from_numpy(images[::stride]), loaded.preprocess),
        layers=layers,
        stages=_stages(loaded.model),
        long=config.long,
        guess=(loaded.class_name(label), float(shares[label])),
    )


def _stages(model: Model) -> list[int]:
    """The stage of each block; an image model has one."""
    depths = [len(model.blocks)] if isinstance(model, ImageModel) else model.config.depths
    return [stage for stage, depth in enumerate(depths) for _ in range(depth)]


def _cropped(images: Tensor, preprocess: Preprocess) -> Tensor:
    """(T, H, W, 3) -> (T, S, S, 3), the middle that `preprocess` scales to the model's size."""
    height, width = images.shape[1:3]
    short_side = effective_short_side(preprocess.image_size, preprocess.short_side)
    side = round(preprocess.image_size / short_side * min(height, width))
    y, x = (height - side) // 2, (width - side) // 2
    return images[:, y : y + side, x : x + side]


@contextmanager
def record(model: Model) -> Iterator[list[Weights]]:
    """Inside, a forward pass of one clip appends every layer's weights to the list.

    It listens to the one function that every layer calls unless it is fused with the pooling.
    """
    found: list[Weights] = []
    grids = _grids(model)
    fused = [m for m in model.modules() if isinstance(m, ShrinkingTemporalAttention) and m.fused]
    callers: list[Any] = [modules, tokens]
    attend = modules.shrinking_temporal_attention

    def listen(q: Tensor, k_cur: Tensor, v_cur: Tensor, *others: Any, **options: Any) -> Tensor:
        k_short, _, k_long, _ = others
        window, scale = options["window"], options.get("scale") or q.shape[-1] ** -0.5
        short, long = (None if k is None else k[0].float() for k in (k_short, k_long))
        weights = weigh(q[0].float(), k_cur[0].float(), short, long, window, scale)
        current, near, far = (part.cpu() for part in weights)
        layer = grids[len(found) % len(grids)]
        prefix, extras = q.shape[2] - math.prod(layer[0]), k_cur.shape[2] - math.prod(layer[1])
        offsets = neighbours(q.shape[1], window)
        found.append(Weights(current, near, far, *layer, prefix, offsets, extras))
        return attend(q, k_cur, v_cur, *others, **options)

    for layer in fused:
        layer.fused = False
    for module in callers:
        module.shrinking_temporal_attention = listen
    try:
        yield found
    finally:
        for layer in fused:
            layer.fused = True
        for module in callers:
            module.shrinking_temporal_attention = attend


def _grids(model: Model) -> list[tuple[Grid, Grid, Grid]]:
    """Of each layer's queries, keys and short-term keys."""
    grid: Grid
    if isinstance(model, ImageModel):
        c, grid = model.config, model.net.patch_embed.grid_size
        strides = [(1, c.kv_stride, c.short_stride)] * len(model.blocks)
    else:
        layers: list[Any] = [block.attn for block in model.blocks]
        grid = model.config.token_grid
        strides = [(attn.q_stride, attn.kv_stride, attn.short_stride) for attn in layers]
    found = []
    for q_stride, kv_stride, short_stride in strides:
        keys, grid = _shrunk(grid, kv_stride), _shrunk(grid, q_stride)
        found.append((grid, keys, _shrunk(keys, short_stride)))
    return found


def weigh(
    q: Tensor,
    k_cur: Tensor,
    k_short: Tensor | None,
    k_long: Tensor | None,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax of eq. 8 for one clip: weights of the current, short and long keys.

    Args:
        q: (T, Nq, H, D) queries.
        k_cur: (T, Nc, H, D) keys of the same frame.
        k_short: (T, Ns, H, D) coarser keys of the neighbour frames, or None.
        k_long: (L, H, D) keys of the whole clip, or None.
        window: t_o.
        scale: factor of the scores.

    Returns:
        (T, H, Nq, Nc), (T, H, Nq, 2r, Ns), (T, H, Nq, L), the neighbours as in `neighbours`.
    """
    offsets = torch.tensor(neighbours(len(q), window), dtype=torch.long, device=q.device)
    frames = torch.arange(len(q), device=q.device)[:, None] + offsets  # (T, 2r)
    outside = (frames < 0) | (frames >= len(q))
    k_short = k_cur[:, :0] if k_short is None else k_short
    k_long = k_cur[0, :0] if k_long is None else k_long
    q = q * scale
    near = k_short[frames.clamp(0, len(q) - 1)]  # (T, 2r, Ns, H, D)
    short = torch.einsum("tqhd,tokhd->thqok", q, near)
    short = short.masked_fill(outside[:, None, None, :, None], float("-inf"))
    scores = (
        torch.einsum("tqhd,tkhd->thqk", q, k_cur),
        short.flatten(3),
        torch.einsum("tqhd,lhd->thql", q, k_long),
    )
    weights = torch.cat(scores, dim=-1).softmax(-1)
    current, flat, long = weights.split([s.shape[-1] for s in scores], dim=-1)
    return current, flat.unflatten(-1, short.shape[3:]), long


def neighbours(frames: int, window: int) -> tuple[int, ...]:
    """Distances of the frames that short-term attention sees, those that no frame has left out."""
    radius = min(window // 2, frames - 1)
    return tuple(offset for offset in range(-radius, radius + 1) if offset)


def _shrunk(grid: Grid, stride: int) -> Grid:
    return -(-grid[0] // stride), -(-grid[1] // stride)


def shares(attention: Attention) -> list[dict[str, Any]]:
    """A record a layer: how its attention is shared out among the kinds of keys, as JSON.

    "all" is the mean over queries, heads and frames, "heads" the same head by head, "class_token"
    that of the class tokens' own queries (None without), "uniform" the parts' shares of the keys.
    """
    records = []
    for index, (weights, stage) in enumerate(zip(attention.layers, attention.stages, strict=True)):
        masses = weights.masses()
        first = {part: mass[..., 0].mean().item() for part, mass in masses.items()}
        heads = {part: mass.mean((0, 2)).tolist() for part, mass in masses.items()}
        records.append(
            {
                "layer": index,
                "stage": stage,
                "all": {part: mass.mean().item() for part, mass in masses.items()},
                "class_token": first if weights.prefix else None,
                "heads": [
                    {part: heads[part][h] for part in PARTS} for h in range(len(heads["current"]))
                ],
                "uniform": weights.uniform(),
            }
        )
    return records


def shares_table(records: list[dict[str, Any]]) -> str:
    """The shares in percent, a line a layer."""
    head = ("layer", "stage", "CA %", "SA %", "LA %", "class token's CA %", "SA %", "LA %")
    rows = []
    for record_ in records:
        cells = [str(record_["layer"]), str(record_["stage"])]
        for who in ("all", "class_token"):
            values: dict[str, Any] = record_[who] or dict.fromkeys(PARTS)
            cells += ["-" if values[p] is None else f"{100 * values[p]:.1f}" for p in PARTS]
        rows.append(cells)
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = (
        "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in (head, *rows)
    )
    return "\n".join(lines)

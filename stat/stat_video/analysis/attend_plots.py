"""Pictures of attention: one figure of a frame, a film of all frames, bars of the shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from stat_video.analysis.attend import PARTS, Attention, Weights
from stat_video.analysis.plots import _figure

COLOURS = {"current": "#0b5fa5", "short": "#edae49", "long": "#d1495b"}
LABELS = {"current": "current (CA)", "short": "short (SA)", "long": "long (LA)"}
PANEL = 1.9  # inches, side of a frame's picture
FILM_FPS = 4
TINY = 1e-12  # the least top of a scale of colours: all of a query's weight may be elsewhere


@dataclass(frozen=True)
class Choice:
    """What of the attention is shown.

    Attributes:
        layer: counted from 0 over all stages.
        frame: of the token frames, counted from 0.
        queries: (row, column) in the layer's grid of queries, or None for the class token.
        head: counted from 0; None is the mean of all.
    """

    layer: int
    frame: int
    queries: tuple[tuple[int, int] | None, ...]
    head: int | None


def draw_attention(attention: Attention, choice: Choice):
    """A matplotlib figure: a row a query, its frame and the neighbours under their weights, the
    weights of every frame's long key as bars; in a row all pictures have one scale of colours.
    """
    weights = attention.layers[choice.layer]
    offsets = sorted({0, *(weights.offsets if weights.short.shape[-1] else ())})
    bars = weights.long.shape[-1] > 0
    widths = [1.0] * len(offsets) + [2.2] * bars
    rows = len(choice.queries)
    figure = _figure(PANEL * sum(widths) + 0.6, (PANEL + 0.35) * rows + 0.55)
    grid = figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths)
    for axes, query in zip(grid, choice.queries, strict=True):
        maps = dict(_maps(weights, choice, query, offsets))
        largest = max(TINY, *(float(m.max()) for m in maps.values()))
        for ax, offset in zip(axes, offsets, strict=False):
            _picture(ax, attention, choice.frame + offset, maps.get(offset), largest)
        middle = axes[offsets.index(0)]
        for side in middle.spines.values():
            side.set(visible=True, color="white" if query is None else "#3ddc84", linewidth=2)
        if query is not None:
            _outline(middle, query, weights.query_grid, attention.images.shape[1])
        axes[0].set_ylabel(_name(query))
        if bars:
            title = f"every frame's {attention.long} token"
            _bars(axes[-1], title, _pick(weights.long, weights, choice, query), choice.frame)
    head = "mean of the heads" if choice.head is None else f"head {choice.head}"
    guess, share = attention.guess
    figure.suptitle(
        f"layer {choice.layer}, frame {choice.frame}, {head}; seen as {guess} ({share:.0%})",
        fontsize=10,
    )
    return figure


def save_figure(attention: Attention, choice: Choice, path: Path) -> None:
    """The figure as a PNG."""
    draw_attention(attention, choice).savefig(path, dpi=100)


def save_film(attention: Attention, choices: Sequence[Choice], path: Path) -> None:
    """The figures of all choices, one after the other, as an MP4."""
    from stat_video.clips.make import write_mp4

    write_mp4(path, np.stack(list(_pixels(attention, choices))), fps=FILM_FPS)


def plot_shares(records: Sequence[dict], path: Path) -> None:
    """Stacked bars, a layer each: how its attention is shared out; a dash where keys alone say."""
    figure = _figure(max(5.0, 0.45 * len(records) + 3.2), 3.4)
    axes = figure.subplots()
    at = np.arange(len(records))
    bottom, expected = np.zeros(len(records)), np.zeros(len(records))
    for part in PARTS:
        values = np.array([100 * record["all"][part] for record in records])
        axes.bar(at, values, bottom=bottom, color=COLOURS[part], label=LABELS[part], width=0.75)
        bottom += values
        expected += np.array([100 * record["uniform"][part] for record in records])
        if part != PARTS[-1]:
            name = "share of the keys" if part == PARTS[0] else None
            axes.hlines(expected, at - 0.42, at + 0.42, "black", linewidth=1.2, label=name)
    axes.set(xlabel="layer", ylabel="attention, %", ylim=(0, 100), xticks=at)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=100)


def _maps(
    weights: Weights, choice: Choice, query: tuple[int, int] | None, offsets: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """(offset, (h, w) weights) of the frame and of the neighbours that are inside the clip."""
    current = _pick(weights.current, weights, choice, query)[weights.extras :]
    short = _pick(weights.short, weights, choice, query)
    frames = len(weights.current)
    for offset in offsets:
        if offset == 0:
            yield 0, current.unflatten(-1, weights.key_grid)
        elif 0 <= choice.frame + offset < frames:
            yield offset, short[weights.offsets.index(offset)].unflatten(-1, weights.short_grid)


def _pick(part: Tensor, weights: Weights, choice: Choice, query: tuple[int, int] | None) -> Tensor:
    """(T, H, Nq, ...) -> (...): of the chosen frame, head and query."""
    index = 0
    if query is not None:
        index = weights.prefix + query[0] * weights.query_grid[1] + query[1]
    heads = part[choice.frame, :, index]
    return heads.mean(0) if choice.head is None else heads[choice.head]


def _picture(ax, attention: Attention, frame: int, weights: Tensor | None, largest: float) -> None:
    """A frame under its weights, a cell per key; empty outside the clip."""
    ax.set(xticks=[], yticks=[])
    for side in ax.spines.values():
        side.set_visible(False)
    if weights is None:
        ax.text(0.5, 0.5, "outside\nthe clip", ha="center", va="center", fontsize=8, color="grey")
        return
    side = attention.images.shape[1]
    place = {"extent": (0, side, side, 0), "interpolation": "nearest"}
    ax.imshow(attention.images[frame].numpy(), **place)
    heat = weights.numpy()
    alpha = 0.75 * heat / largest  # the picture stays visible where the weight is low
    ax.imshow(heat, cmap="inferno", vmin=0, vmax=largest, alpha=alpha, **place)
    ax.set_title(f"frame {frame}: {100 * float(weights.sum()):.0f} %", fontsize=8)


def _outline(ax, query: tuple[int, int], grid: tuple[int, int], side: int) -> None:
    """A box around the query's cell."""
    from matplotlib.patches import Rectangle

    height, width = side / grid[0], side / grid[1]
    corner = (query[1] * width, query[0] * height)
    ax.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="#3ddc84", linewidth=1.5))


def _bars(ax, title: str, weights: Tensor, frame: int) -> None:
    colours = [COLOURS["long"] if i == frame else "#8d96a3" for i in range(len(weights))]
    ax.bar(range(len(weights)), 100 * weights.numpy(), color=colours)
    ax.set_title(f"{title}: {100 * float(weights.sum()):.0f} %", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.set_xlabel("frame", fontsize=7)
    ax.set_ylabel("%", fontsize=7)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _pixels(attention: Attention, choices: Sequence[Choice]) -> Iterator[np.ndarray]:
    """(H, W, 3) uint8 of each figure, both sides even."""
    for choice in choices:
        figure = draw_attention(attention, choice)
        figure.canvas.draw()
        image = np.asarray(figure.canvas.buffer_rgba())[..., :3]
        yield image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2]


def _name(query: tuple[int, int] | None) -> str:
    return "class token" if query is None else f"query {query[0]},{query[1]}"

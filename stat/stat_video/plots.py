"""PNG plots of a run, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def plot_curves(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss and accuracy over steps, from the records of a log.jsonl."""
    steps = [r for r in records if r["kind"] == "step"]
    epochs = [r for r in records if r["kind"] == "epoch"]
    figure = _figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    left.plot([r["step"] for r in steps], [r["loss"] for r in steps], lw=0.8, label="training")
    left.plot([r["step"] for r in epochs], [r["val_loss"] for r in epochs], label="validation")
    left.set(xlabel="step", ylabel="loss")
    for key, label in (("train_top1", "training"), ("val_top1", "validation")):
        right.plot([r["step"] for r in epochs], [100 * r[key] for r in epochs], label=label)
    right.set(xlabel="step", ylabel="top-1, %", ylim=(0, 101))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def plot_confusion(counts: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Confusion matrix, (C, C) counts with the true class along the rows."""
    classes = len(counts)
    side = min(4 + 0.3 * classes, 24)
    figure = _figure(side, side)
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    if classes <= 50:  # beyond that nobody can read them
        axes.set_xticks(range(classes), names, rotation=90 if classes > 5 else 0)
        axes.set_yticks(range(classes), names)
    if classes <= 20:
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(count)), ha="center", va="center", color=colour)
    figure.colorbar(image, ax=axes, shrink=0.7, label="share of the true class")
    figure.savefig(path, dpi=120)


def plot_ablation(
    top1: Mapping[str, Mapping[str, Sequence[float]]],
    orders: Mapping[str, str],
    chance: float,
    path: Path,
) -> None:
    """A row a variant: each run's top-1 as a dot, their mean as a line.

    top1: shares by variant and order of the frames; orders: the orders' labels.
    """
    figure = _figure(7.5, 1.2 + 0.55 * len(top1))
    axes = figure.subplots()
    for number, (order, label) in enumerate(orders.items()):
        height = 0.22 * (number - (len(orders) - 1) / 2)
        for row, shares in enumerate(top1.values()):
            percents = [100 * share for share in shares[order]]
            place, colour = row + height, f"C{number}"
            axes.plot(
                percents,
                [place] * len(percents),
                "o",
                ms=4,
                alpha=0.6,
                color=colour,
                label=None if row else label,
            )
            axes.plot([np.mean(percents)] * 2, [place - 0.1, place + 0.1], lw=2, color=colour)
    axes.axvline(100 * chance, color="grey", ls=":", label="chance")
    axes.set_yticks(range(len(top1)), list(top1))
    axes.invert_yaxis()
    axes.set(xlabel="validation top-1, %", xlim=(-2, 102))
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=120)


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure

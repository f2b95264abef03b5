"""PNG plots of a run, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stat_video.evaluate.evaluation import Scores
from stat_video.files import writing
from stat_video.train.journal import read_journal


def plot_run(folder: Path, scores: Scores, names: Sequence[str]) -> None:
    """curves.png and confusion.png of a finished run, in its folder."""
    plot_curves(read_journal(folder / "log.jsonl"), folder / "curves.png")
    plot_confusion(scores.confusion, names, folder / "confusion.png")


def plot_curves(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss and accuracy over steps, from the records of a log.jsonl."""
    steps = [r for r in records if r["kind"] == "step"]
    epochs = [r for r in records if r["kind"] == "epoch"]
    figure = _figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    left.plot(*_series(steps, "loss"), lw=0.8, label="training")
    left.plot(*_series(epochs, "val_loss"), label="validation")
    left.set(xlabel="step", ylabel="loss")
    for key, label in (("train_top1", "training"), ("val_top1", "validation")):
        right.plot(*_series(epochs, key, 100), label=label)
    right.set(xlabel="step", ylabel="top-1, %", ylim=(0, 101))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    _save(figure, path)


def _series(records: Sequence[dict[str, Any]], key: str, scale: int = 1) -> tuple[list, list]:
    """Steps and values, without missing and non-finite ones."""
    known = [(r["step"], scale * r[key]) for r in records if r.get(key) is not None]
    return [step for step, _ in known], [value for _, value in known]


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
    _save(figure, path)


def plot_ablation(
    tasks: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
    orders: Mapping[str, str],
    chance: float,
    path: Path,
) -> None:
    """One panel per task with one row per variant: a dot per run's top-1, a line for their mean.

    tasks: shares by task, variant and order of the frames; orders: the orders' labels.
    """
    rows = max(len(top1) for top1 in tasks.values())
    figure = _figure(3.5 + 4 * len(tasks), 1.4 + 0.55 * rows)
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, (task, top1) in zip(panels, tasks.items(), strict=True):
        for number, order in enumerate(orders):
            _ablation_runs(axes, top1, order, f"C{number}", 0.22 * (number - (len(orders) - 1) / 2))
        axes.axvline(100 * chance, color="grey", ls=":")
        axes.set_yticks(range(len(top1)), list(top1))
        axes.set(title=task, xlabel="validation top-1, %", xlim=(-2, 102))
        axes.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    from matplotlib.lines import Line2D

    dots: dict[str, Any] = {"marker": "o", "ls": "", "ms": 4}
    handles = [
        Line2D([], [], color=f"C{number}", label=label, **dots)
        for number, label in enumerate(orders.values())
    ]
    handles.append(Line2D([], [], color="grey", ls=":", label="chance"))
    figure.legend(handles=handles, loc="outside right upper")
    _save(figure, path)


def _ablation_runs(axes, top1, order: str, colour: str, shift: float) -> None:
    """One order's dots and lines, drawn `shift` rows below the variants' positions."""
    for row, shares in enumerate(top1.values()):
        percents, place = [100 * share for share in shares[order]], row + shift
        axes.plot(percents, [place] * len(percents), "o", ms=4, alpha=0.6, color=colour)
        axes.plot([np.mean(percents)] * 2, [place - 0.1, place + 0.1], lw=2, color=colour)


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path: Path) -> None:
    with writing(path):
        figure.savefig(path, dpi=120)

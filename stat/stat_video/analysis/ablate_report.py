"""The tables of an ablation, one per task, and its plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from stat_video.analysis.plots import plot_ablation
from stat_video.files import write_json, writing

COLUMNS = {"forward": "top-1", "reverse": "backwards", "shuffle": "shuffled"}


@dataclass(frozen=True)
class Row:
    """One variant: its runs' top-1 as shares by frame order, in the order of the seeds."""

    variant: str
    top1: dict[str, list[float]]
    parameters: int
    multiply_adds: int


def rows_of(results: Sequence[dict[str, Any]]) -> dict[str, list[Row]]:
    """Results by task and variant, in order of first appearance."""
    tasks: dict[str, dict[str, Row]] = {}
    for result in results:
        rows = tasks.setdefault(result["task"], {})
        name = result["variant"]
        if name not in rows:
            empty: dict[str, list[float]] = {order: [] for order in COLUMNS}
            rows[name] = Row(name, empty, result["parameters"], result["multiply_adds"])
        for order in COLUMNS:
            rows[name].top1[order].append(result["top1"][order])
    return {task: list(rows.values()) for task, rows in tasks.items()}


def table(rows: Sequence[Row]) -> str:
    """Markdown: mean and sample standard deviation over the seeds, in per cent."""
    head = ["variant", *COLUMNS.values(), "lowest, highest", "seeds", "parameters", "M mult-adds"]
    lines = ["| " + " | ".join(head) + " |", "| :-- |" + " --: |" * (len(head) - 1)]
    for row in rows:
        forward = row.top1["forward"]
        cells = [
            row.variant,
            *(_mean_and_spread(row.top1[order]) for order in COLUMNS),
            f"{100 * min(forward):.1f}, {100 * max(forward):.1f}",
            str(len(forward)),
            f"{row.parameters:,}",
            f"{row.multiply_adds / 1e6:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_report(results: Sequence[dict[str, Any]], folder: Path) -> str:
    """Write ablation.md, ablation.json and ablation.png. Returns the tables."""
    tasks, first = rows_of(results), results[0]
    text = "\n\n".join(f"**{task}**\n\n{table(rows)}" for task, rows in tasks.items())
    notes = (
        f"Validation top-1 in per cent of {first['videos']} clips, mean ± standard deviation over "
        f"the seeds; chance is {100 / first['classes']:.0f}. Final weights, not the best ones."
    )
    write_json(folder / "ablation.json", list(results))
    with writing(folder / "ablation.md"):
        (folder / "ablation.md").write_text(f"{text}\n\n{notes}\n")
    plot_ablation(
        {task: {row.variant: row.top1 for row in rows} for task, rows in tasks.items()},
        COLUMNS,
        1 / first["classes"],
        folder / "ablation.png",
    )
    return text


def _mean_and_spread(shares: Sequence[float]) -> str:
    percents = [100 * share for share in shares]
    if len(percents) == 1:
        return f"{percents[0]:.1f}"
    return f"{mean(percents):.1f} ± {stdev(percents):.1f}"

"""The plot of how time and memory grow with the frames of a clip."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from benchmarks.harness.growth import Curve, growth_entries, memory_curves, time_curves
from benchmarks.harness.summary import PASSES
from benchmarks.harness.tables import ms

COLOURS = ("#0b5fa5", "#d1495b", "#edae49", "#66a182", "#7a5195", "#8d96a3")
STYLE = {
    "figure.dpi": 110,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def growth(result: dict[str, Any], dtype: str, candidates: list[str], path: Path) -> None:
    """Time and extra memory over the frames of a clip, log-log, exponents in the legend."""
    entries = growth_entries(result, dtype)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
        both = [c for c in time_curves(entries, candidates) if c.which == PASSES[1]]
        _lines(axes[0], both, candidates, 1.0)
        axes[0].set(title="forward and backward", ylabel="ms")
        axes[0].yaxis.set_major_formatter(FuncFormatter(lambda y, _: ms(y) if y < 1 else f"{y:g}"))
        both = [c for c in memory_curves(entries, candidates) if c.which == PASSES[1]]
        _lines(axes[1], both, candidates, float(1 << 20))
        axes[1].set(title="peak memory beside results", ylabel="MiB")
        axes[1].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        name = result["machine"]["name"]
        figure.suptitle(f"{name}, {dtype}, stage 2 of stat_b64 by frames of the clip")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)


def _lines(ax: Axes, curves: list[Curve], candidates: list[str], unit: float) -> None:
    for curve in curves:
        i = candidates.index(curve.candidate)
        power = "" if curve.exponent is None else f": frames^{curve.exponent:.2f}"
        values = [max(v / unit, 1e-2) for v in curve.values]
        ax.plot(
            curve.frames, values, "o-", color=COLOURS[i % len(COLOURS)], markersize=5,
            label=f"{curve.candidate}{power}",
        )  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="frames of a clip")
    frames = sorted({f for c in curves for f in c.frames})
    ax.set_xticks(frames, [str(f) for f in frames], minor=False)
    ax.minorticks_off()
    ax.grid(alpha=0.25)
    ax.legend(loc="upper left")

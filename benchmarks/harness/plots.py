"""PNG plots of results: roofline, speed-ups, growth with frames."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.harness.candidates import EAGER
from benchmarks.harness.cases import SUMMARY
from benchmarks.harness.growth import Curve, growth_entries, memory_curves, time_curves
from benchmarks.harness.summary import PASSES, Entry, Row, best_peer, find_row, median_ms
from benchmarks.harness.tables import ms

COLOURS = ("#0b5fa5", "#d1495b", "#edae49", "#66a182", "#7a5195", "#8d96a3")
MARKERS = ("o", "s", "^")
TITLES = {"forward": "forward", "forward+backward": "forward and backward"}
STYLE = {
    "figure.dpi": 110,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def roofline(result: dict[str, Any], dtype: str, path: Path) -> None:
    """Achieved FLOP/s over FLOP/byte of each stage, under this machine's own roofs."""
    rates = result["rates"]
    copy, matmul = rates["copy_bytes_per_s"], rates["matmul_flops_per_s"][dtype]
    entries = _summary_entries(result, dtype)
    works = [_work(e, which) for e in entries for which in PASSES]
    intensities = [flops / moved for flops, moved in works] + [matmul / copy]
    left, right = min(intensities) / 6, max(intensities) * 2
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True, layout="constrained")
        for ax, which in zip(axes, PASSES, strict=True):
            xs = [left, matmul / copy, right]
            roof = [min(x * copy, matmul) / 1e9 for x in xs]
            ax.plot(xs, roof, color="black", linewidth=1.2)
            label = f"matrix product {matmul / 1e9:,.0f} GFLOP/s"
            ax.annotate(label, (right, roof[-1]), (0, 4), ha="right", **_POINTS)
            label = f"copy {copy / 1e9:,.0f} GB/s"
            ax.annotate(label, (left, roof[0]), (10, 4), rotation=38, ha="left", **_POINTS)
            _roofline_points(ax, entries, which)
            ax.set(xscale="log", yscale="log", xlabel="FLOP / byte", title=TITLES[which])
            ax.xaxis.set_major_formatter(FuncFormatter(_plain))
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(FuncFormatter(_plain))
            ax.yaxis.set_minor_formatter(NullFormatter())
        axes[0].set_ylabel("GFLOP/s")
        names = [name for name, _ in _roofline_rows(entries[0], PASSES[0])]
        keys = [Line2D([], [], color=c, lw=6) for _, c in zip(names, COLOURS, strict=False)]
        keys += [Line2D([], [], color="black", marker=m, linestyle="none") for m in MARKERS]
        names += [f"stage {i}" for i in range(1, len(MARKERS) + 1)]
        figure.legend(keys, names, loc="outside right upper")
        figure.suptitle(f"{result['machine']['name']}, {dtype}, stages of 64 frames")
        _save(figure, path)


_POINTS = {"textcoords": "offset points", "fontsize": 8.5, "rotation_mode": "anchor"}


def _roofline_points(ax: Axes, entries: list[Entry], which: str) -> None:
    for entry, marker in zip(entries, MARKERS, strict=False):
        flops, moved = _work(entry, which)
        for colour, (_, row) in zip(COLOURS, _roofline_rows(entry, which), strict=False):
            time_ms = None if row is None else median_ms(row, which)
            if time_ms is not None:
                ax.plot(flops / moved, flops / time_ms / 1e6, marker, color=colour, markersize=8)


def _roofline_rows(entry: Entry, which: str) -> list[tuple[str, Row | None]]:
    """Our backends, the best peer and the eager one."""
    ours = [r for r in entry["rows"] if r["kind"] == "backend" and r["status"] == "ok"]
    named = [(r["candidate"], r) for r in ours]
    return [*named, ("best peer", best_peer(entry, which)), (EAGER, find_row(entry, EAGER))]


def _plain(value: float, _: object) -> str:
    return f"{value:,g}"


def speedup_bars(result: dict[str, Any], dtype: str, backend: str, path: Path) -> None:
    """Each peer's time over the backend's, stage by stage."""
    entries = _summary_entries(result, dtype)
    peers = [r["candidate"] for r in entries[0]["rows"] if r["kind"] == "peer"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(10, 5), sharey=True, layout="constrained")
        for ax, which in zip(axes, PASSES, strict=True):
            ours = [_median_of(e, backend, which) for e in entries]
            for i, (entry, colour) in enumerate(zip(entries, COLOURS, strict=False)):
                times = [_median_of(entry, peer, which) for peer in peers]
                ratios = [0 if t is None or not ours[i] else t / ours[i] for t in times]
                ys = [p + 0.27 * (i - 1) for p in range(len(peers))]
                ax.barh(ys, ratios, height=0.25, color=colour, label=f"stage {i + 1}")
                for y, value in zip(ys, ratios, strict=True):
                    middle = "no result" if i == 1 else ""
                    text = f"{value:.1f}" if value else middle
                    ax.annotate(text, (value, y), (3, 0), va="center", **_SMALL)
            ax.axvline(1, color="black", linewidth=1)
            ax.set(xlabel=f"time over that of `{backend}`", title=TITLES[which])
        axes[0].set_yticks(range(len(peers)), peers)
        axes[0].invert_yaxis()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
        figure.suptitle(f"{result['machine']['name']}, {dtype}, stages of 64 frames")
        _save(figure, path)


_SMALL = {"textcoords": "offset points", "fontsize": 7.5}


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
        _save(figure, path)


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


def _summary_entries(result: dict[str, Any], dtype: str) -> list[Entry]:
    return [e for e in result["cases"] if e["case"] in SUMMARY and e["dtype"] == dtype]


def _work(entry: Entry, which: str) -> tuple[float, float]:
    """FLOPs and bytes of a pass."""
    passes = ("forward",) if which == "forward" else ("forward", "backward")
    works = [entry["work"][p] for p in passes]
    flops = sum(w["flops"] for w in works)
    return flops, sum(w["read_bytes"] + w["written_bytes"] for w in works)


def _median_of(entry: Entry, candidate: str, which: str) -> float | None:
    rows = [r for r in entry["rows"] if r["candidate"] == candidate]
    return median_ms(rows[0], which) if rows else None


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)

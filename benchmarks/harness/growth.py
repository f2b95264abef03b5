"""How time and memory grow with the frames of a clip: a power law fitted to measured points."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.candidates import EAGER
from benchmarks.harness.summary import PASSES, Entry, find_row, median_ms

PREFIX = "growth-"
FIT_FROM_FRAMES = 32  # below, a call's fixed cost and the clip's ends still show
PEERS = (EAGER, "SDPA masked", "SDPA grouped")  # that are shown beside our backends
RESOLUTION_BYTES = 256 << 10  # of the memory measurement


@dataclass(frozen=True)
class Curve:
    """One candidate's figures over frames.

    Attributes:
        candidate: its name.
        which: "forward" or "forward+backward".
        frames: of a clip, ascending.
        values: ms or bytes.
        exponent: of the power law; None where fewer than three points could be fitted.
    """

    candidate: str
    which: str
    frames: tuple[int, ...]
    values: tuple[float, ...]
    exponent: float | None

    def at(self, frames: int) -> float | None:
        """The figure for clips of so many frames; None where there is none."""
        return dict(zip(self.frames, self.values, strict=True)).get(frames)


def frames_of(entry: Entry) -> int:
    """Frames of the clip: growth-064 is of 64."""
    return int(entry["case"].removeprefix(PREFIX))


def growth_entries(result: dict[str, Any], dtype: str) -> list[Entry]:
    """The growth cases in one dtype, by frames."""
    chosen = [e for e in result["cases"] if e["case"].startswith(PREFIX) and e["dtype"] == dtype]
    return sorted(chosen, key=frames_of)


def fit_exponent(frames: list[int], values: list[float], least: float = 0.0) -> float | None:
    """Least squares slope of log(value) over log(frames); None with fewer than three points.

    Args:
        frames, values: the points; those under FIT_FROM_FRAMES are left out.
        least: values of this and below are left out too.
    """
    points = [
        (math.log(f), math.log(v))
        for f, v in zip(frames, values, strict=True)
        if f >= FIT_FROM_FRAMES and v > least
    ]
    if len(points) < 3:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def time_curves(entries: list[Entry], candidates: list[str]) -> list[Curve]:
    """Medians in ms over frames."""
    return _curves(entries, candidates, lambda row, which: median_ms(row, which), 0.0)


def memory_curves(entries: list[Entry], candidates: list[str]) -> list[Curve]:
    """Peak extra bytes over frames."""

    def size(row: dict[str, Any], which: str) -> float | None:
        return row.get("extra_memory_bytes", {}).get(which)

    return _curves(entries, candidates, size, RESOLUTION_BYTES)


def flops_exponent(entries: list[Entry]) -> float | None:
    """Exponent of the FLOP count; it exceeds 1 since long-term attention has one key per frame."""
    return fit_exponent(
        [frames_of(e) for e in entries], [e["work"]["forward"]["flops"] for e in entries]
    )


def candidates(result: dict[str, Any], dtype: str) -> list[str]:
    """Our backends and a few peers in the growth result, each once."""
    rows = [r for e in growth_entries(result, dtype) for r in e["rows"] if r["status"] == "ok"]
    shown = (r["candidate"] for r in rows if r["kind"] != "peer" or r["candidate"] in PEERS)
    return list(dict.fromkeys(shown))


def _curves(entries: list[Entry], candidates: list[str], figure: Any, least: float) -> list[Curve]:
    found = []
    for which in PASSES:
        for name in candidates:
            points = []
            for entry in entries:
                row = find_row(entry, name)
                value = None if row is None else figure(row, which)
                if value is not None:
                    points.append((frames_of(entry), value))
            if points:
                frames, values = (list(axis) for axis in zip(*points, strict=True))
                exponent = fit_exponent(frames, values, least)
                found.append(Curve(name, which, tuple(frames), tuple(values), exponent))
    return found


def power(exponent: float | None) -> str:
    """The exponent as "frames^1.02", or "not fitted" if there were too few points."""
    return "not fitted" if exponent is None else f"frames^{exponent:.2f}"

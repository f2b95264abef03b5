"""Summary figures of an attention result: speed-ups, fraction of the floor, memory.

These are pure functions of a result file's content, shared by the command, the report and tests.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks.harness.candidates import EAGER
from benchmarks.harness.cases import SUMMARY
from benchmarks.harness.tables import markdown_table, mib, ms, percent, ratio, text_table
from benchmarks.harness.timing import geometric_mean

PASSES = ("forward", "forward+backward")
Entry = dict[str, Any]  # of one case in one dtype
Row = dict[str, Any]  # of one candidate


def median_ms(row: Row, which: str, measure: str = "time") -> float | None:
    """Median of a candidate's samples; None where it was not timed."""
    quantiles = row.get(which, {}).get(measure)
    return None if quantiles is None else quantiles["median_ms"]


def best_peer(entry: Entry, which: str) -> Row | None:
    """The fastest peer that gave right results, by median; None where none was timed."""
    timed = [r for r in entry["rows"] if r["kind"] == "peer" and median_ms(r, which) is not None]
    return min(timed, key=lambda row: median_ms(row, which), default=None)


def find_row(entry: Entry, candidate: str) -> Row | None:
    """A candidate's row."""
    return next((r for r in entry["rows"] if r["candidate"] == candidate), None)


def speedups(entry: Entry, row: Row, which: str) -> dict[str, float | None]:
    """A backend's speed-up against the best peer and against the eager materialised one."""
    own = median_ms(row, which)
    peers = {"best": best_peer(entry, which), "eager": find_row(entry, EAGER)}
    times = {name: None if p is None else median_ms(p, which) for name, p in peers.items()}
    return {n: None if own is None or t is None else t / own for n, t in times.items()}


def summarise(result: dict[str, Any]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Geometric means over the three 64-frame stages, by "backend dtype" and pass.

    The figures of a pass: ``best`` and ``eager`` (speed-ups), ``floor`` (the floor over the time),
    ``to_float32`` (the time over float32's), ``extra_bytes`` (the largest). A figure is None unless
    all three stages have it.
    """
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for name, dtype in _backends_and_dtypes(result):
        entries = [_entry(result, case, dtype) for case in SUMMARY]
        rows = [None if e is None else find_row(e, name) for e in entries]
        if any(r is None or r["status"] != "ok" for r in rows):
            continue
        found[f"{name} {dtype}"] = {
            which: _figures(result, name, entries, rows, which) for which in PASSES
        }
    return found


def summary_table(result: dict[str, Any], markdown: bool = False) -> str:
    """The summary's figures, one line per backend, dtype and pass; text or Markdown."""
    head = (
        "backend",
        "pass",
        "vs best peer",
        "vs eager",
        "of the floor",
        "vs float32",
        "extra MiB",
    )
    rows = [
        (
            key,
            which,
            ratio(f["best"]),
            ratio(f["eager"]),
            percent(f["floor"]),
            ratio(f["to_float32"]),
            mib(f["extra_bytes"]),
        )
        for key, passes in summarise(result).items()
        for which, f in passes.items()
    ]
    return (markdown_table if markdown else text_table)(head, rows)


def case_table(entry: Entry) -> str:
    """Every candidate of one case: times with quartiles, memory, and error or reason for failure.

    On CUDA also the wall time of a call and the device time of its CUDA graph, if measured.
    """
    passes = dict(zip(PASSES, ("forward", "both"), strict=True))
    others = [
        (which, measure)
        for which in PASSES
        for measure in ("wall", "graph")
        if any(median_ms(row, which, measure) is not None for row in entry["rows"])
    ]
    head = ["candidate", "forward ms", "q1-q3", "both ms", "q1-q3"]
    head += [f"{passes[which]} {measure}" for which, measure in others]
    head += ["MiB", "MiB both", "error"]
    rows = []
    for row in entry["rows"]:
        memory = row.get("extra_memory_bytes", {})
        cells = [row["candidate"]]
        for which in PASSES:
            cells += [ms(median_ms(row, which)), _quartiles(row, which)]
        cells += [ms(median_ms(row, which, measure)) for which, measure in others]
        cells += [mib(memory.get(which)) for which in PASSES]
        errors = row.get("relative_errors", {})
        cells.append(f"{max(errors.values()):.0e}" if errors else "-")
        rows.append(cells)
    floors = [ms(entry["floors_ms"][which]) for which in PASSES]
    rows.append(["(floor)", floors[0], "", floors[1], *[""] * (len(head) - 4)])
    title = f"{entry['case']}, {entry['dtype']}: {entry['about']} ({entry['sizes_text']})"
    notes = [f"{r['candidate']}: {r['reason']}" for r in entry["rows"] if "reason" in r]
    notes += [
        f"{r['candidate']}: no graph of {which}: {r[which]['no_graph']}"
        for r in entry["rows"]
        for which in PASSES
        if "no_graph" in r.get(which, {})
    ]
    return "\n".join([title, text_table(head, rows), *notes])


def _quartiles(row: Row, which: str) -> str:
    quantiles = row.get(which, {}).get("time")
    return "" if quantiles is None else f"{ms(quantiles['q1_ms'])}-{ms(quantiles['q3_ms'])}"


def _backends_and_dtypes(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    seen = set()
    for entry in result["cases"]:
        for row in entry["rows"]:
            key = (row["candidate"], entry["dtype"])
            if row["kind"] == "backend" and key not in seen:
                seen.add(key)
                yield key


def _entry(result: dict[str, Any], case: str, dtype: str) -> Entry | None:
    matches = (e for e in result["cases"] if e["case"] == case and e["dtype"] == dtype)
    return next(matches, None)


def _figures(
    result: dict[str, Any], name: str, entries: list[Entry], rows: list[Row], which: str
) -> dict[str, float | None]:
    pairs = list(zip(entries, rows, strict=True))
    own = [median_ms(row, which) for row in rows]
    faster = [speedups(entry, row, which) for entry, row in pairs]
    singles = [_entry(result, entry["case"], "float32") for entry in entries]
    single_rows = [None if e is None else find_row(e, name) for e in singles]
    single = [None if r is None else median_ms(r, which) for r in single_rows]
    floors = [entry["floors_ms"][which] for entry in entries]
    memory = [row.get("extra_memory_bytes", {}).get(which) for row in rows]
    return {
        "best": _mean([f["best"] for f in faster]),
        "eager": _mean([f["eager"] for f in faster]),
        "floor": _mean([_over(f, t) for f, t in zip(floors, own, strict=True)]),
        "to_float32": _mean([_over(t, s) for t, s in zip(own, single, strict=True)]),
        "extra_bytes": None if None in memory else max(memory),
    }


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else geometric_mean(values)

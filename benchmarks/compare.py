"""Two result files: what became slower, beyond the noise.

    python -m benchmarks.compare OLD.json NEW.json

A ratio is new over old, of medians; its spread runs from new's first quartile over old's third to
new's third over old's first. A regression is a ratio whose whole spread lies above one and the
tolerance. The exit code is 1 where any of our own figures regressed, 2 where the files cannot be
compared; peers are shown to tell a slower kernel from a slower machine.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import results
from benchmarks.harness.tables import mib, ms, ratio, text_table

TOLERANCE = 0.03
MEMORY_SLACK_BYTES = 512 << 10  # what two measurements of the same call may differ by


@dataclass(frozen=True)
class Key:
    """Which figure of a result."""

    case: str
    dtype: str
    candidate: str
    kind: str  # "peer", or ours
    what: str  # "forward time", "forward+backward graph", ...

    def __str__(self) -> str:
        return f"{self.case} {self.dtype} {self.candidate}: {self.what}"


@dataclass(frozen=True)
class Change:
    """A time's ratio, new over old, with its spread."""

    key: Key
    old_ms: float
    new_ms: float
    ratio: float
    low: float
    high: float

    def regressed(self, tolerance: float = TOLERANCE) -> bool:
        """Slower beyond the noise."""
        return self.low > 1 + tolerance

    def improved(self, tolerance: float = TOLERANCE) -> bool:
        """Faster beyond the noise."""
        return self.high < 1 - tolerance


def timings(result: dict[str, Any]) -> dict[Key, dict[str, float]]:
    """Quantiles of every sample set in a result of any benchmark."""
    return {key: row[which][measure] for key, row, which, measure in _sample_sets(result)}


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """The figures that both results have."""
    before, after = timings(old), timings(new)
    found = []
    for key in before.keys() & after.keys():
        o, n = before[key], after[key]
        found.append(
            Change(
                key,
                o["median_ms"],
                n["median_ms"],
                n["median_ms"] / o["median_ms"],
                n["q1_ms"] / o["q3_ms"],
                n["q3_ms"] / o["q1_ms"],
            )
        )
    return sorted(found, key=lambda change: str(change.key))


def faults(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What got worse other than a time: ours that no longer run, keep a promise, or need more."""
    before, after = _rows(old), _rows(new)
    found = []
    for name in sorted(before.keys() & after.keys()):
        o, n = before[name], after[name]
        if o["kind"] == "peer":
            continue
        if o.get("status", "ok") == "ok" and n.get("status", "ok") != "ok":
            found.append(f"{' '.join(name)}: {n['status']}, {n.get('reason', 'no reason given')}")
        if o.get("same_losses") is True and n.get("same_losses") is False:
            found.append(f"{' '.join(name)}: its losses are no longer the reference's")
        kept = {how for how, same in o.get("same_bits", {}).items() if same}
        broken = [how for how, same in n.get("same_bits", {}).items() if how in kept and not same]
        found += [f"{' '.join(name)}: no longer the same bits ({how})" for how in broken]
        for which, size in o.get("extra_memory_bytes", {}).items():
            now = n.get("extra_memory_bytes", {}).get(which, size)
            if now > 1.1 * size + MEMORY_SLACK_BYTES:
                found.append(f"{' '.join(name)}: {which} needs {mib(now)} MiB, was {mib(size)}")
    return found


def machine_drift(found: list[Change]) -> float | None:
    """Median ratio of the peers, which nobody changed; None where there are none."""
    ratios = [c.ratio for c in found if c.key.kind == "peer"]
    return statistics.median(ratios) if ratios else None


def report(old: dict[str, Any], new: dict[str, Any], tolerance: float) -> tuple[str, bool]:
    """The text of a comparison, and whether anything of ours regressed."""
    found = changes(old, new)
    lines = _differences(old, new)
    rows = [
        (
            str(c.key),
            ms(c.old_ms),
            ms(c.new_ms),
            ratio(c.ratio),
            f"{c.low:.2f}-{c.high:.2f}",
            "slower" if c.regressed(tolerance) else "faster" if c.improved(tolerance) else "",
        )
        for c in found
    ]
    lines.append(text_table(("figure", "old ms", "new ms", "ratio", "spread", ""), rows))
    drift = machine_drift(found)
    if drift is not None:
        lines.append(f"\npeers, which tell of the machine: {ratio(drift)} of the old time")
    regressions = [c for c in found if c.key.kind != "peer" and c.regressed(tolerance)]
    lines += [f"regression: {c.key}, {ratio(c.ratio)} the old time" for c in regressions]
    worse = faults(old, new)
    lines += [f"regression: {fault}" for fault in worse]
    if not regressions and not worse:
        lines.append("no regression beyond the noise")
    return "\n".join(lines), bool(regressions or worse)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        old, new = results.read(options.old), results.read(options.new)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if old["benchmark"] != new["benchmark"]:
        print(f"a {old['benchmark']} and a {new['benchmark']} result", file=sys.stderr)
        return 2
    if not _rows(old).keys() & _rows(new).keys():
        print("the two results have no case with a candidate in common", file=sys.stderr)
        return 2
    text, worse = report(old, new, options.tolerance)
    print(text)
    return int(worse)


def _sample_sets(result: dict[str, Any]) -> Iterator[tuple[Key, dict[str, Any], str, str]]:
    for (case, dtype, candidate), row in _rows(result).items():
        for which, measures in row.items():
            if not isinstance(measures, dict):
                continue
            for measure, quantiles in measures.items():
                if isinstance(quantiles, dict) and "median_ms" in quantiles:
                    key = Key(case, dtype, candidate, row["kind"], f"{which} {measure}")
                    yield key, row, which, measure


def _rows(result: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {
        (entry["case"], entry["dtype"], row["candidate"]): row
        for entry in result["cases"]
        for row in entry["rows"]
    }


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What else differs: a ratio of two machines says little of the code."""
    lines = [f"{old['date']} {old['commit']} -> {new['date']} {new['commit']}"]
    for name in ("name", "cores", "threads", "torch"):
        before, after = old["machine"].get(name), new["machine"].get(name)
        if before != after:
            lines.append(f"warning: {name} was {before}, is {after}")
    ours = {key for key, row in _rows(old).items() if row["kind"] != "peer"}
    gone = sorted(ours - _rows(new).keys())
    lines += [f"warning: {' '.join(key)} is in the old result only" for key in gone]
    return [*lines, ""]


if __name__ == "__main__":
    sys.exit(main())

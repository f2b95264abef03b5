"""Write the tables of README.md and docs/benchmarks.md, and the plots, from the result files.

    python -m benchmarks.report            writes them
    python -m benchmarks.report --check    writes nothing; exit code 1 where a table is out of date

A table stands between <!-- benchmark:NAME --> and <!-- /benchmark:NAME -->; NAME is summary,
attention, growth, layer or train_step. Each shows the newest complete result of every machine,
summary that of the latest machine only; summary and attention need every peer to have taken part.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, growth, results
from benchmarks.harness.cases import GROWTH_FRAMES, SUMMARY
from benchmarks.harness.summary import (
    PASSES,
    best_peer,
    find_row,
    median_ms,
    speedups,
    summary_table,
)
from benchmarks.harness.tables import markdown_table, mib, ms, percent, ratio

PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
PLOTS = ROOT / "docs" / "benchmarks"
SECTIONS = ("summary", "attention", "growth", "layer", "train_step")
GROWTH_CASES = tuple(f"{growth.PREFIX}{frames:03d}" for frames in GROWTH_FRAMES[2:])


def section(name: str, folder: Path = results.RESULTS) -> str:
    """The text between a section's markers: one table per measured machine."""
    makers = {"summary": _summary, "attention": _attention, "growth": _growth}
    makers |= {"layer": _layer, "train_step": _train_step}
    found = _newest(name, folder)
    if name == "summary":  # the README's few figures are of one machine, the latest measured
        found = sorted(found, key=lambda result: result["date"])[-1:]
    parts = [f"{_machine(r)}\n\n{makers[name](r)}" for r in found]
    return "\n\n".join(parts) or "No result yet."


def between_markers(text: str, name: str) -> str | None:
    """The present text between a section's markers; None if the page has none."""
    match = _pattern(name).search(text)
    return None if match is None else match[2].strip()


def with_section(text: str, name: str, content: str) -> str:
    """The text with a section replaced; unchanged if the page has no such markers."""
    return _pattern(name).sub(lambda m: f"{m[1]}\n{content}\n{m[3]}", text)


def behind(text: str, folder: Path = results.RESULTS) -> list[str]:
    """The sections of a page whose tables are out of date."""
    shown = {name: between_markers(text, name) for name in SECTIONS}
    return [n for n, found in shown.items() if found is not None and found != section(n, folder)]


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="only say what is behind")
    options = parser.parse_args(arguments)
    outdated = False
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in behind(text):
            outdated = True
            print(f"{page.relative_to(ROOT)}: the {name} table is out of date", file=sys.stderr)
            text = with_section(text, name, section(name))
        if not options.check:
            page.write_text(text, encoding="utf-8")
    if options.check:
        return int(outdated)
    for path in write_plots():
        print(path.relative_to(ROOT))
    return 0


def write_plots(folder: Path = results.RESULTS, target: Path = PLOTS) -> list[Path]:
    """The growth plot of every machine's newest result."""
    from benchmarks.harness import plots  # matplotlib is needed here only

    written = []
    for result in _newest("growth", folder):
        dtype = result["settings"]["dtypes"][0]
        written.append(target / f"{results.slug(result['machine'])}-growth.png")
        plots.growth(result, dtype, growth.candidates(result, dtype), written[-1])
    return written


def _newest(name: str, folder: Path) -> list[dict[str, Any]]:
    """The results that a section shows, for each machine that has them."""
    if name == "growth":
        wanted = [("attention", GROWTH_CASES, {})]
    elif name in ("summary", "attention"):  # fewer peers, and "the best peer" is not
        wanted = [("attention", SUMMARY, {"peers": ["*"]})]
    else:
        wanted = [(name, (), {"dtype": dtype}) for dtype in ("float32", "bfloat16")]
    machines = sorted(path for path in folder.glob("*") if path.is_dir())
    found = [results.newest(machine, *run) for machine in machines for run in wanted]
    return [result for result in found if result is not None]


def _summary(result: dict[str, Any]) -> str:
    return summary_table(result, markdown=True)


def _attention(result: dict[str, Any]) -> str:
    head = ("case", "backend", "pass", "ms", "best peer", "its ms", "speed-up", "vs eager", "MiB")
    rows = []
    for entry in (e for e in result["cases"] if e["case"] in SUMMARY):
        ours = (r for r in entry["rows"] if r["kind"] == "backend" and r["status"] == "ok")
        for row in ours:
            for which in PASSES:
                best, times = best_peer(entry, which), speedups(entry, row, which)
                rows.append(
                    (
                        f"{entry['case']} {entry['dtype']}",
                        row["candidate"],
                        which,
                        ms(median_ms(row, which)),
                        "-" if best is None else best["candidate"],
                        "-" if best is None else ms(median_ms(best, which)),
                        ratio(times["best"]),
                        ratio(times["eager"]),
                        mib(row.get("extra_memory_bytes", {}).get(which)),
                    )
                )
    means = f"Geometric means of {', '.join(SUMMARY)}:"
    return f"{means}\n\n{summary_table(result, markdown=True)}\n\n{markdown_table(head, rows)}"


def _growth(result: dict[str, Any]) -> str:
    """Forward and backward at the shortest fitted and the longest clip, and the power laws."""
    dtype = result["settings"]["dtypes"][0]
    entries, names = growth.growth_entries(result, dtype), growth.candidates(result, dtype)
    least, most = growth.FIT_FROM_FRAMES, growth.frames_of(entries[-1])
    head = ("", *(f"ms at {f} frames" for f in (least, most)), "time grows as")
    head += (*(f"MiB at {f} frames" for f in (least, most)), "memory grows as")
    both = PASSES[1]
    memory = {c.candidate: c for c in growth.memory_curves(entries, names) if c.which == both}
    rows = []
    for curve in (c for c in growth.time_curves(entries, names) if c.which == both):
        size = memory.get(curve.candidate)
        cells = [curve.candidate, *(ms(curve.at(f)) for f in (least, most))]
        cells.append(growth.power(curve.exponent))
        cells += ["-" if size is None else mib(size.at(f)) for f in (least, most)]
        rows.append([*cells, growth.power(None if size is None else size.exponent)])
    arithmetic = growth.power(growth.flops_exponent(entries))
    what = f"Stage 2 of stat_b64 by frames of the clip, {dtype}, {both}; the arithmetic itself"
    return f"{what} grows as {arithmetic}:\n\n{markdown_table(head, rows)}"


def _layer(result: dict[str, Any]) -> str:
    head = ("block", "backend", "ms", "attention", "pooling", "projections", "MLP", "norms")
    rows = []
    for entry in result["cases"]:
        for block in (r for r in entry["rows"] if r["part"] == "block" and r["status"] == "ok"):
            for which in PASSES:
                total = median_ms(block, which)
                cells = [f"{entry['case']}, {which}", block["backend"], ms(total)]
                for part in head[3:]:
                    row = find_row(entry, f"{part}, {block['backend']}") or find_row(entry, part)
                    cells.append(percent(median_ms(row, which) / total))
                rows.append(cells)
    return f"{markdown_table(head, rows)}{_layers(result)}"


def _layers(result: dict[str, Any]) -> str:
    """The layer's forward and backward pass against its composite and repeated keys."""
    head = ("layer", "ours, ms", "composite, ms", "", "repeated keys, ms", "")
    rows = []
    for entry in result["cases"]:
        named = ("layer, cpu", "composite, cpu", "layer, reference")
        found = [find_row(entry, name) for name in named]
        times = [None if row is None else median_ms(row, PASSES[1]) for row in found]
        if None not in times:
            ours, composite, repeated = times
            ratios = [ratio(composite / ours), ratio(repeated / ours)]
            cells = [ms(ours), ms(composite), ratios[0], ms(repeated), ratios[1]]
            how = ", autocast" if result["settings"].get("autocast") else ""
            rows.append([f"{entry['case']}, {entry['dtype']}{how}", *cells])
    return f"\n\n{markdown_table(head, rows)}" if rows else ""


def _train_step(result: dict[str, Any]) -> str:
    head = ("model", "path", "step ms", "vs reference", "clips/s", "of the matmul rate", "MiB")
    rows = [
        (
            f"{entry['case']}, {entry['dtype']}, {entry['about']}",
            row["candidate"],
            ms(median_ms(row, "step", "wall")),
            ratio(_over_reference(entry, row)),
            f"{row['clips_per_s']:.2f}",
            percent(row.get("model_flop_utilisation")),
            mib(row.get("extra_memory_bytes", {}).get("step")),
        )
        for entry in result["cases"]
        for row in entry["rows"]
        if row["status"] == "ok"
    ]
    return markdown_table(head, rows)


def _over_reference(entry: dict[str, Any], row: dict[str, Any]) -> float | None:
    """The eager reference path's step time over a row's; None where it was not timed."""
    base = find_row(entry, "reference, eager")
    time_ms = None if base is None else median_ms(base, "step", "wall")
    return None if time_ms is None else time_ms / median_ms(row, "step", "wall")


def _machine(result: dict[str, Any]) -> str:
    m = result["machine"]
    where = f"{m['name']}, {m['threads']} threads" if m["device"] == "cpu" else m["name"]
    if m["device"] == "cpu":
        where += f" ({m['native_library'].get('instruction_set', m['cpu_capability'])})"
    return f"{where}, torch {m['torch']}, {result['date'][:10]}, commit {result['commit']}."


def _pattern(name: str) -> re.Pattern[str]:
    marker = re.escape(f"benchmark:{name}")
    return re.compile(f"(<!-- {marker} -->)(.*?)(<!-- /{marker} -->)", re.DOTALL)


if __name__ == "__main__":
    sys.exit(main())

"""The kernels against the fastest ways to compute the same in PyTorch.

    python -m benchmarks.attention                        the three stages at 64 frames
    python -m benchmarks.attention --cases "b32-*"        other cases, see --dry-run --cases "*"
    python -m benchmarks.attention --cases "growth-*"     time and memory as clips grow

Every candidate is checked against the oracle on the inputs it is timed on. Measured are the forward
pass, forward and backward, peak extra memory, and whether the bits are the same on 1, 2 and 4
threads. Ctrl-C keeps the measurements so far.
"""

import argparse
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.harness import candidates, floors, memory, results, summary, timing, verify
from benchmarks.harness.candidates import Candidate
from benchmarks.harness.cases import NamedCase, select
from benchmarks.harness.materialised import Attention
from stat_kernels.testing import Case

ROUNDS = {"cpu": 11, "cuda": 50}
DTYPES = {"cpu": ["float32", "bfloat16"], "cuda": ["bfloat16", "float32"]}
THREADS = [1, 2, 4]  # a result must not depend on which


@dataclass(frozen=True)
class Ready:
    """A candidate that was checked and may be timed."""

    candidate: Candidate
    function: Attention
    problem: verify.Problem
    row: dict[str, Any]

    @property
    def dtype_name(self) -> str:
        return floors.dtype_name(self.problem.inputs[0].dtype)


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit code: 1 where one of our backends failed, 2 for options, 130 on Ctrl-C.

    A backend fails where it raises though it did not refuse the case, is wrong, or gives other bits
    the second time or on other numbers of threads.
    """
    options = _parser().parse_args(arguments)
    options.dtypes = options.dtypes or DTYPES[options.device]
    timing.prepare_process(options.threads)
    try:
        cases = select(options.cases, options.device)
        chosen = _chosen(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.dry_run:
        print(_plan(cases, chosen, options))
        return 0
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "dry_run")}
    result = results.new_result("attention", options.device, settings) | {"cases": []}

    def measure() -> None:
        try:
            _measure_all(result, cases, chosen, options)
        finally:
            result["summary"] = summary.summarise(result)
            stages = ", ".join(summary.SUMMARY)
            if result["summary"]:
                print(f"\nGeometric means of {stages}:\n{summary.summary_table(result)}")
            else:
                print(f"\nNo geometric means: no backend was timed on all of {stages}.")

    return results.record(result, measure, options.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--cases", nargs="+", default=["quick"], help="names or globs; default: quick")
    add("--dtypes", nargs="+", help="the first is what plots show; default: by device")
    add("--backends", nargs="*", help="of this project; default: all but the reference")
    add("--peers", nargs="*", default=["*"], help="names or globs; default: all of them")
    add("--full", action="store_true", help="every peer, in every dtype")
    add("--device", default=default_device, choices=["cpu", "cuda"])
    add("--threads", type=int, help="default: PyTorch's own choice")
    add("--rounds", type=int, help=f"samples of each candidate; default: {ROUNDS}")
    add("--seconds", type=float, default=15, help="of one pass over a case, after 5 rounds")
    add("--no-memory", action="store_true", help="leave out the memory measurement")
    add("--dry-run", action="store_true", help="list what would run")
    add("--out", type=Path, default=results.RESULTS, help="folder for the result file")
    return parser


def _chosen(options: argparse.Namespace) -> dict[str, list[Candidate]]:
    """Candidates by dtype."""
    everyone = candidates.all_candidates(options.device, options.backends)

    def wanted(candidate: Candidate, first: bool) -> bool:
        if candidate.kind == "backend":
            return True
        named = any(fnmatch(candidate.name, p) for p in options.peers)
        light = not candidate.compiled and not candidate.name.startswith("three")
        return named and (options.full or (not candidate.extra and (first or light)))

    for name in options.dtypes:
        if not isinstance(getattr(torch, name, None), torch.dtype):
            raise ValueError(f"dtype must be a torch dtype's name, got {name!r}")
    return {
        name: [c for c in everyone if wanted(c, name == options.dtypes[0])]
        for name in options.dtypes
    }


def _plan(
    cases: list[NamedCase], chosen: dict[str, list[Candidate]], options: argparse.Namespace
) -> str:
    lines = []
    for named in cases:
        lines.append(f"{named.name:<24} {named.case}  {named.about}")
        for dtype, those in chosen.items():
            for c in those:
                reason = c.unsupported_reason(named.case, getattr(torch, dtype), options.device)
                lines.append(f"    {dtype:<9} {c.name}{f' (no: {reason})' if reason else ''}")
    return "\n".join(lines)


def _measure_all(
    result: dict[str, Any],
    cases: list[NamedCase],
    chosen: dict[str, list[Candidate]],
    options: argparse.Namespace,
) -> None:
    rounds = options.rounds or ROUNDS[options.device]
    steps = sum(len(those) for those in chosen.values()) + rounds * 2 + 2
    timer = timing.timers(options.device)["time"]
    dtypes = [getattr(torch, name) for name in chosen]
    with tqdm(total=len(cases) * steps + 2, desc="attention") as progress:
        progress.set_postfix_str("rates of copy and matrix product")
        rates = floors.measure_rates(options.device, dtypes, timer)
        result["rates"] = rates.to_json()
        progress.update()
        for named in cases:
            entries = [_new_entry(named, dtype, rates) for dtype in chosen]
            result["cases"] += entries
            try:
                _measure_case(named, entries, chosen, rounds, options, progress)
            finally:
                for entry in entries:
                    progress.write(summary.case_table(entry) + "\n")
                results.save(result, options.out)
            torch._dynamo.reset()  # what was compiled for this case's sizes
        rates = floors.better(rates, floors.measure_rates(options.device, dtypes, timer))
        result["rates"] = rates.to_json()
        for entry in result["cases"]:
            case, dtype = Case(**entry["sizes"]), getattr(torch, entry["dtype"])
            entry["floors_ms"] = floors.floors_ms(case, rates, dtype)


def _new_entry(named: NamedCase, dtype_name: str, rates: floors.Rates) -> dict[str, Any]:
    case, dtype = named.case, getattr(torch, dtype_name)
    works = {"forward": floors.forward_work, "backward": floors.backward_work}
    return {
        "case": named.name,
        "about": named.about,
        "sizes": asdict(case),
        "sizes_text": str(case),
        "dtype": dtype_name,
        "work": {name: asdict(work(case, dtype)) for name, work in works.items()},
        "floors_ms": floors.floors_ms(case, rates, dtype),
        "rows": [],
    }


def _measure_case(
    named: NamedCase,
    entries: list[dict[str, Any]],
    chosen: dict[str, list[Candidate]],
    rounds: int,
    options: argparse.Namespace,
    progress: tqdm,
) -> None:
    """Fill the entries of one case, one per dtype; all dtypes are timed in the same rounds."""
    ready: list[Ready] = []
    for entry in entries:
        dtype = getattr(torch, entry["dtype"])
        problem = verify.make_problem(named.case, dtype, options.device)
        for candidate in chosen[entry["dtype"]]:
            progress.set_postfix_str(f"{named.name} {entry['dtype']} {candidate.name}: checked")
            row, function = _check(candidate, problem, dtype, options.device)
            entry["rows"].append(row)
            if row["status"] == "ok":
                ready.append(Ready(candidate, function, problem, row))
            progress.update()
    for which in summary.PASSES:
        progress.set_postfix_str(f"{named.name} {which}")
        _time(ready, which, rounds, options, progress)
    progress.set_postfix_str(f"{named.name} same bits")
    for r in ready:
        if r.candidate.kind == "backend":
            r.row["same_bits"] = verify.same_bits(r.function, r.problem, THREADS)
    progress.update()
    if not options.no_memory:
        progress.set_postfix_str(f"{named.name} memory")
        _measure_memory(named, ready, options, progress)
    progress.update()


def _check(
    candidate: Candidate, problem: verify.Problem, dtype: torch.dtype, device: str
) -> tuple[dict[str, Any], Attention | None]:
    """The candidate's row with its status, and its function if that is "ok".

    Others are "wrong", "cannot run" (unsupported, or a peer that raised), "failed" (ours raised).
    """
    row: dict[str, Any] = {"candidate": candidate.name, "kind": candidate.kind, "status": "ok"}
    reason = candidate.unsupported_reason(problem.case, dtype, device)
    if reason is not None:
        return row | {"status": "cannot run", "reason": reason}, None
    try:
        function = candidate.prepare(problem.case, device)
        tensors = {"out": verify.forward(function, problem)}
        if candidate.no_backward(device) is None:
            both = verify.forward_backward(function, problem.leaves(), problem.grad_out)
            tensors |= verify.named_results(problem, both)
        else:
            row["reason"] = candidate.no_backward(device)
        errors = []
        if candidate.kind == "backend":
            errors = verify.backend_faults(candidate.name, problem)
    # Whatever a compiler or a kernel raises, the row says so and the others go on.
    except Exception as error:
        return row | results.raised(candidate.kind, error), None
    row["relative_errors"] = verify.relative_errors(problem, tensors)
    if candidate.kind == "peer":
        errors = verify.peer_faults(dtype, row["relative_errors"])
    if errors:
        return row | {"status": "wrong", "reason": "WRONG, not timed: " + "; ".join(errors)}, None
    return row, function


def _call(r: Ready, which: str) -> Any:
    if which == "forward":
        return lambda: verify.forward(r.function, r.problem)
    leaves = r.problem.leaves()
    return lambda: verify.forward_backward(r.function, leaves, r.problem.grad_out)


def _time(
    ready: list[Ready], which: str, rounds: int, options: argparse.Namespace, progress: tqdm
) -> None:
    """Interleaved samples of every candidate that has this pass, kept even if interrupted."""
    device = options.device
    timed = {
        f"{i}": r
        for i, r in enumerate(ready)
        if which == "forward" or r.candidate.no_backward(device) is None
    }
    calls = {key: _call(r, which) for key, r in timed.items()}
    for measure, timer in timing.timers(device).items():
        main_one = measure == "time"
        advance = progress.update if main_one else (lambda: None)
        _interleave(timed, calls, which, measure, rounds, options.seconds, timer, advance)
    if device == "cuda":
        graphs = {}
        for key, r in timed.items():
            try:
                graphs[key] = timing.capture_graph(calls[key])
            except RuntimeError as error:
                r.row[which]["no_graph"] = results.raised("peer", error)["reason"]
        timer = timing.timers(device)["time"]
        _interleave(timed, graphs, which, "graph", rounds, options.seconds, timer, lambda: None)


def _interleave(
    timed: dict[str, Ready],
    calls: dict[str, Any],
    which: str,
    measure: str,
    rounds: int,
    budget_s: float,
    timer: timing.Timer,
    advance: Any,
) -> None:
    samples: dict[str, timing.Samples] = {}
    try:
        timing.interleave(calls, rounds, timer, budget_s=budget_s, on_round=advance, into=samples)
    finally:
        for key, taken in samples.items():
            timed[key].row.setdefault(which, {})[measure] = taken.to_json()


def _measure_memory(
    named: NamedCase, ready: list[Ready], options: argparse.Namespace, progress: tqdm
) -> None:
    """Peak extra bytes of each candidate into its row; nothing where it cannot be measured."""
    if options.device == "cuda":
        for r in ready:
            passes = [w for w in summary.PASSES if w in r.row]
            r.row["extra_memory_bytes"] = {
                w: memory.beside_results_bytes(
                    lambda r=r, w=w: _as_list(_call(r, w)()), memory.cuda_growth_bytes
                )
                for w in passes
            }
        return
    if not memory.can_measure_cpu():
        return
    names: dict[str, list[str]] = {}
    for r in ready:
        # peers in every dtype only where all is asked for: a peer's memory follows from its dtype
        if r.candidate.kind == "backend" or options.full or r.dtype_name == options.dtypes[0]:
            names.setdefault(r.dtype_name, []).append(r.candidate.name)
    try:
        found = memory.extra_cpu_bytes(named.name, torch.get_num_threads(), names)
    except (RuntimeError, subprocess.TimeoutExpired) as error:  # times without memory are worth it
        progress.write(f"{named.name}: no memory figures: {error}")
        return
    for r in ready:
        sizes = found.get(r.dtype_name, {}).get(r.candidate.name)
        if sizes is not None:
            r.row["extra_memory_bytes"] = sizes


def _as_list(value: Any) -> list[torch.Tensor]:
    return value if isinstance(value, list) else [value]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit keeps results, too
    sys.exit(main())

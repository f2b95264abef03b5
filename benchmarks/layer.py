"""The layer against its composition of PyTorch operations, and one block of the model by part.

    python -m benchmarks.layer                    stat_b64, each kind of layer, every backend
    python -m benchmarks.layer --autocast         float32 parameters, bfloat16 autocast
    python -m benchmarks.layer --presets stat_b16 --stages 1 --first

"layer" is the attention layer as it is; "composite" pools with PyTorch's operations around the
same attention; the layer with the reference backend repeats keys in memory. The latter two are
timed compiled, too. "MiB" is the peak memory of forward and backward beside their results. Parts
of the block are called on the inputs that they have inside it, forward alone and with the backward
pass. The block is timed in the same rounds, and what its parts do not account for (residual sums,
views, autograd) is the rest. Attention and pooling are parts of the composite. A backend whose
block has wrong results or gradients is not timed.
"""

import argparse
import copy
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.harness import blocks, memory, models, results, timing
from benchmarks.harness.blocks import Piece
from benchmarks.harness.tables import mib, ms, percent, text_table
from stat_kernels import dispatch

WHOLES = ("block", "layer", "composite")
PARTS = ("norms", "projections", "pooling", "attention", "MLP")
BY_BACKEND = ("attention", "projections", "MLP")  # the others are the same for all
PASSES = ("forward", "forward+backward")
# A block's RMS error, over that of the reference in the same dtype and one rounding step. Generous:
# a gradient that is zero but for rounding, as of the keys' bias, differs by several times that.
ERROR_FACTOR = 10.0
ROUNDS = {"cpu": 9, "cuda": 50}


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit code: 1 where a backend failed, 2 for options, 130 on Ctrl-C."""
    options = _parser().parse_args(arguments)
    lower = options.device == "cuda" or options.autocast
    options.dtype = options.dtype or ("bfloat16" if lower else "float32")
    options.rounds = options.rounds or ROUNDS[options.device]
    timing.prepare_process(options.threads)
    if options.memory_of is not None:  # this is the fresh process that measures one of them
        print(json.dumps(_peak_cpu_bytes(*options.memory_of, options)))
        return 0
    try:
        dtype = models.check_names(options.presets, options.backends, options.dtype)
        plan = [
            (preset, stage, first)
            for preset in options.presets
            for stage in options.stages or models.stages(preset)
            for first in ((True, False) if stage in options.first else (False,))
        ]
        heads = {case: models.head_dim(*case[:2]) for case in plan}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    names = options.backends or dispatch.names()
    if options.dry_run:
        for case in plan:
            for name in names:
                reason = dispatch.unsupported_reason(name, options.device, dtype, heads[case])
                print(f"{_title(*case)} {name}{f' (no: {reason})' if reason else ''}")
        return 0
    ignored = ("out", "dry_run", "memory_of")
    settings = {k: v for k, v in vars(options).items() if k not in ignored}
    result = results.new_result("layer", options.device, settings) | {"cases": []}

    def measure() -> None:
        with tqdm(total=len(plan) * 2 * options.rounds, desc="layer") as progress:
            for case in plan:
                entry = {"case": _title(*case), "dtype": options.dtype, "rows": []}
                entry |= {"autocast": options.autocast}
                result["cases"].append(entry)
                torch._dynamo.reset()  # the next case's graphs must not count as recompilations
                try:
                    with _autocast(options):
                        _measure_stage(entry, case, names, dtype, options, progress)
                    if not options.no_memory:
                        _measure_memory(entry, case, options, progress)
                finally:
                    progress.write(table(entry) + "\n")
                    results.save(result, options.out)
            progress.write(speedups(result["cases"]))

    return results.record(result, measure, options.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--presets", nargs="+", default=["stat_b64"])
    add("--stages", nargs="+", type=int, help="default: all of a preset")
    add("--backends", nargs="+", help="default: all that can run, the reference too")
    add("--first", nargs="*", type=int, default=[2], help="stages whose first block is timed too")
    add("--dtype", help="default: float32 on a CPU, bfloat16 on CUDA")
    add("--autocast", action="store_true", help="float32 parameters under bfloat16 autocast")
    add("--batch", type=int, default=1)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--threads", type=int)
    add("--rounds", type=int)
    add("--no-compile", action="store_true", help="leave out the compiled rows")
    add("--no-memory", action="store_true", help="leave out the memory measurement")
    add("--memory-of", nargs=4, help=argparse.SUPPRESS)
    add("--dry-run", action="store_true", help="list what would run")
    add("--out", type=Path, default=results.RESULTS)
    return parser


def _autocast(options: argparse.Namespace) -> torch.autocast:
    dtype = getattr(torch, options.dtype)
    return torch.autocast(options.device, dtype, enabled=options.autocast, cache_enabled=False)


def _title(preset: str, stage: int, first: bool) -> str:
    return f"{preset} stage {stage}{', first block' if first else ''}"


def speedups(entries: list[dict[str, Any]]) -> str:
    """How much faster the layer is, forward and backward, than what it replaces.

    A line for each backend and peer: a ratio of medians a case, and their geometric mean.
    """
    found: dict[tuple[str, str], list[float]] = {}
    peaks: dict[str, list[str]] = {}
    for entry in entries:
        times = {
            row["candidate"]: row.get("forward+backward", {}).get("time", {}).get("median_ms")
            for row in entry["rows"]
        }
        sizes = {r["candidate"]: r.get("extra_memory_bytes") for r in entry["rows"]}
        for name in dispatch.names()[:-1]:
            peers = {
                "composite": f"composite, {name}",
                "compiled composite": f"composite, {name}, compiled",
                "repeated keys": f"layer, {dispatch.REFERENCE}",
                "compiled repeated keys": f"layer, {dispatch.REFERENCE}, compiled",
            }
            ours = times.get(f"layer, {name}")
            for peer, candidate in peers.items():
                if ours and times.get(candidate):
                    found.setdefault((name, peer), []).append(times[candidate] / ours)
            own, others = (sizes.get(f"{what}, {name}") for what in ("layer", "composite"))
            if own is not None and others:
                peaks.setdefault(name, []).append(percent(own / others))
    lines = [
        f"layer, {name}, over {peer}: {' '.join(f'{r:.2f}x' for r in ratios)}, "
        f"geometric mean {statistics.geometric_mean(ratios):.2f}x"
        for (name, peer), ratios in found.items()
    ]
    lines += [
        f"layer, {name}, extra memory over composite's: {' '.join(shares)}"
        for name, shares in peaks.items()
    ]
    return "\n".join(lines)


def table(entry: dict[str, Any]) -> str:
    """Parts with their times and their shares of the block, a block for each backend."""
    head = ("", "forward ms", "share", "both ms", "share", "MiB")
    rows = []
    for block in (r for r in entry["rows"] if r["part"] == "block" and r["status"] == "ok"):
        backend = block["backend"]
        totals = [block.get(which, {}).get("time", {}).get("median_ms") for which in PASSES]
        rows.append([f"block with {backend}", ms(totals[0]), "", ms(totals[1]), "", ""])
        sums = [0.0, 0.0]
        for row in entry["rows"]:
            if row["part"] in WHOLES or row["backend"] not in (None, backend):
                continue
            cells = [f"  {row['part']}"]
            for i, which in enumerate(PASSES):
                time_ms = row.get(which, {}).get("time", {}).get("median_ms")
                known = time_ms is not None and totals[i] is not None
                sums[i] += time_ms or 0.0
                cells += [ms(time_ms), percent(time_ms / totals[i] if known else None)]
            rows.append([*cells, ""])
        cells = ["  rest"]
        for total, accounted in zip(totals, sums, strict=True):
            rest = None if total is None else total - accounted
            cells += [ms(rest), percent(None if rest is None else rest / total)]
        rows.append([*cells, ""])
    for row in (r for r in entry["rows"] if r["part"] in WHOLES[1:]):
        medians = [row.get(which, {}).get("time", {}).get("median_ms") for which in PASSES]
        size = mib(row.get("extra_memory_bytes"))
        rows.append([row["candidate"], ms(medians[0]), "", ms(medians[1]), "", size])
    skipped = [r for r in entry["rows"] if r["status"] != "ok"]
    notes = "".join(f"\n{r['candidate']}: {r['reason']}" for r in skipped)
    return f"{entry['case']}, {entry['dtype']}\n{text_table(head, rows)}{notes}"


def _measure_stage(
    entry: dict[str, Any],
    case: tuple[str, int, bool],
    names: list[str],
    dtype: torch.dtype,
    options: argparse.Namespace,
    progress: tqdm,
) -> None:
    preset, stage, first = case
    stored = torch.float32 if options.autocast else dtype
    block, grid, x = models.make_block(preset, stage, options.batch, options.device, stored, first)
    pieces = blocks.pieces(block, x, grid)
    bounds = _bounds(block, x, grid, dtype, options, progress)
    timed: dict[str, tuple[dict[str, Any], list[Piece]]] = {}
    for part in PARTS:
        if part not in BY_BACKEND:
            _add(entry, timed, part, None, pieces[part])
    for name in names:
        reason = dispatch.unsupported_reason(name, options.device, dtype, block.attn.head_dim)
        if reason is not None:
            row = {"candidate": f"block, {name}", "kind": "backend", "status": "cannot run"}
            entry["rows"].append(row | {"reason": reason, "part": "block", "backend": None})
            continue
        attention = [(blocks.insist(name, block.attn.window), pieces["attention"][0][1], [])]
        whole = blocks.whole(block, x, grid, name)
        failed = _failure(whole, bounds)
        if failed is not None:
            row = {"candidate": f"block, {name}", "kind": "backend", "part": "block"}
            entry["rows"].append(row | failed | {"backend": None})
            continue
        _add(entry, timed, "attention", name, attention)
        for part in BY_BACKEND[1:]:
            _add(entry, timed, part, name, [blocks.as_with(name, block, *p) for p in pieces[part]])
        _add(entry, timed, "block", name, [whole])
        _add(entry, timed, "layer", name, [blocks.whole(block, x, grid, name, block.attn)])
        peer = "layer" if name == dispatch.REFERENCE else "composite"
        if peer == "composite":
            composite = blocks.whole(block, x, grid, name, block.attn, fused=False)
            _add(entry, timed, peer, name, [composite])
        if not options.no_compile:
            _add_compiled(entry, timed, peer, name, _compiled(block.attn, x, grid, name))
    timer = timing.timers(options.device)["time"]
    for which in PASSES:
        make = blocks.forward_call if which == "forward" else blocks.both_call
        calls = {
            key: blocks.sequence([make(*p) for p in found]) for key, (_, found) in timed.items()
        }
        samples: dict[str, timing.Samples] = {}

        def begin(name: str, which: str = which) -> None:
            progress.set_postfix_str(f"{entry['case']} {name}, {which}")

        try:
            timing.interleave(
                calls, options.rounds, timer, before=begin, on_round=progress.update, into=samples
            )
        finally:
            for key, taken in samples.items():
                timed[key][0][which] = {"time": taken.to_json()}


def _compiled(attn: nn.Module, x: Tensor, grid: tuple[int, int], backend: str) -> Piece:
    """The layer around that attention, not fused, as torch.compile makes it: a whole graph."""
    attn = copy.deepcopy(attn)
    attn.backend, attn.fused = backend, False
    compiled = torch.compile(attn, dynamic=False, fullgraph=True)
    return lambda tokens: compiled(tokens, grid)[0], (x,), list(attn.parameters())


def _add_compiled(
    entry: dict[str, Any], timed: dict, part: str, backend: str, piece: Piece
) -> None:
    """Compiles both passes before anything is timed; a row that says why where that fails."""
    failed = _failure(piece)
    _add(entry, timed, part, backend, [piece], suffix=", compiled")
    if failed is not None:
        entry["rows"][-1] |= failed | {"kind": "peer"}
        del timed[entry["rows"][-1]["candidate"]]
    else:
        blocks.forward_call(*piece)()


def _measure_memory(
    entry: dict[str, Any],
    case: tuple[str, int, bool],
    options: argparse.Namespace,
    progress: tqdm,
) -> None:
    """Peak bytes of forward and backward beside outputs and gradients, of the eager layers."""
    if options.device != "cpu" or not memory.can_measure_cpu():
        return
    preset, stage, first = case
    for row in entry["rows"]:
        if row["part"] not in WHOLES[1:] or row["candidate"].endswith("compiled"):
            continue
        progress.set_postfix_str(f"{entry['case']} {row['candidate']}, memory")
        arguments = ["--memory-of", preset, str(stage), str(int(first)), row["candidate"]]
        arguments += ["--dtype", options.dtype, "--batch", str(options.batch)]
        arguments += ["--threads", str(torch.get_num_threads())]
        arguments += ["--autocast"] if options.autocast else []
        try:
            row["extra_memory_bytes"] = memory.run_fresh("benchmarks.layer", arguments)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            progress.write(f"{entry['case']} {row['candidate']}: no memory figure: {error}")


def _peak_cpu_bytes(
    preset: str, stage: str, first: str, candidate: str, options: argparse.Namespace
) -> int:
    """In the fresh process: one layer's."""
    stored = torch.float32 if options.autocast else getattr(torch, options.dtype)
    block, grid, x = models.make_block(
        preset, int(stage), options.batch, "cpu", stored, bool(int(first))
    )
    what, backend = candidate.split(", ")
    piece = blocks.whole(block, x, grid, backend, block.attn, fused=what == "layer")
    call = blocks.both_call(*piece, with_outputs=True)
    with _autocast(options):
        return memory.beside_results_bytes(call, memory.rss_growth_bytes)


# What a result is, its right value, its largest RMS error.
Bounds = Sequence[tuple[str, Tensor, float]]


def _bounds(
    block: nn.Module,
    x: Tensor,
    grid: tuple[int, int],
    dtype: torch.dtype,
    options: argparse.Namespace,
    progress: tqdm,
) -> Bounds:
    """Of the block's output and gradients; empty where the reference cannot compute them."""
    names = ["output", "grad_x", *(f"grad of {name}" for name, _ in block.named_parameters())]
    exact_dtype = torch.float32 if dtype.itemsize == 2 else torch.float64
    try:
        with torch.autocast(options.device, enabled=False):
            exact = copy.deepcopy(block).to(exact_dtype)
            whole = blocks.whole(exact, x.to(exact_dtype), grid, dispatch.REFERENCE)
            right = blocks.both_call(*whole, with_outputs=True)()
        same = blocks.both_call(
            *blocks.whole(block, x, grid, dispatch.REFERENCE), with_outputs=True
        )()
    # the repeated keys of the reference may need more memory than there is; the message says so
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        progress.write(f"results are not checked: {type(error).__name__}: {error}")
        return []
    step = torch.finfo(dtype).eps
    return [
        (name, value, ERROR_FACTOR * (_rms(other - value) + step * _rms(value)))
        for name, value, other in zip(names, right, same, strict=True)
    ]


def _rms(x: Tensor) -> float:
    return x.detach().double().square().mean().sqrt().item()


def _failure(whole: Piece, bounds: Bounds = ()) -> dict[str, str] | None:
    """What a row says of a block that raises or is wrong; None where both passes are right."""
    try:
        found = blocks.both_call(*whole, with_outputs=bool(bounds))()
    # whatever a kernel raises, the row says so and the other backends go on
    except Exception as error:
        return results.raised("backend", error)
    for value, (name, right, bound) in zip(found, bounds, strict=False):
        error = _rms(value - right)
        if not error <= bound:  # NaN is wrong, too
            reason = f"WRONG, not timed: {name}: RMS error {error:.3g}, bound {bound:.3g}"
            return {"status": "wrong", "reason": reason}
    return None


def _add(
    entry: dict[str, Any],
    timed: dict,
    part: str,
    backend: str | None,
    pieces: list[Piece],
    suffix: str = "",
) -> None:
    name = (part if backend is None else f"{part}, {backend}") + suffix
    row = {"candidate": name, "kind": "backend", "status": "ok", "part": part, "backend": backend}
    entry["rows"].append(row)
    timed[name] = (row, pieces)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit keeps results, too
    sys.exit(main())

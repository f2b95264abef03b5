"""A whole optimiser step of the model: forward, loss, backward, AdamW.

    python -m benchmarks.train_step                       CPU: stat_tiny; CUDA: the paper's three
    python -m benchmarks.train_step --presets stat_b16 --modes eager

The reference path against each backend, eager and compiled, all from the same weights and step by
step in turn: time, clips/s, model FLOP utilisation (three times the forward's FLOPs over the step's
time and the measured matrix product's rate), peak memory, the first step's time (it compiles), and
whether both paths learn the same: the losses of 20 steps, fewer with fewer --rounds. --mvit adds
torchvision's mvit_v1_b on the same clips, which is what a user might train instead.
"""

import argparse
import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from benchmarks.harness import floors, memory, models, results, timing
from benchmarks.harness.tables import mib, ms, percent, ratio, text_table
from stat_kernels import dispatch

MODES = ("eager", "compile")
MVIT = "mvit_v1_b"
LOSS_STEPS = 20
STEPS_BEFORE_ROUNDS = 2 + timing.WARM_UP_CALLS  # the first one, the warm-up, the estimate
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # of the reference's first loss
LEARNING_RATE = 1e-4
DEFAULTS = {
    "cpu": {"presets": ["stat_tiny"], "rounds": 16, "dtype": "float32", "batch": 1},
    "cuda": {
        "presets": ["stat_b16", "stat_b32", "stat_b64"],
        "rounds": 20,
        "dtype": "bfloat16",
        "batch": 4,
    },
}

Plan = list[tuple[str, str, str]]  # preset, backend, mode


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit code: 1 where a backend failed or its losses are not the reference's,
    2 for options, 130 on Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    for name, value in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    timing.prepare_process(options.threads)
    try:
        models.check_names(options.presets, options.backends, options.dtype)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    names = [*(options.backends or dispatch.names()), *([MVIT] if options.mvit else [])]
    plan = [(p, n, m) for p in options.presets for n in names for m in options.modes]
    if options.memory_of is not None:  # this is the fresh process that measures one of them
        print(json.dumps(_peak_cpu_bytes(*options.memory_of, options)))
        return 0
    if options.dry_run:
        print(_describe(plan, options))
        return 0
    ignored = ("out", "dry_run", "memory_of")
    settings = {k: v for k, v in vars(options).items() if k not in ignored}
    result = results.new_result("train_step", options.device, settings) | {"cases": []}
    return results.record(result, lambda: _measure_all(result, plan, options), options.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--presets", nargs="+", help=f"of {', '.join(models.PRESETS)}")
    add("--backends", nargs="+", help="default: all, the reference too")
    add("--modes", nargs="+", default=list(MODES), choices=MODES)
    add("--dtype", help="of autocast; default: float32 (none) on a CPU, bfloat16 on CUDA")
    add("--batch", type=int, help="clips a step; default: 1 on a CPU, 4 on CUDA")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--threads", type=int)
    add("--rounds", type=int, help="timed steps of each path, after 4 others")
    add("--mvit", action="store_true", help="also torchvision's mvit_v1_b on the same clips")
    add("--no-memory", action="store_true", help="leave out the memory measurement")
    add("--dry-run", action="store_true", help="list what would run")
    add("--out", type=Path, default=results.RESULTS)
    add("--memory-of", nargs=3, help=argparse.SUPPRESS)
    return parser


def _describe(plan: Plan, options: argparse.Namespace) -> str:
    lines = []
    for preset in dict.fromkeys(p for p, _, _ in plan):
        flops = 3 * 2 * _multiply_adds(preset) * options.batch
        steps = STEPS_BEFORE_ROUNDS + options.rounds
        lines.append(f"{preset}: {steps} steps of {flops / 1e9:,.0f} GFLOP on each path")
        paths = [(name, mode) for p, name, mode in plan if p == preset]
        for (name, mode), reason in _unsupported_reasons(preset, paths, options).items():
            lines.append(f"    {name}, {mode}{f': no: {reason}' if reason else ''}")
    return "\n".join(lines)


class Trainer:
    """A model, its optimiser and a fixed batch; each call is one optimiser step.

    Args:
        preset: of the model.
        backend: of its attention; MVIT for torchvision's network.
        mode: "eager" or "compile".
        options: device, dtype and batch of the run.
    """

    def __init__(self, preset: str, backend: str, mode: str, options: argparse.Namespace) -> None:
        self.model: nn.Module
        if backend == MVIT:
            self.model = models.make_mvit(preset, options.device)
        else:
            self.model = models.make_model(preset, options.device, backend)
        self.clips, self.labels = models.make_clips(preset, options.batch, options.device)
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, fused=options.device == "cuda"
        )
        self.device, self.dtype = options.device, getattr(torch, options.dtype)
        self.losses: list[torch.Tensor] = []  # before each step, on the device
        # compiled with its loss; the optimiser stays PyTorch's fused or foreach one. A full graph
        # or none: otherwise a half compiled model would be timed as a compiled one.
        self.loss = self._loss
        if mode == "compile":
            self.loss = torch.compile(self._loss, dynamic=False, fullgraph=True)

    def __call__(self) -> None:
        """One step."""
        self.optimiser.zero_grad(set_to_none=True)
        with self._autocast():
            loss = self.loss(self.clips, self.labels)
        loss.backward()
        self.optimiser.step()
        self.losses.append(loss.detach())

    def _loss(self, clips: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.model(clips).float(), labels)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device, self.dtype)


def _measure_all(result: dict[str, Any], plan: Plan, options: argparse.Namespace) -> None:
    timer = timing.timers(options.device)["time"]
    rates = floors.measure_rates(options.device, [getattr(torch, options.dtype)], timer)
    result["rates"] = rates.to_json()
    presets = list(dict.fromkeys(preset for preset, _, _ in plan))
    with tqdm(total=len(presets) * options.rounds + 2 * len(plan), desc="train_step") as progress:
        for preset in presets:
            entry = {
                "case": preset,
                "dtype": options.dtype,
                "about": f"{options.batch} clips a step",
                "forward_multiply_adds": _multiply_adds(preset),
                "rows": [],
            }
            result["cases"].append(entry)
            mine = [(name, mode) for p, name, mode in plan if p == preset]
            torch._dynamo.reset()  # the next preset's graphs must not count as recompilations
            try:
                _measure_preset(entry, preset, mine, options, progress)
            finally:
                _add_rates(entry, options.batch, rates.matmul_flops_per_s[options.dtype])
                progress.write(table(entry) + "\n")
                results.save(result, options.out)


def _add_rates(entry: dict[str, Any], batch: int, matmul_flops_per_s: float) -> None:
    """Clips a second and model FLOP utilisation of what was timed."""
    step_flops = 3 * 2 * entry["forward_multiply_adds"] * batch
    for row in entry["rows"]:
        time_ms = _step_ms(row)
        if time_ms is not None:
            row["clips_per_s"] = batch / (time_ms / 1e3)
            if not row["candidate"].startswith(MVIT):
                row["model_flop_utilisation"] = step_flops / (time_ms / 1e3) / matmul_flops_per_s


def _measure_preset(
    entry: dict[str, Any],
    preset: str,
    paths: list[tuple[str, str]],
    options: argparse.Namespace,
    progress: tqdm,
) -> None:
    trainers: dict[str, Trainer] = {}
    rows: dict[str, dict[str, Any]] = {}
    for (name, mode), reason in _unsupported_reasons(preset, paths, options).items():
        path = f"{name}, {mode}"
        kind = "peer" if name in (dispatch.REFERENCE, MVIT) else "backend"
        row: dict[str, Any] = {"candidate": path, "kind": kind, "status": "ok"}
        entry["rows"].append(row)
        progress.set_postfix_str(
            f"{preset} {path}: {'compiling' if mode == 'compile' else 'first step'}"
        )
        if reason is not None:
            row |= {"status": "cannot run", "reason": reason}
        else:
            _first_step(trainers, row, preset, name, mode, options)
            rows[path] = row
        progress.update()
    samples: dict[str, timing.Samples] = {}
    # from idle to idle: a step waits for nothing that the next one would not wait for
    clock = timing.time_wall_cuda if options.device == "cuda" else timing.time_wall
    try:
        timing.interleave(
            trainers,
            options.rounds,
            clock,
            before=lambda path: progress.set_postfix_str(f"{preset} {path}"),
            on_round=progress.update,
            into=samples,
        )
    finally:
        for path, taken in samples.items():
            rows[path]["step"] = {"wall": taken.to_json()}
            rows[path]["losses"] = [loss.item() for loss in trainers[path].losses]
        _compare_losses([rows[path] for path in samples], options)
    if not options.no_memory:
        _measure_memory(preset, trainers, rows, options, progress)


def _first_step(
    trainers: dict[str, Trainer],
    row: dict[str, Any],
    preset: str,
    name: str,
    mode: str,
    options: argparse.Namespace,
) -> None:
    """Builds a trainer and makes its first step, which compiles; or the row says why not."""
    start_s = time.perf_counter()
    try:
        trainer = Trainer(preset, name, mode, options)
        trainer()
        trainer.losses[-1].item()  # waits for the device
    # whatever a compiler or a kernel raises, the row says so and the other paths go on
    except Exception as error:
        row |= results.raised(row["kind"], error)
        return
    row["first_step_s"] = time.perf_counter() - start_s
    trainers[row["candidate"]] = trainer


def _compare_losses(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Each path's losses against those of the eager reference path, step by step.

    The measure is the first loss: on one batch losses fall by orders of magnitude in 20 steps, and
    a difference relative to what is left would be one of roundings.
    """
    reference = f"{dispatch.REFERENCE}, eager"
    truth = next((r["losses"] for r in rows if r["candidate"] == reference), None)
    if truth is None:
        return
    for row in rows:
        if row["candidate"].startswith(MVIT):  # another network
            continue
        pairs = list(zip(row["losses"], truth, strict=False))[:LOSS_STEPS]
        row["loss_steps"] = len(pairs)
        row["loss_difference"] = max(abs(a - b) for a, b in pairs) / abs(truth[0])
        row["same_losses"] = row["loss_difference"] <= LOSS_TOLERANCE[options.dtype]


def _measure_memory(
    preset: str,
    trainers: dict[str, Trainer],
    rows: dict[str, dict[str, Any]],
    options: argparse.Namespace,
    progress: tqdm,
) -> None:
    """Peak bytes of a step above parameters, gradients' place and optimiser state."""
    paths = list(trainers)
    if options.device == "cpu":
        trainers.clear()  # the fresh process needs the memory
    for path in paths:
        progress.set_postfix_str(f"{preset} {path}: memory")
        if options.device == "cuda":
            size = memory.cuda_growth_bytes(_without_gradients(trainers[path]))
        elif memory.can_measure_cpu():
            backend, mode = path.split(", ")
            arguments = ["--memory-of", preset, backend, mode, "--batch", str(options.batch)]
            arguments += ["--dtype", options.dtype, "--threads", str(torch.get_num_threads())]
            try:
                size = memory.run_fresh("benchmarks.train_step", arguments)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                progress.write(f"{preset} {path}: no memory figure: {error}")
                continue
        else:
            return
        rows[path]["extra_memory_bytes"] = {"step": size}
        progress.update()


def _peak_cpu_bytes(preset: str, backend: str, mode: str, options: argparse.Namespace) -> int:
    trainer = Trainer(preset, backend, mode, options)
    step = _without_gradients(trainer)
    step()
    return min(memory.rss_growth_bytes(step) for _ in range(2))


def _without_gradients(trainer: Trainer) -> Callable[[], None]:
    def step() -> None:
        trainer()
        trainer.optimiser.zero_grad(set_to_none=True)

    return step


def _multiply_adds(preset: str) -> int:
    config = models.STATConfig.preset(preset)
    return sum(models.count_multiply_adds(config, full_window=False).values())


def _unsupported_reasons(
    preset: str, paths: list[tuple[str, str]], options: argparse.Namespace
) -> dict[tuple[str, str], str | None]:
    """Why a path's backend cannot run the model; None where it can."""
    sizes = sorted({models.head_dim(preset, stage) for stage in models.stages(preset)})
    dtype = getattr(torch, options.dtype)

    def reason(name: str) -> str | None:
        if name == MVIT:
            installed = importlib.util.find_spec("torchvision") is not None
            return None if installed else "torchvision is not installed"
        found = (dispatch.unsupported_reason(name, options.device, dtype, d) for d in sizes)
        return next((r for r in found if r is not None), None)

    return {path: reason(path[0]) for path in paths}


def table(entry: dict[str, Any]) -> str:
    """Every path's step: time, clips/s, utilisation, memory, agreement of losses."""
    head = ("path", "first s", "step ms", "q1-q3", "clips/s", "MFU", "vs reference", "MiB")
    head += ("loss diff", "")
    base = next((_step_ms(r) for r in entry["rows"] if r["candidate"] == "reference, eager"), None)
    rows = []
    for row in entry["rows"]:
        own = _step_ms(row)
        quantiles = row.get("step", {}).get("wall")
        difference = row.get("loss_difference")
        rows.append(
            (
                row["candidate"],
                f"{row['first_step_s']:.1f}" if "first_step_s" in row else "-",
                ms(own),
                "" if own is None else f"{ms(quantiles['q1_ms'])}-{ms(quantiles['q3_ms'])}",
                "-" if own is None else f"{row['clips_per_s']:.2f}",
                percent(row.get("model_flop_utilisation")),
                ratio(None if own is None or base is None else base / own),
                mib(row.get("extra_memory_bytes", {}).get("step")),
                "-" if difference is None else f"{difference:.0e} of {row['loss_steps']}",
                row.get("reason", ""),
            )
        )
    gigas = entry["forward_multiply_adds"] / 1e9
    title = f"{entry['case']}, {entry['dtype']}, {entry['about']}, {gigas:.1f} G multiply-adds"
    return f"{title} forward\n{text_table(head, rows)}"


def _step_ms(row: dict[str, Any]) -> float | None:
    return row.get("step", {}).get("wall", {}).get("median_ms")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit keeps results, too
    sys.exit(main())

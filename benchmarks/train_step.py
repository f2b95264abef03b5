"""A whole optimiser step of the model: forward, loss, backward, AdamW.

    python -m benchmarks.train_step                       CPU: stat_tiny; CUDA: the paper's three
    python -m benchmarks.train_step --presets stat_b16 --modes eager

The reference path against each backend, eager and compiled: time, clips/s, model FLOP utilisation
(three times the forward's FLOPs over the step's time and the measured matrix product's rate), peak
memory, and whether both paths learn the same: the losses of 20 steps from the same weights.
"""

import argparse
import json
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import floors, memory, models, results, timing
from benchmarks.load import LoadWatch
from benchmarks.progress import Progress
from benchmarks.tables import mib, ms, percent, ratio, text_table
from stat_kernels import dispatch

MODES = ("eager", "compile")
LOSS_STEPS = 20
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # relative, the largest of all steps
LEARNING_RATE = 1e-4
DEFAULTS = {
    "cpu": {"presets": ["stat_tiny"], "rounds": 10, "dtype": "float32", "batch": 1},
    "cuda": {
        "presets": ["stat_b16", "stat_b32", "stat_b64"],
        "rounds": 20,
        "dtype": "bfloat16",
        "batch": 4,
    },
}


def main(arguments: list[str] | None = None) -> int:
    """The command; exit code 1 where a backend's losses are not the reference's, 130 on Ctrl-C."""
    options = _parser().parse_args(arguments)
    for name, value in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.threads:
        torch.set_num_threads(options.threads)
    names = options.backends or dispatch.names()
    plan = [(p, n, m) for p in options.presets for n in names for m in options.modes]
    if options.memory_of is not None:  # this is the fresh process that measures one of them
        print(json.dumps(_peak_cpu_bytes(*options.memory_of, options)))
        return 0
    if options.dry_run:
        for preset, name, mode in plan:
            reason = _refusal(name, options)
            print(f"{preset} {name}, {mode}{f' (no: {reason})' if reason else ''}")
        return 0
    ignored = ("out", "dry_run", "memory_of")
    settings = {k: v for k, v in vars(options).items() if k not in ignored}
    result = results.new_result("train_step", options.device, settings) | {"cases": []}
    watch = LoadWatch()
    code = 0
    try:
        _measure_all(result, plan, options)
        result["complete"] = True
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept", file=sys.stderr)
        code = 130
    result["others_cores"] = watch.others_cores()
    print(watch.note(result["machine"]["cores"]))
    print(f"written: {results.write(result, options.out).name}")
    different = [r for e in result["cases"] for r in e["rows"] if r.get("same_losses") is False]
    return code or int(bool(different))


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
    add("--rounds", type=int, help="timed steps of each path")
    add("--no-losses", action="store_true", help="leave out the comparison of losses")
    add("--no-memory", action="store_true", help="leave out the memory measurement")
    add("--dry-run", action="store_true", help="list what would run")
    add("--out", type=Path, default=results.RESULTS)
    add("--memory-of", nargs=3, help=argparse.SUPPRESS)
    return parser


class Trainer:
    """A model, its optimiser and a fixed batch; each call is one optimiser step.

    Args:
        preset: of the model.
        backend: of its attention.
        mode: "eager" or "compile".
        options: device, dtype and batch of the run.
    """

    def __init__(self, preset: str, backend: str, mode: str, options: argparse.Namespace) -> None:
        self.model = models.make_model(preset, options.device, backend)
        self.clips, self.labels = models.make_clips(preset, options.batch, options.device)
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, fused=options.device == "cuda"
        )
        self.device, self.dtype = options.device, getattr(torch, options.dtype)
        # compiled with its loss; the optimiser stays PyTorch's fused or foreach one
        self.loss = torch.compile(self._loss, dynamic=False) if mode == "compile" else self._loss

    def __call__(self) -> torch.Tensor:
        """One step; the loss before it, on the device."""
        self.optimiser.zero_grad(set_to_none=True)
        with self._autocast():
            loss = self.loss(self.clips, self.labels)
        loss.backward()
        self.optimiser.step()
        return loss.detach()

    def _loss(self, clips: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.model(clips).float(), labels)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device, self.dtype)


def _measure_all(
    result: dict[str, Any], plan: list[tuple[str, str, str]], options: argparse.Namespace
) -> None:
    timer = timing.timers(options.device)
    dtype = getattr(torch, options.dtype)
    rates = floors.measure_rates(options.device, [dtype], timer["time"])
    result["rates"] = rates.to_json()
    presets = list(dict.fromkeys(preset for preset, _, _ in plan))
    with Progress(len(presets) * options.rounds + len(plan), "train_step") as progress:
        for preset in presets:
            multiply_adds = _multiply_adds(preset)
            entry = {
                "case": preset,
                "dtype": options.dtype,
                "about": f"{options.batch} clips a step",
                "forward_multiply_adds": multiply_adds,
                "rows": [],
            }
            result["cases"].append(entry)
            mine = [(name, mode) for p, name, mode in plan if p == preset]
            _measure_preset(entry, preset, mine, options, progress)
            step_flops = 3 * 2 * multiply_adds * options.batch
            for row in entry["rows"]:
                time_ms = row.get("step", {}).get("wall", {}).get("median_ms")
                if time_ms is not None:
                    row["clips_per_s"] = options.batch / (time_ms / 1e3)
                    rate = rates.matmul_flops_per_s[options.dtype]
                    row["model_flop_utilisation"] = step_flops / (time_ms / 1e3) / rate
            progress.say(table(entry) + "\n")


def _measure_preset(
    entry: dict[str, Any],
    preset: str,
    variants: list[tuple[str, str]],
    options: argparse.Namespace,
    progress: Progress,
) -> None:
    trainers: dict[str, Trainer] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, mode in variants:
        kind = "peer" if name == dispatch.REFERENCE else "backend"
        row: dict[str, Any] = {"candidate": f"{name}, {mode}", "kind": kind, "status": "ok"}
        entry["rows"].append(row)
        reason = _refusal(name, options)
        if reason is None:
            try:
                trainer = Trainer(preset, name, mode, options)
                row["losses"] = _losses(trainer, 1 if options.no_losses else LOSS_STEPS)
                trainers[row["candidate"]], rows[row["candidate"]] = trainer, row
            # a compiler may refuse a model in any way; the others are still worth timing
            except Exception as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        if reason is not None:
            row |= {"status": "cannot run", "reason": reason}
        progress.step(f"{preset} {row['candidate']}")
    _compare_losses(list(rows.values()), options)
    samples: dict[str, timing.Samples] = {}
    # from idle to idle: a step waits for nothing that the next one would not wait for
    clock = timing.time_wall_cuda if options.device == "cuda" else timing.time_wall
    try:
        timing.interleave(
            trainers, options.rounds, clock, on_round=lambda: progress.step(preset), into=samples
        )
    finally:
        for name, taken in samples.items():
            rows[name]["step"] = {"wall": taken.to_json()}
    if not options.no_memory:
        _measure_memory(preset, trainers, rows, options)
    trainers.clear()
    torch._dynamo.reset()


def _losses(trainer: Trainer, steps: int) -> list[float]:
    return [trainer().item() for _ in range(steps)]


def _compare_losses(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Each path's losses against those of the eager reference path, step by step."""
    reference = f"{dispatch.REFERENCE}, eager"
    truth = next((r["losses"] for r in rows if r["candidate"] == reference), None)
    if truth is None or options.no_losses:
        return
    for row in rows:
        pairs = zip(row["losses"], truth, strict=True)
        row["loss_difference"] = max(abs(a - b) / max(abs(b), 1e-3) for a, b in pairs)
        row["same_losses"] = row["loss_difference"] <= LOSS_TOLERANCE[options.dtype]


def _measure_memory(
    preset: str,
    trainers: dict[str, Trainer],
    rows: dict[str, dict[str, Any]],
    options: argparse.Namespace,
) -> None:
    """Peak bytes of a step above parameters, gradients' place and optimiser state."""
    for name, trainer in trainers.items():
        if options.device == "cuda":
            size = memory.cuda_growth_bytes(_without_gradients(trainer))
        elif memory.can_measure_cpu():
            backend, mode = name.split(", ")
            arguments = ["--memory-of", preset, backend, mode, "--batch", str(options.batch)]
            arguments += ["--dtype", options.dtype, "--threads", str(torch.get_num_threads())]
            size = memory.run_fresh("benchmarks.train_step", arguments)
        else:
            continue
        rows[name]["extra_memory_bytes"] = {"step": size}


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


def _refusal(name: str, options: argparse.Namespace) -> str | None:
    return dispatch.refusal(name, options.device, getattr(torch, options.dtype), 96)


def table(entry: dict[str, Any]) -> str:
    """Every path's step: time, clips/s, utilisation, memory, agreement of losses."""
    head = ("path", "step ms", "q1-q3", "clips/s", "MFU", "vs reference", "MiB", "loss diff", "")
    base = next((_step_ms(r) for r in entry["rows"] if r["candidate"] == "reference, eager"), None)
    rows = []
    for row in entry["rows"]:
        own = _step_ms(row)
        quantiles = row.get("step", {}).get("wall")
        difference = row.get("loss_difference")
        rows.append(
            (
                row["candidate"],
                ms(own),
                "" if own is None else f"{ms(quantiles['q1_ms'])}-{ms(quantiles['q3_ms'])}",
                "-" if own is None else f"{row['clips_per_s']:.2f}",
                percent(row.get("model_flop_utilisation")),
                ratio(None if own is None or base is None else base / own),
                mib(row.get("extra_memory_bytes", {}).get("step")),
                "-" if difference is None else f"{difference:.0e}",
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

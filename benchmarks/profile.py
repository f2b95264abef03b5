"""Time by kernel: one operation, layer or training step under torch.profiler.

    python -m benchmarks.profile                       attention, layer and step of stat_b64
    python -m benchmarks.profile --what step --preset stat_b16 --batch 2

On CUDA the times are the device's, kernel by kernel; on a CPU they are operators' own times. The
table shows the largest; the result file holds all of them.
"""

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import models, results, verify
from benchmarks.harness.cases import select
from benchmarks.harness.tables import text_table
from stat_kernels import shrinking_temporal_attention

WHAT = ("attention", "layer", "step")
CALLS, WARM_UP_CALLS, ROWS_SHOWN = 3, 2, 25


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit code: 2 for options, 130 on Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--what", nargs="+", default=list(WHAT), choices=WHAT)
    add("--preset", default="stat_b64")
    add("--batch", type=int, default=8, help="clips")
    add("--backend", help="default: the best usable one")
    add("--dtype", default="bfloat16", help="of autocast; float32 is none")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--out", type=Path, default=results.RESULTS)
    options = parser.parse_args(arguments)
    try:
        backends = [options.backend] if options.backend else None
        dtype = models.check_names([options.preset], backends, options.dtype)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    result = results.new_result("profile", options.device, settings) | {"cases": []}

    def measure() -> None:
        for what in options.what:
            for name, call in CALLS_OF[what](options, dtype).items():
                entry = {"case": name, "dtype": options.dtype, "rows": _rows(call, options.device)}
                result["cases"].append(entry)
                results.save(result, options.out)
                print(f"{name}\n{_table(entry['rows'])}\n", flush=True)

    return results.record(result, measure, options.out)


def _attention_calls(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Callable]:
    """Forward and backward of every stage's attention call."""
    short = options.preset.removeprefix("stat_")
    found = {}
    for named in select([f"{short}-stage?"], options.device):
        problem = verify.make_inputs_only(named.case, dtype, options.device, options.batch)

        def call(problem: verify.Problem = problem) -> None:
            def attend(*inputs: torch.Tensor | None) -> torch.Tensor:
                return shrinking_temporal_attention(
                    *inputs, window=problem.case.window, backend=options.backend
                )

            verify.forward_backward(attend, problem.leaves(), problem.grad_out)

        found[f"attention, {named.name}, {options.batch} clips"] = call
    return found


def _layer_calls(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Callable]:
    """Forward and backward of the attention layer of a block of every stage."""
    found = {}
    for stage in models.stages(options.preset):
        block, grid, x = models.make_block(
            options.preset, stage, options.batch, options.device, torch.float32
        )
        layer = block.attn
        layer.backend = options.backend
        x.requires_grad_()

        def call(layer: Any = layer, x: torch.Tensor = x, grid: tuple[int, int] = grid) -> None:
            with _autocast(options.device, dtype):
                y, _ = layer(x, grid)
            y.backward(torch.ones_like(y))

        found[f"layer, {options.preset} stage {stage}, {options.batch} clips"] = call
    return found


def _step_calls(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Callable]:
    """A training step without the optimiser."""
    model = models.make_model(options.preset, options.device, options.backend)
    clips, labels = models.make_clips(options.preset, options.batch, options.device)

    def call() -> None:
        with _autocast(options.device, dtype):
            loss = F.cross_entropy(model(clips).float(), labels)
        loss.backward()

    return {f"step, {options.preset}, {options.batch} clips": call}


CALLS_OF = {"attention": _attention_calls, "layer": _layer_calls, "step": _step_calls}


def _autocast(device: str, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device, dtype, enabled=dtype != torch.float32)


def _rows(call: Callable[[], None], device: str) -> list[dict[str, Any]]:
    """Every kernel (CUDA) or operator (CPU) with its launches and time of one call."""
    for _ in range(WARM_UP_CALLS):
        call()
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        torch.cuda.synchronize()
        activities = [ProfilerActivity.CUDA]
    with profile(activities=activities, acc_events=True) as found:
        for _ in range(CALLS):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
    which = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    rows = [
        {
            "candidate": event.key,
            "kind": "profile",
            "status": "ok",
            "launches": event.count / CALLS,
            "time_us": getattr(event, which) / CALLS,
        }
        for event in found.key_averages()
    ]
    rows = [row for row in rows if row["time_us"] > 0]
    return sorted(rows, key=lambda row: -row["time_us"])


def _table(rows: list[dict[str, Any]]) -> str:
    total = sum(row["time_us"] for row in rows)
    shown = [
        (
            row["candidate"][:90],
            f"{row['launches']:g}",
            f"{row['time_us']:,.0f}",
            f"{100 * row['time_us'] / total:.1f} %",
        )
        for row in rows[:ROWS_SHOWN]
    ]
    launches = sum(row["launches"] for row in rows)
    shown.append(("total", f"{launches:g}", f"{total:,.0f}", ""))
    return text_table(("kernel", "launches", "us", "share"), shown)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit keeps results, too
    sys.exit(main())

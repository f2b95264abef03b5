"""A layer whose clip is shared by several processes: peak memory and bytes exchanged.

    python -m benchmarks.clip_parallel            1, 2 and 4 processes, 32 to 512 frames
    python -m benchmarks.clip_parallel --processes 1 2 --frames 32
    python -m benchmarks.clip_parallel --plan     64 GPUs on paper, nothing is run

Processes of this machine (gloo) run the forward and backward pass of one layer of STAT in float32.
Two candidates differ in what they exchange: "shared" exchanges the short keys within the window and
the long keys, "all keys" the short keys of all frames. Output and input gradient are compared with
those of one process. Bytes are what a process receives from the others, the most of all processes.
Memory is the rise of a process's resident memory during the two passes (Linux). Nothing is timed.

The plan is arithmetic: bytes and operations by formula over given rates, without contention.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import results
from benchmarks.harness.memory import can_measure_cpu, rss_growth_bytes, run_fresh
from benchmarks.harness.tables import text_table
from stat_kernels import ShrinkingTemporalAttention
from stat_kernels.distributed import ClipParallel
from stat_video.model.config import STATConfig
from stat_video.model.flops import count_training_flops

GRID, DIM, HEADS, WINDOW = (14, 14), 192, 2, 7
LAYER = {"window": WINDOW, "kv_stride": 2}  # 49 keys of a frame, 16 short ones
TOLERANCE = 1e-5
H100_TFLOPS = 400.0  # bfloat16, about 40 % of the peak


class AllKeys(ClipParallel):
    """Exchanges the keys of all frames, whatever the window."""

    def within(self, left: int, right: int) -> slice:
        return slice(0, self.num_frames) if left or right else super().within(left, right)

    def send(self, x: Tensor, left: int, right: int) -> Any:
        return super().send(x, *(self.num_frames if left or right else 0,) * 2)


CANDIDATES: dict[str, type[ClipParallel]] = {"shared": ClipParallel, "all keys": AllKeys}


class Received(TorchDispatchMode):
    """Counts the bytes that collectives bring from other processes while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("_c10d_functional::")
        if name == "all_to_all_single":
            x, received = args[:2]
            others = sum(received) - received[dist.get_rank()]
            self.bytes += others * x[0].numel() * x.element_size()
        elif name == "all_gather_into_tensor":
            self.bytes += (args[1] - 1) * args[0].nbytes
        return func(*args, **(kwargs or {}))


def step(layer: ShrinkingTemporalAttention, x: Tensor, grad: Tensor, clip: Any) -> list[Tensor]:
    """Output and gradient of the input of this process's frames."""
    layer.zero_grad(set_to_none=True)
    own = slice(None) if clip is None else clip.own
    part = x[:, own].detach().requires_grad_()
    y, _ = layer(part, GRID, clip=clip)
    y.backward(grad[:, own])
    assert part.grad is not None
    return [y.detach(), part.grad]


def work(frames: int, candidate: str) -> dict[str, Any] | None:
    """In each process: the row of a candidate, which the first one returns."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    layer = ShrinkingTemporalAttention(DIM, HEADS, **LAYER)  # type: ignore[arg-type]
    clip = CANDIDATES[candidate](dist.group.WORLD, frames)  # type: ignore[arg-type]
    x = torch.randn(1, frames, GRID[0] * GRID[1] + 1, DIM)
    grad = torch.randn_like(x)
    difference = _difference(step(layer, x, grad, clip), step(layer, x, grad, None), clip.own)
    with Received() as forward, torch.no_grad():
        layer(x[:, clip.own], GRID, clip=clip)
    with Received() as both:
        step(layer, x, grad, clip)
    growth = min(rss_growth_bytes(lambda: step(layer, x, grad, clip)) for _ in range(3))
    found: list[Any] = [None] * clip.size
    dist.all_gather_object(found, (difference, growth, forward.bytes, both.bytes - forward.bytes))
    worst, memory, received, returned = (max(column) for column in zip(*found, strict=True))
    dist.destroy_process_group()
    row = {"candidate": candidate, "kind": "ours", "status": "ok", "difference": worst}
    if not worst < TOLERANCE:
        row |= {"status": "wrong", "reason": f"differs by {worst:.2g} from one process"}
    row |= {"peak_bytes": memory, "forward_bytes": received, "backward_bytes": returned}
    return row if clip.rank == 0 else None


def _difference(found: list[Tensor], whole: list[Tensor], own: slice) -> float:
    pairs = zip(found, (w[:, own] for w in whole), strict=True)
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def measure(result: dict[str, Any], processes: Sequence[int], frames: Sequence[int]) -> None:
    """Fill the result, case by case; a process of one has nothing to exchange."""
    for count in frames:
        for size in processes:
            entry = {"case": f"T{count}-P{size}", "dtype": "float32", "rows": []}
            result["cases"].append(entry)
            for name in list(CANDIDATES)[: 1 if size == 1 else None]:
                launch = ["--standalone", "--nproc-per-node", str(size), "-m", __spec__.name]
                try:
                    row = run_fresh("torch.distributed.run", [*launch, "work", str(count), name])
                except RuntimeError as error:
                    row = {"candidate": name, "kind": "ours", **results.raised("ours", error)}
                entry["rows"].append(row | {"frames": count, "processes": size})
                print(entry["case"], row["candidate"], row["status"], flush=True)


def table(result: dict[str, Any]) -> str:
    """Every row; MiB per process, KiB received per layer and process."""
    head = ["frames, processes", "exchanges", "peak MiB", "forward KiB", "backward KiB"]
    lines = []
    for row in (row for entry in result["cases"] for row in entry["rows"]):
        first = f"{row['frames']:4}, {row['processes']}"
        if row["status"] != "ok":
            lines.append([first, row["candidate"], row["reason"], "", ""])
            continue
        kib = [f"{row[f'{way}_bytes'] / 1024:.0f}" for way in ("forward", "backward")]
        lines.append([first, row["candidate"], f"{row['peak_bytes'] / 2**20:.0f}", *kib])
    return text_table(head, lines)


# -- on paper ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """What a plan assumes: achieved TFLOP/s, GB/s between two processes, and the microseconds that
    a collective takes whatever its size."""

    tflops: float = H100_TFLOPS
    gbytes_per_s: float = 40.0  # one 400 Gbit/s adapter for each GPU
    latency_us: float = 30.0


def received_bytes(config: STATConfig, processes: int, itemsize: int = 2) -> dict[str, int]:
    """Of one clip's forward pass, by a process in the middle: halos, long keys, and, for other
    methods, the short keys of all frames and the keys of all tokens."""
    total, radius = config.token_frames, config.window // 2
    own = total // processes
    halo = min(2 * radius, total - own)
    found = dict.fromkeys(("halo", "long", "all short keys", "all tokens"), 0)
    for depth, dim, (height, width) in zip(
        config.depths, config.dims, config.stage_grids, strict=True
    ):
        token = depth * 2 * dim * itemsize  # key and value, in every block of the stage
        found["halo"] += halo * 16 * token
        found["long"] += (total - own) * token
        found["all short keys"] += (total - own) * 16 * token
        found["all tokens"] += (total - own) * (height * width + 1) * token
    return found


def plan(frames: int, clips: int, rates: Rates) -> str:
    """A training step of stat_b64 with more frames, on 1 to 64 GPUs for each clip."""
    config = replace(STATConfig.preset("stat_b64"), frames=frames)
    flops, layers = clips * count_training_flops(config), sum(config.depths)
    queries = (
        clips
        * 6
        * sum(
            depth * dim**2 * config.token_frames * (height * width + 1)
            for depth, dim, (height, width) in zip(
                config.depths, config.dims, config.stage_grids, strict=True
            )
        )
    )  # the projection of queries and its two gradients: what an exchange overlaps with
    head = ["GPUs a clip", "frames each", "compute ms", "latency ms", "transfer ms", "overlap ms"]
    head += ["MB a layer", "all short keys", "all tokens"]
    lines = []
    for processes in (1, 2, 4, 8, 16, 32, 64):
        found = {k: clips * b for k, b in received_bytes(config, processes).items()}
        exchanged = found["halo"] + found["long"]
        # forward and backward, short and long keys: four collectives a layer
        latency = 4 * layers * rates.latency_us / 1e3 if processes > 1 else 0.0
        megabytes = [b / layers / 1e6 for b in (exchanged, *list(found.values())[2:])]
        lines.append([
            str(processes),
            str(frames // processes),
            f"{flops / processes / rates.tflops / 1e9:.1f}",
            f"{latency:.1f}",
            f"{2 * exchanged / rates.gbytes_per_s / 1e6:.1f}",
            f"{queries / processes / rates.tflops / 1e9:.2f}",
            *(f"{size:.2f}" for size in megabytes),
        ])  # fmt: skip
    return (
        f"arithmetic, not a measurement: stat_b64 with {frames} frames, {clips} clip(s) at once, "
        f"bfloat16, {rates}\n{text_table(head, lines)}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--frames", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--plan", action="store_true", help="print the plan for 64 GPUs and end")
    parser.add_argument("--plan-frames", type=int, default=1024)
    parser.add_argument("--plan-clips", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.plan:
        print(plan(options.plan_frames, options.plan_clips, Rates()))
        return 0
    if not can_measure_cpu():
        parser.error("peak memory can be measured on Linux only")
    torch.set_num_threads(1)
    settings = {"processes": options.processes, "frames": options.frames}
    result = results.new_result("clip_parallel", "cpu", settings) | {"cases": []}
    code = results.record(result, lambda: measure(result, options.processes, options.frames))
    print(table(result))
    return code


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        if (found := work(int(sys.argv[2]), sys.argv[3])) is not None:
            print(json.dumps(found))
    else:
        sys.exit(main())

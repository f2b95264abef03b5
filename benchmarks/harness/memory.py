"""Peak extra memory of a call, in addition to its inputs, outputs and gradients.

On CUDA the allocator reports it. On a CPU a workspace may come from malloc, which PyTorch does not
track, so resident memory is measured instead: in a fresh process whose allocator returns freed
memory at once, the operating system's high-water mark (VmHWM) is reset before a call and read after
it. Linux counts pages in batches, so figures are accurate to about 0.25 MiB.

    python -m benchmarks.harness.memory CASE THREADS CANDIDATES     prints one JSON object
"""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ROOT
from benchmarks.harness.cases import select
from stat_kernels import dispatch
from stat_kernels.testing import Case, Result, make_inputs

PASSES = ("forward", "forward+backward")
# Blocks of 64 KiB and more are mappings of their own, unmapped when freed; one arena for the rest.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "1000000",
}
REPEATS = 2


def extra_cpu_bytes(
    case: str, threads: int, candidates: dict[str, list[str]]
) -> dict[str, dict[str, dict[str, int]]]:
    """Peak extra bytes by dtype, candidate and pass, measured in a fresh process.

    Args:
        case: a named case.
        threads: of PyTorch.
        candidates: names by dtype.

    Raises:
        RuntimeError: the process failed; the message ends with what it printed last.
    """
    return run_fresh("benchmarks.harness.memory", [case, str(threads), json.dumps(candidates)])


def run_fresh(module: str, arguments: list[str], timeout_s: float = 300) -> Any:
    """The JSON that a module's command prints last, run in a fresh process with that allocator.

    Raises:
        RuntimeError: the process failed; the message ends with what it printed last.
    """
    env = {**os.environ, **ALLOCATOR, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        env=env,
        cwd=ROOT,
        timeout=timeout_s,
    )
    if done.returncode != 0:
        raise RuntimeError(f"measuring memory failed: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def can_measure_cpu() -> bool:
    """Whether this system lets a process reset its own high-water mark."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def rss_growth_bytes(call: Callable[[], object]) -> int:
    """The rise of resident memory above its initial level while ``call`` ran, bytes."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = _status_bytes("VmHWM")
    kept = call()
    peak = _status_bytes("VmHWM")
    del kept
    return peak - before


def cuda_growth_bytes(call: Callable[[], object]) -> int:
    """The rise of PyTorch's allocations above their initial level, bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del kept
    return peak - before


def beside_results_bytes(
    call: Callable[[], list[torch.Tensor]], growth: Callable[[Callable[[], object]], int]
) -> int:
    """The least of a few measurements of ``growth``, minus the bytes that the call returns."""
    result_bytes = sum(x.untyped_storage().nbytes() for x in call())
    return max(0, min(growth(call) for _ in range(REPEATS)) - result_bytes)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {field}")


def _measure(case: Case, names: list[str], dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """In the fresh process: every candidate one after the other."""
    from benchmarks.harness import candidates, verify

    grad_out = make_inputs(case, dtype, seed=1)[0]
    problem = verify.Problem(case, make_inputs(case, dtype), grad_out, Result({}))
    found: dict[str, dict[str, int]] = {}
    known = {c.name: c for c in candidates.all_candidates("cpu", dispatch.names())}
    for name in names:
        function, leaves = known[name].prepare(case, "cpu"), problem.leaves()
        calls = {
            "forward": lambda f=function: [verify.forward(f, problem)],
            "forward+backward": lambda f=function, x=leaves: verify.forward_backward(
                f, x, grad_out
            ),
        }
        if known[name].no_backward("cpu") is not None:
            del calls["forward+backward"]
        found[name] = {p: beside_results_bytes(c, rss_growth_bytes) for p, c in calls.items()}
    return found


if __name__ == "__main__":
    case_name, thread_count, wanted = sys.argv[1:]
    torch.set_num_threads(int(thread_count))
    named = select([case_name])[0]
    found = {d: _measure(named.case, n, getattr(torch, d)) for d, n in json.loads(wanted).items()}
    print(json.dumps(found))

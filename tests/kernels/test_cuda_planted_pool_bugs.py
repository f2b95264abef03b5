"""Bugs planted in the CUDA pooling kernels must be found, as in test_cuda_planted_bugs.py."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.kernels.cuda_emulated import planted
from tests.kernels.cuda_emulator.build import EmulatorError
from tests.kernels.cuda_pool_emulated import PoolKernels
from tests.kernels.pool_cases import PoolCase, pool_error_report

SEEDS = range(3)
# With cut cells and lanes without a vector; a mean beside a token that is not read; three passes.
CASES = [
    PoolCase(P=1, B=2, T=2, D=48, grid=(5, 4), stride=2),
    PoolCase(P=1, B=2, T=2, D=96, grid=(5, 4), stride=1, long="mean"),
    PoolCase(P=1, B=2, T=2, D=72, grid=(4, 3), kernel=(3, 3, 1), stride=1),
]
# Few blocks, so that each takes several units of work one after another.
FEW = planted("pool.cu", "kEnoughBlocks = 1024;", "kEnoughBlocks = 2;")


def find_fault(kernels: PoolKernels) -> str | None:
    """The first thing that is wrong, or None."""
    with kernels.registered():
        for seed in SEEDS:
            kernels.emulated.configure(seed)
            for case in CASES:
                try:
                    found = pool_error_report(case, torch.bfloat16, "cuda")
                except EmulatorError as fault:
                    found = [str(fault)]
                if found:
                    return f"seed {seed}, {case}: {found}"
    return None


def test_without_a_bug_nothing_is_found():
    assert find_fault(PoolKernels(FEW)) is None


BUGS = {
    "parameters are used before they are there": (
        "pool_forward.h",
        "  copy_parameters(parameters, a, place.p);\n  __syncthreads();\n",
        "  copy_parameters(parameters, a, place.p);\n",
    ),
    "a lane without a vector counts": (
        "pool_rows.h",
        "lane.active ? term : 0.f",
        "term",
    ),
    "a tap beside the grid reads the next line": (
        "pool_rows.h",
        "static_cast<unsigned>(left + j) < static_cast<unsigned>(a.grid_w)",
        "true",
    ),
    "another kernel's tap beside the grid reads the next line": (
        "pool_rows.h",
        "i < min(a.kh, a.grid_h - top)",
        "i < a.kh",
    ),
    "a cut cell is averaged over a whole one": (
        "pool_forward.h",
        "sum[c] *= 1.f / cell.size()",
        "sum[c] *= 1.f / (a.cell * a.cell)",
    ),
    "the mean is taken before the sums are there": (
        "pool_forward.h",
        "const float* totals) {\n  __syncthreads();",
        "const float* totals) {",
    ),
    "the next unit's sums come before the mean is taken": (
        "pool_forward.h",
        "    *mean_row = pack_row<T>(mean);\n  }\n  __syncthreads();",
        "    *mean_row = pack_row<T>(mean);\n  }",
    ),
    "a row gets a whole cell's share of a cut one": (
        "pool_backward.h",
        "add_share<T>(grad, of_short, height * width)",
        "add_share<T>(grad, of_short, a.cell * a.cell)",
    ),
    "an unread class token's gradient is not written": (
        "pool_backward.h",
        "a.class_token && !a.classes() &&",
        "false &&",
    ),
    "tokens gather rows that are not complete": (
        "pool_backward.h",
        "__syncthreads();  // the unit's rows are complete",
        "",
    ),
    "the next unit's rows come before the last ones are gathered": (
        "pool_backward.h",
        "__syncthreads();  // and done with",
        "",
    ),
    "a token misses the rows past a step of the stride": (
        "pool_backward.h",
        "quotient[tap] += wraps;",
        "quotient[tap] += wraps && tap < 2;",
    ),
    "warps add their sums at the same time": (
        "pool_backward.h",
        "    __syncthreads();\n  }\n  for (int i = threadIdx.x; i < count * a.D",
        "  }\n  __syncthreads();\n  for (int i = threadIdx.x; i < count * a.D",
    ),
    "sums overwrite parameters that are still read": (
        "pool_backward.h",
        "__syncthreads();  // what was in shared memory is done with",
        "",
    ),
    "the frames of a kernel are mirrored": (
        "pool_backward_any.h",
        "unit.t + a.kt / 2 - frame",
        "unit.t - a.kt / 2 + frame",
    ),
    "the last blocks' sums are left out": (
        "pool_backward.h",
        "chunk < a.chunks; chunk += kReduceSlices",
        "chunk < a.chunks - 1; chunk += kReduceSlices",
    ),
    "too little shared memory is asked for": (
        "pool.cu",
        "static_cast<int64_t>(a.out_h) * a.out_w * a.D * 4;",
        "static_cast<int64_t>(a.out_h) * a.out_w * a.D * 4 - 16;",
    ),
}


def with_bug(name: str, right: str, wrong: str) -> PoolKernels:
    found = planted(name, right, wrong)
    if name == "pool.cu":
        found = {"cuda/pool.cu": FEW["cuda/pool.cu"].replace(right, wrong)}
    return PoolKernels(FEW | found)


@pytest.fixture(scope="module")
def faulty():
    """The kernels with each bug in them; compiled side by side."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(lambda bug: with_bug(*bug), BUGS.values())
        return dict(zip(BUGS, made, strict=True))


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug, faulty):
    fault = find_fault(faulty[bug])
    assert fault is not None
    print(fault)


def test_a_read_past_the_tokens_end_is_found():
    """A tap outside the grid is read and thrown away: no result tells, a guard page does."""
    right, wrong = "if (inside) taps[tap] = tokens", "taps[tap] = inside ? taps[tap] : tokens"
    command = [sys.executable, "-m", "tests.kernels.cuda_pool_emulated"]
    done = subprocess.run(
        [*command, "pool_rows.h", right, wrong],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGSEGV, done.stdout + done.stderr

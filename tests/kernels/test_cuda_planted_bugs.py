"""What is known to be wrong must be found: bugs planted in the CUDA kernels, run on the emulator.

Each is a replacement in the source of head dim 96. What finds it is what test_cuda_kernels.py goes
by: the oracle's tolerances, the emulator's sentences, the counted bank conflicts, a guard page.
test_cuda_planted_pool_bugs.py does the same for the pooling.
"""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from stat_kernels.testing import Case, check_backend, make_inputs
from tests.kernels.cuda_emulated import Kernels, planted
from tests.kernels.cuda_emulator.build import EmulatorError

SEEDS = range(4)
UNIT = "head_dim_96"
# Shared memory in KiB and sizes: keys resident in one pass; keys streamed, and several passes over
# them backward; a half tile of one query, and aligned strips with and without room for the next
# frame's keys.
CASES = [
    (227, Case(T=3, Nq=50, H=1, Nc=30, Ns=8, L=3)),
    (99, Case(T=2, Nq=80, H=1, Nc=200, Ns=30, L=5)),
    (227, Case(T=4, Nq=33, H=1, Nc=30, Ns=16, L=16, window=3)),
    (99, Case(T=4, Nq=33, H=1, Nc=16, Ns=16, L=0, window=(2, 1))),
]
# Long ones, with one seed: several bands of queries for one warp; four frames for one block.
BANDS = (227, Case(B=2, T=8, Nq=140, H=33, Nc=5, Ns=1, L=2))
FRAMES = (227, Case(B=2, T=8, Nq=3, H=64, Nc=16, Ns=16, L=0, window=3))


def find_fault(kernels: Kernels) -> str | None:
    """The first thing that is wrong, or None."""
    with kernels.registered():
        for seed in SEEDS:
            for limit_kib, case in CASES if seed else [*CASES, BANDS, FRAMES]:
                kernels.emulated.configure(seed, shared_limit=limit_kib * 1024)
                inputs = make_inputs(case, torch.bfloat16)
                try:
                    check_backend("cuda", inputs, case.window, backward=case is not BANDS[1])
                except (AssertionError, EmulatorError) as fault:
                    return f"seed {seed}: {fault}"
                if kernels.emulated.take_counters().bank_conflicts:
                    return "bank conflicts"
    return None


def test_without_a_bug_nothing_is_found():
    """In a unit compiled as those with bugs are: a comment is what was planted."""
    comment = planted("tiles.h", "// Tiles of rows", "// These are tiles of rows")
    assert find_fault(Kernels(comment, replaced_in=(UNIT,))) is None


BUGS = {
    "no barrier between the copies of keys and their use": (
        "forward.h",
        "copy_wait<0>();\n  __syncthreads();\n",
        "copy_wait<0>();\n",
    ),
    "keys are used before their copies have landed": (
        "forward.h",
        "copy_wait<0>();\n  __syncthreads();\n",
        "copy_wait<1>();\n  __syncthreads();\n",
    ),
    "queries are used before their copies have landed": (
        "forward.h",
        "copy_wait<0>();\n    __syncwarp();",
        "copy_wait<1>();\n    __syncwarp();",
    ),
    "a warp leaves out bands of queries": (
        "forward.h",
        "band += warps();",
        "band += warps() + 1;",
    ),
    "streamed: no barrier between two stages": (
        "forward.h",
        "__syncthreads();  // this step's keys are there",
        "// this step's keys are there",
    ),
    "streamed: the wait leaves a group under way": (
        "forward.h",
        "copy_wait<0>();\n    __syncthreads();",
        "copy_wait<1>();\n    __syncthreads();",
    ),
    "a row past the last key is a key": (
        "forward.h",
        "key < present ?",
        "key <= present ?",
    ),
    "what was summed is not brought to the new largest score": (
        "forward.h",
        "out[s][n][2 * half] *= shrink;",
        "",
    ),
    "two registers of a fragment are swapped": (
        "tiles.h",
        "a[1] = pack<T>(c0[2], c0[3]);\n  a[2] = pack<T>(c1[0], c1[1]);",
        "a[2] = pack<T>(c0[2], c0[3]);\n  a[1] = pack<T>(c1[0], c1[1]);",
    ),
    "lanes give the wrong rows of a fragment": (
        "tiles.h",
        "load_matrices(b, tile + (lane() % 8 + lane() / 16 * 8) * P + lane() / 8 % 2 * 8);",
        "load_matrices(b, tile + (lane() % 8 + lane() / 8 % 2 * 8) * P + lane() / 16 * 8);",
    ),
    "rows of a tile meet in the banks": (
        "tiles.h",
        "kPitch = D + 8;",
        "kPitch = D;",
    ),
    "too little shared memory is asked for": (
        "launch.h",
        "return (2 * rows + warps * strips * kStrip) * kPitch<D> * 2;",
        "return (2 * rows + warps * strips * kStrip - 1) * kPitch<D> * 2;",
    ),
    "a frame attends its own short keys": (
        "frame_keys.h",
        "(neighbour >= own)",
        "(neighbour > own)",
    ),
    "backward: no barrier before the queries' gradient": (
        "backward.h",
        "__syncthreads();  // the tile's score gradients are complete",
        "",
    ),
    "backward: no barrier between steps": (
        "backward.h",
        "__syncthreads();  // this step's tile and keys are there; the last one's are done with",
        "",
    ),
    "backward: the wait leaves a group under way": (
        "backward.h",
        "copy_wait<0>();\n    __syncthreads();",
        "copy_wait<1>();\n    __syncthreads();",
    ),
    "backward: new keys are copied over keys in use": (
        "backward.h",
        "__syncthreads();  // nobody reads the last set's keys any more",
        "",
    ),
    "backward: the weights are taken before they are there": (
        "backward.h",
        "barrier_wait(ready, 2 * 32);",
        "barrier_arrive(ready, 2 * 32);",
    ),
    "backward: both halves of a tile share a barrier": (
        "backward.h",
        "1 + share.pair * (kTile / kHalf) + half;",
        "1 + share.pair;",
    ),
    "backward: score gradients overwrite weights that are still to be taken": (
        "key_gradients.h",
        "__syncwarp();  // all lanes have taken the weights",
        "",
    ),
    "backward: a half tile too many is skipped": (
        "backward.h",
        "Memory::step(n).query + half * kHalf < a.p.Nq",
        "Memory::step(n).query + half * kHalf + 1 < a.p.Nq",
    ),
    "backward: a piece of the queries' gradient too many is skipped": (
        "backward.h",
        "Memory::step(n).query + Piece(number).q0 >= a.p.Nq",
        "Memory::step(n).query + Piece(number).q0 + 1 >= a.p.Nq",
    ),
    "backward: the tables of a step are overwritten too early": (
        "backward_steps.h",
        "kRing = 4;",
        "kRing = 2;",
    ),
    "backward: the first frame's sums are added to what memory held": (
        "backward_steps.h",
        "return first == frame - p.frame_offset ? first + 1 : first;",
        "return first;",
    ),
    "backward: the last chunk of frames is not added": (
        "backward.h",
        "min(a.chunks - 1, (j + p.behind) / a.frames)",
        "min(a.chunks - 2, (j + p.behind) / a.frames)",
    ),
    "aligned: a neighbour behind replaces what was written of it ahead": (
        "backward_steps.h",
        "return row.frame > frame + a.p.frame_offset || row.frame < first + a.p.frame_offset;",
        "return true;",
    ),
    "aligned: a neighbour is added to what memory held": (
        "backward_steps.h",
        "return row.frame > frame + a.p.frame_offset || row.frame < first + a.p.frame_offset;",
        "return row.frame < first + a.p.frame_offset;",
    ),
    "aligned: gradients of replaced keys are carried on": (
        "backward.h",
        "gradients.clear(i, done);",
        "gradients.clear(i, false);",
    ),
    "aligned: a ring has no spare room": (
        "backward_steps.h",
        "a.behind + (a.spare && a.behind > 0);",
        "a.behind;",
    ),
    "aligned: a frame outside the clip is read": (
        "backward_steps.h",
        "frame >= 0 && frame < p.S ? p.Ns : 0",
        "frame < p.S ? p.Ns : 0",
    ),
}


@pytest.fixture(scope="module")
def faulty():
    """The kernels with each bug in them; compiled side by side."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(lambda bug: Kernels(planted(*bug), replaced_in=(UNIT,)), BUGS.values())
        return dict(zip(BUGS, made, strict=True))


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug, faulty):
    fault = find_fault(faulty[bug])
    assert fault is not None
    print(fault)


def test_a_read_past_a_tensors_end_is_found():
    """One query too many is read, and no result tells; a page that must not be touched does."""
    right, wrong = "begin + r < queries;", "begin + r <= queries;"
    command = [sys.executable, "-m", "tests.kernels.cuda_emulated"]
    done = subprocess.run(
        [*command, "tiles.h", right, wrong],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGSEGV, done.stdout + done.stderr

"""In which order the emulator runs things, what it reports of races, and what it refuses."""

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from tests.kernels.cuda_emulator.build import EmulatorError
from tests.kernels.cuda_probes import Probes, rounded, widened

SEEDS = range(6)


@pytest.fixture(scope="module")
def built():
    return Probes()


@pytest.fixture
def probe(built):
    """Fresh settings and counters for every test."""
    return built.fresh()


NO_BUG, PIPELINE_BUGS = 0, {
    "no barrier after the wait": 1,
    "no barrier before the next copy": 2,
    "a wait that is too shallow": 3,
    "no wait": 4,
}  # fmt: skip


def pipeline(probe, variant):
    """x y^T by blocks of copies, and what it should be."""
    rng = np.random.default_rng(0)
    x, y = (rounded(rng.standard_normal((n, 160))) for n in (64, 16))
    out = np.full((64, 16), np.nan, np.float32)
    probe("pipeline", x, out, y, count=160, variant=variant, threads=128, shared=2 * 80 * 48)
    return out, widened(x) @ widened(y).T


@pytest.mark.parametrize("seed", SEEDS)
def test_a_right_pipeline_is_right_in_every_order(probe, seed):
    probe.emulated.configure(seed)
    out, wanted = pipeline(probe, NO_BUG)
    np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-4)
    counters = probe.emulated.take_counters()
    assert asdict(counters) == {
        "blocks": 1,
        "barriers": 20,
        "shuffles": 0,
        "multiply_adds": 10 * 4 * 2,
        "load_phases": 10 * 4 * 2 * 4,
        "bank_conflicts": 0,
        "copies": 10 * 80 * 2,
        "copied_bytes": 10 * 80 * 32,
    }


@pytest.mark.parametrize("bug", PIPELINE_BUGS)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_seed_reports_a_race(probe, bug, seed):
    probe.emulated.configure(seed)
    with pytest.raises(EmulatorError, match=r"a matrix row is read|a copy goes to"):
        pipeline(probe, PIPELINE_BUGS[bug])


@pytest.mark.parametrize("bug", PIPELINE_BUGS)
def test_some_of_four_seeds_shows_a_race_in_the_values(probe, bug):
    """What is left where accesses are not watched, as those through plain pointers never are."""
    shown = []
    for seed in range(4):
        probe.emulated.configure(seed, watch_races=False)
        out, wanted = pipeline(probe, PIPELINE_BUGS[bug])
        shown.append(not np.allclose(out, wanted, rtol=1e-4, atol=1e-4))
    assert any(shown)


def test_a_race_is_reported_whichever_comes_first(probe):
    source = np.zeros((2, 4), np.uint32)
    sentences = set()
    for seed in range(12):
        probe.emulated.configure(seed)
        with pytest.raises(EmulatorError) as raised:
            probe("race", source, threads=64, shared=16)
        sentences.add(str(raised.value).rpartition(", ")[2])
    assert sentences == {
        "which another warp's copy has filled since the last barrier",
        "which another warp has read since the last barrier",
    }


@pytest.mark.parametrize("distance", [32, 1, -1])
def test_plain_accesses_need_a_barrier(probe, distance):
    """Between warps and between the lanes of one, whichever of two lanes is the first in number."""
    wanted = (np.arange(128) - distance) % 128
    wrong = np.zeros(2, int)
    for seed in range(4):
        for barrier in (0, 1):
            probe.emulated.configure(seed)
            out = np.full(128, -1, np.int32)
            probe("exchange", out=out, variant=distance, count=barrier, threads=128, shared=512)
            wrong[barrier] += (out != wanted).sum()
    assert wrong[0] > 4 * 128 / 8
    assert wrong[1] == 0


def test_a_barrier_of_some_warps_lets_one_pass_on_and_the_other_wait(probe):
    wrong = np.zeros(2, int)
    for seed in range(4):
        for barrier in (0, 1):
            probe.emulated.configure(seed)
            out = np.full(128, -1, np.int32)
            probe("hand_over", out=out, count=barrier, threads=256, shared=512)
            wrong[barrier] += (out != np.arange(128) ^ 5).sum()
    assert wrong[0] > 4 * 128 / 8
    assert wrong[1] == 0


def test_without_the_switch_in_assembly(probe):
    """Other machines switch fibers with ucontext, to the same result in the same order."""
    portable = Probes("-DSTA_EMULATE_UCONTEXT")
    found = []
    for probes in (probe, portable):
        probes.emulated.configure(5)
        out = np.full(128, -1, np.int32)
        probes("exchange", out=out, variant=32, threads=128, shared=512)
        found.append((out.tobytes(), pipeline(probes, NO_BUG)[0].tobytes()))
    assert found[0] == found[1]


def test_the_number_of_workers_changes_nothing(probe):
    found = []
    for workers in (1, 2):
        probe.emulated.configure(3, workers=workers)
        source = np.arange(40 * 4, dtype=np.uint32)
        out = np.zeros((40, 4), np.uint32)
        probe("one_copy", source, out, variant=0, blocks=40, shared=32)
        found.append((out.tobytes(), probe.emulated.take_counters()))
    assert found[0] == found[1]


# ---- what no device allows

FORBIDDEN = {
    0: "warp 0 diverges: 16 of its lanes wait in shuffle_xor, 0 at __syncthreads, 16 have exited",
    1: "its warp diverges: it comes to (shuffle_xor|load_matrices) where others wait in",
    2: "warp 0 diverges: 16 of its lanes wait in shuffle_xor, 16 at __syncthreads, 0 have exited",
    3: "63 threads wait at __syncthreads, 1 have exited",
    4: "a matrix row at byte 8 of shared memory is not aligned to 16 bytes",
    5: "a matrix row at byte 496 of shared memory, the block asked for 500",
    6: "a copy at byte -16 of shared memory, the block asked for 500",
    7: "a copy's source is not aligned to 16 bytes",
    8: "lanes of a warp shuffle with different masks",
    9: "warp 0 diverges: 31 of its lanes wait in __syncwarp, 0 at __syncthreads, 1 have exited",
    10: "byte 500 of shared memory was written, the block asked for 500",
    12: "needs a larger stack",
    13: "warp 0 waits at barrier 3, to which 32 threads have come",
    14: "barrier 3 is left with 32 threads that nobody waited for",
    15: "there is no barrier 16",
}


@pytest.mark.parametrize("variant", FORBIDDEN)
def test_what_no_device_allows_is_a_sentence(probe, variant):
    source = np.zeros(16, np.float32)
    source = source[(-source.ctypes.data % 16) // 4 :][:8]  # aligned to 16 bytes
    with pytest.raises(EmulatorError, match=FORBIDDEN[variant]) as raised:
        probe("forbidden", source, count=500, variant=variant, threads=64, shared=500)
    assert str(raised.value).startswith("block 0: ")
    probe("places", out=np.zeros((1, 64, 4), np.uint32), threads=64)  # goes on working
    assert probe.emulated.sentence() == ""


BEYOND = """
from tests.kernels import cuda_probes
probe = cuda_probes.Probes()
print("built", flush=True)
probe("forbidden", count=500, variant=11, shared=500)
"""


def test_a_page_that_must_not_be_touched_follows_shared_memory():
    """A plain access beyond it kills the process, as one far outside would on a device."""
    done = subprocess.run(
        [sys.executable, "-c", BEYOND],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == "built", done.stderr
    assert done.returncode == -11


def test_launches_that_a_device_refuses(probe):
    out = np.zeros((1, 1024, 4), np.uint32)
    probe.emulated.configure(shared_limit=99 * 1024)
    probe("places", out=out, shared=99 * 1024)
    for sizes in (
        {"shared": 99 * 1024 + 1},
        {"threads": 1056},
        {"blocks": 0},
        {"blocks": 2**31},
    ):
        with pytest.raises(EmulatorError, match=r"code [19]"):
            probe("places", out=out, **sizes)
    with pytest.raises(EmulatorError, match="a block has 33 threads, must be whole warps"):
        probe("places", out=out, threads=33)

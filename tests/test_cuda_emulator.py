"""The emulator that the CUDA kernels are tested on, tested itself on small kernels of its own.

Fragment layouts are held to the PTX ISA's text (ldmatrix, mma.m16n8k16), index by index.
"""

import ctypes
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from cuda_emulator.build import HERE, EmulatorError, build

SEEDS = range(6)


class Probes:
    """The kernels of probes.cu by name, on numpy arrays."""

    def __init__(self, *defines):
        self.emulated = build([HERE / "probes.cu"], defines=defines)

    def __call__(
        self, name, inputs=None, out=None, others=None, *,
        count=0, variant=0, blocks=1, threads=32, shared=0,
    ):  # fmt: skip
        pointers = [None if x is None else x.ctypes.data_as(ctypes.c_void_p)
                    for x in (inputs, others, out)]  # fmt: skip
        code = self.emulated.library.probe(
            name.encode(), *pointers, count, variant, ctypes.c_int64(blocks), threads, shared
        )
        self.emulated.check(code)
        return out


@pytest.fixture(scope="module")
def built():
    return Probes()


@pytest.fixture
def probe(built):
    """Fresh settings and counters for every test."""
    built.emulated.configure()
    built.emulated.take_counters()
    return built


def rounded(x):
    """float32 -> the bits of bfloat16, cut off; exact where 16 bits suffice."""
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def widened(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


# ---- primitives


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices_gives_every_lane_its_pairs(probe, transposed):
    rows = np.arange(32 * 8, dtype=np.uint16).reshape(32, 8)
    out = np.zeros((32, 4), np.uint32)
    name = "load_transposed" if transposed else "load"
    probe(name, rows, out, count=16, shared=32 * 16)
    for lane in range(32):
        for m in range(4):
            matrix = rows[8 * m : 8 * m + 8]
            matrix = matrix.T if transposed else matrix
            row, column = lane // 4, 2 * (lane % 4)
            low, high = int(matrix[row, column]), int(matrix[row, column + 1])
            assert out[lane, m] == low | high << 16


def fragments(a, b):
    """What lane l holds of A (16 x 16) and B (16 x 8), from the PTX ISA's formulas.

    a_i: row groupID for i in 0, 1, 4, 5, else groupID + 8; column 2 * threadID_in_group + (i & 1),
    plus 8 from i = 4 on. b_i: row 2 * threadID_in_group + (i & 1), plus 8 from i = 2 on; column
    groupID. Two values share a register, the first in its lower half.
    """
    held = np.zeros((32, 6), np.uint32)
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        values = []
        for i in range(8):
            row = group if i in (0, 1, 4, 5) else group + 8
            values.append(a[row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)])
        for i in range(4):
            values.append(b[thread * 2 + (i & 1) + (8 if i >= 2 else 0), group])
        for register in range(6):
            held[lane, register] = int(values[2 * register]) | int(values[2 * register + 1]) << 16
    return held


def accumulators(c):
    """What lane l holds of C (16 x 8): c_i in row groupID, from i = 2 on groupID + 8."""
    held = np.zeros((32, 4), np.float32)
    for lane in range(32):
        for i in range(4):
            row = (lane >> 2) + (8 if i >= 2 else 0)
            held[lane, i] = c[row, (lane % 4) * 2 + (i & 1)]
    return held


@pytest.mark.parametrize("dtype", ["half", "bfloat16"])
def test_multiply_add_has_the_documented_fragments(probe, dtype):
    rng = np.random.default_rng(0)
    # Small whole numbers: every product and sum is exact, and one swapped index shows.
    a, b = rng.integers(-8, 9, (16, 16)), rng.integers(-8, 9, (16, 8))
    c = rng.integers(-100, 100, (16, 8)).astype(np.float32)

    def bits(x):
        return rounded(x) if dtype == "bfloat16" else x.astype(np.float16).view(np.uint16)

    out = accumulators(c)
    probe(f"multiply_{dtype}", fragments(bits(a), bits(b)), out)
    np.testing.assert_array_equal(out, accumulators((c + a @ b).astype(np.float32)))
    assert probe.emulated.take_counters().multiply_adds == 1


def test_multiply_add_rounds_no_product(probe):
    """0.1 squared in half: the product has 22 bits, and float32 keeps them all."""
    tenth = np.float16(0.1)
    a, b = np.zeros((16, 16), np.float16), np.zeros((16, 8), np.float16)
    a[0, 0] = b[0, 0] = tenth
    out = np.zeros((32, 4), np.float32)
    probe("multiply_half", fragments(a.view(np.uint16), b.view(np.uint16)), out)
    assert out[0, 0] == np.float64(tenth) ** 2


@pytest.mark.parametrize("mask", [1, 2, 4, 8, 16, 31])
def test_shuffle(probe, mask):
    values = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    out = probe("shuffle", values, np.zeros(32, np.float32), variant=mask)
    np.testing.assert_array_equal(out, values[np.arange(32) ^ mask])


CONVERTED = np.dtype([("pair", np.uint32), ("low", np.float32), ("high", np.float32)])


def many_floats():
    """Ties, subnormal halves, overflows, infinities, and a sweep of all exponents."""
    halves = np.arange(0, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (halves[:-1] + halves[1:]) / 2
    upper = np.arange(0x7F80, dtype=np.uint32)
    bfloats = (upper << 16).view(np.float32)
    ties = ((upper << 16) + 0x8000).view(np.float32)
    sweep = np.random.default_rng(0).integers(0, 2**31 - 2**23, 50_000).astype(np.uint32)
    above = np.nextafter(between, np.float32(np.inf))
    below = np.nextafter(between, np.float32(0))
    tail = np.array([65503, 65504, 65519.99, 65520, 1e38, np.inf], np.float32)
    found = np.concatenate(
        [halves, between, above, below, bfloats, ties, sweep.view(np.float32), tail]
    )
    found = np.concatenate([found, -found])
    return found[: len(found) // 2 * 2]


def test_half_rounds_to_nearest_even(probe):
    values = many_floats()
    out = np.zeros(len(values) // 2, CONVERTED)
    probe("convert_half", values, out, count=len(out))
    with np.errstate(over="ignore"):
        wanted = values.astype(np.float16)
    np.testing.assert_array_equal(
        np.ascontiguousarray(out["pair"]).view(np.uint16), wanted.view(np.uint16)
    )
    back = np.stack([out["low"], out["high"]], 1).ravel()
    np.testing.assert_array_equal(back, wanted.astype(np.float32))


def test_bfloat16_rounds_to_nearest_even(probe):
    import torch

    values = many_floats()
    out = np.zeros(len(values) // 2, CONVERTED)
    probe("convert_bfloat16", values, out, count=len(out))
    wanted = torch.from_numpy(values).to(torch.bfloat16)
    bits = wanted.view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(np.ascontiguousarray(out["pair"]).view(np.uint16), bits)
    back = np.stack([out["low"], out["high"]], 1).ravel()
    np.testing.assert_array_equal(back, wanted.float().numpy())


@pytest.mark.parametrize("dtype", ["half", "bfloat16"])
def test_nan_stays_nan(probe, dtype):
    out = np.zeros(1, CONVERTED)
    bits = np.array([0x7F800001, 0xFFFFFFFF], np.uint32)
    probe(f"convert_{dtype}", bits.view(np.float32), out, count=1)
    assert np.isnan(out["low"][0])
    assert np.isnan(out["high"][0])


def test_exponential_and_logarithm(probe):
    values = np.array([0, 1, -1, 0.5, 10, -126, -126.5, -150, -np.inf, 128], np.float32)
    out = np.zeros((len(values), 2), np.float32)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        probe("logarithms", values, out, count=len(values))
        exponential, logarithm = np.exp2(values), np.log2(values)
    exponential[values < -126] = 0  # results below the smallest normal float are flushed
    np.testing.assert_allclose(out[:, 0], exponential, rtol=3e-7)
    np.testing.assert_allclose(out[:, 1], logarithm, rtol=3e-7)


def test_every_thread_of_every_block_runs_once(probe):
    out = np.zeros((7, 96, 4), np.uint32)
    for _ in range(2):
        probe("places", out=out, blocks=7, threads=96)
    for block in range(7):
        np.testing.assert_array_equal(out[block, :, 0], np.arange(96))
        assert (out[block, :, 1:] == [block, 96, 7]).all()
    assert probe.emulated.take_counters().blocks == 14
    assert probe.emulated.take_counters().blocks == 0


# ---- shared memory


def test_shared_memory_holds_nan_at_a_blocks_start(probe):
    """Also in the second block, whatever the first has left there."""
    rows = np.zeros((32, 8), np.uint16)
    probe("load", rows, np.zeros((32, 4), np.uint32), count=16, shared=512)
    out = probe("untouched_memory", out=np.zeros(512, np.uint8), count=512, shared=512)
    assert (out == 0xFF).all()
    for dtype in (np.float16, np.float32):
        assert np.isnan(out.view(dtype)).all()
    assert np.isnan(widened(out.view(np.uint16))).all()


@pytest.mark.parametrize(
    ("pitch", "conflicts"),
    # Rows that lie 16 bytes (or an odd multiple) apart meet no other; at 32 two share a group of
    # banks, at 64 four, at 128 all eight: one pass more for each beyond the first, in each of the
    # four phases. 208 = 2 * (96 + 8) bytes is a padded row of head dim 96, 192 an unpadded one.
    [(16, 0), (32, 4), (48, 0), (64, 12), (128, 28), (256, 28), (192, 12), (208, 0), (272, 0)],
)
def test_bank_conflicts(probe, pitch, conflicts):
    rows = np.zeros((32, 8), np.uint16)
    probe("load", rows, np.zeros((32, 4), np.uint32), count=pitch, shared=32 * pitch)
    counters = probe.emulated.take_counters()
    assert (counters.load_phases, counters.bank_conflicts) == (4, conflicts)


def test_the_same_row_twice_is_no_conflict(probe):
    rows = np.tile(np.arange(8, dtype=np.uint16), (32, 1))
    probe("load", rows, np.zeros((32, 4), np.uint32), count=0, shared=16)
    assert probe.emulated.take_counters().bank_conflicts == 0


# ---- copies


def copies(probe, waited_groups, seed):
    source = np.arange(1, 9 * 4 + 1, dtype=np.uint32).reshape(9, 4)
    before = source[:, 0].copy()
    probe.emulated.configure(seed)
    out = np.zeros((9, 4), np.uint32)
    probe("one_copy", source, out, variant=waited_groups, blocks=9, shared=32)
    return before, out


@pytest.mark.parametrize("seed", SEEDS)
def test_a_copy_has_landed_after_its_wait(probe, seed):
    """What it brings is the source at the moment of landing: the old value or the new one."""
    before, out = copies(probe, 0, seed)
    assert ((out[:, 1] == before) | (out[:, 1] == 7)).all()
    assert (out[:, 2] == 0).all()  # the second copy has no source
    np.testing.assert_array_equal(out[:, 1], out[:, 3])


def test_a_copy_lands_early_or_late(probe):
    """Each of the two happens in every launch of a few blocks."""
    nothing = 0xFFFFFFFF
    for seed in SEEDS:
        before, out = copies(probe, 0, seed)
        assert 0 < (out[:, 0] == nothing).sum() < len(out)
        assert 0 < (out[:, 0] == before).sum() < len(out)


def test_a_wait_covers_all_but_the_last_groups(probe):
    nothing = 0xFFFFFFFF
    first, second, neither = np.zeros((3, 0), np.uint32)
    for seed in SEEDS:
        first = np.append(first, copies(probe, 1, seed)[1][:, 1])
        second = np.append(second, copies(probe, 1, seed)[1][:, 2])
        neither = np.append(neither, copies(probe, 2, seed)[1][:, 1])
    assert nothing not in first  # the older of the two groups is covered by wait<1>
    assert nothing in second
    assert nothing in neither


# ---- order


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
import test_cuda_emulator as tests
probe = tests.Probes()
print("built", flush=True)
probe("forbidden", count=500, variant=11, shared=500)
"""


def test_a_page_that_must_not_be_touched_follows_shared_memory():
    """A plain access beyond it kills the process, as one far outside would on a device."""
    done = subprocess.run(
        [sys.executable, "-c", BEYOND], capture_output=True, text=True, cwd=Path(__file__).parent
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

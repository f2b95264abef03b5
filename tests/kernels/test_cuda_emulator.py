"""What the emulator takes from the PTX ISA: fragments, conversions, shared memory, copies.

Tested on small kernels of its own; layouts are held to the ISA's text (ldmatrix, mma.m16n8k16),
index by index.
"""

import numpy as np
import pytest

from tests.kernels.cuda_probes import Probes, rounded, widened

SEEDS = range(6)


@pytest.fixture(scope="module")
def built():
    return Probes()


@pytest.fixture
def probe(built):
    """Fresh settings and counters for every test."""
    return built.fresh()


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

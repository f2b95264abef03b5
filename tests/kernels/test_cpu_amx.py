"""What only the tile kernels have: blocks of keys, padding in tiles, the processor's tile state.

tests/kernels/test_cpu_kernel.py runs for them as for the other instruction sets.
"""

import ctypes
import os
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stat_kernels import native
from stat_kernels.__main__ import describe
from stat_kernels.testing import Case, check_backend, make_inputs, oracle, run

TILE_SETS = ("amx", "avx512-bf16", "amx-emulated")
USABLE = [name for name in native.instruction_sets() if name in TILE_SETS]
BLOCK = 512  # keys, kTileBlockKeys


@pytest.fixture(params=USABLE)
def tiles(request, monkeypatch):
    """Every tile set that is usable here; the emulated one always is."""
    monkeypatch.setenv("STAT_CPU_ISA", request.param)
    return request.param


def _inputs(case, **kwargs):
    return make_inputs(case, torch.bfloat16, **kwargs)


def test_the_emulated_set_is_offered_and_never_chosen():
    *others, last = native.instruction_sets()
    assert last == "amx-emulated"
    assert others


def test_only_bfloat16_has_tile_kernels(tiles):
    assert native.instruction_set_of(torch.bfloat16) == tiles
    for dtype in (torch.float32, torch.float64, torch.float16):
        assert native.instruction_set_of(dtype) in ("avx512", "portable")


sizes = st.integers(1, 70)


@pytest.mark.parametrize("name", USABLE)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 2), T=st.integers(1, 5), Nq=sizes, H=st.integers(1, 3), D=st.integers(2, 20),
    Nc=sizes, Ns=st.integers(0, 20), L=st.integers(0, 20), radius=st.integers(0, 5),
)  # fmt: skip
def test_random_sizes(name, B, T, Nq, H, D, Nc, Ns, L, radius):
    """A wrong index shows as an error of the values' own size, so the bound may be a plain one."""
    case = Case(B, T, Nq, H, 8 * D, Nc, Ns, L, 2 * radius + 1)
    inputs = _inputs(case)
    grad = torch.randn_like(inputs[0])
    exact = oracle(inputs, case.window, grad).tensors
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAT_CPU_ISA", name)
        found = run(inputs, case.window, "cpu", grad).tensors
    for key, value in found.items():
        size = exact[key].abs().max().item()
        difference = (value.double() - exact[key]).abs().max().item()
        assert difference <= 0.03 * size + 1e-6, key


@pytest.mark.parametrize("keys", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 17])
def test_blocks_of_keys(keys, tiles):
    check_backend("cpu", _inputs(Case(T=1, Nq=37, H=1, D=32, Nc=keys, Ns=0, L=0)), 1)


def test_very_many_keys(tiles):
    case = Case(T=1, Nq=5, H=1, D=16, Nc=20_000, Ns=0, L=0)
    check_backend("cpu", _inputs(case), 1)


@pytest.mark.parametrize("keys", [40, BLOCK + 40])
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-3])
def test_any_scale(scale, keys, tiles):
    case = Case(T=2, Nq=19, D=24, Nc=keys, Ns=3, L=2)
    inputs = _inputs(case)
    grad = torch.randn_like(inputs[0])
    exact = oracle(inputs, 3, grad, scale=scale).tensors
    for name, value in run(inputs, 3, "cpu", grad, scale=scale).tensors.items():
        torch.testing.assert_close(value.double(), exact[name], rtol=2e-2, atol=2e-2, msg=name)


@pytest.mark.parametrize("keys", [177, BLOCK + 177])
def test_lse_is_more_precise_than_bfloat16(keys, tiles):
    """Products of bfloat16 are exact in float32, so only the sums and the exponential round."""
    inputs = _inputs(Case(T=1, Nq=64, H=1, Nc=keys, Ns=0, L=0))
    exact = oracle(inputs, 1).tensors["lse"]
    torch.testing.assert_close(
        run(inputs, 1, "cpu").tensors["lse"].double(), exact, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("masked", [1, 37, BLOCK, BLOCK + 3])
def test_scores_of_minus_infinity_have_no_weight(masked, tiles):
    """Whole tiles and blocks of them included, forward and backward."""
    case = Case(T=1, Nq=33, H=1, D=32, Nc=masked + 20, Ns=0, L=0)
    q, k, v, *absent = _inputs(case)
    q[..., 0] = 1
    k[:, :, :masked, :, 0] = -float("inf")
    grad = torch.randn_like(q)
    exact = run((q, k[:, :, masked:], v[:, :, masked:], *absent), 1, "cpu", grad).tensors
    found = run((q, k, v, *absent), 1, "cpu", grad).tensors
    torch.testing.assert_close(found["out"], exact["out"], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found["lse"], exact["lse"], rtol=1e-5, atol=1e-5)
    assert not found["grad_v_cur"][:, :, :masked].any()
    torch.testing.assert_close(
        found["grad_v_cur"][:, :, masked:], exact["grad_v_cur"], rtol=2e-2, atol=2e-2
    )


def _same_bits_in_turns(rounds=3):
    """The kernel and PyTorch's own products, in turns, give what they gave at first."""
    inputs = _inputs(Case(T=3, Nq=50, H=2))
    first = run(inputs, 3, "cpu", torch.ones_like(inputs[0])).tensors
    a = torch.randn(256, 256).bfloat16()
    product = a @ a
    q = torch.randn(1, 2, 128, 64).bfloat16()
    attention = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    for _ in range(rounds):
        again = run(inputs, 3, "cpu", torch.ones_like(inputs[0])).tensors
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert torch.equal(a @ a, product)
        beside = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        assert torch.equal(beside, attention)


def test_beside_pytorchs_own_use_of_tiles(tiles):
    _same_bits_in_turns()


def test_in_any_thread(tiles):
    errors = []

    def work():
        try:
            torch.set_num_threads(1)
            _same_bits_in_turns()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


CONFIGURATION = r"""
void store(void* to) { __asm__ volatile("sttilecfg %0" : "=m"(*(char(*)[64])to)); }
void load(const void* from) { __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])from)); }
"""


@pytest.mark.skipif("amx" not in USABLE, reason="this processor has no tile configuration")
@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("threads", [1], indirect=True)
def test_the_threads_tile_configuration_is_restored(rows, threads, tmp_path):
    """Another library may keep one loaded. rows: of its first tile; 0: it has none."""
    (tmp_path / "tiles.c").write_text(CONFIGURATION)
    compiler = os.environ.get("CC") or "cc"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", "tiles.so", "tiles.c"], cwd=tmp_path, check=True
    )
    library = ctypes.CDLL(str(tmp_path / "tiles.so"))
    before, after = bytearray(64), (ctypes.c_char * 64)()
    if rows:
        before[0], before[16], before[48] = 1, 64, rows  # palette, bytes a row, rows
    inputs = _inputs(Case(T=1, Nq=20, H=1))
    library.load((ctypes.c_char * 64).from_buffer(before))
    run(inputs, 3, "cpu", torch.ones_like(inputs[0]))
    library.store(after)
    library.load((ctypes.c_char * 64)())
    assert after.raw == bytes(before)


FORKED = """
import os, sys, torch
from stat_kernels.testing import Case, make_inputs, run
torch.set_num_threads(1)
before = sys.argv[1] == "before"  # does the parent use the kernel before it forks?
inputs = make_inputs(Case(T=2, Nq=40), torch.bfloat16)
def results():
    return run(inputs, 3, "cpu", torch.ones_like(inputs[0])).tensors
if before:
    expected = results()
child = os.fork()
if child == 0:
    torch.save(results(), sys.argv[2])
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0, "the child failed"
found = torch.load(sys.argv[2])
assert all(torch.equal(found[name], value) for name, value in results().items())
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_after_a_fork(when, tmp_path):
    """Parent and child give the same bits, whoever comes first."""
    command = [sys.executable, "-c", FORKED, when, str(tmp_path / "child.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_report_names_the_set_of_each_dtype(tiles):
    line = next(x for x in describe().splitlines() if x.startswith("CPU kernel"))
    assert f"{tiles} for bfloat16" in line
    assert "amx-emulated" in line.split("STAT_CPU_ISA can be")[1]

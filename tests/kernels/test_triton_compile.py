"""What every entry of the Triton table compiles to, and what makes a kernel compile again.

In processes of their own: a stand-in for the driver is active there, and nothing is interpreted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
triton_compile = pytest.importorskip("tools.triton_compile")
config = pytest.importorskip("stat_kernels.backends.triton.config")

ROOT = Path(__file__).parents[2]


def python(*arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def rows():
    found = json.loads(python("-m", "tools.triton_compile", "--json").splitlines()[-1])
    return [triton_compile.Row(**row) for row in found]


def loops(rows):
    """The attention kernels that do the work, not those that add chunks or recompute NaN tiles."""
    return [row for row in rows if not row.kernel.startswith(("repair", "sum", "pool "))]


def test_every_entry_is_compiled(rows):
    """An entry that equals that of few queries is the same kernel and has no rows of its own."""
    entries = {(row.architecture, row.numbers, row.head_dim) for row in rows}
    assert entries == {(key.architecture, key.numbers, key.head_dim) for key in config.TABLE}
    for entry in entries:
        kernels = {r.kernel for r in rows if (r.architecture, r.numbers, r.head_dim) == entry}
        for launched in triton_compile.LAUNCHES.values():
            assert kernels >= set(launched) - {"grad_own_long"}  # may have the tile of grad_own
        assert kernels >= {"forward pooled", "grad_query pooled"}
        assert kernels >= set(triton_compile.POOL_LAUNCHES)


def test_no_register_is_spilled(rows):
    """On no architecture and at no head dim; a stack frame would be a spill in disguise."""
    for row in rows:
        assert (row.spills, row.stack_bytes) == (0, 0), row


def test_shared_memory_is_within_the_limit(rows):
    for row in rows:
        assert row.shared_bytes <= config.SHARED_BYTES[row.architecture], row


def test_the_matrix_units_do_the_products(rows):
    """Two products a loop in the forward, three and four in the backward, in every chunk of D."""
    for row in loops(rows):
        if row.numbers == "half" or row.architecture in config.AMD.values():
            assert row.matrix >= {"forward": 2, "grad_query": 3}.get(row.kernel.split()[0], 4), row
        else:
            assert row.matrix == 0, row  # full float32 precision unless tf32 is allowed


def test_every_main_loop_copies_asynchronously(rows):
    for row in loops(rows):
        assert row.copies >= 2 or row.architecture in config.AMD.values(), row


def test_two_pooling_programs_share_a_multiprocessor(rows):
    """Its loads wait for memory; in 16 bits at STAT's head dim another program fills the gaps."""
    for row in rows:
        nvidia = row.architecture not in config.AMD.values()
        if (
            nvidia
            and row.kernel.startswith("pool")
            and row.head_dim == 96
            and row.numbers == "half"
        ):
            assert row.registers <= 128, row


def test_an_amd_multiprocessor_holds_eight_waves(rows):
    """Two on each of its four units, which have 512 registers a lane, wherever a head is narrow."""
    for row in rows:
        if row.architecture in config.AMD.values() and row.head_dim <= 128:
            assert row.registers <= 256, row
            assert row.shared_bytes <= 40 * 1024, row


def test_the_committed_report_is_what_is_compiled(rows):
    committed = triton_compile.REPORT.read_text()
    if f"triton {triton.__version__}," not in committed:
        pytest.skip("the report was written by another version of triton")
    assert committed == triton_compile.table(rows), (
        "run `python -m tools.triton_compile` and look at what changed"
    )


RECOMPILES = """
import torch
from tools.triton_compile import Recorder
from stat_kernels.testing import Case

record = Recorder(90)
def kernels(case, pooled=False):
    return {id(kernel) for kernel, _ in record(case, torch.bfloat16, pooled)}

known = kernels(Case(T=3, Nq=50, H=2, D=64, L=3))  # own and long keys together
known |= kernels(Case(T=3, Nq=50, H=2, D=64, L=30))  # and apart
known |= kernels(Case(T=3, Nq=50, H=2, D=64, L=3), pooled=True)
for case in (
    Case(T=1, Nq=1, H=1, D=64, Nc=1, Ns=1, L=1),
    Case(B=2, T=16, Nq=32, H=16, D=64, Nc=16, Ns=16, L=16, window=15),
    Case(B=3, T=7, Nq=33, H=3, D=64, Nc=49, Ns=17, L=9, window=5),
    *(Case(Ns=0, L=0, D=64), Case(L=0, D=64), Case(Ns=0, D=64)),
):
    assert kernels(case) <= known, case
assert kernels(Case(T=8, Nq=9, H=3, D=64, Nc=2, Ns=9, L=8, window=5), pooled=True) <= known
pooled = record.pool(torch.bfloat16, 96)
for sizes in ({"heads": 1, "grid": (1, 1)}, {"heads": 16, "grid": (16, 33)}):
    again = record.pool(torch.bfloat16, 96, **sizes)
    assert all(a is b for (a, _), (b, _) in zip(pooled, again, strict=True)), sizes
"""


def test_a_new_shape_compiles_nothing():
    """Sizes, strides, window and missing parts are run-time values, without specialisation."""
    python("-c", RECOMPILES)


CHAINED = """
import re, torch
from tools.triton_compile import Recorder
from stat_kernels.testing import Case

def chained(architecture):
    launched = Recorder(architecture)(Case(T=2, Nq=20, H=1, D=96, Nc=20, Ns=5, L=2), torch.bfloat16)
    found = 0
    for kernel, _ in launched:
        products = re.findall(r"(%\\w+) = tt.dot %\\w+, %\\w+, (%\\w+)", kernel.asm["ttir"])
        results = {result for result, _ in products}
        found += sum(accumulator in results for _, accumulator in products)
    return found

assert chained(100) == 0, "triton-lang/triton#10821"
assert chained(90) > 0
"""


def test_no_two_products_share_an_accumulator_in_tensor_memory():
    """The compiler folds their sum into one accumulator where it can."""
    python("-c", CHAINED)


VARIANTS = """
import torch
from unittest import mock
from tools.triton_compile import LAUNCHES, Recorder, figures
from stat_kernels.backends.triton import launch, pool_call
from stat_kernels.testing import Case

case = Case(T=2, Nq=20, H=1, D=96, Nc=20, Ns=5, L=2)
names = (*LAUNCHES["many"][:4], *LAUNCHES["few"][-2:])
torch.backends.cuda.matmul.allow_tf32 = True
for architecture, dtype in (
    (80, torch.float32), (90, torch.float32), (90, torch.float16),
    (942, torch.float32), (942, torch.float16),
):
    launched = Recorder(architecture)(case, dtype)
    for name, (kernel, options) in zip(names, launched, strict=True):
        found = figures(kernel, options, architecture)
        assert found["spills"] == found["stack_bytes"] == 0, (architecture, name, dtype, found)
        if architecture != 942 and name not in ("repair", "sum"):
            assert found["copies"] >= 2, (architecture, name, dtype, found)
        if dtype == torch.float32 and name != "sum":
            assert "tf32" in kernel.asm["ttgir"], name
POOLINGS = (
    (torch.float16, 40, (3, 3, 3), (2, None, True, "class")),
    (torch.float32, 96, (3, 7, 7), (1, 2, True, "mean")),
    (torch.bfloat16, 96, (1, 3, 3), (1, 2, False, "none")),
    (torch.bfloat16, 256, (1, 7, 7), (8, 2, True, "class")),
)
for dtype, head_dim, kernel, options in POOLINGS:
    for architecture in (90, 942):
        record = Recorder(architecture)
        for compiled, chosen in record.pool(dtype, head_dim, kernel=kernel, options=options):
            found = figures(compiled, chosen, architecture)
            assert found["stack_bytes"] == 0, (head_dim, kernel, options, found)
            # Spilled scalar registers of an AMD GPU go to lanes of vector registers.
            assert found["spills"] == 0 or architecture == 942, (head_dim, kernel, options, found)
with mock.patch.object(pool_call, "VECTOR_BYTES", 10**6):
    for compiled, _ in Recorder(90).pool(torch.bfloat16, 96):
        assert compiled.asm["cubin"]
with mock.patch.object(launch, "VECTOR_BYTES", 10**6):  # strides that no vector fits
    for kernel, _ in Recorder(90)(case, torch.bfloat16):
        assert kernel.asm["cubin"]
    for kernel, _ in Recorder(942)(case, torch.bfloat16):
        assert kernel.asm["hsaco"]
"""


BUFFER_INSTRUCTIONS = """
import torch, triton
from tools.triton_compile import Recorder
from stat_kernels.testing import Case

assert triton.knobs.amd.use_buffer_ops
launched = Recorder(942)(Case(T=2, Nq=20, H=1, D=64, Nc=20, Ns=5, L=2), torch.bfloat16)
for kernel, _ in launched:
    assert "global_load" in kernel.asm["amdgcn"]
    assert "buffer_load" not in kernel.asm["amdgcn"]
    assert not any(["tt.pointer_range", 32] in values for values in kernel.src.attrs.values())
assert triton.knobs.amd.use_buffer_ops, "of other kernels"
"""


def test_amd_buffer_instructions_are_off_for_these_kernels_only():
    """Their pass fails on selected pointers; a kernel would depend on the tensors' sizes, too."""
    python("-c", BUFFER_INSTRUCTIONS)


MLP = """
import torch
from tools.triton_compile import Recorder, figures

for architecture in (80, 90, 100, 942):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        launched = Recorder(architecture).mlp(dtype, 768)
        assert len(launched) == 4
        for compiled, _ in launched:
            found = figures(compiled, {}, architecture)
            assert found["spills"] == found["stack_bytes"] == 0, (architecture, dtype, found)
            assert found["registers"] <= 128, (architecture, dtype, found)
            if architecture == 942:
                assert "global_load_dwordx4" in compiled.asm["amdgcn"], "loads of whole vectors"
            else:
                assert "v4" in compiled.asm["ptx"], "loads of whole vectors"
"""


def test_the_parts_of_an_mlp_compile_without_spills():
    python("-c", MLP)


def test_the_other_numbers_and_strides_compile():
    """float16, tf32 and odd strides, at the head dim of STAT."""
    python("-c", VARIANTS)

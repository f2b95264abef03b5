"""The committed report on the CUDA kernels' machine code is true, and says what it should."""

import re

import pytest

from stat_kernels import native
from tools import cuda_compile

REPORT = cuda_compile.REPORT
FAMILIES = (80, 90, 100)
ATTENTION = {"forward_resident", "forward_streamed", "backward", "reduce_shared_keys"}
POOLING = {  # of every head dim
    *("pool_forward", "pool_backward_small", "pool_backward_rows"),
    *("pool_backward_tokens", "pool_backward_weights"),
}
KERNELS = {*ATTENTION, *POOLING, "pool_reduce"}


def committed_rows():
    """The rows of the committed report, read back from its Markdown."""
    rows, architecture = [], None
    for line in REPORT.read_text().splitlines():
        if heading := re.fullmatch(r"## sm_(\d+)", line):
            architecture = int(heading[1])
        elif architecture and line.startswith("|") and re.search(r"\| \d+ \|", line):
            kernel, *numbers = [cell.strip() for cell in line.strip("|").split("|")]
            rows.append(cuda_compile.Row(architecture, kernel, *map(int, numbers)))
    return rows


def committed_launches():
    """The rows of its table of blocks."""
    text = REPORT.read_text().split("## ")[1]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    rows = [row for row in cells if len(row) == 6 and row[1].isdigit()]
    return [cuda_compile.Launch(row[0], *map(int, row[1:])) for row in rows]


def kind(row):
    return row.kernel.split("<")[0]


def test_the_report_is_of_these_sources():
    (found,) = re.findall(r"sources (\w+),", REPORT.read_text())
    assert found == cuda_compile.toolkit.source_hash(), (
        "csrc/cuda was changed: `make build`, run `python -m tools.cuda_compile`, and look at "
        "what changed in the report"
    )


def test_every_kernel_is_compiled_for_every_family():
    """In float16 and bfloat16; attention at 64, 96 and 128 channels."""
    starts = [f"{name}<{{}}" for name in POOLING]
    starts += [f"{name}<{{}}, {dim}" for name in ATTENTION for dim in (64, 96, 128)]
    for architecture in FAMILIES:
        rows = [row for row in committed_rows() if row.architecture == architecture]
        assert {kind(row) for row in rows} == KERNELS
        for start in starts:
            for dtype in ("Half", "BFloat16"):
                found = [row for row in rows if row.kernel.startswith(start.format(dtype))]
                assert found, start


def test_every_kernel_fits_a_multiprocessor():
    """And at STAT's head dim a forward fits twice, so that one block loads while one computes."""
    found = {(launch.kernel, launch.head_dim): launch for launch in committed_launches()}
    assert {name.split(",")[0] for name, _ in found} == KERNELS
    assert {head_dim for _, head_dim in found} == {64, 96, 128}
    for launch in found.values():
        assert launch.blocks >= 1, launch
        assert launch.dynamic_bytes <= 227 * 1024, launch
    for queries in ("many", "few"):
        assert found[f"forward_resident, {queries} queries", 96].blocks >= 2
    assert found["pool_forward, (1, 3, 3)", 96].blocks >= 3
    assert found["pool_backward_small", 96].blocks >= 2


def test_no_register_is_spilled():
    """A stack frame would be a spill in disguise."""
    for row in committed_rows():
        assert (row.spills, row.stack_bytes) == (0, 0), row


def test_the_matrix_units_are_fed_asynchronously():
    for row in committed_rows():
        if kind(row) in ATTENTION - {"reduce_shared_keys"}:
            assert min(row.hmma, row.ldsm, row.ldgsts) > 0, row


def test_float16_and_bfloat16_are_the_same_code():
    """But for the kind of number: the same counts of everything that matters."""
    rows = {(row.architecture, row.kernel): row for row in committed_rows()}
    for (architecture, kernel), row in rows.items():
        twin = rows[architecture, kernel.replace("BFloat16", "Half")]
        assert (twin.hmma, twin.ldsm, twin.ldgsts) == (row.hmma, row.ldsm, row.ldgsts), kernel


@pytest.fixture(scope="module")
def built():
    """The rows of the library that is installed here."""
    reason = native.cuda_problem()
    if reason is not None:
        pytest.skip(reason)  # test_cuda_build.py: never where nvcc is
    assert cuda_compile.problem() is None
    return cuda_compile.read_library()


def test_what_is_built_spills_nothing(built):
    for row in built:
        assert (row.spills, row.stack_bytes) == (0, 0), row


def test_the_report_is_what_is_built(built):
    version = native.introspection().build_information()["nvcc"]
    if f"nvcc {version}," not in REPORT.read_text():
        pytest.skip("the report was written by another version of nvcc")
    families = {row.architecture for row in built}
    assert built == [row for row in committed_rows() if row.architecture in families], (
        "run `python -m tools.cuda_compile` and look at what changed"
    )

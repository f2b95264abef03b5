"""What nvcc makes of the CUDA kernels, read from the built library, without a GPU.

    python -m tools.cuda_compile            writes results/compile/cuda.md
    python -m tools.cuda_compile --json     prints the rows, writes nothing

Registers, spills, shared memory and instructions come from the machine code of every GPU family
that ``make build`` compiled for. What a launch adds is the host code's own choice, asked in the
emulator of the tests.
"""

import argparse
import ctypes
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from stat_kernels import native
from tools import ROOT, machine_code, toolkit

REPORT = ROOT / "benchmarks" / "results" / "compile" / "cuda.md"
# The matrix product, matrix load and asynchronous copy of sm_80, which sm_90a and sm_100 keep.
INSTRUCTIONS = ("HMMA", "LDSM", "LDGSTS")
COLUMNS = ("kernel", "registers", "stack", "spills", "static shared", *INSTRUCTIONS, "instructions")


@dataclass(frozen=True)
class Row:
    """One kernel's machine code; HMMA, LDSM and LDGSTS count instructions."""

    architecture: int
    kernel: str
    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    hmma: int
    ldsm: int
    ldgsts: int
    instructions: int


@dataclass(frozen=True)
class Launch:
    """One kernel's blocks at STAT's 64-frame shapes, bfloat16, on a Hopper.

    ``blocks`` and ``warps`` are those that fit on a multiprocessor at the same time.
    """

    kernel: str
    head_dim: int
    threads: int
    dynamic_bytes: int
    blocks: int
    warps: int


# A Hopper's multiprocessor; registers are given to warps in whole 256, so 8 a thread.
HOPPER = {"registers": 65536, "shared_bytes": 228 * 1024, "threads": 2048, "blocks": 32}
BFLOAT16 = 3  # STA_BF16


class StaCudaKernel(ctypes.Structure):
    """As csrc/cuda/sta_cuda.h has it."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        *(
            (name, ctypes.c_int32)
            for name in (
                *("head_dim", "dtype", "registers", "spilled_bytes", "static_shared"),
                *("dynamic_shared", "threads", "blocks_resident"),
            )
        ),
    )


def nvcc_command(source: Path, target: Path, gpus: str) -> list[str]:
    """What makes a shared library of one .cu file, compiled as the kernels are.

    Args:
        source: the file; it may include what csrc/ holds.
        target: the library to write; its C functions can be called by name.
        gpus: as TORCH_CUDA_ARCH_LIST.

    Raises:
        ToolkitError: there is no toolkit, or it does not know the GPUs.
    """
    cuda = toolkit
    tools = cuda.find()
    chosen, _ = cuda.architectures(gpus, tools.known())
    words = shlex.split(tools.compile_command(chosen, None))
    words += ["-Xcompiler", "-fvisibility=default", "-shared", "-cudart", "static"]
    return [*words, "-o", str(target), str(source)]


def problem() -> str | None:
    """Why the library cannot be reported on, in one sentence; None where it can."""
    reason = native.cuda_problem()
    if reason is not None:
        return reason
    module = native.introspection()
    if module is None:
        return "the library was built without pybind11, so it does not say of which sources it is"
    if module.build_information()["CUDA sources"] != toolkit.source_hash():
        return "csrc/cuda was changed after the library was built; run `make build`"
    return None


def read_library(library: Path = native.PATH) -> list[Row]:
    """The rows of every kernel and GPU family in a library, sorted."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        machine_code.output(
            machine_code.tool("cuobjdump"), "-xelf", "all", library.resolve(), folder=folder
        )
        rows = [row for cubin in folder.glob("*.cubin") for row in read_cubin(cubin)]
    return sorted(rows, key=lambda row: (row.architecture, natural(row.kernel)))


def read_cubin(cubin: Path) -> list[Row]:
    """The rows of one object; its name ends as in "libstat_kernels.3.sm_90.cubin"."""
    architecture = int(re.search(r"sm_(\d+)\w*\.cubin$", cubin.name)[1])
    usage, code = machine_code.resources(cubin), machine_code.disassembly(cubin)
    names = dict(zip(usage, readable(usage), strict=True))
    return [
        Row(
            architecture,
            names[kernel],
            **found,
            spills=machine_code.spills(code[kernel]),
            **{i.lower(): machine_code.count(code[kernel], i) for i in INSTRUCTIONS},
            instructions=machine_code.instructions(code[kernel]),
        )
        for kernel, found in usage.items()
    ]


def readable(mangled: Iterable[str]) -> list[str]:
    """ "forward_resident<BFloat16, 96, 2>" for what the linker calls it."""
    text = machine_code.output("c++filt", "--no-params", *mangled)
    short = [re.sub(r"\bsta::|\(anonymous namespace\)::", "", x) for x in text.splitlines()]
    return [re.sub(r"\((?:int|bool)\)|^void ", "", x) for x in short]


def launches(rows: list[Row]) -> list[Launch]:
    """The blocks of every kernel, by the host code and by the registers of its row."""
    from tests.kernels.cuda_emulator.build import build

    library = build(sorted((ROOT / "csrc" / "cuda").glob("*.cu"))).library
    report, found = StaCudaKernel(), []
    while library.sta_cuda_kernel(len(found), ctypes.byref(report)) == 0:
        found.append(_launch(report, rows) if report.dtype == BFLOAT16 else None)
    return [launch for launch in found if launch is not None]


def _launch(report: StaCudaKernel, rows: list[Row]) -> Launch:
    name, head_dim, threads = report.name.decode(), report.head_dim, report.threads
    hopper = [r for r in rows if r.architecture == 90 and "Half" not in r.kernel]
    kernels = [r for r in hopper if r.kernel.split("<")[0] == name.split(",")[0]]
    # The pooling kernels are of any head dim.
    variants = [r for r in kernels if f"<BFloat16, {head_dim}" in r.kernel] or kernels
    # By how many strips of 16 queries a band; not specialised, then specialised.
    row = variants[0] if name.endswith(("few queries", "any kernel")) else variants[-1]
    used = {
        "registers": -(-row.registers // 8) * 8 * threads,
        "shared_bytes": report.dynamic_shared + row.shared_bytes,
        "threads": threads,
        "blocks": 1,
    }
    blocks = min(HOPPER[what] // used[what] for what in used)
    return Launch(name, head_dim, threads, report.dynamic_shared, blocks, blocks * threads // 32)


def natural(name: str) -> list[int | str]:
    """A sort key in which 64 comes before 128."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def table(rows: list[Row]) -> str:
    """The report, as Markdown."""
    nvcc = native.introspection().build_information()["nvcc"]
    text = [
        "# What the CUDA kernels compile to",
        "",
        f"nvcc {nvcc}, sources {toolkit.source_hash()}, written by",
        "`python -m tools.cuda_compile` from the built library; a test compares it with the",
        "sources and with what is built. Registers and stack bytes are a thread's, spills count",
        "instructions, static shared memory is a block's in bytes (from sm_90 on 1024 are the",
        "system's own). HMMA: matrix products, LDSM: matrix loads, LDGSTS: asynchronous copies of",
        "16 bytes.",
        "",
        "## Blocks at STAT's 64-frame shapes, bfloat16, on a Hopper",
        "",
        "Blocks and warps are those that fit on a multiprocessor at the same time. The pooling",
        "kernels (pool_*) take every head dim.",
        "",
        "| kernel | D | threads | dynamic shared | blocks | warps |",
        "|---|---|---|---|---|---|",
        *(f"| {' | '.join(map(str, asdict(launch).values()))} |" for launch in launches(rows)),
    ]
    text += machine_code.by_architecture(COLUMNS, rows)
    return "\n".join(text) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code, 2 where there is nothing to read."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.cuda_compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the rows, write no file")
    options = parser.parse_args(arguments)
    reason = problem()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    rows = read_library()
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        REPORT.write_text(table(rows))
        print(f"written: {REPORT.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the compiler makes of every entry of the Triton backend's table, without a GPU.

    python -m tools.triton_compile            compiles, writes results/compile/triton.md
    python -m tools.triton_compile --json     compiles, prints the rows, writes nothing

The real host code runs on small CPU tensors; only the driver is a stand-in that says "compile for
this GPU" and launches nothing. Registers, spills and instructions are read from the machine code.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from stat_kernels.backends import triton as backend
from stat_kernels.backends.triton import config, key_gradients, launch
from stat_kernels.testing import Case, make_inputs
from tools import ROOT, amd_code, machine_code

REPORT = ROOT / "benchmarks" / "results" / "compile" / "triton.md"
DTYPES = {"half": torch.bfloat16, "single": torch.float32}
# Queries of a frame and long keys: few queries for each long key, so that own and long keys are two
# launches; many, so that they are one. The many are
# cut into chunks for the short keys, too, where CHUNK_QUERIES is what ``compile_entry`` says.
CASES = {
    "few": Case(T=3, Nq=50, H=1, Nc=20, Ns=5, L=15),
    "many": Case(T=3, Nq=100, H=1, Nc=20, Ns=5, L=3),
}
LAUNCHES = {
    "few": ("forward", "grad_query", "grad_own", "grad_own", "sum", "grad_short", "repair"),
    "many": (
        *("forward", "grad_query", "grad_own_long", "sum"),
        *("grad_short partial", "repair partial", "sum"),
    ),
}
POOL_LAUNCHES = ("pool forward", "pool rows", "pool tokens", "pool sum")
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
AMD = {number: name for name, number in config.AMD.items()}


@dataclass(frozen=True)
class Row:
    """One compiled kernel; ``matrix`` and ``copies`` count instructions inside loops."""

    architecture: int
    numbers: str
    head_dim: int
    queries: str
    kernel: str
    tile: str
    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    matrix: int
    copies: int
    instructions: int


class CompileOnly:
    """A driver for a GPU that is not there."""

    def __init__(self, architecture: int) -> None:
        self.device = architecture  # one for each, with compiled kernels of its own
        self.target = GPUTarget("cuda", architecture, 32)
        if architecture in AMD:
            self.target = GPUTarget("hip", AMD[architecture], 64)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


class Recorder:
    """Runs the backend for a GPU that is not there and keeps what was compiled, in order."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.kernels: list[tuple[object, dict[str, object]]] = []

    def __call__(
        self, case: Case, dtype: torch.dtype, pooled: bool = False
    ) -> list[tuple[object, dict[str, object]]]:
        """What a forward and a backward call launch: compiled kernels and their options.

        ``pooled``: keys and values are views of one buffer, as the pooling writes it.
        """

        def attend() -> None:
            inputs = make_inputs(case, dtype)
            if pooled:
                kv = torch.empty(
                    2, case.B, case.T, 1 + case.Nc + case.Ns, case.H, case.D, dtype=dtype
                )
                long, cur, short = kv.split((1, case.Nc, case.Ns), dim=3)
                inputs = (inputs[0], *cur, *short, *long[:, :, :, 0])
            scale = case.D**-0.5
            out, lse = backend.forward(*inputs, case.reach, scale)
            backend.backward(out, None, *inputs, out, lse, case.reach, scale)

        return self._record(attend)

    def pool(
        self,
        dtype: torch.dtype,
        head_dim: int,
        heads: int = 2,
        grid: tuple[int, int] = (28, 28),
        kernel: tuple[int, int, int] = (1, 3, 3),
        options: tuple = (4, 2, True, "class"),
    ) -> list[tuple[object, dict[str, object]]]:
        """The same of the pooling of keys and values; ``options``: from stride to long."""
        n = grid[0] * grid[1] + options[2]
        tokens = torch.empty(1, 2, n, 3, heads, head_dim, dtype=dtype).movedim(3, 0)[1:]
        weights = [torch.empty(head_dim, 1, *kernel)] * 2
        norms = [torch.empty(head_dim)] * 2

        def pool() -> None:
            pooled, stats = backend.pool_forward(
                tokens, weights, norms, norms, grid, *options, 1e-6
            )
            backend.pool_backward(
                pooled, tokens, weights, norms, stats, grid, *options, torch.empty_like(tokens)
            )

        return self._record(pool)

    def mlp(self, dtype: torch.dtype, columns: int) -> list[tuple[object, dict[str, object]]]:
        """The same of the parts of an MLP, with a float32 residual and stochastic depth."""
        x, bias = torch.empty(2, 3, columns, dtype=dtype), torch.empty(columns)
        skip, scale = torch.empty(x.shape), torch.empty(2)

        def run() -> None:
            backend.bias_gelu_forward(x, bias)
            backend.bias_gelu_backward(x, x, bias)
            backend.bias_residual_forward(skip, x, bias, scale)
            backend.bias_residual_backward(skip, scale, dtype)

        return self._record(run)

    def _record(self, calls: Callable[[], None]) -> list[tuple[object, dict[str, object]]]:
        run = JITFunction.run

        def compile_only(kernel, *arguments, grid, warmup, **options):
            compiled = run(kernel, *arguments, grid=grid, warmup=True, **options)
            self.kernels.append((compiled, options))

        self.kernels = []
        driver.set_active(CompileOnly(self.architecture))
        with (
            mock.patch.object(JITFunction, "run", compile_only),
            mock.patch.object(launch, "architecture", return_value=self.architecture),
        ):
            calls()
        return self.kernels


def compile_entry(architecture: int, numbers: str, head_dim: int) -> list[Row]:
    """The rows of the table's entries for one GPU, kind of numbers and head dim."""
    record, rows, seen = Recorder(architecture), [], set()

    def add(
        queries: str, names: Iterable[str], launched: list[tuple[object, dict[str, object]]]
    ) -> None:
        entry = asdict(config.Key(architecture, numbers, head_dim, queries))
        for name, (compiled, options) in zip(names, launched, strict=True):
            if compiled.hash not in seen:  # the same for few and many queries, or own and long
                seen.add(compiled.hash)
                rows.append(Row(**entry, kernel=name, **figures(compiled, options, architecture)))

    for queries, case in CASES.items():
        case = replace(case, D=head_dim)
        with mock.patch.object(key_gradients, "CHUNK_QUERIES", 2 * case.T * CASES["few"].Nq - 1):
            add(queries, LAUNCHES[queries], record(case, DTYPES[numbers]))
        pooled = record(replace(case, L=case.T), DTYPES[numbers], pooled=True)
        add(queries, (f"{name} pooled" for name in LAUNCHES["many"][:2]), pooled[:2])
    add("", POOL_LAUNCHES, record.pool(DTYPES[numbers], head_dim))
    return rows


def compile_all(workers: int | None = None) -> list[Row]:
    """Every row, in the table's order; ``workers`` processes, by default one a core."""
    entries = dict.fromkeys((k.architecture, k.numbers, k.head_dim) for k in config.TABLE)
    workers = workers or len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        # The slowest first, so that no worker is left with one at the end.
        order = sorted(entries, key=lambda e: (e[1] == "single", e[0], e[2]), reverse=True)
        done = {entry: pool.submit(compile_entry, *entry) for entry in order}
        return [row for entry in entries for row in done[entry].result()]


def figures(compiled: object, options: dict[str, object], architecture: int) -> dict[str, object]:
    """Registers, spills, shared memory and instruction counts of one compiled kernel."""
    read = _read_amd if architecture in AMD else _read_nvidia
    tile = ""
    if "BLOCK_Q" in options:
        tile = f"{options['BLOCK_Q']}x{options['BLOCK_K']} w{options['num_warps']}"
    elif "num_warps" in options:
        tile = f"{options['BLOCK']} w{options['num_warps']}"
    return {"tile": tile, "shared_bytes": compiled.metadata.shared} | read(compiled, architecture)


def _read_amd(compiled: object, architecture: int) -> dict[str, int]:
    assembly = compiled.asm["amdgcn"]
    code = amd_code.code(assembly)
    inside = amd_code.loop_lines(code)
    return amd_code.resources(assembly) | {
        "matrix": machine_code.count(inside, amd_code.MATRIX_INSTRUCTION),
        "copies": 0,  # there are none on gfx942 that Triton uses unless told to
        "instructions": amd_code.instructions(code),
    }


def _read_nvidia(compiled: object, architecture: int) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        (usage,) = machine_code.resources(cubin).values()
        code = machine_code.output(machine_code.tool("nvdisasm"), "-c", cubin).splitlines()
    inside = machine_code.loop_lines(code)
    matrix = MATRIX_INSTRUCTION[architecture]
    return {
        "registers": usage["registers"],
        "stack_bytes": usage["stack_bytes"],
        "spills": machine_code.spills(code),
        "matrix": machine_code.count(inside, matrix),
        "copies": machine_code.count(inside, "LDGSTS"),
        "instructions": machine_code.instructions(code),
    }


def table(rows: list[Row]) -> str:
    """The report, as Markdown."""
    text = [
        "# What the Triton kernels compile to",
        "",
        f"triton {triton.__version__}, written by `python -m tools.triton_compile`; a test",
        "compares it with what is compiled now. Tile: queries x keys, or rows, and warps; pooling",
        "(1, 3, 3) by a stride of 4, keys and values, class and short tokens. Matrix: matrix",
        "instructions (HMMA, HGMMA, UTCHMMA; none for float32, whose products are scalar) and",
        "copies: asynchronous copies (LDGSTS), both inside loops. gfx942: warps are waves of 64",
        "lanes, matrix instructions (v_mfma) multiply float32 too, and there are no such copies.",
    ]
    columns = ("numbers", "D", "Nq", "kernel", "tile", "registers", "stack", "spills", "shared",
               "matrix", "copies", "instructions")  # fmt: skip
    text += machine_code.by_architecture(columns, rows, AMD)
    return "\n".join(text) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.triton_compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the rows, write no file")
    options = parser.parse_args(arguments)
    if launch.interpreted():
        print("unset TRITON_INTERPRET: the interpreter compiles nothing", file=sys.stderr)
        return 2
    rows = compile_all()
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
        return 0
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(table(rows), encoding="utf-8")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

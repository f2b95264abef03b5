"""Read a cubin's machine code and resource usage with CUDA's own tools, without a GPU."""

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any


def tool(name: str) -> Path:
    """The path of cuobjdump or nvdisasm: of the CUDA toolkit, else of triton's package.

    Raises:
        FileNotFoundError: it is in neither.
    """
    on_path = shutil.which(name)
    if on_path:
        return Path(on_path)
    package = importlib.util.find_spec("triton")
    if package is not None:
        found = Path(package.origin).parent / "backends" / "nvidia" / "bin" / name
        if found.is_file():
            return found
    raise FileNotFoundError(f"{name} is neither on the PATH nor in triton's package")


def output(*command: object, folder: Path | None = None) -> str:
    """What a command prints; run in ``folder``.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    words = [str(part) for part in command]
    return subprocess.run(words, check=True, capture_output=True, text=True, cwd=folder).stdout


def resources(cubin: Path) -> dict[str, dict[str, int]]:
    """Registers a thread, stack bytes a thread and static shared bytes a block of each kernel."""
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    return {
        name: {"registers": int(registers), "stack_bytes": int(stack), "shared_bytes": int(shared)}
        for name, registers, stack, shared in re.findall(
            pattern, output(tool("cuobjdump"), "-res-usage", cubin)
        )
    }


def disassembly(cubin: Path) -> dict[str, list[str]]:
    """The lines of each kernel's machine code."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in output(tool("nvdisasm"), "-c", cubin).splitlines():
        if begin := re.match(r"\.text\.(\S+):", line):
            lines = found.setdefault(begin[1], [])
        elif re.match(r"\s+\.section\s", line):
            lines = []  # of something else
        else:
            lines.append(line)
    return found


def loop_lines(code: list[str]) -> list[str]:
    """The lines of a disassembly between a label and a later branch back to it."""
    return between_labels(code, r"\s*(\.L_x_\d+):", r"\bBRA\b.*`\((\.L_x_\d+)\)")


def between_labels(code: list[str], label: str, branch: str) -> list[str]:
    """The lines between a label and a later branch back to it.

    Args:
        code: of one kernel.
        label: a regular expression with the label's name as its group, at a line's beginning.
        branch: the same of a branch, with the name of its target, anywhere in a line.
    """
    labels, inside = {}, [False] * len(code)
    for number, line in enumerate(code):
        if begin := re.match(label, line):
            labels[begin[1]] = number
        target = re.search(branch, line)
        # A branch to itself is the padding behind the last instruction, not a loop.
        if target and labels.get(target[1], number) < number - 1:
            start = labels[target[1]]
            inside[start : number + 1] = [True] * (number + 1 - start)
    return [line for line, kept in zip(code, inside, strict=True) if kept]


def count(lines: Iterable[str], instruction: str) -> int:
    """The number of lines that hold an instruction, with any suffixes."""
    return sum(1 for line in lines if re.search(rf"\b{instruction}\b", line))


def spills(lines: list[str]) -> int:
    """Instructions that move registers to and from a thread's local memory."""
    return count(lines, "STL") + count(lines, "LDL")


def instructions(lines: list[str]) -> int:
    """All of them, the padding behind the last one included."""
    return sum(1 for line in lines if re.search(r";\s*$", line))


def by_architecture(
    columns: Sequence[str], rows: Iterable[Any], names: Mapping[int, str] | None = None
) -> list[str]:
    """Markdown lines: a section and a table for each architecture, in the rows' order.

    Args:
        columns: heads of what a row holds after its architecture.
        rows: dataclasses whose first field is ``architecture``, an int such as 90.
        names: of architectures that are not called sm_90 or the like.
    """
    tables: dict[int, list[str]] = {}
    for row in rows:
        architecture, *values = asdict(row).values()
        head = ["", f"## {(names or {}).get(architecture, f'sm_{architecture}')}", ""]
        head += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        line = f"| {' | '.join(str(value) for value in values)} |"
        tables.setdefault(architecture, head).append(line)
    return [line for table in tables.values() for line in table]

"""Read what the AMD compiler says of a kernel in its assembly, without a GPU."""

import re

from tools import machine_code

MATRIX_INSTRUCTION = r"v_mfma\w*"


def resources(assembly: str) -> dict[str, int]:
    """Of the one kernel in ``assembly``.

    ``registers`` are vector registers a lane, accumulators included; ``spills`` registers of either
    kind: scalar registers go to lanes of vector registers, vector registers to the stack.
    """

    def metadata(name: str) -> int:
        (value,) = re.findall(rf"^\s+\.{name}:\s+(\d+)$", assembly, re.MULTILINE)
        return int(value)

    return {
        "registers": metadata("vgpr_count"),
        "stack_bytes": metadata("private_segment_fixed_size"),
        "spills": metadata("vgpr_spill_count") + metadata("sgpr_spill_count"),
    }


def code(assembly: str) -> list[str]:
    """The lines with labels and instructions, without directives and comments."""
    lines = (line.split(";")[0].rstrip() for line in assembly.splitlines())
    return [line for line in lines if re.match(r"\.LBB\w+:|\s+[a-z]\w+", line)]


def loop_lines(lines: list[str]) -> list[str]:
    """The lines between a label and a later branch back to it."""
    return machine_code.between_labels(lines, r"(\.LBB\w+):", r"s_c?branch\w* (\.LBB\w+)")


def instructions(lines: list[str]) -> int:
    """All of them."""
    return sum(not line.endswith(":") for line in lines)

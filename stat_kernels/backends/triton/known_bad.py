"""Versions of Triton that compile these kernels wrongly for some GPUs; such calls are refused.

An entry is about what the kernels do. Two products into one accumulator, which Triton to 3.8.0
compiles wrongly on the 100 family (triton-lang/triton#10821), has no entry: ``dot_rows`` avoids it.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class KnownBad:
    """Versions from ``first`` up to, not including, ``fixed`` on some GPUs.

    Attributes:
        first, fixed: versions of Triton, (3, 7) for 3.7.0.
        capabilities: compute capabilities, (10, 0) for a B200.
        because: what goes wrong, with Triton's own issue.
    """

    first: tuple[int, int]
    fixed: tuple[int, int]
    capabilities: frozenset[tuple[int, int]]
    because: str


_RACE = "products in a loop race with their operands (triton-lang/triton#{})"
KNOWN_BAD = (
    KnownBad((0, 0), (3, 7), frozenset({(10, 0), (10, 3)}), _RACE.format(9871)),
    KnownBad((3, 7), (3, 8), frozenset({(10, 3)}), _RACE.format(10590)),
)


def reason(version: str, capability: tuple[int, int]) -> str | None:
    """Why a version of Triton must not compile the kernels for a GPU, or None.

    Args:
        version: as ``triton.__version__`` has it, "3.6.0+git123".
        capability: compute capability of the GPU.
    """
    found = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    for entry in KNOWN_BAD:
        if capability in entry.capabilities and entry.first <= found < entry.fixed:
            return (
                f"triton {version} compiles it wrongly for compute capability "
                "{}.{}: {}; triton {}.{} is the first without it".format(
                    *capability, entry.because, *entry.fixed
                )
            )
    return None

"""Which of the two GPU backends goes first: a table, and its look-up. The first entry that fits.

An entry that a measurement decided cites the result file, so that it can be checked and replaced.
"""

from dataclasses import dataclass

import torch

ANY = None


@dataclass(frozen=True)
class Entry:
    """One line: what it fits, who goes first there, and who says so.

    Attributes:
        first: "cuda" or "triton"; the other is next.
        because: the result file that decided it, below benchmarks/results/, or why none has yet.
        architecture: 80, 90 or 100 for the family of the GPU, or ANY.
        dtype: torch.float16, torch.bfloat16 or ANY.
        head_dim: D or ANY.
        queries: "few" (at most FEW a frame), "many" or ANY.
    """

    first: str
    because: str
    architecture: int | None = ANY
    dtype: torch.dtype | None = ANY
    head_dim: int | None = ANY
    queries: str | None = ANY


UNDECIDED = "not yet decided by a benchmark"
FEW = 64  # queries a frame: one tile of them
TABLE = (
    Entry("cuda", f"{UNDECIDED}; cuda computes head dim 96 without padding", head_dim=96),
    Entry("triton", UNDECIDED),
)


def size_class(queries: int) -> str | None:
    """ "few" or "many" of a frame's queries.

    ANY as long as no entry asks: a comparison would tie a graph traced with free sizes to one side
    of it.
    """
    if all(entry.queries is ANY for entry in TABLE):
        return ANY
    return "few" if queries <= FEW else "many"


def family(capability: tuple[int, int]) -> int:
    """80 for Ampere and Ada, 90 for Hopper, 100 for Blackwell and newer."""
    return min(100, 10 * capability[0])


def decide(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, queries: str | None
) -> Entry:
    """The entry of a call.

    Args:
        capability: of the GPU, (9, 0) for a Hopper.
        dtype, head_dim: of the tensors.
        queries: as ``size_class`` gives it; where it is not known, entries that ask are passed by.
    """
    found = (family(capability), dtype, head_dim, queries)

    def fits(entry: Entry) -> bool:
        asked = (entry.architecture, entry.dtype, entry.head_dim, entry.queries)
        return all(a is ANY or a == f for a, f in zip(asked, found, strict=True))

    return next(entry for entry in TABLE if fits(entry))  # the last one fits every call

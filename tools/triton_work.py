"""What the Triton attention kernels execute for a call, and how much of it is useful, by counting.

    python -m tools.triton_work        a table of STAT's stages, 8 clips of 64 frames, on a Hopper

The real host code runs; what it would launch is counted instead. A product of a pair is D
multiply-adds for one query and one key: the forward needs two of a pair that attends, the backward
five, of which these kernels compute two again. Tiles also hold pairs that do not attend.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from unittest import mock

import torch

from stat_kernels import ops
from stat_kernels.backends import triton as backend
from stat_kernels.backends.triton import launch
from stat_kernels.testing import Case

STAGES = {  # of T=64: 32 frames of tokens
    "1": Case(B=8, T=32, Nq=785, H=2, D=96, Nc=49, Ns=16, L=32, window=7),
    "2": Case(B=8, T=32, Nq=197, H=4, D=96, Nc=49, Ns=16, L=32, window=7),
    "3": Case(B=8, T=32, Nq=50, H=8, D=96, Nc=49, Ns=16, L=32, window=7),
}
FORWARD, NEEDED_BACKWARD = 2, 5  # products of a pair


@dataclass(frozen=True)
class Launch:
    """One launch: ``executed`` and ``useful`` count products of pairs of a query and a key."""

    kernel: str
    programs: int
    executed: int = 0
    useful: int = 0


def launches(case: Case, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """What a forward and a backward launch, in order; the tensors hold nothing."""
    found: list[Launch] = []

    def count(kernel, where, programs, *arguments, **options):
        names = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        name = kernel.fn.__name__.removesuffix("_kernel")
        guarded = " (repair)" if options.get("GUARDED") else ""
        executed, useful = COUNTS.get(name, lambda case, a: (0, 0))(case, names)
        # A repair that finds no NaN executes nothing.
        found.append(Launch(name + guarded, programs, *((0, 0) if guarded else (executed, useful))))

    with _launches_go_to(count):
        inputs = _empty(case, dtype)
        out, lse = backend.forward(*inputs, case.reach, 1.0)
        backend.backward(out, None, *inputs, out, lse, case.reach, 1.0)
    return found


def _empty(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor | None, ...]:
    b, t, h, d = case.B, case.T, case.H, case.D
    frames = case.S or t

    def tensors(count: int, *size: int) -> list[torch.Tensor | None]:
        return [torch.empty(size, dtype=dtype) if 0 not in size else None for _ in range(count)]

    return (
        *tensors(1, b, t, case.Nq, h, d), *tensors(2, b, t, case.Nc, h, d),
        *tensors(2, b, frames, case.Ns, h, d), *tensors(2, b, case.L, h, d),
    )  # fmt: skip


@contextmanager
def _launches_go_to(count) -> Iterator[None]:
    from stat_kernels.backends.triton import key_gradients

    with mock.patch.object(launch, "run", count), mock.patch.object(key_gradients, "run", count):
        yield


def _useful(case: Case, own: bool = True, short: bool = True, long: bool = True) -> int:
    """Pairs that attend, of some kinds of keys."""
    b, t, h, d = case.B, case.T, case.H, case.D
    return ops.query_key_pairs(
        (b, t, case.Nq, h, d), (b, t, case.Nc if own else 0, h, d),
        (b, case.S or t, case.Ns, h, d) if short and case.Ns else None,
        (b, case.L, h, d) if long and case.L else None, *case.reach,
    )  # fmt: skip


def _up(n: int, block: int) -> int:
    return ceil(n / block) * block


def _by_query(products: int):
    def count(case: Case, a: dict) -> tuple[int, int]:
        """Programs own a tile of one frame's queries and read the frame's keys."""
        keys = 0
        for own in range(a["OFFSET"], a["OFFSET"] + a["T"]):
            neighbours = min(own, a["LEFT"]) + min(a["S"] - 1 - own, a["RIGHT"])
            longs = own + 1 if a["CAUSAL"] else a["L"]
            keys += _up(a["NC"] + neighbours * a["NS"] + longs, a["BLOCK_K"])
        pairs = case.B * a["H"] * _up(a["NQ"], a["BLOCK_Q"]) * keys
        return products * pairs, products * _useful(case)

    return count


def _own(case: Case, a: dict) -> tuple[int, int]:
    """Programs own a tile of own and long keys and read spans of queries."""
    queries = a["T"] * a["NQ"]
    read = sum(
        _up(min(a["SPAN"], queries - start), a["BLOCK_Q"]) for start in range(0, queries, a["SPAN"])
    )
    pairs = case.B * a["H"] * read * _up(a["NC"] + a["L"], a["BLOCK_K"])
    useful = _useful(case, own=a["NC"] > 0, short=False, long=a["L"] > 0)
    return 4 * pairs, 4 * useful


def _short(case: Case, a: dict) -> tuple[int, int]:
    """Programs own a tile of short keys across frames and read a chunk of what attends it."""
    read = 0
    for start in range(0, a["S"] * a["NS"], a["BLOCK_K"]):
        end = min(start + a["BLOCK_K"], a["S"] * a["NS"]) - 1
        first = max(start // a["NS"] - a["OFFSET"] - a["RIGHT"], 0)
        last = min(end // a["NS"] - a["OFFSET"] + a["LEFT"] + 1, a["T"])
        queries = max(0, last - first) * a["NQ"]
        span = _up(ceil(queries / a["CHUNKS"]), a["BLOCK_Q"])
        for chunk in range(a["CHUNKS"]):
            read += _up(max(0, min(span, queries - chunk * span)), a["BLOCK_Q"])
    pairs = case.B * a["H"] * read * a["BLOCK_K"]
    return 4 * pairs, 4 * _useful(case, own=False, long=False)


COUNTS = {
    "forward": _by_query(FORWARD), "query_gradient": _by_query(3),
    "own_key_gradients": _own, "short_key_gradients": _short,
}  # fmt: skip


def table() -> str:
    """The stages' launches as Markdown, and what remains useful of all products of the backward."""
    lines = [
        "| stage | kernel | programs | executed GFLOP | useful |",
        "|---|---|---|---|---|",
    ]
    for stage, case in STAGES.items():
        found = launches(case)
        flop = 2 * case.D / 1e9
        for one in found:
            work = ["", ""]
            if one.executed:
                work = [f"{one.executed * flop:.1f}", f"{one.useful / one.executed:.0%}"]
            lines.append(f"| {stage} | {one.kernel} | {one.programs} | {' | '.join(work)} |")
        executed = sum(one.executed for one in found[1:])
        useful = sum(one.useful for one in found[1:])
        needed = NEEDED_BACKWARD * _useful(case)
        lines.append(
            f"| {stage} | backward, all | | {executed * flop:.1f} | {useful / executed:.0%} "
            f"(necessary: {needed / executed:.0%}) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

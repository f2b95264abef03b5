"""Tiles of every kernel as plain data, and the function that looks them up.

The numbers come from compiling, not from timing: as many rows as fit without spilled registers
(``benchmarks/results/compile/triton.md`` has the figures), and few enough registers that two or
three programs share a multiprocessor. Nothing is measured at run time unless STAT_AUTOTUNE=1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


def _limit(maxnreg: int | None) -> dict[str, int]:
    """Triton's option, left out where there is no limit: the AMD compiler refuses its name."""
    return {} if maxnreg is None else {"maxnreg": maxnreg}


@dataclass(frozen=True)
class Tile:
    """Rows of queries and of keys that a program holds at once, and how it is compiled."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int = 2
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """The compile-time arguments of a kernel."""
        options = {
            "BLOCK_Q": self.block_q, "BLOCK_K": self.block_k,
            "num_warps": self.num_warps, "num_stages": self.num_stages,
        }  # fmt: skip
        return options | _limit(self.maxnreg)


@dataclass(frozen=True)
class Config:
    """The tiles of the attention's kernels.

    ``repair`` is for the launch that recomputes keys' gradients where they hold NaN. It rarely
    computes anything, so its tile is chosen to fit, not for speed.
    ``grad_own_long`` is for own and long keys together, ``grad_own`` for either alone.
    """

    forward: Tile
    grad_query: Tile
    grad_own_long: Tile
    grad_own: Tile
    grad_short: Tile
    repair: Tile = Tile(16, 32, 8, num_stages=1)


@dataclass(frozen=True)
class Key:
    """The key of the table.

    Args:
        architecture: 80, 90 or 100, the oldest compute capability of the family, or one of AMD.
        numbers: "half" for float16 and bfloat16, "single" for float32 (tf32 too).
        head_dim: 64, 96, 128 or 256, the largest D that the entry serves.
        queries: "few" where a frame has at most FEW_QUERIES, else "many".
    """

    architecture: int
    numbers: str
    head_dim: int
    queries: str


FEW_QUERIES = 64
HEAD_DIMS = (64, 96, 128, 256)
# Shared memory of one program, in bytes. The family of 80 holds the consumer GPUs with less.
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 942: 64 * 1024}
AMD = {"gfx942": 942}  # MI300 and MI325

T = Tile  # (queries, keys, warps)
_AMPERE = {
    64: Config(T(64, 64, 4), T(64, 64, 4), T(32, 128, 8), T(32, 64, 8), T(32, 64, 8)),
    96: Config(T(64, 32, 4), T(64, 32, 4), T(16, 128, 8), T(16, 64, 8), T(32, 64, 8)),
    128: Config(T(64, 32, 4), T(64, 32, 4), T(32, 64, 8), T(32, 64, 8), T(32, 64, 8)),
    256: Config(T(64, 32, 8), T(32, 32, 8), T(16, 32, 8), T(16, 32, 8), T(16, 32, 8)),
}
_HOPPER = {
    64: Config(T(64, 64, 4), T(64, 64, 4), T(64, 128, 8), T(64, 64, 4), T(64, 64, 4)),
    96: Config(T(64, 64, 4, maxnreg=168), T(64, 64, 4), T(32, 128, 8), T(32, 64, 4), T(64, 64, 4)),
    128: Config(T(64, 64, 4), T(64, 64, 4), T(64, 64, 8), T(64, 64, 8), T(64, 64, 8)),
    256: Config(T(64, 32, 8), T(64, 32, 8), T(32, 64, 8), T(32, 64, 8), T(32, 64, 8)),
}
# Where a frame has several tiles of queries, each reads the frame's keys from L2 again: 128 rows
# halve that traffic, 128 registers let two programs of 8 warps share a multiprocessor.
_HOPPER_MANY = {
    64: replace(_HOPPER[64], forward=T(128, 64, 8)),
    96: replace(_HOPPER[96], forward=T(128, 32, 8, maxnreg=128)),
}
_BLACKWELL = {
    64: Config(T(64, 64, 4), T(64, 64, 4), T(64, 128, 8), T(64, 64, 4), T(64, 64, 4)),
    96: Config(T(64, 64, 4), T(64, 64, 4), T(64, 128, 8), T(64, 64, 8), T(64, 64, 4)),
    128: Config(T(64, 64, 4), T(64, 64, 4), T(64, 64, 8), T(64, 64, 8), T(64, 64, 4)),
    256: Config(T(64, 32, 8), T(64, 32, 8), T(32, 64, 8), T(32, 64, 8), T(32, 64, 4)),
}
# Without matrix units for float32 the products are scalar and unrolled: small tiles. Without a
# limit the assembler settles for 80 registers on some architectures, and spills.
_OWN = T(16, 32, 8, maxnreg=255)
_WIDEST = T(16, 16, 8, maxnreg=128)
_SINGLE = {
    64: Config(T(32, 32, 8), T(32, 32, 8), _OWN, _OWN, T(16, 32, 8)),
    # tf32 spills with 32 short keys
    96: Config(
        T(32, 32, 8), T(16, 32, 8), _OWN, _OWN, T(16, 16, 8), repair=T(16, 16, 8, num_stages=1)
    ),
    128: Config(T(32, 32, 8), T(32, 32, 8, maxnreg=128), _OWN, _OWN, T(16, 32, 8)),
    256: Config(T(32, 16, 8), T(16, 32, 8), _WIDEST, _WIDEST, _WIDEST, repair=_WIDEST),
}
# gfx942: a warp is a wave of 64 lanes. Up to D = 128 a lane has at most 256 registers, so that two
# waves share each of a multiprocessor's four units.
_CDNA3_HALF = Config(T(64, 32, 4), T(64, 32, 4), T(16, 128, 8), T(16, 64, 4), T(16, 64, 4))
_CDNA3 = {
    **dict.fromkeys((64, 96, 128), _CDNA3_HALF),
    256: Config(T(64, 32, 8), T(32, 16, 4), T(16, 32, 4), T(16, 32, 4), T(16, 32, 4)),
}
_CDNA3_NARROW = T(16, 16, 4)
_CDNA3_SINGLE = {
    64: Config(T(32, 32, 8), T(32, 32, 8), T(16, 32, 8), T(16, 32, 8), T(16, 32, 8)),
    96: Config(T(32, 32, 8), T(16, 32, 8), T(16, 32, 8), T(16, 32, 8), T(16, 32, 8)),
    128: Config(T(32, 32, 8), T(16, 32, 8), T(16, 32, 8), T(16, 32, 8), T(16, 32, 8)),
    256: Config(T(16, 16, 8), T(16, 16, 8), *(_CDNA3_NARROW,) * 4),
}


def _table() -> dict[Key, Config]:
    few = {80: _AMPERE, 90: _HOPPER, 100: _BLACKWELL, 942: _CDNA3}
    many = few | {90: _HOPPER | _HOPPER_MANY}
    entries = {}
    for architecture in SHARED_BYTES:
        for d in HEAD_DIMS:
            for queries, half in (("few", few), ("many", many)):
                entries[Key(architecture, "half", d, queries)] = half[architecture][d]
                single = _CDNA3_SINGLE if architecture in AMD.values() else _SINGLE
                entries[Key(architecture, "single", d, queries)] = single[d]
    return entries


TABLE = _table()


def family(capability: tuple[int, int]) -> int:
    """The architecture of a Key for an NVIDIA GPU with this compute capability."""
    # Only data-centre Blackwells (10.x) have the tensor memory that the family of 100 is for.
    return {9: 90, 10: 100}.get(capability[0], 80)


def key(architecture: int, numbers: str, head_dim: int, num_queries: int) -> Key:
    """The entry for a GPU and a call.

    Args:
        architecture: as in Key.
        numbers: "half" or "single".
        head_dim: D, at most 256.
        num_queries: Nq, queries a frame.
    """
    bucket = next(d for d in HEAD_DIMS if head_dim <= d)
    return Key(architecture, numbers, bucket, "few" if num_queries <= FEW_QUERIES else "many")


@dataclass(frozen=True)
class PoolTile:
    """Rows of the head dim that a program of the pooling holds at once, and how it is compiled."""

    rows: int
    num_warps: int
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """The compile-time arguments of a kernel."""
        return {"BLOCK": self.rows, "num_warps": self.num_warps} | _limit(self.maxnreg)


# By kind of numbers and the largest D that the entry serves. Without its limit of registers, the
# compiler would spill a few to fit more programs on a multiprocessor, or issue all loads at once
# and leave room for two programs only. AMD's compiler knows no such limit and needs none.
_POOL_FORWARD = {
    "half": {96: PoolTile(16, 4, 128), 128: PoolTile(8, 4, 128), 256: PoolTile(8, 4, 168)},
    "single": {96: PoolTile(16, 4, 168), 128: PoolTile(16, 4), 256: PoolTile(8, 8, 168)},
}
_POOL_ROWS = {128: PoolTile(32, 8), 256: PoolTile(16, 8)}
_POOL_TOKENS = {128: PoolTile(32, 8, 128), 256: PoolTile(16, 8, 128)}
POOL_TILES = {
    "forward": _POOL_FORWARD,
    "rows": dict.fromkeys(("half", "single"), _POOL_ROWS),
    "tokens": dict.fromkeys(("half", "single"), _POOL_TOKENS),
}


def pool_tile(kernel: str, architecture: int, numbers: str, head_dim: int) -> PoolTile:
    """The tile of a pooling kernel, "forward", "rows" or "tokens", for D channels."""
    tiles = POOL_TILES[kernel][numbers]
    tile = next(tile for d, tile in tiles.items() if head_dim <= d)
    return replace(tile, maxnreg=None) if architecture in AMD.values() else tile


def pool_unroll(taps: int, whole: int = 9) -> int:
    """How far a loop over taps is unrolled, to keep several loads in flight.

    Fully for up to ``whole`` taps, a 3 x 3 kernel, otherwise by 3, a line of one.
    """
    return taps if taps <= whole else 3


def candidates(architecture: int, numbers: str, kernel: str) -> list[Tile]:
    """Every tile that the table has for a kernel on a GPU, for STAT_AUTOTUNE=1."""
    entries = (
        c for k, c in TABLE.items() if (k.architecture, k.numbers) == (architecture, numbers)
    )
    return list(dict.fromkeys(getattr(config, kernel) for config in entries))

"""Where a frame's pooled tokens lie: one buffer, from which attention reads through views."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

LONG_MODES = ("class", "mean", "none")


@dataclass(frozen=True)
class PoolLayout:
    """Rows of a pooled buffer (..., B, T, R, H, D) along R: long, then current, then short.

    Attributes:
        long: 1 for the class token or the mean, 0 for neither.
        grid: (h', w') of the current tokens.
        short_grid: (h'', w'') of the short tokens, (0, 0) where there are none.
        normed: rows that a LayerNorm wrote, which are the first ones of ``long`` and ``current``;
            a mean is none, so the statistics of long="mean" begin with the current rows.
    """

    long: int
    grid: tuple[int, int]
    short_grid: tuple[int, int]
    normed: int

    @property
    def current(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def short(self) -> int:
        return self.short_grid[0] * self.short_grid[1]

    @property
    def rows(self) -> int:
        return self.long + self.current + self.short

    def split(self, pooled: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Views (..., Nc, H, D), (..., Ns, H, D) or None, (..., H, D) or None of a buffer."""
        long, current, short = pooled.split((self.long, self.current, self.short), dim=-3)
        return current, short if self.short else None, long.squeeze(-3) if self.long else None


def pool_layout(
    grid: Sequence[int], stride: int, short_stride: int | None, long: str
) -> PoolLayout:
    """The layout for tokens of ``grid`` (h, w); the kernel is padded by half, so it is not asked.

    Args:
        grid, stride, short_stride: as in `stat_kernels.pool_tokens`.
        long: one of LONG_MODES.
    """
    pooled = _shrink(grid, stride)
    short = (0, 0) if short_stride is None else _shrink(pooled, short_stride)
    normed = pooled[0] * pooled[1] + (long == "class")
    return PoolLayout(int(long != "none"), pooled, short, normed)


def _shrink(grid: Sequence[int], stride: int) -> tuple[int, int]:
    """Rounded up; by addition, so that sizes which a compiler traces stay plain divisions."""
    return (grid[0] + stride - 1) // stride, (grid[1] + stride - 1) // stride

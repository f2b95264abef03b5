"""A pooling call: from tensors to kernel arguments."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stat_kernels.backends.triton import config, launch
from stat_kernels.backends.triton.launch import VECTOR_BYTES, chunks
from stat_kernels.pool_layout import PoolLayout, pool_layout

# Run-time sizes of the kernels; a call's sizes have this order. Cells are those of the average
# pooling, SIDE x SIDE positions; without short tokens each position is a cell of its own.
SIZES = ("P", "B", "T", "H", "GRID_H", "GRID_W", "OUT_H", "OUT_W", "CELLS_H", "CELLS_W", "SIDE")
AXES = "pbtnh"


@dataclass(frozen=True)
class PoolCall:
    """One call's tokens and options, and what the kernels want to know about them.

    Args:
        tokens: (P, B, T, N, H, D) with 1 as its last stride.
        kernel: (kt, kh, kw).
        grid, stride, short_stride, class_token, long: see ``stat_kernels.backends``.
        grad_tokens: of a backward call, as ``tokens``.
    """

    tokens: Tensor
    kernel: tuple[int, ...]
    grid: Sequence[int]
    stride: int
    short_stride: int | None
    class_token: bool
    long: str
    grad_tokens: Tensor | None = None

    @functools.cached_property
    def layout(self) -> PoolLayout:
        return pool_layout(self.grid, self.stride, self.short_stride, self.long)

    @property
    def cells(self) -> tuple[int, int]:
        """The grid of cells."""
        return self.layout.grid if self.short_stride is None else self.layout.short_grid

    @property
    def taps(self) -> int:
        kt, kh, kw = self.kernel
        return kt * kh * kw

    @property
    def heads(self) -> int:
        """P * B * T * H: (tensor, frame, head) triples, which programs never mix."""
        p, b, t, _, h, _ = self.tokens.shape
        return p * b * t * h

    @property
    def sizes(self) -> tuple[int, ...]:
        """The values of SIZES."""
        p, b, t, _, h, _ = self.tokens.shape
        return p, b, t, h, *self.grid, *self.layout.grid, *self.cells, self.short_stride or 1

    @functools.cached_property
    def unit(self) -> int:
        """Elements that strides are counted in, as in ``launch.Call.unit``."""
        unit = VECTOR_BYTES // self.tokens.element_size()
        tensors = [x for x in (self.tokens, self.grad_tokens) if x is not None]
        return unit if all(s % unit == 0 for x in tensors for s in _strides(x)) else 1

    def strides_of(self, x: Tensor) -> tuple[int, ...]:
        """Strides of (P, B, T, N, H) in units."""
        return tuple(s // self.unit for s in _strides(x))

    def tile(self, kernel: str) -> config.PoolTile:
        """The table's tile for a kernel, "forward", "rows" or "tokens"."""
        numbers = "single" if self.tokens.dtype == torch.float32 else "half"
        where = launch.architecture(self.tokens.device)
        return config.pool_tile(kernel, where, numbers, self.tokens.shape[-1])

    @functools.cached_property
    def constants(self) -> dict[str, int | str | bool]:
        """The compile-time arguments that the kernels share."""
        d = self.tokens.shape[-1]
        d0, d1 = chunks(d)
        kt, kh, kw = self.kernel
        return {
            "CLASS_TOKEN": int(self.class_token), "LONG": self.long,
            "SHORT": self.short_stride is not None, "STRIDE": self.stride,
            "KT": kt, "KH": kh, "KW": kw, "UNIT": self.unit, "D": d, "D0": d0, "D1": d1,
        }  # fmt: skip


def pack_parameters(*lists: Sequence[Tensor]) -> Tensor:
    """Parameters of P poolings as (P, rows, D) float32, in one launch.

    Args:
        lists: P convolution weights, of which each tap becomes a row, or P vectors (D,).
    """
    rows = [
        p.detach().reshape(p.shape[0], -1).T for of_one in zip(*lists, strict=True) for p in of_one
    ]
    return torch.cat(rows).to(torch.float32).view(len(lists[0]), -1, rows[0].shape[1])


def stride_names(tensor: str) -> list[str]:
    """A kernel's parameters for a tensor's strides; see ``launch.stride_names``."""
    return [f"{tensor}_{axis}" for axis in AXES]


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides of (P, B, T, N, H), 0 where a step is never taken."""
    return tuple(0 if size == 1 else s for size, s in zip(x.shape[:5], x.stride(), strict=False))

"""An MLP without its matrix products: bias and GELU, bias and residual, forward and backward.

A program owns ROWS rows of BLOCK columns. In the backward it walks SPAN rows and sums its columns;
the sums of all programs are added by one reduction, in order, so there are no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stat_kernels.backends.triton.launch import run

ROWS, BLOCK = 32, 64  # 16-byte loads of eight threads make 128 bytes of a row in 16 bits
SPAN = 1024  # rows whose columns one program of a backward sums
OPTIONS = {"ROWS": ROWS, "BLOCK": BLOCK, "num_warps": 4}


@triton.jit
def tile(part, COLUMNS, BLOCK: tl.constexpr):
    """The columns of a program (BLOCK,), which of them exist, and the number of its rows' part."""
    blocks = tl.cdiv(COLUMNS, BLOCK)
    column = part % blocks * BLOCK + tl.arange(0, BLOCK)
    return column, column < COLUMNS, part // blocks


@triton.jit
def elements(row, column, inside, count, COLUMNS):
    """Offsets (ROWS, BLOCK) and which of them exist; ``count`` rows do."""
    offset = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    return offset, (row < count)[:, None] & inside[None, :]


@triton.jit
def store_sums(sums, total, part, column, inside, COLUMNS):
    """The sums of a program's rows (ROWS, BLOCK) to sums (parts, COLUMNS)."""
    tl.store(sums + part.to(tl.int64) * COLUMNS + column, tl.sum(total, 0), mask=inside)


@triton.jit
def clip_scale(scale, row, valid, ROWS_OF_CLIP):
    """The factors of rows (ROWS, 1)."""
    factor = tl.load(scale + row // ROWS_OF_CLIP, mask=valid, other=0.0)
    return factor.to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["COUNT"])
def bias_gelu_kernel(x, bias, out, COUNT, COLUMNS, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column, inside, part = tile(tl.program_id(0), COLUMNS, BLOCK)
    row = part * ROWS + tl.arange(0, ROWS)
    offset, valid = elements(row, column, inside, COUNT, COLUMNS)
    z = tl.load(x + offset, mask=valid, other=0.0).to(tl.float32)
    z += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    y = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    tl.store(out + offset, y.to(out.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["COUNT"])
def bias_gelu_gradient_kernel(
    grad_out, x, bias, grad_x, sums, COUNT, COLUMNS,
    SPAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_x, and sums (programs' parts, COLUMNS)."""
    column, inside, part = tile(tl.program_id(0), COLUMNS, BLOCK)
    b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(part * SPAN, tl.minimum(part * SPAN + SPAN, COUNT), ROWS):
        row = start + tl.arange(0, ROWS)
        offset, valid = elements(row, column, inside, COUNT, COLUMNS)
        z = tl.load(x + offset, mask=valid, other=0.0).to(tl.float32) + b
        grad = tl.load(grad_out + offset, mask=valid, other=0.0).to(tl.float32)
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        grad *= 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
        tl.store(grad_x + offset, grad.to(grad_x.dtype.element_ty), mask=valid)
        total += grad
    store_sums(sums, total, part, column, inside, COLUMNS)


@triton.jit(do_not_specialize=["COUNT", "ROWS_OF_CLIP"])
def bias_residual_kernel(
    skip, x, bias, scale, out, COUNT, COLUMNS, ROWS_OF_CLIP,
    SCALED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column, inside, part = tile(tl.program_id(0), COLUMNS, BLOCK)
    row = part * ROWS + tl.arange(0, ROWS)
    offset, valid = elements(row, column, inside, COUNT, COLUMNS)
    y = tl.load(x + offset, mask=valid, other=0.0).to(tl.float32)
    y += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if SCALED:
        y *= clip_scale(scale, row, row < COUNT, ROWS_OF_CLIP)
    y += tl.load(skip + offset, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + offset, y.to(out.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["COUNT", "ROWS_OF_CLIP"])
def bias_residual_gradient_kernel(
    grad_out, scale, grad_x, sums, COUNT, COLUMNS, ROWS_OF_CLIP, SCALED: tl.constexpr,
    WRITES: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_x where it WRITES one, and sums (programs' parts, COLUMNS)."""
    column, inside, part = tile(tl.program_id(0), COLUMNS, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(part * SPAN, tl.minimum(part * SPAN + SPAN, COUNT), ROWS):
        row = start + tl.arange(0, ROWS)
        offset, valid = elements(row, column, inside, COUNT, COLUMNS)
        grad = tl.load(grad_out + offset, mask=valid, other=0.0).to(tl.float32)
        if SCALED:
            grad *= clip_scale(scale, row, row < COUNT, ROWS_OF_CLIP)
        if WRITES:
            tl.store(grad_x + offset, grad.to(grad_x.dtype.element_ty), mask=valid)
        total += grad
    store_sums(sums, total, part, column, inside, COLUMNS)


def bias_gelu(x: Tensor, bias: Tensor, out: Tensor) -> None:
    """Fills ``out``."""
    count, columns = _sizes(x)
    programs = triton.cdiv(count, ROWS) * triton.cdiv(columns, BLOCK)
    run(bias_gelu_kernel, x, programs, x, bias, out, count, columns, **OPTIONS)


def bias_gelu_gradient(grad_out: Tensor, x: Tensor, bias: Tensor, grad_x: Tensor) -> Tensor:
    """Fills ``grad_x``; the gradient of the bias (C,), float32."""
    sums, programs = _sums(x)
    run(
        bias_gelu_gradient_kernel, x, programs,
        grad_out, x, bias, grad_x, sums, *_sizes(x), SPAN=SPAN, **OPTIONS,
    )  # fmt: skip
    return sums.sum(0)


def bias_residual(skip: Tensor, x: Tensor, bias: Tensor, scale: Tensor | None, out: Tensor) -> None:
    """Fills ``out``."""
    count, columns = _sizes(x)
    programs = triton.cdiv(count, ROWS) * triton.cdiv(columns, BLOCK)
    run(
        bias_residual_kernel, x, programs,
        skip, x, bias, x if scale is None else scale, out, count, columns,
        *_rows_of_clip(count, scale), **OPTIONS,
    )  # fmt: skip


def bias_residual_gradient(grad_out: Tensor, scale: Tensor | None, grad_x: Tensor) -> Tensor:
    """Fills ``grad_x`` unless it has no elements; the gradient of the bias (C,), float32."""
    sums, programs = _sums(grad_out)
    count, columns = _sizes(grad_out)
    run(
        bias_residual_gradient_kernel, grad_out, programs,
        grad_out, grad_out if scale is None else scale, grad_x, sums, count, columns,
        *_rows_of_clip(count, scale), WRITES=grad_x.numel() > 0, SPAN=SPAN, **OPTIONS,
    )  # fmt: skip
    return sums.sum(0)


def _sizes(x: Tensor) -> tuple[int, int]:
    """Rows and columns."""
    return x.numel() // x.shape[-1], x.shape[-1]


def _rows_of_clip(count: int, scale: Tensor | None) -> tuple[int, bool]:
    return (1, False) if scale is None else (count // scale.numel(), True)


def _sums(x: Tensor) -> tuple[Tensor, int]:
    """A row of sums for each part of SPAN rows, and how many programs fill them."""
    count, columns = _sizes(x)
    parts = triton.cdiv(count, SPAN)
    sums = torch.empty((parts, columns), dtype=torch.float32, device=x.device)
    return sums, parts * triton.cdiv(columns, BLOCK)

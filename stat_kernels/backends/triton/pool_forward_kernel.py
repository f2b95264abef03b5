"""Pooling, forward: a program owns cells of the average pooling, with all their positions."""

import triton
import triton.language as tl
from torch import Tensor

from stat_kernels.backends.triton import config
from stat_kernels.backends.triton.launch import cdiv, run
from stat_kernels.backends.triton.pool_call import SIZES, PoolCall, stride_names
from stat_kernels.backends.triton.pool_rows import (
    cell_share,
    convolve,
    head_pointer,
    load_vector,
    pool_program,
    store_vector,
    sum_channels,
)
from stat_kernels.backends.triton.primitives import divide, store_rows, zero_rows


@triton.jit
def normalise(y0, y1, parameters, eps, TAPS: tl.constexpr,
              D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):  # fmt: skip
    """LayerNorm of rows (N, D): z0, z1, mean (N,), 1 / sqrt(var + eps) (N,)."""
    mean = sum_channels(y0, y1, D1) / D
    y0 -= mean[:, None]
    if D1 > 0:
        inside = D0 + tl.arange(0, D1) < D
        y1 = tl.where(inside[None, :], y1 - mean[:, None], 0.0)
    rstd = tl.rsqrt(sum_channels(y0 * y0, y1 * y1, D1) / D + eps)
    w0, w1 = load_vector(parameters + TAPS * D, True, D, D0, D1)
    b0, b1 = load_vector(parameters + TAPS * D + D, True, D, D0, D1)
    y0 = y0 * rstd[:, None] * w0 + b0
    if D1 > 0:
        y1 = y1 * rstd[:, None] * w1 + b1
    return y0, y1, mean, rstd


@triton.jit(do_not_specialize=[*stride_names("tokens"), *SIZES, "SPAN"])
def pool_forward_kernel(
    tokens, parameters, pooled, stats, tokens_p, tokens_b, tokens_t, tokens_n, tokens_h,
    P, B, T, H, GRID_H, GRID_W, OUT_H, OUT_W, CELLS_H, CELLS_W, SIDE, SPAN, eps,
    CLASS_TOKEN: tl.constexpr, LONG: tl.constexpr, SHORT: tl.constexpr, STRIDE: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, UNROLL: tl.constexpr,
    UNIT: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """pooled (P, B, T, R, H, D) and stats (2, P, B, T, Rn, H).

    A program walks ``SPAN`` cells of one head of a frame, BLOCK at a time: one position of each
    cell after the other, and after the first cells' positions the class token, a row like them.
    """
    TAPS: tl.constexpr = KT * KH * KW
    OF_CLASS: tl.constexpr = 1 if LONG == "class" else 0
    FIRST: tl.constexpr = 0 if LONG == "none" else 1  # the first current row
    cells = CELLS_H * CELLS_W
    p, frame, t, h, part = pool_program(P, T, H, tl.cdiv(cells, SPAN))
    strides = (tokens_p, tokens_b, tokens_t, tokens_n, tokens_h)
    tokens = head_pointer(tokens, strides, p, frame, T, h, UNIT)
    parameters += p * (TAPS + 2) * D
    current = OUT_H * OUT_W
    head = p.to(tl.int64) * B * T + frame
    normed = OF_CLASS + current
    rstds = P.to(tl.int64) * B * T * normed * H
    stats += head * normed * H + h
    rows = FIRST + current
    if SHORT:
        rows += cells
    pooled += (head * rows * H + h) * D
    total0, total1 = zero_rows(BLOCK, D0, D1)

    for start in range(part * SPAN, tl.minimum(part * SPAN + SPAN, cells), BLOCK):
        cell = start + tl.arange(0, BLOCK)
        cell_y = divide(cell, CELLS_W)
        cell_x = cell - cell_y * CELLS_W
        sum0, sum1 = zero_rows(BLOCK, D0, D1)
        steps = SIDE * SIDE
        if LONG == "class":
            steps += tl.where(start == 0, 1, 0)
        for step in range(steps):
            y = cell_y * SIDE + step // SIDE
            x = cell_x * SIDE + step % SIDE
            valid = (cell < cells) & (step < SIDE * SIDE) & (y < OUT_H) & (x < OUT_W)
            of_class = (cell == 0) & (step == SIDE * SIDE)
            z0, z1 = convolve(
                tokens, parameters, y, x, valid, of_class, t, tokens_t, tokens_n, T, GRID_H, GRID_W,
                CLASS_TOKEN, LONG, STRIDE, KT, KH, KW, UNROLL, UNIT, D, D0, D1, BLOCK,
            )  # fmt: skip
            z0, z1, mean, rstd = normalise(z0, z1, parameters, eps, TAPS, D, D0, D1)
            row = tl.where(of_class, -OF_CLASS, y * OUT_W + x)
            written = valid
            if LONG == "class":
                written = valid | of_class
            tl.store(stats + (OF_CLASS + row) * H, mean, mask=written)
            tl.store(stats + rstds + (OF_CLASS + row) * H, rstd, mask=written)
            store_rows(pooled + (FIRST + row) * H * D, z0, z1, written, D, D0, D1)
            if SHORT or LONG == "mean":
                sum0 += tl.where(valid[:, None], z0, 0.0)
                if D1 > 0:
                    sum1 += tl.where(valid[:, None], z1, 0.0)
        if LONG == "mean":
            total0 += sum0
            if D1 > 0:
                total1 += sum1
        if SHORT:
            share = cell_share(cell_y, cell_x, SIDE, OUT_H, OUT_W)[:, None]
            row = FIRST + current + cell
            store_rows(pooled + row * H * D, sum0 * share, sum1 * share, cell < cells, D, D0, D1)
    if LONG == "mean":
        share = 1.0 / current
        store_vector(pooled, tl.sum(total0, 0) * share, tl.sum(total1, 0) * share, D, D0, D1)


def pool(call: PoolCall, parameters: Tensor, eps: float, pooled: Tensor, stats: Tensor) -> None:
    """Fills ``pooled`` and ``stats``.

    Args:
        parameters: (P, taps + 2, D), from ``pack_parameters`` of weights, norm weights and biases.
    """
    tile = call.tile("forward")
    cells = call.cells[0] * call.cells[1]
    # A frame's mean has one owner, which walks all its cells.
    span = cells if call.long == "mean" else tile.rows
    run(
        pool_forward_kernel, call.tokens, call.heads * cdiv(cells, span),
        call.tokens, parameters, pooled, stats,
        *call.strides_of(call.tokens), *call.sizes, span, eps,
        **call.constants, **tile.options, UNROLL=config.pool_unroll(call.taps),
    )  # fmt: skip

"""Pooling, backward: rows through the norm, then tokens gather, then parameters are summed.

Three kernels. The first computes the convolution again and takes the gradient through the norm: a
gradient for each of its rows, and sums of its rows for the parameters. In the second each token
gathers from the rows that read it. The third adds the sums, in order. No atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stat_kernels.backends.triton import config
from stat_kernels.backends.triton.launch import cdiv, run
from stat_kernels.backends.triton.pool_call import SIZES, PoolCall, stride_names
from stat_kernels.backends.triton.pool_rows import (
    cell_share,
    convolve,
    corner_tokens,
    head_pointer,
    load_float,
    load_vector,
    pool_program,
    store_vector,
    sum_channels,
    tap_rows,
)
from stat_kernels.backends.triton.primitives import divide, store_rows, zero_rows

SUM_GROUP = 512  # slabs that one program adds up
SUM_TILE = (64, 32)  # slabs and columns at once


@triton.jit
def incoming(
    grad_pooled, row, n, valid, current, OUT_H, OUT_W, CELLS_W, SIDE, H,
    LONG: tl.constexpr, SHORT: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """The gradient of normed rows: their own, and their share of a cell's and of the mean's."""
    FIRST: tl.constexpr = 1 if LONG == "mean" else 0  # normed rows begin here
    y = divide(n, OUT_W)
    x = n - y * OUT_W
    dz0, dz1 = load_float(grad_pooled + (FIRST + row) * H * D, valid, D, D0, D1)
    if SHORT:
        cell_y = divide(y, SIDE)
        cell_x = divide(x, SIDE)
        share = cell_share(cell_y, cell_x, SIDE, OUT_H, OUT_W)[:, None]
        cell = (0 if LONG == "none" else 1) + OUT_H * OUT_W + cell_y * CELLS_W + cell_x
        short0, short1 = load_float(grad_pooled + cell * H * D, current, D, D0, D1)
        dz0 += short0 * share
        if D1 > 0:
            dz1 += short1 * share
    if LONG == "mean":
        share = 1.0 / (OUT_H * OUT_W)
        long0, long1 = load_float(grad_pooled + row * 0, current, D, D0, D1)
        dz0 += long0 * share
        if D1 > 0:
            dz1 += long1 * share
    return dz0, dz1


@triton.jit(do_not_specialize=[*stride_names("tokens"), *SIZES])
def pool_rows_kernel(
    grad_pooled, tokens, parameters, stats, grad_rows, slabs,
    tokens_p, tokens_b, tokens_t, tokens_n, tokens_h,
    P, B, T, H, GRID_H, GRID_W, OUT_H, OUT_W, CELLS_H, CELLS_W, SIDE,
    CLASS_TOKEN: tl.constexpr, LONG: tl.constexpr, SHORT: tl.constexpr, STRIDE: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, UNROLL: tl.constexpr,
    UNIT: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_rows (P, B, T, Rn, H, D), of what the norm read, and slabs (P, programs, taps + 2, D).

    A program owns BLOCK normed rows of one head of a frame, the class token's being the first; its
    slab holds its sums for the taps, the norm's weight and its bias.
    """
    TAPS: tl.constexpr = KT * KH * KW
    OF_CLASS: tl.constexpr = 1 if LONG == "class" else 0
    normed = OF_CLASS + OUT_H * OUT_W
    parts = tl.cdiv(normed, BLOCK)
    p, frame, t, h, part = pool_program(P, T, H, parts)
    strides = (tokens_p, tokens_b, tokens_t, tokens_n, tokens_h)
    tokens = head_pointer(tokens, strides, p, frame, T, h, UNIT)
    parameters += p * (TAPS + 1) * D
    head = p.to(tl.int64) * B * T + frame
    rstds = P.to(tl.int64) * B * T * normed * H
    stats += head * normed * H + h
    grad_rows += (head * normed * H + h) * D
    rows = OUT_H * OUT_W + (0 if LONG == "none" else 1)
    if SHORT:
        rows += CELLS_H * CELLS_W
    grad_pooled += (head * rows * H + h) * D
    slabs += ((head * parts + part) * H + h) * (TAPS + 2) * D

    row = part * BLOCK + tl.arange(0, BLOCK)
    valid = row < normed
    of_class = row < OF_CLASS
    n = tl.maximum(row - OF_CLASS, 0)
    y = divide(n, OUT_W)
    x = n - y * OUT_W
    current = valid & (row >= OF_CLASS)
    hat0, hat1 = convolve(
        tokens, parameters, y, x, current, of_class, t, tokens_t, tokens_n, T, GRID_H, GRID_W,
        CLASS_TOKEN, LONG, STRIDE, KT, KH, KW, UNROLL, UNIT, D, D0, D1, BLOCK,
    )  # fmt: skip
    dz0, dz1 = incoming(
        grad_pooled, row, n, valid, current, OUT_H, OUT_W, CELLS_W, SIDE, H,
        LONG, SHORT, D, D0, D1,
    )  # fmt: skip
    mean = tl.load(stats + row * H, mask=valid, other=0.0)[:, None]
    rstd = tl.load(stats + rstds + row * H, mask=valid, other=0.0)[:, None]
    hat0 = (hat0 - mean) * rstd
    hat1 = (hat1 - mean) * rstd
    store_vector(slabs + TAPS * D, tl.sum(dz0 * hat0, 0), tl.sum(dz1 * hat1, 0), D, D0, D1)
    store_vector(slabs + TAPS * D + D, tl.sum(dz0, 0), tl.sum(dz1, 0), D, D0, D1)

    w0, w1 = load_vector(parameters + TAPS * D, True, D, D0, D1)
    dz0 *= w0
    dz1 *= w1
    centre = sum_channels(dz0, dz1, D1)[:, None] / D
    slope = sum_channels(dz0 * hat0, dz1 * hat1, D1)[:, None] / D
    dy0 = (dz0 - centre - hat0 * slope) * rstd
    dy1 = (dz1 - centre - hat1 * slope) * rstd
    store_rows(grad_rows + row * H * D, dy0, dy1, valid, D, D0, D1)

    corner, top, left = corner_tokens(
        tokens, y, x, tokens_n, GRID_W, CLASS_TOKEN, STRIDE, KH, KW, UNIT
    )
    for tap in tl.range(0, TAPS, loop_unroll_factor=UNROLL):
        under, inside = tap_rows(
            corner, top, left, current, tap, t, tokens_t, tokens_n, T, GRID_H, GRID_W,
            KT, KH, KW, UNIT,
        )  # fmt: skip
        x0, x1 = load_float(under, inside, D, D0, D1)
        store_vector(slabs + tap * D, tl.sum(dy0 * x0, 0), tl.sum(dy1 * x1, 0), D, D0, D1)


@triton.jit(do_not_specialize=[*stride_names("grad"), *SIZES])
def pool_tokens_kernel(
    grad_rows, parameters, grad, grad_p, grad_b, grad_t, grad_n, grad_h,
    P, B, T, H, GRID_H, GRID_W, OUT_H, OUT_W, CELLS_H, CELLS_W, SIDE,
    CLASS_TOKEN: tl.constexpr, LONG: tl.constexpr, SHORT: tl.constexpr, STRIDE: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, UNROLL: tl.constexpr,
    UNIT: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad (P, B, T, N, H, D), every element.

    A program owns BLOCK squares of STRIDE x STRIDE tokens, one square for each output position, and
    writes one token of each at a time: these are read by the same taps, ceil(kh / STRIDE) x
    ceil(kw / STRIDE) in a frame. Row 0 is the class token where there is one.
    """
    TAPS: tl.constexpr = KT * KH * KW
    OF_CLASS: tl.constexpr = 1 if LONG == "class" else 0
    TAPS_H: tl.constexpr = (KH + STRIDE - 1) // STRIDE
    TAPS_W: tl.constexpr = (KW + STRIDE - 1) // STRIDE
    squares = OUT_H * OUT_W
    normed = OF_CLASS + squares
    p, frame, t, h, part = pool_program(P, T, H, tl.cdiv(CLASS_TOKEN + squares, BLOCK))
    strides = (grad_p, grad_b, grad_t, grad_n, grad_h)
    grad = head_pointer(grad, strides, p, frame, T, h, UNIT)
    parameters += p * (TAPS + 1) * D
    head = p.to(tl.int64) * B * T + frame
    grad_rows += (head * normed * H + h) * D

    row = part * BLOCK + tl.arange(0, BLOCK)
    square = row - CLASS_TOKEN
    y = divide(tl.maximum(square, 0), OUT_W)
    x = tl.maximum(square, 0) - y * OUT_W
    for place in range(STRIDE * STRIDE):
        token_y = place // STRIDE
        token_x = place % STRIDE
        of_class = (square < 0) & (place == 0)
        valid = (square >= 0) & (square < squares)
        valid = valid & (y * STRIDE + token_y < GRID_H) & (x * STRIDE + token_x < GRID_W)
        if OF_CLASS:
            acc0, acc1 = load_float(grad_rows + row * 0, of_class, D, D0, D1)
        else:
            acc0, acc1 = zero_rows(BLOCK, D0, D1)
        first_i = (token_y + KH // 2) % STRIDE
        first_j = (token_x + KW // 2) % STRIDE
        for step in tl.range(0, KT * TAPS_H * TAPS_W, loop_unroll_factor=UNROLL):
            k = step // (TAPS_H * TAPS_W)
            i = first_i + step // TAPS_W % TAPS_H * STRIDE
            j = first_j + step % TAPS_W * STRIDE
            reader_t = t - k + KT // 2
            reader_y = y + (token_y + KH // 2) // STRIDE - step // TAPS_W % TAPS_H
            reader_x = x + (token_x + KW // 2) // STRIDE - step % TAPS_W
            exists = (i < KH) & (j < KW)
            reads = valid & exists & (reader_t >= 0) & (reader_t < T) & (reader_y >= 0)
            reads = reads & (reader_y < OUT_H) & (reader_x >= 0) & (reader_x < OUT_W)
            reader = OF_CLASS + reader_y * OUT_W + reader_x + (reader_t - t) * normed
            dy0, dy1 = load_float(grad_rows + reader * H * D, reads, D, D0, D1)
            tap = (k * KH + i) * KW + j
            w0, w1 = load_vector(parameters + tap * D, exists, D, D0, D1)
            acc0 += dy0 * w0
            if D1 > 0:
                acc1 += dy1 * w1
        n = CLASS_TOKEN + (y * STRIDE + token_y) * GRID_W + x * STRIDE + token_x
        n = tl.where(of_class, 0, n).to(tl.int64)
        store_rows(grad + n * grad_n * UNIT, acc0, acc1, valid | of_class, D, D0, D1)


@triton.jit(do_not_specialize=["SLABS", "GROUP"])
def sum_slabs_kernel(
    slabs, total, SLABS, GROUP, TAPS: tl.constexpr, D: tl.constexpr, LAST: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """slabs (P, SLABS, taps + 2, D) to (P, ceil(SLABS / GROUP), taps + 2, D).

    The LAST sum is grad_params (P, D * (taps + 2)), in which a channel's taps lie together.
    """
    SIZE: tl.constexpr = (TAPS + 2) * D
    blocks = (SIZE + COLUMNS - 1) // COLUMNS
    groups = tl.cdiv(SLABS, GROUP)
    owner = tl.program_id(0) // blocks
    p = (owner // groups).to(tl.int64)
    group = owner % groups
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < SIZE)[None, :]
    slabs += p * SLABS * SIZE
    acc = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for start in range(group * GROUP, tl.minimum(group * GROUP + GROUP, SLABS), BLOCK):
        slab = start + tl.arange(0, BLOCK)
        valid = (slab < SLABS)[:, None] & inside
        acc += tl.load(
            slabs + slab.to(tl.int64)[:, None] * SIZE + column[None, :], mask=valid, other=0.0
        )
    if LAST:
        tap = column // D
        column = tl.where(tap < TAPS, column % D * TAPS + tap, column)
    tl.store(total + owner.to(tl.int64) * SIZE + column, tl.sum(acc, 0), mask=column < SIZE)


def pool_gradients(
    call: PoolCall, parameters: Tensor, grad_pooled: Tensor, stats: Tensor, grad_params: Tensor
) -> None:
    """Fills ``call.grad_tokens`` and ``grad_params``.

    Args:
        parameters: (P, taps + 1, D), from ``pack_parameters`` of weights and norm weights.
        grad_pooled, stats, grad_params: see ``stat_kernels.backends``.
    """
    tokens, normed = call.tokens, call.layout.normed
    p, b, t, _, h, d = tokens.shape
    # bfloat16 has float32's range; float16 could overflow where the tokens' gradients would not.
    dtype = torch.bfloat16 if tokens.dtype == torch.bfloat16 else torch.float32
    grad_rows = torch.empty((p, b, t, normed, h, d), dtype=dtype, device=tokens.device)
    tile = call.tile("rows")
    parts = cdiv(normed, tile.rows)
    slabs = torch.empty(
        (p, call.heads // p * parts, call.taps + 2, d), dtype=torch.float32, device=tokens.device
    )
    run(
        pool_rows_kernel, tokens, call.heads * parts,
        grad_pooled, tokens, parameters, stats, grad_rows, slabs,
        *call.strides_of(tokens), *call.sizes,
        **call.constants, **tile.options, UNROLL=config.pool_unroll(call.taps, 3),
    )  # fmt: skip
    tile, rows = call.tile("tokens"), call.class_token + call.layout.current
    kt, kh, kw = call.kernel
    readers = kt * cdiv(kh, call.stride) * cdiv(kw, call.stride)
    run(
        pool_tokens_kernel, tokens, call.heads * cdiv(rows, tile.rows),
        grad_rows, parameters, call.grad_tokens,
        *call.strides_of(call.grad_tokens), *call.sizes,
        **call.constants, **tile.options, UNROLL=config.pool_unroll(readers),
    )  # fmt: skip
    _sum_slabs(call, slabs, grad_params)


def _sum_slabs(call: PoolCall, slabs: Tensor, grad_params: Tensor) -> None:
    """Adds the slabs in groups, and the groups' sums again, until there is one for each tensor."""
    rows, columns = SUM_TILE
    p, count, *_ = slabs.shape
    while slabs is not grad_params:
        groups = cdiv(count, SUM_GROUP)
        total = grad_params
        if groups > 1:
            total = torch.empty(
                (p, groups, *slabs.shape[2:]), dtype=slabs.dtype, device=slabs.device
            )
        run(
            sum_slabs_kernel, slabs, p * groups * cdiv(slabs[0, 0].numel(), columns),
            slabs, total, count, SUM_GROUP,
            TAPS=call.taps, D=slabs.shape[-1], LAST=groups == 1, BLOCK=rows, COLUMNS=columns,
        )  # fmt: skip
        slabs, count = total, groups

"""Shared by the pooling kernels: programs, rows in float32, the depthwise convolution."""

import triton
import triton.language as tl

from stat_kernels.backends.triton.primitives import load_rows, zero_rows


@triton.jit
def pool_program(P, T, H, parts):
    """(p, frame, t, h, part) of a program; frames are numbered through the clips.

    Heads and tensors lie next to each other in the projection, so they run at the same time.
    """
    program = tl.program_id(0)
    frame = program // H // P // parts
    return program // H % P, frame, frame % T, program % H, program // H // P % parts


@triton.jit
def head_pointer(base, strides, p, frame, T, h, UNIT: tl.constexpr):
    """Token 0 of a (P, B, T, N, H, D) tensor's tensor p, frame and head."""
    base += (p.to(tl.int64) * strides[0] + (frame // T).to(tl.int64) * strides[1]) * UNIT
    return base + ((frame % T).to(tl.int64) * strides[2] + h.to(tl.int64) * strides[4]) * UNIT


@triton.jit
def load_float(pointers, valid, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """``load_rows`` in float32."""
    x0, x1 = load_rows(pointers, valid, D, D0, D1)
    return x0.to(tl.float32), x1.to(tl.float32)


@triton.jit
def load_vector(pointer, valid, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """A row of packed parameters as (1, D0) and (1, D1), zero beyond D or where not ``valid``."""
    columns = tl.arange(0, D0)
    x0 = tl.load(pointer + columns, mask=(columns < D) & valid, other=0.0)
    x1 = x0
    if D1 > 0:
        columns = D0 + tl.arange(0, D1)
        x1 = tl.load(pointer + columns, mask=(columns < D) & valid, other=0.0)
    return x0[None, :], x1[None, :]


@triton.jit
def store_vector(pointer, x0, x1, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """(D0,) and (D1,) to D elements; casts to the dtype behind ``pointer``."""
    dtype = pointer.dtype.element_ty
    tl.store(pointer + tl.arange(0, D0), x0.to(dtype))
    if D1 > 0:
        columns = D0 + tl.arange(0, D1)
        tl.store(pointer + columns, x1.to(dtype), mask=columns < D)


@triton.jit
def sum_channels(x0, x1, D1: tl.constexpr):
    """(N, D) to (N,)."""
    total = tl.sum(x0, 1)
    if D1 > 0:
        total += tl.sum(x1, 1)
    return total


@triton.jit
def cell_share(cell_y, cell_x, SIDE, OUT_H, OUT_W):
    """The weight of a position in its cell's average, which the grid's edge may cut; (N,)."""
    held = tl.minimum(SIDE, OUT_H - cell_y * SIDE) * tl.minimum(SIDE, OUT_W - cell_x * SIDE)
    return 1.0 / tl.maximum(held, 1).to(tl.float32)  # 1 beyond the grid, where zeros are averaged


@triton.jit
def tap_rows(
    corner, top, left, valid, tap, t, stride_t, stride_n, T, GRID_H, GRID_W,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Pointers to the tokens under a tap of the convolution, and which are inside the clip.

    ``corner``: the token under tap (0, 0) of its frame, which need not exist; ``top`` and
    ``left`` are its row and column.
    """
    later = tap // (KH * KW) - KT // 2
    i = tap // KW % KH
    j = tap % KW
    inside = valid & (top + i >= 0) & (top + i < GRID_H) & (left + j >= 0) & (left + j < GRID_W)
    inside = inside & (t + later >= 0) & (t + later < T)
    steps = stride_n.to(tl.int64) * (i * GRID_W + j) + stride_t.to(tl.int64) * later
    return corner + steps * UNIT, inside


@triton.jit
def corner_tokens(
    tokens, y, x, stride_n, GRID_W, CLASS_TOKEN: tl.constexpr, STRIDE: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The token under the first tap of output positions (y, x): pointer, row and column."""
    top = y * STRIDE - KH // 2
    left = x * STRIDE - KW // 2
    n = top * GRID_W + left + CLASS_TOKEN
    return tokens + n.to(tl.int64) * stride_n * UNIT, top, left


@triton.jit
def convolve(
    tokens, parameters, y, x, valid, of_class, t, stride_t, stride_n, T, GRID_H, GRID_W,
    CLASS_TOKEN: tl.constexpr, LONG: tl.constexpr, STRIDE: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, UNROLL: tl.constexpr,
    UNIT: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the norm reads: the convolution at ``valid`` positions, the token of ``of_class`` rows.

    ``tokens`` points to a frame's first token. Rows that are neither are zero.
    """
    corner, top, left = corner_tokens(
        tokens, y, x, stride_n, GRID_W, CLASS_TOKEN, STRIDE, KH, KW, UNIT
    )
    if LONG == "class":
        acc0, acc1 = load_float(tokens + tl.zeros([BLOCK], tl.int32), of_class, D, D0, D1)
    else:
        acc0, acc1 = zero_rows(BLOCK, D0, D1)
    for tap in tl.range(0, KT * KH * KW, loop_unroll_factor=UNROLL):
        rows, inside = tap_rows(
            corner, top, left, valid, tap, t, stride_t, stride_n, T, GRID_H, GRID_W,
            KT, KH, KW, UNIT,
        )  # fmt: skip
        x0, x1 = load_float(rows, inside, D, D0, D1)
        w0, w1 = load_vector(parameters + tap * D, True, D, D0, D1)
        acc0 += x0 * w0
        if D1 > 0:
            acc1 += x1 * w1
    return acc0, acc1

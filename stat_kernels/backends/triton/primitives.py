"""Shared by the kernels: two chunks of head-dim channels, rows of keys, exact division.

A head dim that is not a power of two is two chunks, D0 channels then D1 (96 = 64 + 32), so that the
matrix units never multiply padding; D1 = 0 where one chunk is enough. Channels of a chunk
beyond D (40 = 32 + 16) are masked.
"""

import triton
import triton.language as tl
from triton.runtime.jit import constexpr_function

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
NO_LIMIT = tl.constexpr(1 << 30)


@constexpr_function
def tensor_memory():
    """Whether this is compiled for a GPU whose matrix units write to tensor memory, 10.x."""
    target = tl.target_info.current_target()
    return target is not None and target.backend == "cuda" and target.arch // 10 == 10


@triton.jit
def divide(x, n):
    """floor(x / n) of non-negative int32, exact, without the 25 instructions of a division."""
    quotient = (x.to(tl.float32) * (1.0 / n)).to(tl.int32)
    remainder = x - quotient * n
    return quotient + tl.where(remainder >= n, 1, 0) - tl.where(remainder < 0, 1, 0)


@triton.jit
def load_rows(pointers, valid, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Rows (N, D) that begin at ``pointers`` (N,) as (N, D0) and (N, D1); zero where not valid."""
    columns = tl.arange(0, D0)
    x0 = tl.load(pointers[:, None] + columns[None, :], mask=valid[:, None], other=0.0)
    x1 = x0
    if D1 > 0:
        columns = D0 + tl.arange(0, D1)
        mask = valid[:, None]
        if D0 + D1 > D:
            mask = mask & (columns < D)[None, :]
        x1 = tl.load(pointers[:, None] + columns[None, :], mask=mask, other=0.0)
    return x0, x1


@triton.jit
def store_rows(pointers, x0, x1, valid, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """The inverse of load_rows; casts to the dtype behind ``pointers``."""
    dtype = pointers.dtype.element_ty
    columns = tl.arange(0, D0)
    tl.store(pointers[:, None] + columns[None, :], x0.to(dtype), mask=valid[:, None])
    if D1 > 0:
        columns = D0 + tl.arange(0, D1)
        mask = valid[:, None]
        if D0 + D1 > D:
            mask = mask & (columns < D)[None, :]
        tl.store(pointers[:, None] + columns[None, :], x1.to(dtype), mask=mask)


@triton.jit
def zero_rows(N: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Accumulators of N rows; the second is a stand-in where there is one chunk."""
    x1 = tl.zeros([N, 1], tl.float32)
    if D1 > 0:
        x1 = tl.zeros([N, D1], tl.float32)
    return tl.zeros([N, D0], tl.float32), x1


@triton.jit
def dot_rows(a0, a1, b0, b1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """Every row of a times every row of b: (M, D) and (N, D) to (M, N), summed in float32."""
    if D1 == 0:
        return tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if tensor_memory() and (PRECISION == "tf32" or a0.dtype != tl.float32):
        # Two products into one accumulator are compiled wrongly there, and cost a round trip
        # through registers (triton-lang/triton#10821). The limit, which only fp8 heeds, keeps the
        # compiler from making one of them the other's accumulator again.
        x0 = tl.dot(a0, tl.trans(b0), input_precision=PRECISION, max_num_imprecise_acc=NO_LIMIT)
        x1 = tl.dot(a1, tl.trans(b1), input_precision=PRECISION, max_num_imprecise_acc=NO_LIMIT)
        return x0 + x1
    product = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    return tl.dot(a1, tl.trans(b1), product, input_precision=PRECISION)


@triton.jit
def add_product(acc0, acc1, weights, x0, x1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """acc + weights x for weights (M, N), rows x (N, D) and accumulators (M, D)."""
    weights = weights.to(x0.dtype)
    acc0 = tl.dot(weights, x0, acc0, input_precision=PRECISION)
    if D1 > 0:
        acc1 = tl.dot(weights, x1, acc1, input_precision=PRECISION)
    return acc0, acc1


@triton.jit
def row_sums(a0, a1, b0, b1, D1: tl.constexpr):
    """Every row of a times the same row of b: (M, D) and (M, D) to (M,), in float32."""
    total = tl.sum(a0.to(tl.float32) * b0.to(tl.float32), 1)
    if D1 > 0:
        total += tl.sum(a1.to(tl.float32) * b1.to(tl.float32), 1)
    return total


@triton.jit
def clip_pointer(base, strides, b, h, UNIT: tl.constexpr):
    """First row of clip b, head h; ``strides`` of (B, T, N, H), counted in UNIT elements."""
    return base + (b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[3]) * UNIT


@triton.jit
def row_pointers(clip, strides, frame, token, UNIT: tl.constexpr):
    """Row ``token`` of ``frame``, either a scalar or a block, below a pointer of clip_pointer."""
    offset = frame.to(tl.int64) * strides[1] + token.to(tl.int64) * strides[2]
    return clip + offset * UNIT


@triton.jit
def token_pointers(frame, strides, token, UNIT: tl.constexpr):
    """Rows ``token`` below a pointer of frame_pointer."""
    return frame + token.to(tl.int64) * strides[2] * UNIT


@triton.jit
def frame_pointer(base, strides, b, i, h, UNIT: tl.constexpr):
    """First row of clip b, frame i, head h."""
    return clip_pointer(base, strides, b, h, UNIT) + i.to(tl.int64) * strides[1] * UNIT


@triton.jit
def query_program(NQ, H, T, BLOCK_Q: tl.constexpr):
    """(b, i, h, first row) of a program that owns a tile of queries; a frame's come together."""
    program = tl.program_id(0)
    tiles = tl.cdiv(NQ, BLOCK_Q)
    frame = program // tiles
    b = frame // H // T
    return b, frame // H % T, frame % H, program % tiles * BLOCK_Q


@triton.jit
def keys_of_frame(own, NC, NS, L, S, LEFT, RIGHT, CAUSAL: tl.constexpr):
    """Of frame ``own``: first neighbour inside the clip, number of short keys, number of keys."""
    first = tl.maximum(own - LEFT, 0)
    short_rows = (tl.minimum(own + RIGHT, S - 1) - first) * NS  # itself is no neighbour
    longs = L
    if CAUSAL:
        longs = own + 1
    return first, short_rows, NC + short_rows + longs


@triton.jit
def key_pointers(
    row, cur, short, long, cur_strides, short_strides, long_strides,
    i, own, first, NC, NS, short_rows, SHORT_TOKEN, LONG_TOKEN,
    POOLED: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Where a frame's keys lie: rows cur, then short, then long, with no gap between them.

    Row r of the short part is token r % NS of the neighbour r // NS; frame ``own`` of the short
    keys is stepped over, so the hole in the window costs nothing. Bases are those of clip_pointer.

    POOLED: all are tokens of one buffer with the strides of ``cur``, short and long ones
    SHORT_TOKEN and LONG_TOKEN tokens behind the current ones. One offset of 32 bits, which keys and
    values share, then replaces three of 64 for each.
    """
    short_row = row - NC
    frame = divide(short_row, NS)
    token = short_row - frame * NS
    frame += first
    frame += tl.where(frame >= own, 1, 0)
    long_row = short_row - short_rows
    if POOLED:
        frame = tl.where(short_row < 0, i, tl.where(long_row < 0, frame, long_row))
        token = tl.where(long_row < 0, SHORT_TOKEN + token, LONG_TOKEN)
        token = tl.where(short_row < 0, row, token)
        offset = frame * cur_strides[1] + token * cur_strides[2]
        return cur + offset.to(tl.int64) * UNIT
    short = row_pointers(short, short_strides, frame, token, UNIT)
    long = token_pointers(long, long_strides, long_row, UNIT)
    cur += i.to(tl.int64) * cur_strides[1] * UNIT
    cur = token_pointers(cur, cur_strides, row, UNIT)
    return tl.where(short_row < 0, cur, tl.where(long_row < 0, short, long))

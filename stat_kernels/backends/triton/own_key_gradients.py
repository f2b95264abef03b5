"""Gradients of own and long keys, which all queries of a frame attend.

A frame's own keys and the clip's long keys are one sequence of rows. A program owns a tile of them
and reads a span of queries once: a frame's, and then STAT's 49 + 32 keys are one tile of 128.
Gradients of own keys are written at once; those of long keys are float32 partial sums, one a span.
"""

import triton
import triton.language as tl
from torch import Tensor

from stat_kernels.backends.triton.config import Tile
from stat_kernels.backends.triton.launch import Call, cdiv, launch, stride_names
from stat_kernels.backends.triton.primitives import (
    clip_pointer,
    divide,
    frame_pointer,
    load_rows,
    row_pointers,
    token_pointers,
    zero_rows,
)
from stat_kernels.backends.triton.query_tiles import add_queries, load_statistics


@triton.jit
def store_scaled(
    own_rows, long_rows, x0, x1, scale, own, long,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """Rows x times scale, to ``own_rows`` where ``own`` and to ``long_rows`` where ``long``."""
    dtype = own_rows.dtype.element_ty
    columns = tl.arange(0, D0)
    x0 *= scale
    tl.store(own_rows[:, None] + columns[None, :], x0.to(dtype), mask=own[:, None])
    tl.store(long_rows[:, None] + columns[None, :], x0, mask=long[:, None])
    if D1 > 0:
        x1 *= scale
        columns = D0 + tl.arange(0, D1)
        inside = (columns < D)[None, :]
        tl.store(own_rows[:, None] + columns[None, :], x1.to(dtype), mask=own[:, None] & inside)
        tl.store(long_rows[:, None] + columns[None, :], x1, mask=long[:, None] & inside)


@triton.jit(
    do_not_specialize=[
        *("T", "NQ", "H", "NC", "L", "OFFSET", "SPAN", "PARTIALS"),
        *stride_names("q", "grad_out", "k_cur", "v_cur", "k_long", "v_long", "grad_k", "grad_v"),
    ]
)
def own_key_gradients_kernel(
    q, grad_out, statistics, k_cur, v_cur, k_long, v_long, grad_k, grad_v, partial,
    q_b, q_t, q_n, q_h, grad_out_b, grad_out_t, grad_out_n, grad_out_h,
    k_cur_b, k_cur_t, k_cur_n, k_cur_h, v_cur_b, v_cur_t, v_cur_n, v_cur_h,
    k_long_b, k_long_t, k_long_n, k_long_h, v_long_b, v_long_t, v_long_n, v_long_h,
    grad_k_b, grad_k_t, grad_k_n, grad_k_h, grad_v_b, grad_v_t, grad_v_n, grad_v_h,
    T, NQ, H, NC, L, OFFSET, SPAN, PARTIALS, scale, scale_log2,
    GUARDED: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    PRECISION: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v (B, T, NC, H, D) of own keys, and ``partial`` (2, spans, B, L, H, D).

    Queries are numbered through the clip; a span is SPAN of them, a frame's unless NC is 0. Where
    CAUSAL, long key l is attended by frames l - OFFSET and on. PARTIALS is the size of one of the
    two halves of ``partial``.

    GUARDED, which only CAUSAL needs: recomputes what a launch without it wrote where that has NaN.
    """
    q_strides = (q_b, q_t, q_n, q_h)
    grad_out_strides = (grad_out_b, grad_out_t, grad_out_n, grad_out_h)
    k_cur_strides = (k_cur_b, k_cur_t, k_cur_n, k_cur_h)
    v_cur_strides = (v_cur_b, v_cur_t, v_cur_n, v_cur_h)
    k_long_strides = (k_long_b, k_long_t, k_long_n, k_long_h)
    v_long_strides = (v_long_b, v_long_t, v_long_n, v_long_h)
    grad_k_strides = (grad_k_b, grad_k_t, grad_k_n, grad_k_h)
    grad_v_strides = (grad_v_b, grad_v_t, grad_v_n, grad_v_h)
    tiles = tl.cdiv(NC + L, BLOCK_K)
    spans = tl.cdiv(T * NQ, SPAN)
    row = tl.program_id(0) % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    owner = tl.program_id(0) // tiles
    h = owner % H
    span = owner // H % spans
    b = owner // H // spans
    clips = tl.num_programs(0) // tiles // H // spans
    own = row < NC
    valid = row < NC + L
    long = row - NC
    partial += ((span * clips + b).to(tl.int64) * L * H + h) * D
    if GUARDED:
        found = tl.load(partial + long * H * D, mask=valid & ~own, other=0.0)
        if tl.max((found != found).to(tl.int32)) == 0:
            return

    k_cur = frame_pointer(k_cur, k_cur_strides, b, span, h, UNIT)
    v_cur = frame_pointer(v_cur, v_cur_strides, b, span, h, UNIT)
    k_long = clip_pointer(k_long, k_long_strides, b, h, UNIT)
    v_long = clip_pointer(v_long, v_long_strides, b, h, UNIT)
    k_cur = token_pointers(k_cur, k_cur_strides, row, UNIT)
    v_cur = token_pointers(v_cur, v_cur_strides, row, UNIT)
    k_long = token_pointers(k_long, k_long_strides, long, UNIT)
    v_long = token_pointers(v_long, v_long_strides, long, UNIT)
    k0, k1 = load_rows(tl.where(own, k_cur, k_long), valid, D, D0, D1)
    v0, v1 = load_rows(tl.where(own, v_cur, v_long), valid, D, D0, D1)
    q = clip_pointer(q, q_strides, b, h, UNIT)
    grad_out = clip_pointer(grad_out, grad_out_strides, b, h, UNIT)
    statistics += (b * H + h).to(tl.int64) * T * NQ * 2
    grad_k0, grad_k1 = zero_rows(BLOCK_K, D0, D1)
    grad_v0, grad_v1 = zero_rows(BLOCK_K, D0, D1)
    first = span * SPAN
    last = tl.minimum(first + SPAN, T * NQ)
    attended = tl.where(own, 0, (long - OFFSET) * NQ)  # from this query on
    for start in range(first, last, BLOCK_Q):
        lse_log2, delta, readable, finite = load_statistics(
            statistics, start, last, GUARDED, BLOCK_Q
        )
        query = start + tl.arange(0, BLOCK_Q)
        i = divide(query, NQ)
        n = query - i * NQ
        q0, q1 = load_rows(row_pointers(q, q_strides, i, n, UNIT), readable, D, D0, D1)
        grad_out_rows = row_pointers(grad_out, grad_out_strides, i, n, UNIT)
        do0, do1 = load_rows(grad_out_rows, readable, D, D0, D1)
        attends = query[None, :] >= attended[:, None]
        grad_k0, grad_k1, grad_v0, grad_v1 = add_queries(
            grad_k0, grad_k1, grad_v0, grad_v1, k0, k1, v0, v1, q0, q1, do0, do1,
            lse_log2, delta, finite, attends, scale_log2, CAUSAL, GUARDED, D1, PRECISION,
        )  # fmt: skip

    long = valid & ~own
    partial += (row - NC) * H * D
    grad_k = frame_pointer(grad_k, grad_k_strides, b, span, h, UNIT)
    grad_k = token_pointers(grad_k, grad_k_strides, row, UNIT)
    store_scaled(grad_k, partial, grad_k0, grad_k1, scale, own, long, D, D0, D1)
    partial += PARTIALS.to(tl.int64)
    grad_v = frame_pointer(grad_v, grad_v_strides, b, span, h, UNIT)
    grad_v = token_pointers(grad_v, grad_v_strides, row, UNIT)
    store_scaled(grad_v, partial, grad_v0, grad_v1, 1.0, own, long, D, D0, D1)


def own_key_gradients(
    call: Call, statistics: Tensor, keys: tuple[int, int], span: int, partial: Tensor
) -> None:
    """Fills ``call.grads`` of k_cur and v_cur, and ``partial``.

    Args:
        statistics: (B, H, T * Nq, 2), from ``query_gradient``.
        keys: Nc or 0, L or 0: how many own keys and long keys are asked for.
        span: queries of a span; Nq if own keys are asked for.
        partial: (2, spans, B, 1, L, H, D) float32, sums over spans of queries.
    """
    t, nq, h, *_, offset, _, _ = call.sizes
    b = call.q.shape[0]
    _, k_cur, v_cur, _, _, k_long, v_long = call.inputs
    gradients = call.grads[1:3]

    def programs(tile: Tile) -> int:
        return b * cdiv(t * nq, span) * h * cdiv(sum(keys), tile.block_k)

    arguments = (
        call.q, call.grad_out, statistics, k_cur, v_cur, k_long, v_long, *gradients, partial,
        *call.strides_of(call.q, call.grad_out, k_cur, v_cur, k_long, v_long, *gradients),
        t, nq, h, *keys, offset, span, partial[0].numel(), call.scale, call.scale_log2,
    )  # fmt: skip
    kernel = "grad_own_long" if all(keys) else "grad_own"
    launch(own_key_gradients_kernel, call, kernel, programs, *arguments, GUARDED=False)
    if keys[1] and call.reach.causal_long:
        launch(own_key_gradients_kernel, call, "repair", programs, *arguments, GUARDED=True)

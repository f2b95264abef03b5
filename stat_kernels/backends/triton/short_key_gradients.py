"""Gradients of short keys: a program owns a tile of keys, across frames, and a chunk of queries.

A tile of 64 short keys holds the keys of several frames, which the queries of those frames' windows
attend. Many queries are cut into chunks, each of which leaves a float32 partial sum; otherwise the
gradients are written at once.

Some queries of a tile attend only some of its keys. A second launch of the same kernel (GUARDED)
therefore recomputes the tiles that hold NaN, so that a NaN stays within its window.
"""

import triton
import triton.language as tl
from torch import Tensor

from stat_kernels.backends.triton.config import Tile
from stat_kernels.backends.triton.launch import Call, cdiv, launch, stride_names
from stat_kernels.backends.triton.primitives import (
    clip_pointer,
    divide,
    load_rows,
    row_pointers,
    store_rows,
    zero_rows,
)
from stat_kernels.backends.triton.query_tiles import add_queries, load_statistics


@triton.jit(
    do_not_specialize=[
        *("T", "NQ", "H", "NS", "S", "OFFSET", "LEFT", "RIGHT", "CHUNKS", "PARTIALS"),
        *stride_names("q", "grad_out", "k", "v", "grad_k", "grad_v"),
    ]
)
def short_key_gradients_kernel(
    q, grad_out, statistics, k, v, grad_k, grad_v,
    q_b, q_t, q_n, q_h, grad_out_b, grad_out_t, grad_out_n, grad_out_h,
    k_b, k_t, k_n, k_h, v_b, v_t, v_n, v_h,
    grad_k_b, grad_k_t, grad_k_n, grad_k_h, grad_v_b, grad_v_t, grad_v_n, grad_v_h,
    T, NQ, H, NS, S, OFFSET, LEFT, RIGHT, CHUNKS, PARTIALS, scale, scale_log2,
    PARTIAL: tl.constexpr, GUARDED: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    PRECISION: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v (B, S, NS, H, D), or, where PARTIAL, CHUNKS of these PARTIALS units apart.

    Queries are numbered through the clip: query n of frame i is i * NQ + n. Row r of the keys is
    token r % NS of frame r // NS.

    GUARDED: recomputes what a launch without it wrote. A query whose delta is not finite makes
    grad_k NaN in every channel of every key of its tile, so a program that finds no NaN in the
    first channel of its keys returns at once.
    """
    q_strides = (q_b, q_t, q_n, q_h)
    grad_out_strides = (grad_out_b, grad_out_t, grad_out_n, grad_out_h)
    k_strides = (k_b, k_t, k_n, k_h)
    v_strides = (v_b, v_t, v_n, v_h)
    grad_k_strides = (grad_k_b, grad_k_t, grad_k_n, grad_k_h)
    grad_v_strides = (grad_v_b, grad_v_t, grad_v_n, grad_v_h)
    tiles = tl.cdiv(S * NS, BLOCK_K)
    chunk = tl.program_id(0) % CHUNKS
    tile = tl.program_id(0) // CHUNKS % tiles
    owner = tl.program_id(0) // CHUNKS // tiles
    b = owner // H
    h = owner % H
    key = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    valid = key < S * NS
    frame = divide(key, NS)
    token = key - frame * NS
    first_frame = tile * BLOCK_K // NS - OFFSET  # among the queries' frames
    last_frame = (tl.minimum(tile * BLOCK_K + BLOCK_K, S * NS) - 1) // NS - OFFSET
    first = tl.maximum(first_frame - RIGHT, 0) * NQ
    last = tl.minimum(last_frame + LEFT + 1, T) * NQ
    span = tl.cdiv(tl.cdiv(tl.maximum(last - first, 0), CHUNKS), BLOCK_Q) * BLOCK_Q
    first += chunk * span
    last = tl.minimum(first + span, last)
    own = (frame - OFFSET) * NQ

    if PARTIAL:
        grad_k += chunk.to(tl.int64) * PARTIALS * UNIT
        grad_v += chunk.to(tl.int64) * PARTIALS * UNIT
    grad_k = clip_pointer(grad_k, grad_k_strides, b, h, UNIT)
    grad_v = clip_pointer(grad_v, grad_v_strides, b, h, UNIT)
    grad_k_rows = row_pointers(grad_k, grad_k_strides, frame, token, UNIT)
    grad_v_rows = row_pointers(grad_v, grad_v_strides, frame, token, UNIT)
    if GUARDED:
        found = tl.load(grad_k_rows, mask=valid, other=0.0).to(tl.float32)
        if tl.max((found != found).to(tl.int32)) == 0:
            return

    k = clip_pointer(k, k_strides, b, h, UNIT)
    v = clip_pointer(v, v_strides, b, h, UNIT)
    k0, k1 = load_rows(row_pointers(k, k_strides, frame, token, UNIT), valid, D, D0, D1)
    v0, v1 = load_rows(row_pointers(v, v_strides, frame, token, UNIT), valid, D, D0, D1)
    q = clip_pointer(q, q_strides, b, h, UNIT)
    grad_out = clip_pointer(grad_out, grad_out_strides, b, h, UNIT)
    statistics += owner.to(tl.int64) * T * NQ * 2
    grad_k0, grad_k1 = zero_rows(BLOCK_K, D0, D1)
    grad_v0, grad_v1 = zero_rows(BLOCK_K, D0, D1)
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
        ahead = query[None, :] - own[:, None]
        near = (ahead >= -RIGHT * NQ) & (ahead < (LEFT + 1) * NQ)
        attends = near & ((ahead < 0) | (ahead >= NQ))
        grad_k0, grad_k1, grad_v0, grad_v1 = add_queries(
            grad_k0, grad_k1, grad_v0, grad_v1, k0, k1, v0, v1, q0, q1, do0, do1,
            lse_log2, delta, finite, attends, scale_log2, True, GUARDED, D1, PRECISION,
        )  # fmt: skip
    store_rows(grad_k_rows, grad_k0 * scale, grad_k1 * scale, valid, D, D0, D1)
    store_rows(grad_v_rows, grad_v0, grad_v1, valid, D, D0, D1)


def short_key_gradients(
    call: Call, statistics: Tensor, chunks: int, gradients: tuple[Tensor, ...], partials: int
) -> None:
    """Fills the gradients of k_short and v_short, or their partial sums from the first one on.

    Args:
        statistics: (B, H, T * Nq, 2), from ``query_gradient``.
        chunks: into which the queries of a tile are cut.
        gradients: (B, S, Ns, H, D) each.
        partials: elements from one partial sum to the next.
    """
    t, nq, h, _, ns, _, frames, offset, left, right = call.sizes
    k, v = call.inputs[3:5]

    def programs(tile: Tile) -> int:
        return call.q.shape[0] * h * cdiv(frames * ns, tile.block_k) * chunks

    arguments = (
        call.q, call.grad_out, statistics, k, v, *gradients,
        *call.strides_of(call.q, call.grad_out, k, v, *gradients),
        t, nq, h, ns, frames, offset, left, right, chunks, partials // call.unit,
        call.scale, call.scale_log2,
    )  # fmt: skip
    for kernel, guarded in (("grad_short", False), ("repair", True)):
        launch(
            short_key_gradients_kernel, call, kernel, programs, *arguments,
            PARTIAL=chunks > 1, GUARDED=guarded,
        )  # fmt: skip

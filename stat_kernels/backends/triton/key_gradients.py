"""Gradients of keys and values: a program owns a tile of keys, reads the queries that attend it.

Three calls of one kernel. Current keys are attended by their own frame's queries, short keys by
those of the window's frames: each gradient has one owner, written once. Long keys are attended by
the whole clip, so programs own (chunk of queries, tile of keys), leave float32 partial sums, and a
second kernel adds the chunks in order. No atomics: the same bits every time.

Where some queries of a tile attend only some of its keys, a second launch of the same kernel
(GUARDED) recomputes the tiles that hold NaN, so that a NaN stays within its window.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stat_kernels.backends.triton.config import Tile
from stat_kernels.backends.triton.launch import INPUTS, Call, launch, run, stride_names
from stat_kernels.backends.triton.primitives import (
    add_product,
    clip_pointer,
    divide,
    dot_rows,
    load_rows,
    row_pointers,
    store_rows,
    zero_rows,
)

# Queries behind one partial sum of the long keys' gradients: enough work for a program, and at
# least as many for each key as keep the partial sums below an eighth of the queries' own bytes.
CHUNK_QUERIES = 1024
CHUNK_QUERIES_PER_KEY = 32
SUM_BLOCK = 1024


@triton.jit
def sum_over_queries(
    q, grad_out, statistics, k0, k1, v0, v1, q_strides, grad_out_strides,
    first, last, own, before, after, NQ, scale_log2,
    MASKED: tl.constexpr, GUARDED: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_k / scale and grad_v of a tile of keys, summed over queries ``first`` to ``last``.

    MASKED: a key is attended by queries own + before to own + after, own (BLOCK_K,), without the NQ
    of its own frame, which begin at own. The other weights are 0, which is enough unless a query
    holds NaN or inf, for 0 * NaN is NaN. GUARDED: such queries are read as zeros, and the gradients
    of the keys that they do attend become NaN. The main loop has no registers to spare for that.
    """
    grad_k0, grad_k1 = zero_rows(BLOCK_K, D0, D1)
    grad_v0, grad_v1 = zero_rows(BLOCK_K, D0, D1)
    for start in range(first, last, BLOCK_Q):
        query = start + tl.arange(0, BLOCK_Q)
        query_valid = query < last
        i = divide(query, NQ)
        n = query - i * NQ
        pairs = 2 * start + tl.arange(0, 2 * BLOCK_Q)
        pairs = tl.load(statistics + pairs, mask=pairs < 2 * last, other=0.0)
        lse_log2, delta = tl.split(tl.reshape(pairs, [BLOCK_Q, 2]))
        readable = query_valid
        if GUARDED:
            finite = delta - delta == 0.0
            readable = readable & finite
            delta = tl.where(finite, delta, 0.0)
        q_rows = row_pointers(q, q_strides, i, n, UNIT)
        q0, q1 = load_rows(q_rows, readable, D, D0, D1)
        lse_log2 = tl.where(readable, lse_log2, float("inf"))
        scores = dot_rows(k0, k1, q0, q1, D1, PRECISION) * scale_log2
        weights = tl.exp2(scores - lse_log2[None, :])
        if MASKED:
            ahead = query[None, :] - own[:, None]
            near = (ahead >= before) & (ahead < after)
            attends = near & ((ahead < 0) | (ahead >= NQ))
            weights = tl.where(attends, weights, 0.0)
            if GUARDED:
                weights = tl.where(attends & ~finite[None, :], float("nan"), weights)
        grad_out_rows = row_pointers(grad_out, grad_out_strides, i, n, UNIT)
        do0, do1 = load_rows(grad_out_rows, readable, D, D0, D1)
        grad_v0, grad_v1 = add_product(grad_v0, grad_v1, weights, do0, do1, D1, PRECISION)
        grad_weights = dot_rows(v0, v1, do0, do1, D1, PRECISION)
        grad_scores = weights * (grad_weights - delta[None, :])
        grad_k0, grad_k1 = add_product(grad_k0, grad_k1, grad_scores, q0, q1, D1, PRECISION)
    return grad_k0, grad_k1, grad_v0, grad_v1


@triton.jit(
    do_not_specialize=[
        *("T", "NQ", "H", "N", "FRAMES", "SPAN", "OFFSET", "LEFT", "RIGHT"),
        *stride_names("q", "grad_out", "k", "v", "grad_k", "grad_v"),
    ]
)
def key_gradients_kernel(
    q, grad_out, statistics, k, v, grad_k, grad_v,
    q_b, q_t, q_n, q_h, grad_out_b, grad_out_t, grad_out_n, grad_out_h,
    k_b, k_t, k_n, k_h, v_b, v_t, v_n, v_h,
    grad_k_b, grad_k_t, grad_k_n, grad_k_h, grad_v_b, grad_v_t, grad_v_n, grad_v_h,
    T, NQ, H, N, FRAMES, SPAN, OFFSET, LEFT, RIGHT, scale, scale_log2,
    PART: tl.constexpr, GUARDED: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    PRECISION: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v (B, FRAMES, N, H, D).

    Queries are numbered through the clip: query n of frame i is i * NQ + n.

    PART "short": a tile of keys runs across frames (row r is token r % N of frame r // N) and is
    attended by the frames in whose window a key's lies, its own excepted. Otherwise a tile stays
    within frame f and is attended by queries f * SPAN to (f + 1) * SPAN; key n of the "long" part,
    where CAUSAL, by frames n - OFFSET and on.

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
    program = tl.program_id(0)
    key = tl.arange(0, BLOCK_K)
    if PART == "short":
        tiles = tl.cdiv(FRAMES * N, BLOCK_K)
        b = program // tiles // H
        h = program // tiles % H
        key += program % tiles * BLOCK_K
        valid = key < FRAMES * N
        frame = divide(key, N)
        token = key - frame * N
        first_frame = program % tiles * BLOCK_K // N - OFFSET  # among the queries' frames
        last_frame = tl.minimum(program % tiles * BLOCK_K + BLOCK_K, FRAMES * N) - 1
        last_frame = last_frame // N - OFFSET
        first = tl.maximum(first_frame - RIGHT, 0) * NQ
        last = tl.minimum(last_frame + LEFT + 1, T) * NQ
        own = (frame - OFFSET) * NQ
        before, after = -RIGHT * NQ, (LEFT + 1) * NQ
    else:
        tiles = tl.cdiv(N, BLOCK_K)
        owner = program // tiles
        b = owner // H // FRAMES
        h = owner % H
        key += program % tiles * BLOCK_K
        valid = key < N
        token = key
        frame = tl.zeros([BLOCK_K], tl.int32) + owner // H % FRAMES
        first = owner // H % FRAMES * SPAN
        last = tl.minimum(first + SPAN, T * NQ)
        own = (token - OFFSET - 1) * NQ  # the last frame that does not attend
        before, after = 0, (T + OFFSET + 1) * NQ
        if PART == "long" and CAUSAL:
            first = tl.maximum(first, (program % tiles * BLOCK_K - OFFSET) * NQ)

    if GUARDED:
        written = clip_pointer(grad_k, grad_k_strides, b, h, UNIT)
        written = row_pointers(written, grad_k_strides, frame, token, UNIT)
        written = tl.load(written, mask=valid, other=0.0).to(tl.float32)
        if tl.max((written != written).to(tl.int32)) == 0:
            return

    k = clip_pointer(k, k_strides, b, h, UNIT)
    v = clip_pointer(v, v_strides, b, h, UNIT)
    k0, k1 = load_rows(row_pointers(k, k_strides, frame, token, UNIT), valid, D, D0, D1)
    v0, v1 = load_rows(row_pointers(v, v_strides, frame, token, UNIT), valid, D, D0, D1)
    q = clip_pointer(q, q_strides, b, h, UNIT)
    grad_out = clip_pointer(grad_out, grad_out_strides, b, h, UNIT)
    statistics += (b * H + h).to(tl.int64) * T * NQ * 2

    MASKED: tl.constexpr = PART == "short" or (PART == "long" and CAUSAL)
    grad_k0, grad_k1, grad_v0, grad_v1 = sum_over_queries(
        q, grad_out, statistics, k0, k1, v0, v1, q_strides, grad_out_strides,
        first, last, own, before, after, NQ, scale_log2,
        MASKED, GUARDED, UNIT, D, D0, D1, PRECISION, BLOCK_Q, BLOCK_K,
    )  # fmt: skip

    grad_k = clip_pointer(grad_k, grad_k_strides, b, h, UNIT)
    grad_v = clip_pointer(grad_v, grad_v_strides, b, h, UNIT)
    grad_k_rows = row_pointers(grad_k, grad_k_strides, frame, token, UNIT)
    grad_v_rows = row_pointers(grad_v, grad_v_strides, frame, token, UNIT)
    store_rows(grad_k_rows, grad_k0 * scale, grad_k1 * scale, valid, D, D0, D1)
    store_rows(grad_v_rows, grad_v0, grad_v1, valid, D, D0, D1)


@triton.jit(do_not_specialize=["CHUNKS", "L", "H", *stride_names("total")])
def sum_chunks_kernel(
    partial, total, total_b, total_t, total_n, total_h, CHUNKS, L, H,
    UNIT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """total (B, L, H, D) = partial (B, CHUNKS, L, H, D) summed over the chunks, in order."""
    size = L * H * D
    blocks = tl.cdiv(size, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    valid = column < size
    acc = tl.zeros([BLOCK], tl.float32)
    for chunk in range(CHUNKS):
        acc += tl.load(partial + (b * CHUNKS + chunk) * size + column, mask=valid, other=0.0)
    row = column // D
    offset = b * total_b + (row // H).to(tl.int64) * total_n + (row % H).to(tl.int64) * total_h
    tl.store(total + offset * UNIT + column % D, acc.to(total.dtype.element_ty), mask=valid)


def key_gradients(call: Call, statistics: Tensor) -> None:
    """Fills ``call.grads`` of k_cur, v_cur, k_short, v_short, k_long, v_long where these exist.

    Args:
        statistics: (B, H, T * Nq, 2), from ``query_gradient``.
    """
    t, nq, *_ = call.sizes
    _, k_cur, _, k_short, _, k_long, _ = call.tensors
    b, _, _, h, d = k_cur.shape
    _launch(call, statistics, "cur", call.grads[1:3], frames=t, span=nq)
    if k_short is not None:
        _launch(call, statistics, "short", call.grads[3:5], frames=k_short.shape[1], span=0)
    if k_long is not None:
        length = k_long.shape[1]
        span = max(CHUNK_QUERIES, CHUNK_QUERIES_PER_KEY * length)
        chunks = triton.cdiv(t * nq, span)
        partial = torch.empty(
            (2, b, chunks, length, h, d), dtype=torch.float32, device=k_long.device
        )
        _launch(call, statistics, "long", partial.unbind(), frames=chunks, span=span)
        for sums, gradient in zip(partial, call.grads[5:7], strict=True):
            run(
                sum_chunks_kernel, call.q, b * triton.cdiv(length * h * d, SUM_BLOCK),
                sums, gradient, *call.strides_of(gradient), chunks, length, h,
                UNIT=call.unit, D=d, BLOCK=SUM_BLOCK,
            )  # fmt: skip


def _launch(
    call: Call, statistics: Tensor, part: str, gradients: tuple[Tensor, ...],
    frames: int, span: int,
) -> None:  # fmt: skip
    """The gradients of one part's keys and values."""
    t, nq, h, *_, offset, left, right = call.sizes
    first = INPUTS.index(f"k_{part}")
    k, v = call.inputs[first : first + 2]
    b, n = k.shape[0], k.shape[-3]

    def programs(tile: Tile) -> int:
        if part == "short":
            return b * h * triton.cdiv(frames * n, tile.block_k)
        return b * h * frames * triton.cdiv(n, tile.block_k)

    arguments = (
        call.q, call.grad_out, statistics, k, v, *gradients,
        *call.strides_of(call.q, call.grad_out, k, v, *gradients),
        t, nq, h, n, frames, span, offset, left, right, call.scale, call.scale_log2,
    )  # fmt: skip
    options = {"PART": part, "GUARDED": False}
    launch(key_gradients_kernel, call, "grad_keys", programs, *arguments, **options)
    if part == "short" or (part == "long" and call.reach.causal_long):
        options["GUARDED"] = True
        launch(key_gradients_kernel, call, "repair", programs, *arguments, **options)

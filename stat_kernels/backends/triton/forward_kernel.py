"""Forward: a program owns a tile of one frame's queries and reads that frame's keys once, in order.

The keys of frame i are one sequence of rows (current, short, long; see ``key_pointers``), so a
single pipelined loop serves all three kinds, the tiles are dense, and a missing part is a length
of zero. The softmax is online, in base 2.
"""

import triton
import triton.language as tl
from torch import Tensor

from stat_kernels.backends.triton.launch import (
    INPUTS,
    SIZES,
    TOKENS,
    Call,
    cdiv,
    launch,
    stride_names,
)
from stat_kernels.backends.triton.primitives import (
    LN_2,
    add_product,
    clip_pointer,
    dot_rows,
    key_pointers,
    keys_of_frame,
    load_rows,
    query_program,
    row_pointers,
    store_rows,
    zero_rows,
)


@triton.jit(do_not_specialize=[*SIZES, *TOKENS, *stride_names(*INPUTS)])
def forward_kernel(
    q, k_cur, v_cur, k_short, v_short, k_long, v_long, out, lse,
    q_b, q_t, q_n, q_h, k_cur_b, k_cur_t, k_cur_n, k_cur_h,
    v_cur_b, v_cur_t, v_cur_n, v_cur_h, k_short_b, k_short_t, k_short_n, k_short_h,
    v_short_b, v_short_t, v_short_n, v_short_h, k_long_b, k_long_t, k_long_n, k_long_h,
    v_long_b, v_long_t, v_long_n, v_long_h,
    T, NQ, H, NC, NS, L, S, OFFSET, LEFT, RIGHT, SHORT_TOKEN, LONG_TOKEN, scale_log2,
    POOLED: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    PRECISION: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (B, T, NQ, H, D) and lse (B, T, H, NQ), both contiguous."""
    q_strides = (q_b, q_t, q_n, q_h)
    k_cur_strides = (k_cur_b, k_cur_t, k_cur_n, k_cur_h)
    v_cur_strides = (v_cur_b, v_cur_t, v_cur_n, v_cur_h)
    k_short_strides = (k_short_b, k_short_t, k_short_n, k_short_h)
    v_short_strides = (v_short_b, v_short_t, v_short_n, v_short_h)
    k_long_strides = (k_long_b, k_long_t, k_long_n, k_long_h)
    v_long_strides = (v_long_b, v_long_t, v_long_n, v_long_h)
    if POOLED:
        v_cur_strides = k_cur_strides
    b, i, h, first_query = query_program(NQ, H, T, BLOCK_Q)
    query = first_query + tl.arange(0, BLOCK_Q)
    query_valid = query < NQ
    q = clip_pointer(q, q_strides, b, h, UNIT)
    q0, q1 = load_rows(row_pointers(q, q_strides, i, query, UNIT), query_valid, D, D0, D1)

    k_cur = clip_pointer(k_cur, k_cur_strides, b, h, UNIT)
    v_cur = clip_pointer(v_cur, v_cur_strides, b, h, UNIT)
    k_short = clip_pointer(k_short, k_short_strides, b, h, UNIT)
    v_short = clip_pointer(v_short, v_short_strides, b, h, UNIT)
    k_long = clip_pointer(k_long, k_long_strides, b, h, UNIT)
    v_long = clip_pointer(v_long, v_long_strides, b, h, UNIT)
    own = i + OFFSET
    first, short_rows, keys = keys_of_frame(own, NC, NS, L, S, LEFT, RIGHT, CAUSAL)

    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc0, acc1 = zero_rows(BLOCK_Q, D0, D1)
    for start in range(0, keys, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        valid = row < keys
        k_rows = key_pointers(
            row, k_cur, k_short, k_long, k_cur_strides, k_short_strides, k_long_strides,
            i, own, first, NC, NS, short_rows, SHORT_TOKEN, LONG_TOKEN, POOLED, UNIT,
        )  # fmt: skip
        k0, k1 = load_rows(k_rows, valid, D, D0, D1)
        scores = dot_rows(q0, q1, k0, k1, D1, PRECISION) * scale_log2
        scores = tl.where(valid[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # -inf - -inf is NaN
        weights = tl.exp2(scores - base[:, None])
        rescale = tl.exp2(highest - base)
        total = total * rescale + tl.sum(weights, 1)
        v_rows = key_pointers(
            row, v_cur, v_short, v_long, v_cur_strides, v_short_strides, v_long_strides,
            i, own, first, NC, NS, short_rows, SHORT_TOKEN, LONG_TOKEN, POOLED, UNIT,
        )  # fmt: skip
        v0, v1 = load_rows(v_rows, valid, D, D0, D1)
        acc0 *= rescale[:, None]
        acc1 *= rescale[:, None]
        acc0, acc1 = add_product(acc0, acc1, weights, v0, v1, D1, PRECISION)
        highest = new_highest

    frame = (b * T + i).to(tl.int64)
    rows = out + ((frame * NQ + query) * H + h) * D
    store_rows(rows, acc0 / total[:, None], acc1 / total[:, None], query_valid, D, D0, D1)
    # A score of +inf is its own logsumexp, although the softmax has no value there.
    lse_log2 = highest + tl.where(highest == float("inf"), 0.0, tl.log2(total))
    tl.store(lse + (frame * H + h) * NQ + query, lse_log2 * LN_2, mask=query_valid)


def attend(call: Call, out: Tensor, lse: Tensor) -> None:
    """Fills out (B, T, Nq, H, D) and lse (B, T, H, Nq), both contiguous."""
    b, t, nq, h, _ = call.q.shape
    launch(
        forward_kernel, call, "forward", lambda tile: b * t * h * cdiv(nq, tile.block_q),
        *call.inputs, out, lse, *call.strides_of(*call.inputs), *call.sizes, *call.tokens,
        call.scale_log2, POOLED=call.pooled is not None,
    )  # fmt: skip

"""Gradient of the queries: a program owns a tile of one frame's queries and reads its keys again.

Alongside it writes two statistics of every query for the gradients of the keys: lse in base 2 and
``delta = rowsum(grad_out * out) - grad_lse``, with which dS = P * (dP - delta). There, queries are
numbered through the clip, so that a tile that runs across frames reads them as one vector.
"""

import torch
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
    LOG2_E,
    add_product,
    clip_pointer,
    dot_rows,
    key_pointers,
    keys_of_frame,
    load_rows,
    query_program,
    row_pointers,
    row_sums,
    store_rows,
    zero_rows,
)


@triton.jit(do_not_specialize=[*SIZES, *TOKENS, *stride_names("grad_out", *INPUTS, "grad_q")])
def query_gradient_kernel(
    grad_out, out, lse, grad_lse, q, k_cur, v_cur, k_short, v_short, k_long, v_long,
    grad_q, statistics,
    grad_out_b, grad_out_t, grad_out_n, grad_out_h, q_b, q_t, q_n, q_h,
    k_cur_b, k_cur_t, k_cur_n, k_cur_h, v_cur_b, v_cur_t, v_cur_n, v_cur_h,
    k_short_b, k_short_t, k_short_n, k_short_h, v_short_b, v_short_t, v_short_n, v_short_h,
    k_long_b, k_long_t, k_long_n, k_long_h, v_long_b, v_long_t, v_long_n, v_long_h,
    grad_q_b, grad_q_t, grad_q_n, grad_q_h,
    T, NQ, H, NC, NS, L, S, OFFSET, LEFT, RIGHT, SHORT_TOKEN, LONG_TOKEN, scale, scale_log2,
    HAS_GRAD_LSE: tl.constexpr, POOLED: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    PRECISION: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_q (B, T, NQ, H, D) and statistics (B, H, T * NQ, 2).

    out, lse, grad_lse and statistics are contiguous.
    """
    grad_out_strides = (grad_out_b, grad_out_t, grad_out_n, grad_out_h)
    q_strides = (q_b, q_t, q_n, q_h)
    k_cur_strides = (k_cur_b, k_cur_t, k_cur_n, k_cur_h)
    v_cur_strides = (v_cur_b, v_cur_t, v_cur_n, v_cur_h)
    k_short_strides = (k_short_b, k_short_t, k_short_n, k_short_h)
    v_short_strides = (v_short_b, v_short_t, v_short_n, v_short_h)
    k_long_strides = (k_long_b, k_long_t, k_long_n, k_long_h)
    v_long_strides = (v_long_b, v_long_t, v_long_n, v_long_h)
    grad_q_strides = (grad_q_b, grad_q_t, grad_q_n, grad_q_h)
    if POOLED:
        v_cur_strides = k_cur_strides
    b, i, h, first_query = query_program(NQ, H, T, BLOCK_Q)
    query = first_query + tl.arange(0, BLOCK_Q)
    query_valid = query < NQ
    frame = (b * T + i).to(tl.int64)
    row = ((frame * NQ + query) * H + h) * D
    statistic = (frame * H + h) * NQ + query

    grad_out = clip_pointer(grad_out, grad_out_strides, b, h, UNIT)
    grad_out_rows = row_pointers(grad_out, grad_out_strides, i, query, UNIT)
    do0, do1 = load_rows(grad_out_rows, query_valid, D, D0, D1)
    out0, out1 = load_rows(out + row, query_valid, D, D0, D1)
    query_delta = row_sums(do0, do1, out0, out1, D1)
    if HAS_GRAD_LSE:
        query_delta -= tl.load(grad_lse + statistic, mask=query_valid, other=0.0)
    lse_log2 = tl.load(lse + statistic, mask=query_valid, other=0.0) * LOG2_E
    statistics += (((b * H + h) * T + i).to(tl.int64) * NQ + query) * 2
    tl.store(statistics, lse_log2, mask=query_valid)
    tl.store(statistics + 1, query_delta, mask=query_valid)
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

    acc0, acc1 = zero_rows(BLOCK_Q, D0, D1)
    for start in range(0, keys, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        valid = key < keys
        k_rows = key_pointers(
            key, k_cur, k_short, k_long, k_cur_strides, k_short_strides, k_long_strides,
            i, own, first, NC, NS, short_rows, SHORT_TOKEN, LONG_TOKEN, POOLED, UNIT,
        )  # fmt: skip
        k0, k1 = load_rows(k_rows, valid, D, D0, D1)
        scores = dot_rows(q0, q1, k0, k1, D1, PRECISION) * scale_log2
        weights = tl.exp2(scores - lse_log2[:, None])
        weights = tl.where(valid[None, :], weights, 0.0)
        v_rows = key_pointers(
            key, v_cur, v_short, v_long, v_cur_strides, v_short_strides, v_long_strides,
            i, own, first, NC, NS, short_rows, SHORT_TOKEN, LONG_TOKEN, POOLED, UNIT,
        )  # fmt: skip
        v0, v1 = load_rows(v_rows, valid, D, D0, D1)
        grad_weights = dot_rows(do0, do1, v0, v1, D1, PRECISION)
        grad_scores = weights * (grad_weights - query_delta[:, None])
        acc0, acc1 = add_product(acc0, acc1, grad_scores, k0, k1, D1, PRECISION)

    grad_q = clip_pointer(grad_q, grad_q_strides, b, h, UNIT)
    grad_q_rows = row_pointers(grad_q, grad_q_strides, i, query, UNIT)
    store_rows(grad_q_rows, acc0 * scale, acc1 * scale, query_valid, D, D0, D1)


def query_gradient(call: Call, out: Tensor, lse: Tensor, grad_lse: Tensor | None) -> Tensor:
    """Fills ``call.grads[0]``; returns statistics (B, H, T * Nq, 2), lse in base 2 and delta."""
    b, t, nq, h, _ = call.q.shape
    statistics = torch.empty((b, h, t * nq, 2), dtype=torch.float32, device=lse.device)
    launch(
        query_gradient_kernel, call, "grad_query",
        lambda tile: b * t * h * cdiv(nq, tile.block_q),
        call.grad_out, out, lse, lse if grad_lse is None else grad_lse,
        *call.inputs, call.grads[0], statistics,
        *call.strides_of(call.grad_out, *call.inputs, call.grads[0]), *call.sizes, *call.tokens,
        call.scale, call.scale_log2,
        HAS_GRAD_LSE=grad_lse is not None, POOLED=call.pooled is not None,
    )  # fmt: skip
    return statistics

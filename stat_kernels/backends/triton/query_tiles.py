"""A tile of queries and what it adds to the gradients of a tile of keys; shared by two kernels."""

import triton
import triton.language as tl

from stat_kernels.backends.triton.primitives import add_product, dot_rows


@triton.jit
def load_statistics(statistics, start, last, GUARDED: tl.constexpr, BLOCK_Q: tl.constexpr):
    """lse (base 2), delta, which are to be read, which are finite, of queries from ``start`` on.

    GUARDED: a query whose delta is not finite is not read. What is not read gets no weight.
    """
    pairs = 2 * start + tl.arange(0, 2 * BLOCK_Q)
    pairs = tl.load(statistics + pairs, mask=pairs < 2 * last, other=0.0)
    lse_log2, delta = tl.split(tl.reshape(pairs, [BLOCK_Q, 2]))
    readable = start + tl.arange(0, BLOCK_Q) < last
    finite = delta - delta == 0.0
    if GUARDED:
        readable = readable & finite
        delta = tl.where(finite, delta, 0.0)
    return tl.where(readable, lse_log2, float("inf")), delta, readable, finite


@triton.jit
def add_queries(
    grad_k0, grad_k1, grad_v0, grad_v1, k0, k1, v0, v1, q0, q1, do0, do1,
    lse_log2, delta, finite, attends, scale_log2,
    MASKED: tl.constexpr, GUARDED: tl.constexpr, D1: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_k / scale and grad_v of a tile of keys, with a tile of queries added.

    MASKED: pairs that are not in ``attends`` get the weight 0, which is enough unless a query holds
    NaN or inf, for 0 * NaN is NaN. GUARDED: such queries were read as zeros, and the gradients of
    the keys that they do attend become NaN.
    """
    scores = dot_rows(k0, k1, q0, q1, D1, PRECISION) * scale_log2
    weights = tl.exp2(scores - lse_log2[None, :])
    if MASKED:
        weights = tl.where(attends, weights, 0.0)
    if GUARDED:
        weights = tl.where(attends & ~finite[None, :], float("nan"), weights)
    grad_v0, grad_v1 = add_product(grad_v0, grad_v1, weights, do0, do1, D1, PRECISION)
    grad_weights = dot_rows(v0, v1, do0, do1, D1, PRECISION)
    grad_scores = weights * (grad_weights - delta[None, :])
    grad_k0, grad_k1 = add_product(grad_k0, grad_k1, grad_scores, q0, q1, D1, PRECISION)
    return grad_k0, grad_k1, grad_v0, grad_v1

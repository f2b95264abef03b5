"""The layer's core as one call: from the packed projection to the attention's output."""

import operator
from typing import Any, NamedTuple

from torch import Tensor

from stat_kernels import core_ops, dispatch, pool_ops
from stat_kernels.checks import window_pair
from stat_kernels.pool_layout import pool_layout


class PoolParameters(NamedTuple):
    """Of one pooling: weight (D, 1, kt, kh, kw), the norm's weight (D,) and bias (D,)."""

    weight: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


def packed_attention(
    qkv: Tensor,
    q: PoolParameters | None,
    k: PoolParameters,
    v: PoolParameters,
    *,
    grid: tuple[int, int],
    q_stride: int,
    kv_stride: int,
    short_stride: int | None,
    class_token: bool,
    long: str,
    eps: float,
    window: int | tuple[int, int],
    causal_long: bool = False,
    backend: str | None,
) -> Tensor | None:
    """Pools queries, keys and values of a packed projection and attends, by one operator.

    The same as `stat_kernels.pool_tokens` of each and
    `stat_kernels.shrinking_temporal_attention` of the results. No copy of a slot is made, and
    the gradient is written into one packed tensor. The caller has checked the arguments.

    Args:
        qkv: (B, T, N, 3, H, D), N = class_token + h * w.
        q: pooling of the queries, whose class token is pooled with them; None for none.
        k, v: poolings of keys and values.
        grid, short_stride, class_token, long, eps: as in ``pool_tokens``, the last two for keys and
            values; queries have no short tokens.
        q_stride, kv_stride: strides of the poolings.
        window, causal_long, backend: as in ``shrinking_temporal_attention``.

    Returns:
        out (B, T, Nq, H, D); None where the backend of the attention has no kernel for the pooling.
    """
    device, head_dim = str(qkv.device), operator.index(qkv.shape[-1])
    tokens = qkv.shape[2]
    if q is not None:
        tokens = class_token + pool_layout(grid, q_stride, None, "none").current
    queries = dispatch.size_class(device, tokens)
    name = dispatch.choose(backend, device, qkv.dtype, head_dim, queries)
    poolings: list[Any] = [(tuple(k.weight.shape[2:]), kv_stride)]
    if q is not None:
        poolings.append((tuple(q.weight.shape[2:]), q_stride))
    if not dispatch.pools(name, device, qkv.dtype, head_dim, tuple(poolings)):
        return None
    q_weight, q_norm_weight, q_norm_bias = (None, None, None) if q is None else q
    out, *_ = core_ops.core_forward(
        qkv, q_weight, q_norm_weight, k.weight, k.norm_weight, v.weight, v.norm_weight,
        q_norm_bias, k.norm_bias, v.norm_bias, grid, q_stride, kv_stride, short_stride,
        class_token, long, eps, *window_pair(window), causal_long, head_dim**-0.5, name,
    )  # fmt: skip
    return out


def pooled_rows(
    tokens: Tensor,
    pooling: PoolParameters,
    *,
    grid: tuple[int, int],
    stride: int,
    short_stride: int | None,
    class_token: bool,
    long: str,
    eps: float,
    backend: str | None,
) -> Tensor | None:
    """The buffer that `stat_kernels.pool_tokens` returns views of, with its arguments.

    Returns:
        (B, T, R, H, D) as `PoolLayout` describes it; None where the backend of the attention has no
        kernel for the pooling.
    """
    device, head_dim = str(tokens.device), operator.index(tokens.shape[-1])
    queries = dispatch.size_class(device, tokens.shape[2])
    name = dispatch.choose(backend, device, tokens.dtype, head_dim, queries)
    poolings: Any = ((tuple(pooling.weight.shape[2:]), stride),)
    if not dispatch.pools(name, device, tokens.dtype, head_dim, poolings):
        return None
    rows, _ = pool_ops.pool_forward(
        tokens, *pooling, grid, stride, short_stride, class_token, long, eps, name
    )
    return rows

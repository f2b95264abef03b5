"""The CPU backend: allocates outputs and calls the fused C++ kernel of the native library."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stat_kernels import native
from stat_kernels.backends import (
    Reach,
    empty_grad_params,
    empty_mlp_gradients,
    empty_pooled,
    gradients_to_fill,
)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def unsupported_reason(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernel cannot take such a call, or None."""
    if device != "cpu":
        return f"it takes CPU tensors, these are on {device}"
    if dtype not in DTYPES:
        return f"it has no {str(dtype).removeprefix('torch.')} kernel"
    return native.problem()


def forward(
    q: Tensor,
    k_cur: Tensor,
    v_cur: Tensor,
    k_short: Tensor | None,
    v_short: Tensor | None,
    k_long: Tensor | None,
    v_long: Tensor | None,
    reach: Reach,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out (B, T, Nq, H, D) and lse (B, T, H, Nq); shapes as in ``shrinking_temporal_attention``."""
    isa = native.instruction_set()
    b, t, nq, h, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty((b, t, h, nq), dtype=torch.promote_types(q.dtype, torch.float32))
    torch.ops.stat_kernels.cpu_forward(
        q, k_cur, v_cur, k_short, v_short, k_long, v_long, *reach, scale, isa, out, lse
    )
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k_cur: Tensor,
    v_cur: Tensor,
    k_short: Tensor | None,
    v_short: Tensor | None,
    k_long: Tensor | None,
    v_long: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    reach: Reach,
    scale: float,
    grads: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """The seven gradients in the order of the inputs; a missing input's is without elements.

    Written to ``grads`` where these are given; see ``gradients_to_fill``. out and lse are not read.
    """
    isa = native.instruction_set()
    inputs = (q, k_cur, v_cur, k_short, v_short, k_long, v_long)
    grads = gradients_to_fill(inputs, grads)
    torch.ops.stat_kernels.cpu_backward(grad_out, grad_lse, *inputs, *reach, scale, isa, *grads)
    return grads


def pool_unsupported_reason(
    device: str, dtype: torch.dtype, head_dim: int, kernel: tuple[int, int, int], stride: int
) -> str | None:
    """Why the pooling kernel cannot take such a call, or None; it takes every kernel and stride."""
    return unsupported_reason(device, dtype, head_dim)


def pool_forward(
    tokens: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    grid: Sequence[int],
    stride: int,
    short_stride: int | None,
    class_token: bool,
    long: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """pooled and stats, as ``stat_kernels.backends`` describes them."""
    isa = native.instruction_set()
    pooled, stats = empty_pooled(tokens, grid, stride, short_stride, long)
    params = [_accumulated(p, stats.dtype) for p in (weights, norm_weights, norm_biases)]
    sizes = [*grid, *weights[0].shape[2:], stride, short_stride or 0]
    torch.ops.stat_kernels.cpu_pool_forward(
        tokens, *params, sizes, class_token, long, eps, isa, pooled, stats
    )
    return pooled, stats


def pool_backward(
    grad_pooled: Tensor,
    tokens: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    stats: Tensor,
    grid: Sequence[int],
    stride: int,
    short_stride: int | None,
    class_token: bool,
    long: str,
    grad_tokens: Tensor,
) -> Tensor:
    """grad_params; fills ``grad_tokens``, which may have any strides but a unit last one."""
    isa = native.instruction_set()
    grad_params = empty_grad_params(tokens, weights)
    params = [_accumulated(p, stats.dtype) for p in (weights, norm_weights)]
    sizes = [*grid, *weights[0].shape[2:], stride, short_stride or 0]
    torch.ops.stat_kernels.cpu_pool_backward(
        grad_pooled, tokens, *params, stats, sizes, class_token, long, isa,
        grad_tokens, grad_params,
    )  # fmt: skip
    return grad_params


def bias_gelu_forward(x: Tensor, bias: Tensor) -> Tensor:
    """As ``stat_kernels.backends`` describes it; so the next three."""
    out = torch.empty(x.shape, dtype=x.dtype)
    bias = _accumulated([bias], _sums(x.dtype))[0]
    torch.ops.stat_kernels.cpu_bias_gelu_forward(x, bias, native.instruction_set(), out)
    return out


def bias_gelu_backward(grad_out: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty(x.shape, dtype=x.dtype)
    grad_bias = torch.empty(bias.shape, dtype=_sums(x.dtype))
    bias = _accumulated([bias], grad_bias.dtype)[0]
    torch.ops.stat_kernels.cpu_bias_gelu_backward(
        grad_out, x, bias, native.instruction_set(), grad_x, grad_bias
    )
    return grad_x, grad_bias


def bias_residual_forward(skip: Tensor, x: Tensor, bias: Tensor, scale: Tensor | None) -> Tensor:
    out = torch.empty(skip.shape, dtype=skip.dtype)
    bias = _accumulated([bias], _sums(x.dtype))[0]
    scale = None if scale is None else _accumulated([scale], bias.dtype)[0]
    isa = native.instruction_set()
    torch.ops.stat_kernels.cpu_bias_residual_forward(skip, x, bias, scale, isa, out)
    return out


def bias_residual_backward(
    grad_out: Tensor, scale: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    grad_x, grad_bias = empty_mlp_gradients(grad_out, scale, dtype)
    scale = None if scale is None else _accumulated([scale], grad_bias.dtype)[0]
    torch.ops.stat_kernels.cpu_bias_residual_backward(
        grad_out, scale, native.instruction_set(), grad_x, grad_bias
    )
    return grad_x, grad_bias


def _sums(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _accumulated(parameters: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """In the dtype of the sums: the same tensors where they are, as float32 ones mostly are."""
    return [p.detach().to(dtype).contiguous() for p in parameters]

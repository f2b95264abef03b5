"""The operators of the pooling: kernels, fakes, autograd, FLOP formulas.

``stat_kernels::pool_forward`` and ``stat_kernels::pool_backward`` pool one tensor; a backend pools
several in one call, as ``stat_kernels.core_ops`` has it do. Importing this file loads no backend.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from stat_kernels import autograd, backends, native
from stat_kernels.pool_layout import pool_layout

_FORWARD, _BACKWARD = "stat_kernels::pool_forward", "stat_kernels::pool_backward"
_KERNEL_DEVICES = ("cpu", "cuda")

native.define_operators()


@torch.library.impl(_FORWARD, _KERNEL_DEVICES)
def _forward(tokens, weight, norm_weight, norm_bias, *options):
    *options, backend = options
    pooled, stats = backends.load(backend).pool_forward(
        unit_last_stride(tokens)[None], [weight], [norm_weight], [norm_bias], *options
    )
    return pooled[0], stats


@torch.library.register_fake(_FORWARD)
def _forward_fake(
    tokens, weight, norm_weight, norm_bias,
    grid, stride, short_stride, class_token, long, eps, backend,
):  # fmt: skip
    pooled, stats = backends.empty_pooled(tokens[None], grid, stride, short_stride, long)
    return pooled[0], stats


@torch.library.impl(_BACKWARD, _KERNEL_DEVICES)
def _backward(grad_pooled, tokens, weight, norm_weight, stats, *options):
    *options, backend = options
    grad_tokens = tokens.new_empty(tokens.shape)
    grad_params = backends.load(backend).pool_backward(
        grad_pooled.contiguous()[None], unit_last_stride(tokens)[None], [weight], [norm_weight],
        stats, *options, grad_tokens[None],
    )  # fmt: skip
    return grad_tokens, grad_params


@torch.library.register_fake(_BACKWARD)
def _backward_fake(grad_pooled, tokens, weight, norm_weight, stats, *options):
    return tokens.new_empty(tokens.shape), backends.empty_grad_params(tokens, [weight])


def unit_last_stride(x: Tensor) -> Tensor:
    """Kernels take any strides but that of the last axis; a copy is the exception, not the rule."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def split_grad_params(
    grad_params: Tensor, weight: Tensor, norm_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a pooling's weight, norm weight and norm bias, in the parameters' dtypes.

    Args:
        grad_params: (D * (kt * kh * kw + 2),), one tensor's part of what a backend returns.
        weight, norm_weight: the parameters; the norm's bias is like its weight.
    """
    sizes = (weight.numel(), norm_weight.numel(), norm_weight.numel())
    grad_weight, grad_norm_weight, grad_norm_bias = grad_params.split(sizes)
    return (
        grad_weight.view(weight.shape).to(weight.dtype),
        grad_norm_weight.to(norm_weight.dtype),
        grad_norm_bias.to(norm_weight.dtype),
    )


def _setup_context(ctx, inputs, output):
    tokens, weight, norm_weight, _, *ctx.options, _, ctx.backend = inputs
    ctx.save_for_backward(tokens, weight, norm_weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_pooled, _):
    if grad_pooled is None:
        return (None,) * 11
    tokens, weight, norm_weight, stats = ctx.saved_tensors
    grad_tokens, grad_params = pool_backward(
        grad_pooled, tokens, weight, norm_weight, stats, *ctx.options, ctx.backend
    )
    return grad_tokens, *split_grad_params(grad_params[0], weight, norm_weight), *(None,) * 7


def _double_backward(ctx, *grads):
    raise RuntimeError(
        "the fused pooling of tokens has no second derivative; "
        "use backend='reference' where one is needed"
    )


pool_forward = torch.ops.stat_kernels.pool_forward.default
pool_backward = torch.ops.stat_kernels.pool_backward.default

_library = torch.library.Library("stat_kernels", "IMPL")
autograd.register(_library, pool_forward, _autograd, _setup_context)
autograd.register(_library, pool_backward, _double_backward)


def convolution_flops(
    tokens_shape: Sequence[int], weight_shape: Sequence[int], grid: Sequence[int], stride: int
) -> int:
    """Of the convolution, two a multiply-add; padding counts, as in PyTorch's own formula."""
    b, t, _, h, d = tokens_shape
    positions = pool_layout(grid, stride, None, "none").current
    return 2 * b * t * positions * h * d * math.prod(weight_shape[1:])


@register_flop_formula(torch.ops.stat_kernels.pool_forward)
def forward_flops(tokens, weight, norm_weight, norm_bias, grid, stride, *args, **kwargs) -> int:
    """One convolution; norms and averages do not count, as in PyTorch's own formulas."""
    return convolution_flops(tokens, weight, grid, stride)


@register_flop_formula(torch.ops.stat_kernels.pool_backward)
def backward_flops(
    grad_pooled, tokens, weight, norm_weight, stats, grid, stride, *args, **kwargs
) -> int:
    """Three: the convolution again, and the gradients of its input and of its weight."""
    return 3 * convolution_flops(tokens, weight, grid, stride)

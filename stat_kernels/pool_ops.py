"""The operators of the pooling: schema, kernels, fakes, autograd, FLOP formulas.

``stat_kernels::pool_forward`` and ``stat_kernels::pool_backward`` take and return what
``stat_kernels.backends`` describes, and the backend's name. Importing this file loads no kernel.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from stat_kernels import backends
from stat_kernels.pool_layout import pool_layout

_FORWARD, _BACKWARD = "stat_kernels::pool_forward", "stat_kernels::pool_backward"
_KERNEL_DEVICES = ("cpu", "cuda")
_OPTIONS = "SymInt[] grid, int stride, int? short_stride, bool class_token, str long"

torch.library.define(
    _FORWARD,
    "(Tensor tokens, Tensor[] weights, Tensor[] norm_weights, Tensor[] norm_biases, "
    f"{_OPTIONS}, float eps, str backend) -> (Tensor pooled, Tensor stats)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    _BACKWARD,
    "(Tensor grad_pooled, Tensor tokens, Tensor[] weights, Tensor[] norm_weights, Tensor stats, "
    f"{_OPTIONS}, str backend) -> (Tensor grad_tokens, Tensor grad_params)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(_FORWARD, _KERNEL_DEVICES)
def _forward(tokens, weights, norm_weights, norm_biases, *options):
    *options, backend = options
    module = backends.load(backend)
    return module.pool_forward(unit_last(tokens), weights, norm_weights, norm_biases, *options)


@torch.library.register_fake(_FORWARD)
def _forward_fake(
    tokens, weights, norm_weights, norm_biases,
    grid, stride, short_stride, class_token, long, eps, backend,
):  # fmt: skip
    return backends.empty_pooled(tokens, grid, stride, short_stride, long)


@torch.library.impl(_BACKWARD, _KERNEL_DEVICES)
def _backward(grad_pooled, tokens, weights, norm_weights, stats, *options):
    *options, backend = options
    grad_tokens = tokens.new_empty(tokens.shape)
    grad_params = backends.load(backend).pool_backward(
        grad_pooled.contiguous(), unit_last(tokens), weights, norm_weights, stats,
        *options, grad_tokens,
    )  # fmt: skip
    return grad_tokens, grad_params


@torch.library.register_fake(_BACKWARD)
def _backward_fake(grad_pooled, tokens, weights, norm_weights, stats, *options):
    return tokens.new_empty(tokens.shape), backends.empty_grad_params(tokens, weights)


def split_grad_params(
    grad_params: Tensor, weights: Sequence[Tensor], norms: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of the weights, norm weights and norm biases, each in its parameter's dtype.

    Args:
        grad_params: as a backend returns it.
        weights, norms: the parameters; a norm's weight and bias share shape and dtype.
    """
    d = weights[0].shape[0]
    found = ([], [], [])
    for row, weight, norm in zip(grad_params, weights, norms, strict=True):
        parts = row.split((weight.numel(), d, d))
        found[0].append(parts[0].view(weight.shape).to(weight.dtype))
        found[1].append(parts[1].to(norm.dtype))
        found[2].append(parts[2].to(norm.dtype))
    return found


def unit_last(x: Tensor) -> Tensor:
    """Kernels take any strides but that of the last axis; a copy is the exception, not the rule."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _setup_context(ctx, inputs, output):
    tokens, weights, norm_weights, _, *ctx.options, _, ctx.backend = inputs
    ctx.save_for_backward(tokens, *weights, *norm_weights, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_pooled, _):
    tokens, *params, stats = ctx.saved_tensors
    nothing = (None,) * 7
    if grad_pooled is None:
        empty = [None] * (len(params) // 2)
        return None, empty, list(empty), list(empty), *nothing
    weights, norms = params[: len(params) // 2], params[len(params) // 2 :]
    grad_tokens, grad_params = pool_backward(
        grad_pooled, tokens, weights, norms, stats, *ctx.options, ctx.backend
    )
    return grad_tokens, *split_grad_params(grad_params, weights, norms), *nothing


def _double_backward(ctx, *grads):
    raise RuntimeError(
        "the fused pooling of tokens has no second derivative; "
        "use backend='reference' where one is needed"
    )


torch.library.register_autograd(_FORWARD, _autograd, setup_context=_setup_context)
torch.library.register_autograd(_BACKWARD, _double_backward)

pool_forward = torch.ops.stat_kernels.pool_forward.default
pool_backward = torch.ops.stat_kernels.pool_backward.default


def convolution_flops(tokens_shape, weight_shape, grid, stride: int) -> int:
    """Of the convolution of P tensors, two a multiply-add; padding counts, as in PyTorch."""
    p, b, t, _, h, d = tokens_shape
    layout = pool_layout(grid, stride, None, "none")
    return 2 * p * b * t * layout.current * h * d * math.prod(weight_shape[1:])


@register_flop_formula(torch.ops.stat_kernels.pool_forward)
def forward_flops(tokens, weights, norm_weights, norm_biases, grid, stride, *args, **kwargs) -> int:
    """One convolution; norms and averages do not count, as in PyTorch's own formulas."""
    return convolution_flops(tokens, weights[0], grid, stride)


@register_flop_formula(torch.ops.stat_kernels.pool_backward)
def backward_flops(
    grad_pooled, tokens, weights, norm_weights, stats, grid, stride, *args, **kwargs
) -> int:
    """Three: the convolution again, and the gradients of its input and of its weight."""
    return 3 * convolution_flops(tokens, weights[0], grid, stride)

"""The operators between an MLP's products: kernels, fakes, autograd.

``stat_kernels::bias_gelu_forward`` and ``stat_kernels::bias_residual_forward``, each with its
backward. They do no FLOPs in PyTorch's count, which leaves out element-wise operations. Importing
this file loads no kernel.
"""

import torch
from torch import Tensor

from stat_kernels import autograd, backends, native

_NAMES = (
    "bias_gelu_forward", "bias_gelu_backward", "bias_residual_forward", "bias_residual_backward",
)  # fmt: skip

native.define_operators()


def _call(name, backend, *arguments):
    dense = (x.contiguous() if isinstance(x, Tensor) else x for x in arguments)
    return getattr(backends.load(backend), name)(*dense)


for _name in _NAMES:

    @torch.library.impl(f"stat_kernels::{_name}", ("cpu", "cuda"))
    def _run(*arguments, _name=_name):
        *arguments, backend = arguments
        return _call(_name, backend, *arguments)


@torch.library.register_fake("stat_kernels::bias_gelu_forward")
def _gelu_fake(x, bias, backend):
    return x.new_empty(x.shape)


@torch.library.register_fake("stat_kernels::bias_gelu_backward")
def _gelu_backward_fake(grad_out, x, bias, backend):
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(bias.shape, dtype=dtype)


@torch.library.register_fake("stat_kernels::bias_residual_forward")
def _residual_fake(skip, x, bias, scale, backend):
    return skip.new_empty(skip.shape)


@torch.library.register_fake("stat_kernels::bias_residual_backward")
def _residual_backward_fake(grad_out, scale, dtype, backend):
    return backends.empty_mlp_gradients(grad_out, scale, dtype)


def _save_gelu(ctx, inputs, output):
    x, bias, ctx.backend = inputs
    ctx.save_for_backward(x, bias)


def _gelu_rule(ctx, grad_out):
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = bias_gelu_backward(grad_out, x, bias, ctx.backend)
    return grad_x, grad_bias.to(bias.dtype), None


def _save_residual(ctx, inputs, output):
    _, x, bias, scale, ctx.backend = inputs
    ctx.dtypes = x.dtype, bias.dtype
    ctx.save_for_backward(scale)


def _residual_rule(ctx, grad_out):
    (scale,) = ctx.saved_tensors
    x_dtype, bias_dtype = ctx.dtypes
    grad_x, grad_bias = bias_residual_backward(grad_out, scale, x_dtype, ctx.backend)
    if scale is None and x_dtype == grad_out.dtype:
        grad_x = grad_out
    return grad_out, grad_x, grad_bias.to(bias_dtype), None, None


def _double_backward(ctx, *grads):
    raise RuntimeError(
        "the fused parts of an MLP have no second derivative; "
        "use backend='reference' where one is needed"
    )


bias_gelu_forward = torch.ops.stat_kernels.bias_gelu_forward.default
bias_gelu_backward = torch.ops.stat_kernels.bias_gelu_backward.default
bias_residual_forward = torch.ops.stat_kernels.bias_residual_forward.default
bias_residual_backward = torch.ops.stat_kernels.bias_residual_backward.default

_library = torch.library.Library("stat_kernels", "IMPL")
autograd.register(_library, bias_gelu_forward, _gelu_rule, _save_gelu)
autograd.register(_library, bias_gelu_backward, _double_backward)
autograd.register(_library, bias_residual_forward, _residual_rule, _save_residual)
autograd.register(_library, bias_residual_backward, _double_backward)

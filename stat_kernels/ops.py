"""The operators that PyTorch sees: schema, kernels, fakes, one autograd rule, FLOP formulas.

``stat_kernels::sta_forward`` and ``stat_kernels::sta_backward`` take the backend's name as an
argument, so a traced graph says which kernel it will run. Importing this file loads no kernel.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from stat_kernels import autograd, backends

_INPUTS = (
    "Tensor q, Tensor k_cur, Tensor v_cur, Tensor? k_short, Tensor? v_short, "
    "Tensor? k_long, Tensor? v_long"
)
_FORWARD, _BACKWARD = "stat_kernels::sta_forward", "stat_kernels::sta_backward"
_KERNEL_DEVICES = ("cpu", "cuda")

torch.library.define(
    _FORWARD,
    f"({_INPUTS}, int window, float scale, str backend) -> (Tensor out, Tensor lse)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    _BACKWARD,
    f"(Tensor grad_out, Tensor? grad_lse, {_INPUTS}, Tensor out, Tensor lse, "
    "int window, float scale, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(_FORWARD, _KERNEL_DEVICES)
def _forward(q, k_cur, v_cur, k_short, v_short, k_long, v_long, window, scale, backend):
    inputs = _unit_last_stride(q, k_cur, v_cur, k_short, v_short, k_long, v_long)
    return backends.load(backend).forward(*inputs, window, scale)


@torch.library.register_fake(_FORWARD)
def _forward_fake(q, k_cur, v_cur, k_short, v_short, k_long, v_long, window, scale, backend):
    b, t, nq, h, _ = q.shape
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((b, t, h, nq), dtype=lse_dtype)


@torch.library.impl(_BACKWARD, _KERNEL_DEVICES)
def _backward(
    grad_out, grad_lse, q, k_cur, v_cur, k_short, v_short, k_long, v_long,
    out, lse, window, scale, backend,
):  # fmt: skip
    grad_out, *inputs = _unit_last_stride(
        grad_out, q, k_cur, v_cur, k_short, v_short, k_long, v_long
    )
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    return backends.load(backend).backward(grad_out, grad_lse, *inputs, out, lse, window, scale)


@torch.library.register_fake(_BACKWARD)
def _backward_fake(
    grad_out, grad_lse, q, k_cur, v_cur, k_short, v_short, k_long, v_long,
    out, lse, window, scale, backend,
):  # fmt: skip
    return backends.empty_gradients(q, k_cur, v_cur, k_short, v_short, k_long, v_long)


def _unit_last_stride(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Kernels take any strides but that of the last axis; a copy is the exception, not the rule."""
    return tuple(x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.window, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)  # an unused output sends None, not a tensor of zeros


def _autograd(ctx, grad_out, grad_lse):
    *inputs, out, lse = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 10
    if grad_out is None:
        grad_out = out.new_zeros(()).expand(out.shape)
    gradients = sta_backward(
        grad_out, grad_lse, *inputs, out, lse, ctx.window, ctx.scale, ctx.backend
    )
    present = (g if x is not None else None for g, x in zip(gradients, inputs, strict=True))
    return (*present, None, None, None)


def _double_backward(ctx, *grads):
    raise RuntimeError(
        "the fused shrinking temporal attention has no second derivative; "
        "use backend='reference' where one is needed"
    )


sta_forward = torch.ops.stat_kernels.sta_forward.default
sta_backward = torch.ops.stat_kernels.sta_backward.default

_library = torch.library.Library("stat_kernels", "IMPL")
autograd.register(_library, sta_forward, _autograd, _setup_context)
autograd.register(_library, sta_backward, _double_backward)


def query_key_pairs(q_shape, k_cur_shape, k_short_shape, k_long_shape, window: int) -> int:
    """How many (query, key) pairs are scored; neighbours outside the clip do not count."""
    b, t, nq, h, _ = q_shape
    radius = min(window // 2, t - 1)
    neighbours = 2 * radius * t - radius * (radius + 1)  # summed over the frames of a clip
    keys = t * k_cur_shape[2]
    keys += 0 if k_short_shape is None else neighbours * k_short_shape[2]
    keys += 0 if k_long_shape is None else t * k_long_shape[1]
    return b * h * nq * keys


@register_flop_formula(torch.ops.stat_kernels.sta_forward)
def forward_flops(
    q, k_cur, v_cur, k_short, v_short, k_long, v_long, window, scale, backend, *args, **kwargs
) -> int:
    """Two products (scores and output), two FLOPs a multiply-add; arguments are shapes."""
    return 2 * 2 * q[-1] * query_key_pairs(q, k_cur, k_short, k_long, window)


@register_flop_formula(torch.ops.stat_kernels.sta_backward)
def backward_flops(
    grad_out, grad_lse, q, k_cur, v_cur, k_short, v_short, k_long, v_long,
    out, lse, window, scale, backend, *args, **kwargs,
) -> int:  # fmt: skip
    """Five products: the scores again, dP, dV, dQ and dK."""
    return 5 * 2 * q[-1] * query_key_pairs(q, k_cur, k_short, k_long, window)

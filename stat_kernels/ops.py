"""The operators that PyTorch sees: kernels, fakes, one autograd rule, FLOP formulas.

``stat_kernels::sta_forward`` and ``stat_kernels::sta_backward`` take the backend's name as an
argument, so a traced graph says which kernel it will run. Importing this file loads no backend.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from stat_kernels import autograd, backends, native

_FORWARD, _BACKWARD = "stat_kernels::sta_forward", "stat_kernels::sta_backward"
_KERNEL_DEVICES = ("cpu", "cuda")

native.define_operators()


@torch.library.impl(_FORWARD, _KERNEL_DEVICES)
def _forward(
    q, k_cur, v_cur, k_short, v_short, k_long, v_long,
    left, right, frame_offset, causal_long, scale, backend,
):  # fmt: skip
    inputs = _unit_last_stride(q, k_cur, v_cur, k_short, v_short, k_long, v_long)
    reach = backends.Reach(left, right, frame_offset, causal_long)
    return backends.load(backend).forward(*inputs, reach, scale)


@torch.library.register_fake(_FORWARD)
def _forward_fake(
    q, k_cur, v_cur, k_short, v_short, k_long, v_long,
    left, right, frame_offset, causal_long, scale, backend,
):  # fmt: skip
    b, t, nq, h, _ = q.shape
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((b, t, h, nq), dtype=lse_dtype)


@torch.library.impl(_BACKWARD, _KERNEL_DEVICES)
def _backward(
    grad_out, grad_lse, q, k_cur, v_cur, k_short, v_short, k_long, v_long,
    out, lse, left, right, frame_offset, causal_long, scale, backend,
):  # fmt: skip
    grad_out, *inputs = _unit_last_stride(
        grad_out, q, k_cur, v_cur, k_short, v_short, k_long, v_long
    )
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    reach = backends.Reach(left, right, frame_offset, causal_long)
    return backends.load(backend).backward(grad_out, grad_lse, *inputs, out, lse, reach, scale)


@torch.library.register_fake(_BACKWARD)
def _backward_fake(
    grad_out, grad_lse, q, k_cur, v_cur, k_short, v_short, k_long, v_long,
    out, lse, left, right, frame_offset, causal_long, scale, backend,
):  # fmt: skip
    return backends.empty_gradients(q, k_cur, v_cur, k_short, v_short, k_long, v_long)


def _unit_last_stride(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Kernels take any strides but that of the last axis; a copy is the exception, not the rule."""
    return tuple(x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _setup_context(ctx, inputs, output):
    tensors, ctx.others = inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors, *results_to_keep(output, inputs[-1]))
    ctx.set_materialize_grads(False)  # an unused output sends None, not a tensor of zeros


def results_to_keep(results: Sequence[Tensor], backend: str) -> tuple[Tensor | None, Tensor | None]:
    """out and lse for the backward of a backend; None for both where it does not read them."""
    out, lse = results
    return (None, None) if backend in backends.RECOMPUTING else (out, lse)


def _autograd(ctx, grad_out, grad_lse):
    *inputs, out, lse = ctx.saved_tensors
    nothing = (None,) * len(ctx.others)
    if grad_out is None and grad_lse is None:
        return (*(None for _ in inputs), *nothing)
    if grad_out is None:
        grad_out = inputs[0].new_zeros(()).expand(inputs[0].shape)  # out is like q
    gradients = sta_backward(grad_out, grad_lse, *inputs, out, lse, *ctx.others)
    present = (g if x is not None else None for g, x in zip(gradients, inputs, strict=True))
    return (*present, *nothing)


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


def query_key_pairs(
    q_shape: Sequence[int],
    k_cur_shape: Sequence[int],
    k_short_shape: Sequence[int] | None,
    k_long_shape: Sequence[int] | None,
    left: int,
    right: int,
    frame_offset: int = 0,
    causal_long: bool = False,
) -> int:
    """How many (query, key) pairs are scored; neighbours outside the clip do not count."""
    b, t, nq, h, _ = q_shape
    frames = range(frame_offset, frame_offset + t)
    keys = t * k_cur_shape[2]
    if k_short_shape is not None:
        last = k_short_shape[1] - 1
        neighbours = sum(min(left, i) + min(right, last - i) for i in frames)
        keys += neighbours * k_short_shape[2]
    if k_long_shape is not None:
        keys += sum(i + 1 for i in frames) if causal_long else t * k_long_shape[1]
    return b * h * nq * keys


@register_flop_formula(torch.ops.stat_kernels.sta_forward)
def forward_flops(
    q, k_cur, v_cur, k_short, v_short, k_long, v_long,
    left, right, frame_offset, causal_long, *args, **kwargs,
) -> int:  # fmt: skip
    """Two products (scores and output), two FLOPs a multiply-add; arguments are shapes."""
    reach = (left, right, frame_offset, causal_long)
    return 2 * 2 * q[-1] * query_key_pairs(q, k_cur, k_short, k_long, *reach)


@register_flop_formula(torch.ops.stat_kernels.sta_backward)
def backward_flops(
    grad_out, grad_lse, q, k_cur, v_cur, k_short, v_short, k_long, v_long,
    out, lse, left, right, frame_offset, causal_long, *args, **kwargs,
) -> int:  # fmt: skip
    """Five products: the scores again, dP, dV, dQ and dK."""
    reach = (left, right, frame_offset, causal_long)
    return 5 * 2 * q[-1] * query_key_pairs(q, k_cur, k_short, k_long, *reach)

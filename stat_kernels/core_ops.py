"""The operators of the layer's core: from the packed projection to the attention's output.

``stat_kernels::core_forward`` pools queries (where they are pooled), keys and values and attends;
``stat_kernels::core_backward`` returns one packed gradient, which attention and pooling write into
slot by slot. Both are built from a backend's attention and pooling. Importing this file loads no
backend.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from stat_kernels import autograd, backends, native, ops, pool_ops
from stat_kernels.pool_layout import PoolLayout, pool_layout

_FORWARD, _BACKWARD = "stat_kernels::core_forward", "stat_kernels::core_backward"
_KERNEL_DEVICES = ("cpu", "cuda")

native.define_operators()


class Options(NamedTuple):
    """The arguments of both operators that are no tensors, in the schema's order."""

    grid: tuple[int, int]
    q_stride: int
    kv_stride: int
    short_stride: int | None
    class_token: bool
    long: str
    eps: float
    left: int
    right: int
    causal_long: bool
    scale: float
    backend: str

    @property
    def kv(self) -> tuple:
        """Of the pooling of keys and values."""
        return self.grid, self.kv_stride, self.short_stride, self.class_token, self.long

    @property
    def q(self) -> tuple:
        """Of the pooling of queries: the class token stays one of them, nothing is pooled again."""
        return self.grid, self.q_stride, None, self.class_token, self.q_long

    @property
    def q_long(self) -> str:
        return "class" if self.class_token else "none"

    @property
    def reach(self) -> backends.Reach:
        return backends.Reach(self.left, self.right, causal_long=self.causal_long)

    @property
    def kv_layout(self) -> PoolLayout:
        return pool_layout(self.grid, self.kv_stride, self.short_stride, self.long)


def _attention_views(q: Tensor, kv: Tensor, layout: PoolLayout) -> tuple[Tensor | None, ...]:
    """q and the six parts of keys and values, views of the pooled buffer (2, B, T, R, H, D)."""
    parts = (part.unbind(0) if part is not None else (None, None) for part in layout.split(kv))
    return q, *(tensor for part in parts for tensor in part)


@torch.library.impl(_FORWARD, _KERNEL_DEVICES)
def _forward(
    qkv, q_weight, q_norm_weight, k_weight, k_norm_weight, v_weight, v_norm_weight,
    q_norm_bias, k_norm_bias, v_norm_bias, *options,
):  # fmt: skip
    options = Options(*options)
    backend = backends.load(options.backend)
    slots = pool_ops.unit_last_stride(qkv).movedim(3, 0)  # (3, B, T, N, H, D)
    kv, kv_stats = backend.pool_forward(
        slots[1:], [k_weight, v_weight], [k_norm_weight, v_norm_weight],
        [k_norm_bias, v_norm_bias], *options.kv, options.eps,
    )  # fmt: skip
    q, q_stats = _no_queries(qkv)
    if q_weight is not None:
        q, q_stats = backend.pool_forward(
            slots[:1], [q_weight], [q_norm_weight], [q_norm_bias], *options.q, options.eps
        )
    queries = slots[0] if q_weight is None else q[0]
    out, lse = backend.forward(
        *_attention_views(queries, kv, options.kv_layout), options.reach, options.scale
    )
    return out, lse, kv, kv_stats, q, q_stats


def _no_queries(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """An operator cannot return None: tensors without elements where queries are not pooled."""
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    return qkv.new_empty(0), qkv.new_empty(0, dtype=dtype)


@torch.library.register_fake(_FORWARD)
def _forward_fake(
    qkv, q_weight, q_norm_weight, k_weight, k_norm_weight, v_weight, v_norm_weight,
    q_norm_bias, k_norm_bias, v_norm_bias, *options,
):  # fmt: skip
    options = Options(*options)
    slots = qkv.movedim(3, 0)
    grid, stride, short_stride, _, long = options.kv
    kv, kv_stats = backends.empty_pooled(slots[1:], grid, stride, short_stride, long)
    q, q_stats = _no_queries(qkv)
    if q_weight is not None:
        grid, stride, short_stride, _, long = options.q
        q, q_stats = backends.empty_pooled(slots[:1], grid, stride, short_stride, long)
    b, t, nq, h, d = slots.shape[1:] if q_weight is None else q.shape[1:]
    out, lse = qkv.new_empty((b, t, nq, h, d)), kv_stats.new_empty((b, t, h, nq))
    return out, lse, kv, kv_stats, q, q_stats


@torch.library.impl(_BACKWARD, _KERNEL_DEVICES)
def _backward(
    grad_out, qkv, q_weight, q_norm_weight, k_weight, k_norm_weight, v_weight, v_norm_weight,
    out, lse, kv, kv_stats, q, q_stats, *options,
):  # fmt: skip
    options = Options(*options)
    backend = backends.load(options.backend)
    slots = pool_ops.unit_last_stride(qkv).movedim(3, 0)
    grad_qkv = qkv.new_empty(qkv.shape)
    grad_slots = grad_qkv.movedim(3, 0)
    grad_kv, grad_q = torch.empty_like(kv), torch.empty_like(q)
    layout, pools_queries = options.kv_layout, q_weight is not None
    backend.backward(
        pool_ops.unit_last_stride(grad_out), None,
        *_attention_views(q[0] if pools_queries else slots[0], kv, layout),
        out, lse, options.reach, options.scale,
        grads=_attention_views(grad_q[0] if pools_queries else grad_slots[0], grad_kv, layout),
    )  # fmt: skip
    grad_kv_params = backend.pool_backward(
        grad_kv, slots[1:], [k_weight, v_weight], [k_norm_weight, v_norm_weight], kv_stats,
        *options.kv, grad_slots[1:],
    )  # fmt: skip
    if not pools_queries:
        return grad_qkv, grad_kv_params, _no_queries(qkv)[1]
    grad_q_params = backend.pool_backward(
        grad_q, slots[:1], [q_weight], [q_norm_weight], q_stats, *options.q, grad_slots[:1]
    )
    return grad_qkv, grad_kv_params, grad_q_params


@torch.library.register_fake(_BACKWARD)
def _backward_fake(grad_out, qkv, q_weight, q_norm_weight, k_weight, k_norm_weight, v_weight, *_):
    grad_kv_params = backends.empty_grad_params(qkv, [k_weight, v_weight])
    grad_q_params = _no_queries(qkv)[1]
    if q_weight is not None:
        grad_q_params = backends.empty_grad_params(qkv, [q_weight])
    return qkv.new_empty(qkv.shape), grad_kv_params, grad_q_params


def _setup_context(ctx, inputs, output):
    qkv, *weights, _, _, _ = inputs[:10]
    ctx.options = inputs[10:]
    results = ops.results_to_keep(output[:2], ctx.options[-1])
    ctx.save_for_backward(qkv, *weights, *results, *output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_out, *_):
    if grad_out is None:
        return (None,) * 22
    qkv, q, q_norm, k, k_norm, v, v_norm, *outputs = ctx.saved_tensors
    grad_qkv, grad_kv, grad_q = core_backward(
        grad_out, qkv, q, q_norm, k, k_norm, v, v_norm, *outputs, *ctx.options
    )
    dk, dk_norm, dk_bias = pool_ops.split_grad_params(grad_kv[0], k, k_norm)
    dv, dv_norm, dv_bias = pool_ops.split_grad_params(grad_kv[1], v, v_norm)
    dq = dq_norm = dq_bias = None
    if q is not None:
        dq, dq_norm, dq_bias = pool_ops.split_grad_params(grad_q[0], q, q_norm)
    return (
        grad_qkv, dq, dq_norm, dk, dk_norm, dv, dv_norm, dq_bias, dk_bias, dv_bias, *(None,) * 12
    )  # fmt: skip


def _double_backward(ctx, *grads):
    raise RuntimeError(
        "the fused shrinking temporal attention has no second derivative; "
        "use backend='reference' where one is needed"
    )


core_forward = torch.ops.stat_kernels.core_forward.default
core_backward = torch.ops.stat_kernels.core_backward.default

_library = torch.library.Library("stat_kernels", "IMPL")
autograd.register(_library, core_forward, _autograd, _setup_context)
autograd.register(_library, core_backward, _double_backward)


def _flops(qkv, q_weight, k_weight, options: Options) -> tuple[int, int]:
    """Of the convolutions and of one product of the attention; tensors are given as shapes."""
    b, t, n, _, h, d = qkv
    tokens, layout, nq = (b, t, n, h, d), options.kv_layout, n
    convolutions = 2 * pool_ops.convolution_flops(tokens, k_weight, options.grid, options.kv_stride)
    if q_weight is not None:
        grid, stride = options.grid, options.q_stride
        convolutions += pool_ops.convolution_flops(tokens, q_weight, grid, stride)
        nq = pool_layout(grid, stride, None, options.q_long).rows
    pairs = ops.query_key_pairs(
        (b, t, nq, h, d),
        (b, t, layout.current, h, d),
        (b, t, layout.short, h, d) if layout.short else None,
        (b, t, h, d) if layout.long else None,
        *options.reach,
    )
    return convolutions, 2 * d * pairs


@register_flop_formula(torch.ops.stat_kernels.core_forward)
def forward_flops(
    qkv, q_weight, q_norm_weight, k_weight, k_norm_weight, v_weight, v_norm_weight,
    q_norm_bias, k_norm_bias, v_norm_bias, *options, **kwargs,
) -> int:  # fmt: skip
    """The convolutions and two products, as the operators of pooling and attention count them."""
    convolutions, product = _flops(qkv, q_weight, k_weight, Options(*options))
    return convolutions + 2 * product


@register_flop_formula(torch.ops.stat_kernels.core_backward)
def backward_flops(
    grad_out, qkv, q_weight, q_norm_weight, k_weight, k_norm_weight, v_weight, v_norm_weight,
    out, lse, kv, kv_stats, q, q_stats, *options, **kwargs,
) -> int:  # fmt: skip
    """Three times the convolutions, and five products."""
    convolutions, product = _flops(qkv, q_weight, k_weight, Options(*options))
    return 3 * convolutions + 5 * product

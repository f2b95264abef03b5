"""The fast backends, best first; on a GPU ``dispatch.GPU_PREFERENCES`` ranks the two there.

Each module is imported when first asked for, never earlier.

A backend is a module with three functions over contiguous-last-axis tensors; ``device`` is theirs,
"cpu" or "cuda:1", or "cuda" for the current GPU:

    unsupported_reason(device, dtype, head_dim) -> str | None
    forward(q, k_cur, v_cur, k_short, v_short, k_long, v_long, reach, scale) -> (out, lse)
    backward(grad_out, grad_lse, q, ..., v_long, out, lse, reach, scale, grads=None)
        -> seven gradients, written to ``grads`` where these are given; out and lse are None for a
        backend of RECOMPUTING

A backend may also have ``untested_reason(device) -> str | None``: why it serves a GPU only where
the caller insists on it.

A backend may also pool tokens; it then has three more functions:

    pool_unsupported_reason(device, dtype, head_dim, kernel, stride) -> str | None
    pool_forward(tokens, weights, norm_weights, norm_biases,
                 grid, stride, short_stride, class_token, long, eps) -> (pooled, stats)
    pool_backward(grad_pooled, tokens, weights, norm_weights, stats,
                  grid, stride, short_stride, class_token, long, grad_tokens) -> grad_params

P tensors of one shape, each with parameters of its own, are pooled in one call: keys and values of
a layer, P = 2, or queries, P = 1. With (Nl, Nc, Ns) = long, current, short of ``layout``, which is
``pool_layout(grid, stride, short_stride, long)``:

    tokens        (P, B, T, N, H, D), N = class_token + h * w; any strides but a unit last one, such
                  as slots of a packed projection, ``qkv.movedim(3, 0)[1:]``
    weights       P of (D, 1, kt, kh, kw), contiguous; norm_weights, norm_biases: P of (D,); each in
                  a floating dtype of its own, under autocast float32 beside 16-bit tokens
    long          "class" (only with class_token), "mean" or "none"; with "mean" or "none" a class
                  token is not read and its gradient is zero
    pooled        fresh contiguous (P, B, T, Nl + Nc + Ns, H, D) in the dtype of ``tokens``
    stats         fresh contiguous (2, P, B, T, layout.normed, H), float32 (float64 for float64):
                  mean and 1 / sqrt(var + eps) of each row that a LayerNorm wrote, in rows' order
    grad_pooled   as ``pooled``, contiguous
    grad_tokens   as ``tokens``, with strides of its own: every element is written, zeros too
    grad_params   fresh contiguous (P, D * (kt * kh * kw + 2)), dtype of ``stats``: gradients of
                  weight (in its own layout), norm_weight and norm_bias, one after the other

A backend may also compute what lies between the products of an MLP (``stat_kernels.mlp``), in
``dtype`` of x; it then has four more functions:

    bias_gelu_forward(x, bias) -> out
    bias_gelu_backward(grad_out, x, bias) -> (grad_x, grad_bias)
    bias_residual_forward(skip, x, bias, scale) -> out
    bias_residual_backward(grad_out, scale, dtype) -> (grad_x, grad_bias)

    x, skip       contiguous (..., C); skip in the dtype of x or, beside a 16-bit x, float32
    bias          (C,) in a floating dtype of its own
    scale         (B,) or None; B divides the rows
    out, grad_out contiguous, as x, of the residual as skip
    grad_x        fresh contiguous, as x; without elements where it would be grad_out itself
    grad_bias     fresh (C,), float32 (float64 for float64), the same bits on every call

Backends never import one another, nor the reference.
"""

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stat_kernels.pool_layout import pool_layout

NAMES = ("cpu", "cuda", "triton")
# Their backward computes the softmax again from q and k alone, so out and lse are not kept for it.
RECOMPUTING = ("cpu",)


# q, k_cur, v_cur, k_short, v_short, k_long, v_long
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Reach(NamedTuple):
    """Which keys a frame reads besides its own; see ``shrinking_temporal_attention``."""

    left: int
    right: int
    frame_offset: int = 0
    causal_long: bool = False


class Gpu(NamedTuple):
    """What the backends ask of a GPU.

    Attributes:
        capability: compute capability, (9, 0) for a Hopper.
        multiprocessors: how many it has.
        shared_bytes: shared memory that one block may ask for.
        amd: "gfx942" for an MI300, None for an NVIDIA GPU; the other three then mean little.
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int
    amd: str | None = None


def gpu(device: str) -> Gpu | None:
    """The GPU ``device``, "cuda:1" or "cuda" for the current one; None on a machine without GPUs.

    PyTorch is asked once for each GPU, because each of its answers costs microseconds.
    """
    if not _has_gpus():
        return None
    index = torch.device(device).index
    return _gpu(torch.cuda.current_device() if index is None else index)


@functools.cache
def _has_gpus() -> bool:
    return torch.cuda.is_available()


@functools.cache
def _gpu(index: int) -> Gpu:
    found: Any = torch.cuda.get_device_properties(index)
    rocm = torch.version.hip is not None
    return Gpu(
        (found.major, found.minor),
        found.multi_processor_count,
        0 if rocm else found.shared_memory_per_block_optin,
        found.gcnArchName.split(":")[0] if rocm else None,  # "gfx942:sramecc+:xnack-"
    )


def load(name: str) -> ModuleType:
    """The module of the backend ``name``, one of NAMES."""
    return importlib.import_module(f"stat_kernels.backends.{name}")


def empty_gradients(q: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
    """One fresh contiguous tensor per input, q first.

    An operator cannot return None, so a missing input's gradient is a tensor without elements.
    """
    return tuple(q.new_empty((0,) if x is None else x.shape) for x in (q, *others))


def gradients_to_fill(inputs: Inputs, grads: Sequence[Tensor | None] | None) -> tuple[Tensor, ...]:
    """The tensors that a backward writes to: ``grads``, or fresh ones where it is None.

    Args:
        inputs: of the operation, seven.
        grads: of their shapes, dtype and device, with any strides but a last one of 1; they may be
            views of one packed gradient. None for a missing input.
    """
    if grads is None:
        return empty_gradients(*inputs)
    grad: Any  # None for a missing input only
    for x, grad in zip(inputs, grads, strict=True):
        if x is not None and (grad.shape != x.shape or grad.stride(-1) != 1):
            raise ValueError(
                f"a gradient to fill must have its input's shape {tuple(x.shape)} and 1 as its "
                f"last stride, got the shape {tuple(grad.shape)} and the strides {grad.stride()}"
            )
    return tuple(inputs[0].new_empty(0) if grad is None else grad for grad in grads)


def empty_pooled(
    tokens: Tensor, grid: Sequence[int], stride: int, short_stride: int | None, long: str
) -> tuple[Tensor, Tensor]:
    """Uninitialised ``pooled`` and ``stats`` of a call."""
    layout = pool_layout(grid, stride, short_stride, long)
    p, b, t, _, h, d = tokens.shape
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    pooled = tokens.new_empty((p, b, t, layout.rows, h, d))
    return pooled, tokens.new_empty((2, p, b, t, layout.normed, h), dtype=dtype)


def empty_mlp_gradients(
    grad_out: Tensor, scale: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Uninitialised ``grad_x`` and ``grad_bias`` of ``bias_residual_backward``."""
    same = scale is None and dtype == grad_out.dtype
    return (
        grad_out.new_empty((0,) if same else grad_out.shape, dtype=dtype),
        grad_out.new_empty(grad_out.shape[-1:], dtype=torch.promote_types(dtype, torch.float32)),
    )


def empty_grad_params(tokens: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Uninitialised ``grad_params`` of a call."""
    numel = weights[0].numel() + 2 * weights[0].shape[0]
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    return tokens.new_empty((len(weights), numel), dtype=dtype)

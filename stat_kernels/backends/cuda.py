"""The CUDA C++ backend: NVIDIA GPUs from Ampere on, compiled ahead, native at head dim 96."""

import functools
import math
import operator
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from stat_kernels import native
from stat_kernels.backends import (
    Gpu,
    Reach,
    empty_grad_params,
    empty_pooled,
    gpu,
    gradients_to_fill,
)

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 96, 128)
POOL_HEAD_DIMS = range(16, 257, 8)
POOL_KERNEL = (3, 7, 7)  # the largest
POOL_STRIDES = range(1, 9)
OLDEST = (8, 0)  # compute capability: mma.sync on bfloat16 and asynchronous copies
VECTOR_BYTES = 16  # of one asynchronous copy
VECTOR = VECTOR_BYTES // 2  # elements in it

Input = TypeVar("Input", Tensor, Tensor | None)


def unsupported_reason(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernels cannot take such a call, or None."""
    reason = _tensor_problem(device, dtype)
    if reason is None and head_dim not in HEAD_DIMS:
        reason = f"it takes head dims 64, 96 and 128, not {head_dim}"
    return reason or native.cuda_problem() or _gpu_problem(gpu(device))


def pool_unsupported_reason(
    device: str, dtype: torch.dtype, head_dim: int, kernel: tuple[int, int, int], stride: int
) -> str | None:
    """Why the pooling kernels cannot take such a call, or None."""
    reason = _tensor_problem(device, dtype)
    if reason is None and head_dim not in POOL_HEAD_DIMS:
        reason = f"it pools head dims that are multiples of 8 from 16 to 256, not {head_dim}"
    if reason is None and any(map(operator.gt, kernel, POOL_KERNEL)):
        reason = f"it takes pooling kernels up to {POOL_KERNEL}, not {tuple(kernel)}"
    if reason is None and stride not in POOL_STRIDES:
        reason = f"it takes pooling strides from 1 to 8, not {stride}"
    if reason := reason or native.cuda_problem():
        return reason
    return _gpu_problem(gpu(device)) or _too_large(head_dim, kernel, gpu(device))


def _tensor_problem(device: str, dtype: torch.dtype) -> str | None:
    if not device.startswith("cuda"):
        return f"it takes CUDA tensors, these are on {device}"
    if dtype not in DTYPES:
        return f"it takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


def _too_large(head_dim: int, kernel: tuple[int, int, int], found: Gpu | None) -> str | None:
    """A block holds all parameters of the pooling in shared memory, and a mean's partial sums."""
    needed = 4 * head_dim * (math.prod(kernel) + 2) + 4096
    if found is not None and needed > found.shared_bytes:
        return (
            f"a pooling kernel {tuple(kernel)} at head dim {head_dim} needs {needed} bytes of "
            f"shared memory, this GPU offers {found.shared_bytes}"
        )
    return None


def _gpu_problem(found: Gpu | None) -> str | None:
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    if found is None:
        return "no NVIDIA driver with a GPU was found"
    major, minor = found.capability
    if found.capability < OLDEST:
        oldest = "{}.{}".format(*OLDEST)
        return f"it needs compute capability {oldest} or newer, this GPU has {major}.{minor}"
    built = native.cuda_architectures()
    if not runs_on(built, found.capability):
        return (
            f"it was compiled for {built}, which does not run on this GPU of compute capability "
            f"{major}.{minor}; build it with TORCH_CUDA_ARCH_LIST={major}.{minor}"
        )
    return None


@functools.cache
def runs_on(built: str, found: tuple[int, int]) -> bool:
    """Whether code compiled for ``built`` ("8.0 9.0a 10.0+PTX") runs on a GPU.

    Machine code runs on later GPUs of the same generation, that of "9.0a" on exactly that GPU, and
    a driver compiles PTX for every later one.
    """
    for word in built.split():
        match: Any = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        major, minor, suffix, ptx = match.groups()
        oldest = int(major), int(minor)
        if found == oldest:
            return True
        if not suffix and found > oldest and (ptx or found[0] == oldest[0]):
            return True
    return False


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
    """out (B, T, Nq, H, D) and lse (B, T, H, Nq); shapes as in ``shrinking_temporal_attention``.

    The kernels copy 16 bytes at a time. A tensor whose address or strides are not multiples of that
    (a slice of an odd number of channels, for instance) is first made contiguous.
    """
    native.load()
    inputs = aligned(q, k_cur, v_cur, k_short, v_short, k_long, v_long)
    b, t, nq, h, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((b, t, h, nq), dtype=torch.float32, device=q.device)
    if q.numel() > 0:
        torch.ops.stat_kernels.cuda_forward(*inputs, *reach, scale, out, lse)
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
    out: Tensor,
    lse: Tensor,
    reach: Reach,
    scale: float,
    grads: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """The seven gradients in the order of the inputs; a missing input's is without elements.

    Written to ``grads`` where these are given (see ``gradients_to_fill``); their addresses and
    strides must be multiples of 16 bytes. Other inputs are copied as in ``forward``, and lse is
    made contiguous.
    """
    native.load()
    inputs = (q, k_cur, v_cur, k_short, v_short, k_long, v_long)
    grads = gradients_to_fill(inputs, grads)
    if q.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    grad_out, out = aligned(grad_out, out)
    copies = aligned(*inputs)
    size = torch.ops.stat_kernels.cuda_workspace(*copies, *reach)
    workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
    torch.ops.stat_kernels.cuda_backward(
        grad_out, grad_lse, *copies, out, lse.contiguous(), *reach, scale, workspace, *grads
    )  # fmt: skip
    return grads


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
    """pooled and stats, as ``stat_kernels.backends`` describes them.

    Tokens whose address or strides are not multiples of 16 bytes are copied first.
    """
    native.load()
    pooled, stats = empty_pooled(tokens, grid, stride, short_stride, long)
    if tokens.numel() > 0:
        params = [_as_float32(p) for p in (weights, norm_weights, norm_biases)]
        sizes = [*grid, *weights[0].shape[2:], stride, short_stride or 0]
        torch.ops.stat_kernels.cuda_pool_forward(
            *aligned(tokens), *params, sizes, class_token, long, eps, pooled, stats
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
    """grad_params; fills ``grad_tokens``.

    Tensors whose address or strides are not multiples of 16 bytes are copied first, as by
    ``pool_forward``; such a ``grad_tokens`` is filled from a contiguous tensor.
    """
    native.load()
    grad_params = empty_grad_params(tokens, weights)
    if tokens.numel() == 0:
        return grad_params.zero_()
    params = [_as_float32(p) for p in (weights, norm_weights)]
    options = [*grid, *weights[0].shape[2:], stride, short_stride or 0], class_token, long
    grad_pooled, tokens = aligned(grad_pooled, tokens)
    filled = (
        grad_tokens
        if _whole_vectors(grad_tokens)
        else torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
    )
    size = torch.ops.stat_kernels.cuda_pool_workspace(tokens, *options)
    workspace = torch.empty(size, dtype=torch.uint8, device=tokens.device)
    torch.ops.stat_kernels.cuda_pool_backward(
        grad_pooled, tokens, *params, stats, *options, workspace, filled, grad_params
    )
    if filled is not grad_tokens:
        grad_tokens.copy_(filled)
    return grad_params


def _as_float32(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().to(torch.float32).contiguous() for p in parameters]


def aligned(*tensors: Input) -> tuple[Input, ...]:
    """Each tensor, or a contiguous copy if its address or strides are not multiples of 16 bytes.

    The stride of an axis of one element counts, too: it is never used, but the library checks it.
    """
    return tuple(x if x is None or _whole_vectors(x) else _copy(x) for x in tensors)


def _whole_vectors(x: Tensor) -> bool:
    *strides, last = x.stride()
    bits = functools.reduce(operator.or_, strides)  # one test for all: the unit is a power of two
    return last == 1 and bits % VECTOR == 0 and x.data_ptr() % VECTOR_BYTES == 0


def _copy(x: Tensor) -> Tensor:
    """Fresh memory: ``contiguous`` returns a misaligned but contiguous tensor as it is."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)

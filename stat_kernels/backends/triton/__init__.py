"""The Triton backend: NVIDIA GPUs from Ampere on, and CPU tensors in Triton's interpreter.

It also compiles for AMD's gfx942, where it has never run and must be asked for by name. Triton
itself is imported with the first call, never with this package's import.
"""

import functools
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from stat_kernels import backends
from stat_kernels.backends import (
    Reach,
    empty_grad_params,
    empty_mlp_gradients,
    empty_pooled,
    gradients_to_fill,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = range(16, 257, 8)
POOL_KERNEL = (3, 7, 7)  # the largest (kt, kh, kw)
POOL_STRIDES = range(1, 9)
OLDEST = (8, 0)  # compute capability: bfloat16 and asynchronous copies


def unsupported_reason(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernels cannot take such a call, or None."""
    if dtype not in DTYPES:
        return f"it has no {str(dtype).removeprefix('torch.')} kernel"
    if head_dim not in HEAD_DIMS:
        return f"it takes head dims that are multiples of 8 from 16 to 256, not {head_dim}"
    if device == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return (
                "it takes CPU tensors only where TRITON_INTERPRET=1 was set before Python started"
            )
    elif not device.startswith("cuda"):
        return f"it takes CUDA tensors, these are on {device}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    return _interpreter_problem() if device == "cpu" else _gpu_problem(device)


def _interpreter_problem() -> str | None:
    from stat_kernels.backends.triton import launch

    if not launch.interpreted():
        return "TRITON_INTERPRET=1 was set only after its kernels had been imported"
    return None


def _gpu_problem(device: str) -> str | None:
    if torch.version.cuda is None and torch.version.hip is None:
        return "this PyTorch was built without CUDA"
    found = backends.gpu(device)
    if found is None:
        vendor = "NVIDIA" if torch.version.hip is None else "AMD"
        return f"no {vendor} driver with a GPU was found"
    if found.amd:
        return _amd_problem(found.amd)
    return _capability_problem(found.capability)


def _amd_problem(name: str) -> str | None:
    from stat_kernels.backends.triton.config import AMD

    if name in AMD:
        return None
    return f"it has no tiles for {name}, of AMD GPUs only for {', '.join(AMD)}"


def untested_reason(device: str) -> str | None:
    """Why only a caller who insists gets the kernels on this GPU, or None."""
    found = backends.gpu(device) if device.startswith("cuda") else None
    if found is None or not found.amd:
        return None
    return f"its kernels compile for {found.amd} but have never run there"


@functools.cache
def _capability_problem(found: tuple[int, int]) -> str | None:
    """The same for an NVIDIA GPU of this compute capability; cached, as every call asks."""
    import triton

    from stat_kernels.backends.triton import known_bad

    if found < OLDEST:
        return "it needs compute capability {}.{} or newer, this GPU has {}.{}".format(
            *OLDEST, *found
        )
    return known_bad.reason(triton.__version__, found)


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
    from stat_kernels.backends.triton.forward_kernel import attend
    from stat_kernels.backends.triton.launch import Call

    b, t, nq, h, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((b, t, h, nq), dtype=torch.float32, device=q.device)
    if q.numel() > 0:
        attend(Call((q, k_cur, v_cur, k_short, v_short, k_long, v_long), reach, scale), out, lse)
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

    Written to ``grads`` where these are given; see ``gradients_to_fill``.
    """
    from stat_kernels.backends.triton.key_gradients import key_gradients
    from stat_kernels.backends.triton.launch import Call
    from stat_kernels.backends.triton.query_gradient import query_gradient

    inputs = (q, k_cur, v_cur, k_short, v_short, k_long, v_long)
    grads = gradients_to_fill(inputs, grads)
    if q.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    call = Call(inputs, reach, scale, grad_out, grads)
    statistics = query_gradient(call, out.contiguous(), lse.contiguous(), grad_lse)
    key_gradients(call, statistics)
    return grads


def pool_unsupported_reason(
    device: str, dtype: torch.dtype, head_dim: int, kernel: tuple[int, int, int], stride: int
) -> str | None:
    """Why the pooling kernels cannot take such a call, or None."""
    if any(size > largest for size, largest in zip(kernel, POOL_KERNEL, strict=True)):
        return f"it pools with kernels up to {POOL_KERNEL}, not {tuple(kernel)}"
    if stride not in POOL_STRIDES:
        return f"it pools with strides from 1 to {POOL_STRIDES[-1]}, not {stride}"
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
    from stat_kernels.backends.triton.pool_call import PoolCall, pack_parameters
    from stat_kernels.backends.triton.pool_forward_kernel import pool

    pooled, stats = empty_pooled(tokens, grid, stride, short_stride, long)
    if tokens.numel() > 0:
        kernel = tuple(weights[0].shape[2:])
        call = PoolCall(tokens, kernel, grid, stride, short_stride, class_token, long)
        pool(call, pack_parameters(weights, norm_weights, norm_biases), eps, pooled, stats)
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
    from stat_kernels.backends.triton.pool_call import PoolCall, pack_parameters
    from stat_kernels.backends.triton.pool_gradients import pool_gradients

    grad_params = empty_grad_params(tokens, weights)
    if tokens.numel() == 0:
        return grad_params.zero_()
    kernel = tuple(weights[0].shape[2:])
    call = PoolCall(tokens, kernel, grid, stride, short_stride, class_token, long, grad_tokens)
    parameters = pack_parameters(weights, norm_weights)
    pool_gradients(call, parameters, grad_pooled, stats, grad_params)
    return grad_params


def bias_gelu_forward(x: Tensor, bias: Tensor) -> Tensor:
    """As ``stat_kernels.backends`` describes it; so the next three."""
    from stat_kernels.backends.triton import mlp_kernels

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() > 0:
        mlp_kernels.bias_gelu(x, bias.detach(), out)
    return out


def bias_gelu_backward(grad_out: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    from stat_kernels.backends.triton import mlp_kernels

    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return grad_x, torch.zeros(bias.shape, dtype=torch.float32, device=x.device)
    return grad_x, mlp_kernels.bias_gelu_gradient(grad_out, x, bias.detach(), grad_x)


def bias_residual_forward(skip: Tensor, x: Tensor, bias: Tensor, scale: Tensor | None) -> Tensor:
    from stat_kernels.backends.triton import mlp_kernels

    out = torch.empty(skip.shape, dtype=skip.dtype, device=x.device)
    if x.numel() > 0:
        mlp_kernels.bias_residual(skip, x, bias.detach(), scale, out)
    return out


def bias_residual_backward(
    grad_out: Tensor, scale: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    from stat_kernels.backends.triton import mlp_kernels

    grad_x, grad_bias = empty_mlp_gradients(grad_out, scale, dtype)
    if grad_out.numel() == 0:
        return grad_x, grad_bias.zero_()
    return grad_x, mlp_kernels.bias_residual_gradient(grad_out, scale, grad_x)

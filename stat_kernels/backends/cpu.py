"""The CPU backend: allocates outputs and calls the fused C++ kernel of the native library."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stat_kernels import native
from stat_kernels.backends import Reach, gradients_to_fill

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
    out: Tensor,
    lse: Tensor,
    reach: Reach,
    scale: float,
    grads: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """The seven gradients in the order of the inputs; a missing input's is without elements.

    Written to ``grads`` where these are given; see ``gradients_to_fill``.
    """
    isa = native.instruction_set()
    inputs = (q, k_cur, v_cur, k_short, v_short, k_long, v_long)
    grads = gradients_to_fill(inputs, grads)
    torch.ops.stat_kernels.cpu_backward(
        grad_out, grad_lse, *inputs, out, lse, *reach, scale, isa, *grads
    )
    return grads

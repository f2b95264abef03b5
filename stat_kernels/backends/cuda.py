"""The CUDA C++ backend: NVIDIA GPUs from Ampere on, compiled ahead, native at head dim 96."""

import functools
import operator
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from stat_kernels import native
from stat_kernels.backends import Reach, gradients_to_fill

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 96, 128)
OLDEST = (8, 0)  # compute capability: mma.sync on bfloat16 and asynchronous copies
VECTOR_BYTES = 16  # of one asynchronous copy
VECTOR = VECTOR_BYTES // 2  # elements in it


def unsupported_reason(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernels cannot take such a call, or None."""
    if device != "cuda":
        return f"it takes CUDA tensors, these are on {device}"
    if dtype not in DTYPES:
        return f"it takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if head_dim not in HEAD_DIMS:
        return f"it takes head dims 64, 96 and 128, not {head_dim}"
    return native.cuda_problem() or _device_problem()


def _device_problem() -> str | None:
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    if not torch.cuda.is_available():
        return "no NVIDIA driver with a GPU was found"
    found = torch.cuda.get_device_capability()
    if found < OLDEST:
        return "it needs compute capability {}.{} or newer, this GPU has {}.{}".format(
            *OLDEST, *found
        )
    built = native.cuda_architectures()
    if not runs_on(built, found):
        return (
            f"it was compiled for {built}, which does not run on this GPU of compute capability "
            f"{found[0]}.{found[1]}; build it with TORCH_CUDA_ARCH_LIST={found[0]}.{found[1]}"
        )
    return None


@functools.cache
def runs_on(built: str, found: tuple[int, int]) -> bool:
    """Whether code compiled for ``built`` ("8.0 9.0a 10.0+PTX") runs on a GPU.

    Machine code runs on later GPUs of the same generation, that of "9.0a" on exactly that GPU, and
    a driver compiles PTX for every later one.
    """
    for word in built.split():
        major, minor, suffix, ptx = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word).groups()
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

    The kernels copy 16 bytes at a time: a tensor whose address or strides are no whole multiples of
    that (a slice of an odd number of channels, for instance) is copied to a contiguous one first.
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
    strides must be multiples of 16 bytes. Inputs of which that is not true are copied, as
    :func:`forward` does; lse is made contiguous.
    """
    native.load()
    inputs = (q, k_cur, v_cur, k_short, v_short, k_long, v_long)
    grads = gradients_to_fill(inputs, grads)
    if q.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    grad_out, out, *inputs = aligned(grad_out, out, *inputs)
    size = torch.ops.stat_kernels.cuda_workspace(*inputs, *reach)
    workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
    torch.ops.stat_kernels.cuda_backward(
        grad_out, grad_lse, *inputs, out, lse.contiguous(), *reach, scale, workspace, *grads
    )  # fmt: skip
    return grads


def aligned(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Each tensor as it is, or a contiguous copy where address or strides are no whole vectors.

    Copies also where an axis of one element has an odd stride: nothing is read with it, but the
    library refuses it, and such tensors are rare.
    """
    return tuple(x if x is None or _whole_vectors(x) else _copy(x) for x in tensors)


def _whole_vectors(x: Tensor) -> bool:
    *strides, last = x.stride()
    bits = functools.reduce(operator.or_, strides)  # one test for all: the unit is a power of two
    return last == 1 and bits % VECTOR == 0 and x.data_ptr() % VECTOR_BYTES == 0


def _copy(x: Tensor) -> Tensor:
    """Fresh memory: ``contiguous`` returns a misaligned but contiguous tensor as it is."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)

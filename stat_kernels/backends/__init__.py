"""The fast backends, best first; on a GPU ``dispatch.GPU_PREFERENCES`` ranks the two there.

Each module is imported when first asked for, never earlier.

A backend is a module with three functions over contiguous-last-axis tensors:

    unsupported_reason(device, dtype, head_dim) -> str | None
    forward(q, k_cur, v_cur, k_short, v_short, k_long, v_long, window, scale) -> (out, lse)
    backward(grad_out, grad_lse, q, ..., v_long, out, lse, window, scale) -> seven gradients

Backends never import one another, nor the reference.
"""

import importlib
from types import ModuleType

from torch import Tensor

NAMES = ("cpu", "cuda", "triton")


def load(name: str) -> ModuleType:
    """The module of the backend ``name``, one of NAMES."""
    return importlib.import_module(f"stat_kernels.backends.{name}")


def empty_gradients(*inputs: Tensor | None) -> tuple[Tensor, ...]:
    """One fresh contiguous tensor per input, q first.

    An operator cannot return None, so a missing input's gradient is a tensor without elements.
    """
    q = inputs[0]
    return tuple(q.new_empty((0,) if x is None else x.shape) for x in inputs)

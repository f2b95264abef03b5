"""What lies between the products of an MLP: bias and GELU, bias and residual, each in one pass.

A linear layer's bias costs a pass of its own in PyTorch's backward, which reads the whole gradient
again for its column sums, and on CPUs another one in the forward pass, which copies the bias to
every row before the product. Here the product has no bias, and the bias is added where its result
is read anyway.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stat_kernels import dispatch, mlp_ops, products
from stat_kernels.checks import check_bias, check_residual
from stat_kernels.functional import cast_for_autocast
from stat_kernels.reference import bias_gelu_reference, bias_residual_reference


def bias_gelu(x: Tensor, bias: Tensor, *, backend: str | None = None) -> Tensor:
    """``gelu(x + bias)`` with the exact GELU; backward gives both gradients in one pass.

    Args:
        x: (..., C), of a product without bias.
        bias: (C,), in any floating dtype.
        backend: None for the best usable one, or a name to insist on. With None PyTorch's own
            operations are used under torch.compile, which fuses them itself, and in a graph that
            torch.export or torch.jit.trace makes for a GPU: the kernels there are Triton's, which a
            program without Python cannot run.

    Sums are in float32 (float64 for float64). Under autocast x is cast to the autocast dtype.

    Returns:
        (..., C) in the dtype of x.

    Raises:
        TypeError, ValueError: an argument is off; the message names it.
        RuntimeError: the backend insisted on cannot take the call; the message says why.
    """
    (x,) = cast_for_autocast((x,))
    check_bias(x, bias)
    name = _choose(backend, x, x)
    if name == dispatch.REFERENCE:
        return bias_gelu_reference(x, bias)
    return mlp_ops.bias_gelu_forward(x, bias, name)


def bias_residual(
    skip: Tensor,
    x: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """``skip + scale * (x + bias)``; backward gives the gradients of x and bias in one pass.

    Args:
        skip: (B, ..., C), the residual; it may be float32 beside a 16-bit x, as under autocast.
        x: (B, ..., C), of a product without bias.
        bias: (C,), in any floating dtype.
        scale: (B,), a factor for each clip, as stochastic depth needs it; None for 1. It has no
            gradient.
        backend: as in `bias_gelu`.

    Under autocast x is cast to the autocast dtype, the residual is not.

    Returns:
        (B, ..., C) in the wider dtype of skip and x.

    Raises:
        TypeError, ValueError, RuntimeError: as `bias_gelu`.
    """
    (x,) = cast_for_autocast((x,))
    check_residual(skip, x, bias, scale)
    name = _choose(backend, x, skip)
    if name == dispatch.REFERENCE:
        return bias_residual_reference(skip, x, bias, scale)
    return mlp_ops.bias_residual_forward(skip, x, bias, scale, name)


def explain_mlp(x: Tensor, skip: Tensor | None = None) -> str:
    """One line a backend: usable for `bias_gelu` of x, or for `bias_residual`, or why not.

    Args:
        x, skip: as in `bias_residual`; skip is None for `bias_gelu`. Graphs that torch.compile,
            torch.export or torch.jit.trace makes may choose otherwise, see there.
    """
    (x,) = cast_for_autocast((x,))
    return dispatch.mlp_report(str(x.device), x.dtype, x.dtype if skip is None else skip.dtype)


def linear_gelu(linear: nn.Linear, x: Tensor, *, backend: str | None = None) -> Tensor:
    """``gelu(linear(x))`` by `bias_gelu`.

    A linear layer that is more than its weight and bias (a subclass, one with hooks) is called as
    it is, and "reference" calls it, too.
    """
    if backend == dispatch.REFERENCE or linear.bias is None or not products.is_plain(linear):
        return F.gelu(linear(x))
    return bias_gelu(products.linear(x, linear.weight), linear.bias, backend=backend)


def linear_residual(
    linear: nn.Linear,
    x: Tensor,
    skip: Tensor,
    scale: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """``skip + scale * linear(x)`` by `bias_residual`; which layers are called as they are, see
    `linear_gelu`.
    """
    if backend == dispatch.REFERENCE or linear.bias is None or not products.is_plain(linear):
        branch = linear(x)
        if scale is not None:
            branch = branch * scale.to(branch.dtype).view(-1, *[1] * (branch.dim() - 1))
        return skip + branch
    x = products.linear(x, linear.weight)
    return bias_residual(skip, x, linear.bias, scale, backend=backend)


def _choose(backend: str | None, x: Tensor, skip: Tensor) -> str:
    if backend is None:
        saved = dispatch.traces_to_save()
        if torch.compiler.is_compiling() and not saved:
            return dispatch.REFERENCE
        if saved and x.device.type != "cpu":
            return dispatch.REFERENCE
    return dispatch.choose_mlp(backend, str(x.device), x.dtype, skip.dtype)

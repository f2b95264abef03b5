"""Matrix products of linear layers, by the faster of PyTorch's two libraries.

PyTorch multiplies float32 matrices on x86 CPUs with MKL, which uses AVX2 on AMD processors, where
oneDNN uses AVX-512: 2.2 times as fast on a Zen 5. PyTorch gives oneDNN convolutions, so there a
linear layer is computed as a convolution with a kernel of one pixel. Its bits are the same on every
run, but depend on the number of threads; ``torch.use_deterministic_algorithms(True)`` restores MKL.
"""

import functools
from pathlib import Path
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, to rounding: x (..., K), weight (N, K) -> (..., N)."""
    if not _better_convolved(x, weight):
        return F.linear(x, weight, bias)
    pixels = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, K, 1, rows), channels last
    y = F.conv2d(
        pixels, weight.reshape(*weight.shape, 1, 1), None if bias is None else bias.detach()
    )
    y = y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)
    return y if bias is None else _BiasGradient.apply(y, bias)


class _BiasGradient(torch.autograd.Function):
    """y, to which a bias was added, unchanged. oneDNN's own gradient of a bias adds up rows one by
    one, which over 25,000 rows is 17 times less accurate than PyTorch's sum.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, bias: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.flatten(0, -2).sum(0)


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling it is no more than `linear` on its weight and bias: no subclass, no hooks."""
    hooks = [module._forward_hooks, module._forward_pre_hooks]
    hooks += [module._backward_hooks, module._backward_pre_hooks]
    return type(module) is nn.Linear and not any(hooks)


def apply_linear(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``, by `linear` where it is a plain linear layer."""
    return linear(x, module.weight, module.bias) if is_plain(module) else module(x)


def _better_convolved(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        # no subclass: DTensor, FakeTensor and others have rules of their own
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        # oneDNN's bits depend on the number of threads, MKL's do not
        and not torch.are_deterministic_algorithms_enabled()
        and mkl_is_slow()
        and _in_full_precision()
    )


def _in_full_precision() -> bool:
    """Where less is asked for, products and convolutions have settings of their own."""
    mkldnn: Any = torch.backends.mkldnn
    return {mkldnn.matmul.fp32_precision, mkldnn.conv.fp32_precision} <= {"none", "ieee"}


@functools.cache
def mkl_is_slow() -> bool:
    """Whether MKL multiplies float32 matrices on this CPU and leaves AVX-512 unused."""
    cpu = Path("/proc/cpuinfo")
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and cpu.is_file()
        and "AuthenticAMD" in cpu.read_text(encoding="utf-8", errors="replace")
    )

"""Calls of bias_gelu and bias_residual, and how far a backend's results are from the oracle's."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stat_kernels import bias_gelu, bias_residual
from stat_kernels.testing import Result, tolerance_errors

NAMES = ("x", "bias", "skip", "scale")


@dataclass(frozen=True)
class MlpCase:
    """A call: of bias_residual where there is a skip, else of bias_gelu.

    Attributes:
        shape: of x.
        skip: dtype of the residual, "same" as x or "float32"; None for GELU.
        scaled: whether each clip has a factor; the first one's is 0.
        bias_dtype: float64 for float64, else this.
        spread: standard deviation of x; GELU's tails are reached with large ones.
    """

    shape: tuple[int, ...]
    skip: str | None = None
    scaled: bool = False
    bias_dtype: torch.dtype = torch.float32
    spread: float = 1.0

    def __str__(self) -> str:
        skip = "gelu" if self.skip is None else f"{self.skip}{' scaled' if self.scaled else ''}"
        return f"{'x'.join(map(str, self.shape))} {skip}"


CASES = (
    MlpCase((3, 5, 96)),
    MlpCase((2, 131, 13), spread=4.0),
    MlpCase((1, 1)),
    MlpCase((700, 40), bias_dtype=torch.bfloat16),
    MlpCase((3, 5, 96), "same"),
    MlpCase((3, 43, 13), "same", scaled=True),
    MlpCase((2, 7, 200), "float32", bias_dtype=torch.bfloat16),
    MlpCase((4, 2, 3, 24), "float32", scaled=True),
    MlpCase((600, 17), "same"),
)


def make_mlp_inputs(
    case: MlpCase, dtype: torch.dtype, seed: int = 0, device: str = "cpu"
) -> tuple[list, Tensor]:
    """x, bias, skip and scale (None where there is none), and the incoming gradient."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    bias_dtype = dtype if dtype == torch.float64 else case.bias_dtype
    out_dtype = torch.float32 if case.skip == "float32" and dtype.itemsize == 2 else dtype
    x = (case.spread * draw(*case.shape)).to(dtype)
    bias = draw(case.shape[-1]).to(bias_dtype)
    skip = None if case.skip is None else draw(*case.shape).to(out_dtype)
    clips = torch.arange(case.shape[0], device=device)
    scale = 1.25 * (clips > 0) if case.scaled else None
    return [x, bias, skip, scale], draw(*case.shape).to(out_dtype)


def run_mlp(inputs: list, grad_out: Tensor, backend: str | None) -> Result:
    """The result and the gradients of x, bias and skip."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in inputs[:3]]
    x, bias, skip = leaves
    if skip is None:
        out = bias_gelu(x, bias, backend=backend)
    else:
        out = bias_residual(skip, x, bias, inputs[3], backend=backend)
    present = {f"grad_{n}": t for n, t in zip(NAMES, leaves, strict=False) if t is not None}
    grads = torch.autograd.grad(out, list(present.values()), grad_out)
    return Result({"out": out.detach(), **dict(zip(present, grads, strict=True))})


def mlp_error_report(
    case: MlpCase, dtype: torch.dtype, backend: str, device: str = "cpu"
) -> list[str]:
    """How a backend breaks the contract's tolerances; empty where it keeps them."""

    def references(seed: int) -> tuple[Result, Result]:
        inputs, grad_out = make_mlp_inputs(case, dtype, seed, device)
        double = [t if t is None else t.double() for t in inputs]
        exact = run_mlp(double, grad_out.double(), "reference")
        return exact, run_mlp(inputs, grad_out, "reference")

    exact, same_dtype = references(0)
    result = run_mlp(*make_mlp_inputs(case, dtype, device=device), backend)
    for name, value in result.tensors.items():
        assert value.dtype == same_dtype.tensors[name].dtype, name
    found = tolerance_errors(result, exact, same_dtype)
    draws = [references(seed) for seed in (1, 2, 3)] if found else []
    return found and tolerance_errors(result, exact, same_dtype, draws)

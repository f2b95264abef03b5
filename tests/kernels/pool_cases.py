"""Calls of the pooling operator, held against the reference in float64."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stat_kernels import backends, pool_tokens
from stat_kernels.pool_layout import PoolLayout, pool_layout
from stat_kernels.testing import Result, tolerance_errors

EPS = 1e-6
PARAMETERS = ("weight", "norm_weight", "norm_bias")


@dataclass(frozen=True)
class PoolCase:
    """Sizes of one call; ``packed`` makes the tensors the last slots of a projection of P + 1."""

    P: int = 2
    B: int = 1
    T: int = 2
    H: int = 1
    D: int = 96
    grid: tuple[int, int] = (5, 4)
    kernel: tuple[int, int, int] = (1, 3, 3)
    stride: int = 2
    short_stride: int | None = 2
    class_token: bool = True
    long: str = "class"
    packed: bool = True

    def __str__(self) -> str:
        grid, kernel = "x".join(map(str, self.grid)), "x".join(map(str, self.kernel))
        return (
            f"P{self.P}-B{self.B}-T{self.T}-H{self.H}-D{self.D}-grid{grid}-kernel{kernel}"
            f"-stride{self.stride}-short{self.short_stride}-{self.long}"
            f"{'' if self.class_token else '-no class token'}{'-packed' if self.packed else ''}"
        )

    @property
    def options(self) -> tuple:
        return self.grid, self.stride, self.short_stride, self.class_token, self.long

    @property
    def layout(self) -> PoolLayout:
        return pool_layout(self.grid, self.stride, self.short_stride, self.long)


@dataclass(frozen=True)
class PoolInputs:
    """A call's tokens, parameters (P of each) and incoming gradient."""

    tokens: Tensor
    weights: list[Tensor]
    norm_weights: list[Tensor]
    norm_biases: list[Tensor]
    grad_pooled: Tensor

    @property
    def parameters(self) -> list[list[Tensor]]:
        return [self.weights, self.norm_weights, self.norm_biases]

    def double(self) -> "PoolInputs":
        lists = [[x.double() for x in found] for found in self.parameters]
        return PoolInputs(self.tokens.double(), *lists, self.grad_pooled.double())


def make_pool_inputs(
    case: PoolCase,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    seed: int = 0,
    parameter_dtype: torch.dtype = torch.float32,
) -> PoolInputs:
    """Normal tokens, and parameters that leave the results' deviation near 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    n = case.class_token + case.grid[0] * case.grid[1]
    tokens = draw(case.B, case.T, n, case.P + case.packed, case.H, case.D).to(dtype)
    parameters = (
        [draw(case.D, 1, *case.kernel) / math.prod(case.kernel) ** 0.5 for _ in range(case.P)],
        [1 + draw(case.D) / 4 for _ in range(case.P)],
        [draw(case.D) / 4 for _ in range(case.P)],
    )
    grad = draw(case.P, case.B, case.T, case.layout.rows, case.H, case.D).to(dtype)
    return PoolInputs(
        tokens.movedim(3, 0)[case.packed :],
        *([x.to(parameter_dtype) for x in found] for found in parameters),
        grad,
    )


def run_pool(case: PoolCase, inputs: PoolInputs, backend: str, backward: bool = True) -> Result:
    """pooled as "out", and all gradients where asked for."""
    tokens = inputs.tokens.detach().requires_grad_(backward)
    lists = [[x.detach().requires_grad_(backward) for x in found] for found in inputs.parameters]
    run = _reference if backend == "reference" else _kernel
    pooled = run(case, tokens, *lists, backend)
    found = {"out": pooled.detach()}
    if backward:
        leaves = {"grad_tokens": tokens}
        for name, tensors in zip(PARAMETERS, lists, strict=True):
            leaves |= {f"grad_{name}_{p}": x for p, x in enumerate(tensors)}
        grads = torch.autograd.grad(pooled, list(leaves.values()), inputs.grad_pooled)
        found |= dict(zip(leaves, grads, strict=True))
    return Result(found)


class _Kernels(torch.autograd.Function):
    """A backend's two functions for all P tensors at once, as the layer's core calls them."""

    @staticmethod
    def forward(ctx, case, backend, tokens, *parameters):
        ctx.case, ctx.backend = case, backends.load(backend)
        lists = [list(parameters[i * case.P : (i + 1) * case.P]) for i in range(3)]
        pooled, stats = ctx.backend.pool_forward(tokens, *lists, *case.options, EPS)
        ctx.save_for_backward(tokens, stats, *parameters)
        ctx.mark_non_differentiable(stats)
        return pooled, stats

    @staticmethod
    def backward(ctx, grad_pooled, _):
        tokens, stats, *parameters = ctx.saved_tensors
        p = ctx.case.P
        weights, norm_weights = parameters[:p], parameters[p : 2 * p]
        packed = tokens.new_full((p + 1, *tokens.shape[1:]), float("nan"))
        if ctx.case.packed:  # slots of one packed gradient
            packed = packed.movedim(0, 3).contiguous().movedim(3, 0)
        else:  # the heads of a token lie apart
            packed = packed.transpose(3, 4).contiguous().transpose(3, 4)
        grad_params = ctx.backend.pool_backward(
            grad_pooled.contiguous(), tokens, weights, norm_weights, stats,
            *ctx.case.options, packed[1:],
        )  # fmt: skip
        assert packed[0].isnan().all(), "the gradient wrote into another slot"
        d = tokens.shape[-1]
        sizes = (weights[0].numel(), d, d)
        parts = list(zip(*(row.split(sizes) for row in grad_params), strict=True))
        grads = [g.view(weights[0].shape) for g in parts[0]] + [*parts[1], *parts[2]]
        return None, None, packed[1:], *grads


def _kernel(case, tokens, weights, norm_weights, norm_biases, backend):
    pooled, _ = _Kernels.apply(case, backend, tokens, *weights, *norm_weights, *norm_biases)
    return pooled


def _reference(case, tokens, weights, norm_weights, norm_biases, backend):
    """The reference's results in the operator's layout."""
    grid, stride, short_stride, class_token, long = case.options
    pooled = []
    for x, weight, *norm in zip(tokens, weights, norm_weights, norm_biases, strict=True):
        current, short, of_frame = pool_tokens(
            x, weight, *norm, grid=grid, stride=stride, short_stride=short_stride,
            class_token=class_token, long=long, eps=EPS, backend=backend,
        )  # fmt: skip
        rows = [of_frame if of_frame is None else of_frame.unsqueeze(2), current, short]
        pooled.append(torch.cat([r for r in rows if r is not None], dim=2))
    return torch.stack(pooled)


def pool_error_report(
    case: PoolCase,
    dtype: torch.dtype,
    backend: str,
    device: str = "cpu",
    parameter_dtype: torch.dtype = torch.float32,
) -> list[str]:
    """How a backend breaks the contract's tolerances; empty where it keeps them."""

    def references(seed: int) -> tuple[PoolInputs, Result, Result]:
        inputs = make_pool_inputs(case, dtype, device, seed, parameter_dtype)
        exact = run_pool(case, inputs.double(), "reference")
        return inputs, exact, run_pool(case, inputs, "reference")

    inputs, exact, same_dtype = references(0)
    result = run_pool(case, inputs, backend)
    found = tolerance_errors(result, exact, same_dtype)
    # A maximum is one element among many: on one draw the reference may have no bad one.
    return found and tolerance_errors(
        result, exact, same_dtype, [references(seed)[1:] for seed in (1, 2, 3)]
    )

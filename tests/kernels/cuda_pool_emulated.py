"""The CUDA pooling kernels on the emulator, behind the CUDA backend's own Python half.

    python -m tests.kernels.cuda_pool_emulated [HEADER TEXT OTHER_TEXT]

runs forward and backward with a page that must not be touched behind every tensor that a kernel
sees; of kernels whose HEADER has OTHER_TEXT instead of TEXT, where these are given.
"""

import ctypes
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from stat_kernels import backends, native, pool_tokens
from stat_kernels.backends import cuda
from stat_kernels.pool_layout import pool_layout
from stat_kernels.pool_ops import pool_forward
from stat_kernels.reference import _depthwise_convolution
from stat_kernels.testing import Result, guarded, tolerance_errors
from tests.kernels.cuda_emulated import DTYPES, planted
from tests.kernels.cuda_emulator.build import CSRC, Emulated, EmulatorError, build

LONG_MODES = {"none": 0, "class": 1, "mean": 2}  # enum StaLong
UNITS = ("pool", "errors")
MOST_TENSORS = 4  # STA_POOL_MAX


class StaPoolTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((f"stride_{axis}", ctypes.c_int64) for axis in "pbtnh"),
    ]

    @classmethod
    def of(cls, x: Tensor) -> "StaPoolTensor":
        return cls(x.data_ptr(), *x.stride()[:-1])


class StaPoolParams(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in "PBTHD"),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("grid_h", "grid_w", "out_h", "out_w", "short_h", "short_w"),
                *("kt", "kh", "kw", "stride", "short_stride"),
            )
        ),
        ("class_token", ctypes.c_int32),
        ("long_rows", ctypes.c_int32),
        ("eps", ctypes.c_double),
        ("dtype", ctypes.c_int32),
        ("tokens", StaPoolTensor),
        *(
            (name, ctypes.c_void_p * MOST_TENSORS)
            for name in ("weight", "norm_weight", "norm_bias")
        ),
        ("pooled", ctypes.c_void_p),
        ("grad_pooled", ctypes.c_void_p),
        ("stats", ctypes.c_void_p),
        ("grad_tokens", StaPoolTensor),
        ("grad_params", ctypes.c_void_p),
    ]


def params(tokens: Tensor, sizes: list[int], class_token: bool, long: str, **others):
    """The struct of a call; ``others`` are its further fields, as tensors, lists of them or numbers."""
    p_, b, t, _, h, d = tokens.shape
    *grid, kt, kh, kw, stride, short_stride = sizes
    layout = pool_layout(grid, stride, short_stride or None, long)
    p = StaPoolParams(
        p_, b, t, h, d, *grid, *layout.grid, *layout.short_grid, kt, kh, kw, stride, short_stride,
        class_token, LONG_MODES[long], dtype=DTYPES.get(tokens.dtype, 0),
        tokens=StaPoolTensor.of(tokens),
    )  # fmt: skip
    for name, value in others.items():
        if isinstance(value, list):
            value = (ctypes.c_void_p * MOST_TENSORS)(*(x.data_ptr() for x in value))
        elif isinstance(value, Tensor):
            value = StaPoolTensor.of(value) if name == "grad_tokens" else value.data_ptr()
        setattr(p, name, value)
    return p


class PoolKernels:
    """csrc/cuda/pool.cu on the emulator, in the place of the library's CUDA operators.

    Attributes:
        emulated: the library; its settings decide how the next calls run.
        place: where a tensor lies that a kernel sees, and to where results are copied back from.
    """

    def __init__(self, replaced: Mapping[str, str] | None = None) -> None:
        units = [CSRC / "cuda" / f"{unit}.cu" for unit in UNITS]
        self.emulated: Emulated = build(units, replaced=replaced, replaced_in=("pool",))
        self.library = self.emulated.library
        self.library.sta_cuda_error_string.restype = ctypes.c_char_p
        self.place = lambda x: x

    @contextmanager
    def registered(self) -> Iterator["PoolKernels"]:
        """As the operators of the backend "cuda", for tensors on the CPU."""
        native.load()
        operators = torch.library.Library("stat_kernels", "IMPL")
        operators.impl("cuda_pool_forward", self._forward, "CPU")
        operators.impl("cuda_pool_workspace", self._workspace, "CPU")
        operators.impl("cuda_pool_backward", self._backward, "CPU")
        try:
            with mock.patch.object(cuda, "pool_unsupported_reason", lambda *_: None):
                yield self
        finally:
            operators._destroy()

    def check(self, code: int) -> None:
        if code != 0:
            raise EmulatorError(self.library.sta_cuda_error_string(code).decode())

    def _forward(self, tokens, weights, norms, biases, sizes, class_token, long, eps, *results):
        parameters = dict(zip(("weight", "norm_weight", "norm_bias"), (weights, norms, biases)))
        placed = {name: [self.place(x) for x in found] for name, found in parameters.items()}
        pooled, stats = map(self.place, results)
        p = params(
            self.place(tokens), sizes, class_token, long,
            eps=eps, pooled=pooled, stats=stats, **placed,
        )  # fmt: skip
        self.check(self.library.sta_cuda_pool_forward(ctypes.byref(p), None))
        for result, found in zip(results, (pooled, stats), strict=True):
            result.copy_(found)

    def _workspace(self, tokens, sizes, class_token, long) -> int:
        size = ctypes.c_int64()
        p = params(tokens, sizes, class_token, long)
        self.check(self.library.sta_cuda_pool_workspace_bytes(ctypes.byref(p), ctypes.byref(size)))
        assert size.value % 16 == 0  # or a guard page would not follow at once
        return size.value

    def _backward(
        self, grad_pooled, tokens, weights, norms, stats, sizes, class_token, long, workspace,
        *results,
    ):  # fmt: skip
        grad_tokens, grad_params = map(self.place, results)
        workspace = self.place(workspace.view(torch.float32).fill_(float("nan")))
        p = params(
            self.place(tokens), sizes, class_token, long,
            weight=[self.place(x) for x in weights], norm_weight=[self.place(x) for x in norms],
            grad_pooled=self.place(grad_pooled), stats=self.place(stats),
            grad_tokens=grad_tokens, grad_params=grad_params,
        )  # fmt: skip
        address = ctypes.c_void_p(workspace.data_ptr())
        self.check(self.library.sta_cuda_pool_backward(ctypes.byref(p), address, None))
        for result, found in zip(results, (grad_tokens, grad_params), strict=True):
            result.copy_(found)


@dataclass(frozen=True)
class PoolCase:
    """One call, of ``slots[1:]`` of a packed projection where there are more slots than tensors."""

    P: int = 2
    B: int = 1
    T: int = 2
    H: int = 2
    D: int = 96
    grid: tuple[int, int] = (5, 4)
    kernel: tuple[int, int, int] = (1, 3, 3)
    stride: int = 2
    short_stride: int | None = 2
    class_token: bool = True
    long: str = "class"
    packed: bool = True
    params_dtype: torch.dtype = torch.float32

    @property
    def options(self) -> tuple:
        return self.grid, self.stride, self.short_stride, self.class_token, self.long


@dataclass(frozen=True)
class PoolInputs:
    """Leaves and the incoming gradient of a call."""

    tokens: Tensor
    weights: list[Tensor]
    norm_weights: list[Tensor]
    norm_biases: list[Tensor]
    grad_pooled: Tensor

    def cast(self, dtype: torch.dtype) -> "PoolInputs":
        lists = ([x.to(dtype) for x in found] for found in self.parameters)
        return PoolInputs(self.tokens.to(dtype), *lists, self.grad_pooled.to(dtype))

    @property
    def parameters(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return self.weights, self.norm_weights, self.norm_biases


def make_pool_inputs(case: PoolCase, dtype: torch.dtype, device="cpu", seed=0) -> PoolInputs:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    n, rows = (
        case.class_token + case.grid[0] * case.grid[1],
        pool_layout(case.grid, case.stride, case.short_stride, case.long).rows,
    )
    slots = case.P + case.packed
    tokens = draw(case.B, case.T, n, slots, case.H, case.D).to(device, dtype)
    scale = case.kernel[0] * case.kernel[1] * case.kernel[2]

    def each(make) -> list[Tensor]:
        return [make().to(device, case.params_dtype) for _ in range(case.P)]

    return PoolInputs(
        tokens.movedim(3, 0)[case.packed :],
        each(lambda: draw(case.D, 1, *case.kernel) / scale**0.5),
        each(lambda: 1 + draw(case.D) / 4),
        each(lambda: draw(case.D) / 4),
        draw(case.P, case.B, case.T, rows, case.H, case.D).to(device, dtype),
    )


EPS = 1e-6


def run_pool(case: PoolCase, inputs: PoolInputs, backend: str) -> Result:
    """pooled, statistics and all gradients, through the operator or the reference."""
    tokens = inputs.tokens.detach().requires_grad_()
    lists = [[x.detach().requires_grad_() for x in found] for found in inputs.parameters]
    if backend == "reference":
        pooled, stats = _reference(case, tokens, *lists)
    else:
        pooled, stats = pool_forward(tokens, *lists, *case.options, EPS, backend)
    grads = torch.autograd.grad(pooled, [tokens, *sum(lists, [])], inputs.grad_pooled)
    names = [f"grad_{k}_{p}" for k in ("weight", "norm_weight", "norm_bias") for p in range(case.P)]
    found = {"out": pooled.detach(), "mean": stats[0], "rstd": stats[1]}
    return Result(found | dict(zip(["grad_tokens", *names], grads, strict=True)))


def _reference(case: PoolCase, tokens: Tensor, weights, norm_weights, norm_biases):
    """The reference's results in a backend's buffer, and the statistics of what it normalises."""
    buffers, stats = [], []
    grid, stride, short_stride, class_token, long = case.options
    for x, weight, norm_weight, norm_bias in zip(
        tokens, weights, norm_weights, norm_biases, strict=True
    ):
        current, short, of_clip = pool_tokens(
            x, weight, norm_weight, norm_bias, grid=grid, stride=stride, short_stride=short_stride,
            class_token=class_token, long=long, eps=EPS, backend="reference",
        )  # fmt: skip
        parts = [None if of_clip is None else of_clip.unsqueeze(2), current, short]
        buffers.append(torch.cat([part for part in parts if part is not None], dim=2))
        # Without its affine part and with a mean of zero a norm is (y - mean) * rstd.
        dtype = torch.promote_types(x.dtype, torch.float32)
        video = x.detach().to(dtype)[:, :, int(class_token) :].unflatten(2, grid)
        y = _depthwise_convolution(video, weight.detach().to(dtype), stride).flatten(2, 3)
        if long == "class":
            y = torch.cat([x.detach().to(dtype)[:, :, :1], y], dim=2)
        variance = y.var(-1, correction=0)
        stats.append(torch.stack([y.mean(-1), (variance + EPS).rsqrt()]))
    return torch.stack(buffers), torch.stack(stats, dim=1)


def pool_error_report(
    case: PoolCase, dtype: torch.dtype, backend="cuda", device="cpu"
) -> list[str]:
    """How a backend breaks the contract's tolerances; empty where it keeps them."""

    def pair(seed: int) -> tuple[PoolInputs, Result, Result]:
        inputs = make_pool_inputs(case, dtype, device, seed)
        exact = run_pool(case, inputs.cast(torch.float64), "reference")
        return inputs, exact, run_pool(case, inputs, "reference")

    inputs, exact, same_dtype = pair(0)
    result = run_pool(case, inputs, backend)
    found = tolerance_errors(result, exact, same_dtype)
    # A maximum is one element among many: on one draw the reference may have no bad one.
    return found and tolerance_errors(result, exact, same_dtype, [pair(s)[1:] for s in (1, 2, 3)])

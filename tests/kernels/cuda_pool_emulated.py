"""The CUDA pooling kernels on the emulator, behind the CUDA backend's own Python half.

    python -m tests.kernels.cuda_pool_emulated [HEADER TEXT OTHER_TEXT]

runs forward and backward with a page that must not be touched behind every tensor that a kernel
sees; of kernels whose HEADER has OTHER_TEXT instead of TEXT, where these are given.
"""

import ctypes
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from stat_kernels import native
from stat_kernels.backends import cuda
from stat_kernels.pool_layout import pool_layout
from stat_kernels.testing import guarded
from tests.kernels.cuda_emulated import DTYPES, planted
from tests.kernels.cuda_emulator.build import CSRC, Emulated, EmulatorError, build
from tests.kernels.pool_cases import PARAMETERS, PoolCase, pool_error_report

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
    """The struct of a call; ``others`` are further fields: tensors, lists of them, numbers."""
    p_, b, t, _, h, d = tokens.shape
    *grid, kt, kh, kw, stride, short_stride = sizes
    layout = pool_layout(grid, stride, short_stride or None, long)
    p = StaPoolParams(
        p_, b, t, h, d, *grid, *layout.grid, *layout.short_grid, kt, kh, kw, stride, short_stride,
        class_token, LONG_MODES[long], dtype=DTYPES.get(tokens.dtype, 0),
        tokens=StaPoolTensor.of(tokens),
    )  # fmt: skip
    p.alive = (tokens, others)  # the struct holds addresses only
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
            with mock.patch.object(cuda, "pool_unsupported_reason", return_value=None):
                yield self
        finally:
            operators._destroy()

    def check(self, code: int) -> None:
        if code != 0:
            raise EmulatorError(self.library.sta_cuda_error_string(code).decode())

    def _forward(self, tokens, weights, norms, biases, sizes, class_token, long, eps, *results):
        pooled, stats = map(self.place, results)
        p = params(
            self.place(tokens), sizes, class_token, long, eps=eps, pooled=pooled, stats=stats,
            **self._parameters(weights, norms, biases),
        )  # fmt: skip
        self.check(self.library.sta_cuda_pool_forward(ctypes.byref(p), None))
        for result, found in zip(results, (pooled, stats), strict=True):
            result.copy_(found)

    def _parameters(self, *lists: list[Tensor]) -> dict[str, list[Tensor]]:
        names = PARAMETERS[: len(lists)]
        return {n: [self.place(x) for x in found] for n, found in zip(names, lists, strict=True)}

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
            **self._parameters(weights, norms),
            grad_pooled=self.place(grad_pooled), stats=self.place(stats),
            grad_tokens=grad_tokens, grad_params=grad_params,
        )  # fmt: skip
        address = ctypes.c_void_p(workspace.data_ptr())
        self.check(self.library.sta_cuda_pool_backward(ctypes.byref(p), address, None))
        for result, found in zip(results, (grad_tokens, grad_params), strict=True):
            result.copy_(found)


GUARDED = [
    PoolCase(grid=(7, 7), stride=1),
    PoolCase(D=16, grid=(3, 2), kernel=(3, 3, 3), short_stride=None),
    PoolCase(P=1, D=40, grid=(4, 5), kernel=(1, 5, 1), stride=3, class_token=False, long="mean"),
]


def guard_pages(kernels: PoolKernels) -> None:
    """Forward and backward, every tensor with a guard page behind it."""
    kernels.place = guarded
    for case in GUARDED:
        found = pool_error_report(case, torch.bfloat16, "cuda")
        assert not found, f"{case}: {found}"
        print(case, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with PoolKernels(planted(*sys.argv[1:]) if sys.argv[1:] else None).registered() as registered:
        guard_pages(registered)
    print("reached the end")

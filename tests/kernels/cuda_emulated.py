"""The CUDA kernels on the emulator, as a backend; and the checks that may kill their process.

    python -m tests.kernels.cuda_emulated [HEADER TEXT OTHER_TEXT]

runs forward and backward with a page that must not be touched behind every tensor that a kernel
sees; of kernels whose HEADER has OTHER_TEXT instead of TEXT, where these are given. The tests start
it, and use the rest in their own process.
"""

import ctypes
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from stat_kernels import backends
from stat_kernels.backends.cuda import aligned
from stat_kernels.testing import INPUTS, Case, error_report, guarded, make_inputs
from tests.kernels.cuda_emulator.build import CSRC, Emulated, EmulatorError, build

DTYPES = {torch.float16: 2, torch.bfloat16: 3}  # enum StaDtype
NO_SUCH_KERNEL, UNSUPPORTED, SHARED_MEMORY, TOO_LARGE, UNALIGNED = -1, -2, -3, -4, -5


class StaTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("stride_b", "stride_t", "stride_n", "stride_h")),
    ]

    @classmethod
    def of(cls, x: Tensor | None) -> "StaTensor":
        """Of a (B, T, N, H, D) or (B, L, H, D) tensor, or of none."""
        if x is None or x.numel() == 0:
            return cls()
        strides = list(x.stride())
        if x.dim() == 4:
            strides.insert(1, 0)
        return cls(x.data_ptr(), *strides[:4])


class StaParams(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "T", "Nq", "H", "D", "Nc", "Ns", "L", "S")),
        *((name, ctypes.c_int64) for name in ("frame_offset", "left", "right")),
        ("causal_long", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("scale", ctypes.c_double),
        *((name, StaTensor) for name in (*INPUTS, "out")),
        ("lse", ctypes.c_void_p),
        ("grad_out", StaTensor),
        ("grad_lse", ctypes.c_void_p),
        *((f"grad_{name}", StaTensor) for name in INPUTS),
    ]


def params(
    inputs: tuple[Tensor | None, ...], reach: backends.Reach, scale: float, **others
) -> StaParams:
    """The struct of a call; ``others`` are out, lse, grad_out, grad_lse, grad_q, ..."""
    q, k_cur, _, k_short, _, k_long, _ = inputs
    b, t, nq, h, d = q.shape
    p = StaParams(b, t, nq, h, d, k_cur.shape[2], scale=scale, **reach._asdict())
    p.S = t if k_short is None else k_short.shape[1]
    if k_short is None and reach.causal_long:
        p.S = k_long.shape[1]
    p.Ns = 0 if k_short is None else k_short.shape[2]
    p.L = 0 if k_long is None else k_long.shape[1]
    p.dtype = DTYPES.get(q.dtype, 0)
    for name, value in (*zip(INPUTS, inputs, strict=True), *others.items()):
        if name.endswith("lse"):
            setattr(p, name, None if value is None else value.data_ptr())
        else:
            setattr(p, name, StaTensor.of(value))
    return p


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def poisoned_and_guarded(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    found = poisoned(shape, dtype)
    return guarded(found) if found.numel() > 0 else found


class Kernels:
    """csrc/cuda on the emulator, with a backend's three functions.

    Attributes:
        emulated: the library; its settings decide how the next calls run.
        allocate: makes a result or scratch memory, given a shape and a dtype.
    """

    def __init__(
        self, replaced: Mapping[str, str] | None = None, replaced_in: tuple[str, ...] | None = None
    ) -> None:
        units = sorted((CSRC / "cuda").glob("*.cu"))
        self.emulated: Emulated = build(units, replaced=replaced, replaced_in=replaced_in)
        self.allocate = poisoned
        self.library = self.emulated.library
        self.library.sta_cuda_error_string.restype = ctypes.c_char_p

    @contextmanager
    def registered(self) -> Iterator["Kernels"]:
        """As the backend "cuda" of the public functions."""
        load = backends.load
        names = backends.NAMES if "cuda" in backends.NAMES else (*backends.NAMES, "cuda")
        with (
            mock.patch.object(backends, "NAMES", names),
            mock.patch.object(backends, "load", lambda n: self if n == "cuda" else load(n)),
        ):
            yield self

    def unsupported_reason(self, device: str, dtype: torch.dtype, head_dim: int) -> str | None:
        return None

    def check(self, code: int) -> None:
        if code != 0:
            raise EmulatorError(self.library.sta_cuda_error_string(code).decode())

    def forward(self, *arguments) -> tuple[Tensor, Tensor]:
        """As a backend's ``forward``."""
        *inputs, reach, scale = arguments
        inputs = aligned(*inputs)
        b, t, nq, h, _ = inputs[0].shape
        out = self.allocate(inputs[0].shape, inputs[0].dtype)
        lse = self.allocate((b, t, h, nq), torch.float32)
        p = params(inputs, reach, scale, out=out, lse=lse)
        self.check(self.library.sta_cuda_forward(ctypes.byref(p), None))
        return out, lse

    def backward(self, grad_out, grad_lse, *arguments, grads=None) -> tuple[Tensor, ...]:
        """As a backend's ``backward``."""
        *inputs, out, lse, reach, scale = arguments
        grad_out, out, *inputs = aligned(grad_out, out, *inputs)
        if grads is None:
            grads = [self.allocate((0,) if x is None else x.shape, out.dtype) for x in inputs]
        named = {f"grad_{name}": grad for name, grad in zip(INPUTS, grads, strict=True)}
        p = params(
            inputs, reach, scale, out=out, lse=lse, grad_out=grad_out, grad_lse=grad_lse, **named
        )
        size = ctypes.c_int64()
        self.check(self.library.sta_cuda_workspace_bytes(ctypes.byref(p), ctypes.byref(size)))
        assert size.value % 16 == 0  # or a guard page would not follow at once
        workspace = self.allocate((size.value // 4,), torch.float32)
        address = ctypes.c_void_p(workspace.data_ptr())
        self.check(self.library.sta_cuda_backward(ctypes.byref(p), address, None))
        return tuple(grads)


GUARDED = [
    Case(B=2, T=3, Nq=50, H=2, D=64, Nc=49, Ns=16, L=5, window=3),
    Case(T=2, Nq=1, H=1, D=96, Nc=1, Ns=1, L=1),
    Case(T=2, Nq=17, H=1, D=96, Nc=7, Ns=0, L=0),
    Case(T=3, Nq=33, H=1, D=128, Nc=20, Ns=5, L=2, window=7),
]


def planted(header: str, right: str, wrong: str) -> dict[str, str]:
    """A header of csrc/cuda with a bug in it, to build with; the right text must be there once."""
    name = f"cuda/{header}"
    text = (CSRC / name).read_text()
    assert text.count(right) == 1, f"{header} holds {right!r} {text.count(right)} times"
    return {name: text.replace(right, wrong)}


def guard_pages(kernels: Kernels) -> None:
    """Forward and backward, resident and streamed, every tensor with a guard page behind it."""
    kernels.allocate = poisoned_and_guarded
    for shared_limit in (227 * 1024, 99 * 1024):
        kernels.emulated.configure(shared_limit=shared_limit)
        for case in GUARDED:
            inputs = tuple(guarded(x) for x in make_inputs(case, torch.bfloat16))
            q = inputs[0]
            b, t, nq, h, _ = q.shape
            grad_out, grad_lse = guarded(torch.randn_like(q)), guarded(torch.randn(b, t, h, nq))
            found = error_report("cuda", inputs, case.window, grad_out, grad_lse)
            assert not found, f"{case}: {found}"
            print(shared_limit, case, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with Kernels(planted(*sys.argv[1:]) if sys.argv[1:] else None).registered() as registered:
        guard_pages(registered)
    print("reached the end")

"""The candidates: this project's backends, and the ways to compute the same in PyTorch."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness.flex import flex
from benchmarks.harness.materialised import Attention, eager, sdpa_grouped, sdpa_masked
from benchmarks.harness.merged import merged_partials
from stat_kernels import dispatch, shrinking_temporal_attention
from stat_kernels.testing import Case

EAGER = "eager"  # materialised keys, the paper's own way: a speed-up is stated against it too
CUDA_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Candidate:
    """One way to compute the operation.

    Attributes:
        name: in tables and result files.
        build: sizes and device -> function of the seven inputs.
        kind: "backend" of this project or "peer".
        compiled: whether torch.compile is applied.
        sdpa: the SDPA backend to require; None leaves the choice to PyTorch.
        extra: included only on request.
    """

    name: str
    build: Callable[[Case, str], Attention]
    kind: Literal["backend", "peer"] = "peer"
    compiled: bool = False
    sdpa: SDPBackend | None = None
    extra: bool = False

    def prepare(self, case: Case, device: str) -> Attention:
        """The function to check and time; it is compiled at its first call."""
        function = self.build(case, device)
        if self.compiled:
            function = torch.compile(function, dynamic=False, fullgraph=True)
        if self.sdpa is None:
            return function

        def insisting(*inputs: Tensor | None) -> Tensor:
            with sdpa_kernel(self.sdpa):
                return function(*inputs)

        return insisting

    def no_backward(self, device: str) -> str | None:
        """The reason why it has no backward pass on this device, or None."""
        if self.build is flex and device == "cpu":
            return "FlexAttention has no backward pass on a CPU"
        return None

    def unsupported_reason(self, case: Case, dtype: torch.dtype, device: str) -> str | None:
        """The reason why it cannot take the case, if known beforehand, or None."""
        if self.kind == "backend":
            return dispatch.unsupported_reason(self.name, device, dtype, case.D)
        return None


def peers(device: str) -> list[Candidate]:
    """Every peer for a device, in the order of the tables."""
    found = [
        Candidate(EAGER, eager),
        Candidate("eager, compiled", eager, compiled=True),
        Candidate("SDPA masked", sdpa_masked),
        Candidate("SDPA masked, compiled", sdpa_masked, compiled=True),
        Candidate("SDPA grouped", sdpa_grouped),
        Candidate("SDPA grouped, compiled", sdpa_grouped, compiled=True),
    ]
    if device == "cuda":
        for name, backend in CUDA_SDPA.items():
            found.append(Candidate(f"SDPA masked [{name}]", sdpa_masked, sdpa=backend))
            found.append(Candidate(f"SDPA grouped [{name}]", sdpa_grouped, sdpa=backend))
    else:  # without a choice PyTorch takes its flash kernel for CPUs; there is no other but math
        math = SDPBackend.MATH
        found.append(Candidate("SDPA masked [math]", sdpa_masked, sdpa=math, extra=True))
        found.append(Candidate("SDPA grouped [math]", sdpa_grouped, sdpa=math, extra=True))
    found.append(Candidate("three partials", merged_partials))
    found.append(Candidate("three partials, compiled", merged_partials, compiled=True))
    found.append(Candidate("FlexAttention, compiled", flex, compiled=True))
    return found


def backends(names: Iterable[str] | None = None) -> list[Candidate]:
    """This project's backends, best first.

    Args:
        names: of backends; None is all but the reference, which the peer "eager" stands for: the
            same formula without the logsumexp that the reference always computes.

    Raises:
        ValueError: a name is not a backend's.
    """
    known = dispatch.names()
    chosen = [n for n in known if n != dispatch.REFERENCE] if names is None else list(names)
    for name in chosen:
        if name not in known:
            raise ValueError(f"backend must be one of {', '.join(known)}, got {name!r}")
    return [Candidate(name, partial(_backend, name), kind="backend") for name in chosen]


def all_candidates(device: str, names: Iterable[str] | None = None) -> list[Candidate]:
    """Backends, then peers, in the order of the tables; ``names`` as in `backends`."""
    return [*backends(names), *peers(device)]


def _backend(name: str, case: Case, device: str) -> Attention:
    def attend(*inputs: Tensor | None) -> Tensor:
        return shrinking_temporal_attention(*inputs, window=case.window, backend=name)

    return attend

"""The least time a case can take on this machine: its bytes and FLOPs over measured rates.

Every input is read once and every output written once; intermediate results do not count. The
rates are those of PyTorch's copy and matrix product on this machine, measured in the same run. A
kernel can beat the latter; its fraction of the floor is then above one.
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from benchmarks.harness.timing import Timer, interleave
from stat_kernels.ops import query_key_pairs
from stat_kernels.testing import Case

FORWARD_PRODUCTS = 2  # S = Q K^T, P V
BACKWARD_PRODUCTS = 5  # S again, dP, dV, dQ, dK


@dataclass(frozen=True)
class Work:
    """The bytes and FLOPs that one pass over a case needs at least."""

    read_bytes: int
    written_bytes: int
    flops: int

    @property
    def moved_bytes(self) -> int:
        return self.read_bytes + self.written_bytes


@dataclass(frozen=True)
class Rates:
    """Measured rates: bytes/s read and written by a copy, FLOP/s of a matrix product."""

    copy_bytes_per_s: float
    matmul_flops_per_s: dict[str, float]  # by dtype name

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def better(one: Rates, other: Rates) -> Rates:
    """The larger of each rate, from measurements at the start and at the end of a run."""
    matmul = {
        name: max(rate, other.matmul_flops_per_s[name])
        for name, rate in one.matmul_flops_per_s.items()
    }
    return Rates(max(one.copy_bytes_per_s, other.copy_bytes_per_s), matmul)


def forward_work(case: Case, dtype: torch.dtype) -> Work:
    """Inputs read, out written. The lse is not counted, since inference does not need it."""
    size = dtype.itemsize
    inputs = {name: math.prod(shape) for name, shape in case.shapes().items() if shape}
    return Work(
        read_bytes=size * sum(inputs.values()),
        written_bytes=size * inputs["q"],
        flops=2 * FORWARD_PRODUCTS * case.D * _pairs(case),
    )


def backward_work(case: Case, dtype: torch.dtype) -> Work:
    """Inputs, out, lse and the incoming gradient read, one gradient per input written."""
    size = dtype.itemsize
    inputs = {name: math.prod(shape) for name, shape in case.shapes().items() if shape}
    lse_bytes = max(size, 4) * case.B * case.T * case.H * case.Nq
    return Work(
        read_bytes=size * (sum(inputs.values()) + 2 * inputs["q"]) + lse_bytes,
        written_bytes=size * sum(inputs.values()),
        flops=2 * BACKWARD_PRODUCTS * case.D * _pairs(case),
    )


def floor_ms(work: Work, rates: Rates, dtype: torch.dtype) -> float:
    """The larger of the time to move the bytes and the time to do the FLOPs, ms."""
    flops_per_s = rates.matmul_flops_per_s[dtype_name(dtype)]
    seconds = max(work.moved_bytes / rates.copy_bytes_per_s, work.flops / flops_per_s)
    return seconds * 1e3


def floors_ms(case: Case, rates: Rates, dtype: torch.dtype) -> dict[str, float]:
    """Floors of the forward pass and of forward and backward, one after the other."""
    forward = floor_ms(forward_work(case, dtype), rates, dtype)
    backward = floor_ms(backward_work(case, dtype), rates, dtype)
    return {"forward": forward, "forward+backward": forward + backward}


def measure_rates(device: str, dtypes: list[torch.dtype], timer: Timer, rounds: int = 7) -> Rates:
    """The machine's copy rate and, for each dtype, the best matrix product's rate.

    Args:
        device: "cpu" or "cuda".
        dtypes: of the matrix products.
        timer: ms of a call.
        rounds: samples; the fastest counts, since a floor is what an undisturbed machine can do.
    """
    copy_rate = _copy_rate(device, timer, rounds)
    matmul_rates = {dtype_name(d): _matmul_rate(device, d, timer, rounds) for d in dtypes}
    return Rates(copy_rate, matmul_rates)


def _copy_rate(device: str, timer: Timer, rounds: int) -> float:
    """Bytes read and written a second; the buffers are larger than any cache."""
    elements = (256 << 20 if device == "cpu" else 2 << 30) // 4
    source, target = (torch.ones(elements, device=device) for _ in range(2))
    samples = interleave({"copy": lambda: target.copy_(source)}, rounds, timer)["copy"]
    return 2 * source.nbytes / (samples.quantile_ms(0) / 1e3)


def _matmul_rate(device: str, dtype: torch.dtype, timer: Timer, rounds: int) -> float:
    """FLOP/s of the best product: libraries peak at different sizes, and on some CPUs PyTorch's
    products use slower instructions than its convolutions, so those with one pixel count, too.
    """
    best = 0.0
    for size in (1024, 2048) if device == "cpu" else (4096, 8192):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        ways = {"matmul": lambda a=a, b=b: a @ b}
        if device == "cpu":
            pixels, kernel = a.view(1, 1, size, size).permute(0, 3, 1, 2), b.view(size, size, 1, 1)
            ways["convolution"] = lambda x=pixels, w=kernel: F.conv2d(x, w)
        for samples in interleave(ways, rounds, timer).values():
            best = max(best, 2 * size**3 / (samples.quantile_ms(0) / 1e3))
    return best


def dtype_name(dtype: torch.dtype) -> str:
    """The name without its module: float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _pairs(case: Case) -> int:
    shapes = case.shapes()
    return query_key_pairs(
        shapes["q"], shapes["k_cur"], shapes["k_short"], shapes["k_long"], *case.reach
    )

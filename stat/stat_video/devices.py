"""The device of a run."""

from __future__ import annotations

import os

import torch

from stat_kernels.memory import keep_freed_memory
from stat_video.errors import UserError

# TFLOP/s of matrix products without sparsity, in 16 bits and in float32 (without TF32), as NVIDIA's
# data sheets state them; by what torch's name of the device begins with, the longest match first.
PEAK_TFLOPS = {
    "NVIDIA B200": (2250.0, 75.0),
    "NVIDIA H200": (989.4, 66.9),
    "NVIDIA H100 PCIe": (756.0, 51.2),
    "NVIDIA H100 NVL": (835.0, 60.0),
    "NVIDIA H100": (989.4, 66.9),
    "NVIDIA A100": (312.0, 19.5),
    "NVIDIA L40S": (362.0, 91.6),
    "NVIDIA L4": (121.0, 30.3),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6),
    "NVIDIA GeForce RTX 3090": (71.0, 35.6),
}


def prepare_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the GPU where there is one.

    For a CPU the process keeps freed memory from then on.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        return _prepared(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise ValueError("it holds no numbers")
    # torch reports a device that is not there by AssertionError, RuntimeError or its own types.
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"device {name!r} cannot be used here: {first}") from error
    return _prepared(device)


def _prepared(device: torch.device) -> torch.device:
    if device.type == "cpu":
        keep_freed_memory()
    return device


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that `PEAK_TFLOPS` says for matrix products in `dtype`; None for other devices."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = [n for n in PEAK_TFLOPS if f"{name} ".startswith((f"{n} ", f"{n}-"))]
    if not known:
        return None
    half, single = PEAK_TFLOPS[max(known, key=len)]
    return 1e12 * (single if dtype == torch.float32 else half)


def available_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""Picking the device of a run."""

from __future__ import annotations

import os

import torch

from stat_video.errors import UserError


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the GPU where there is one. Raises UserError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # torch reports a device that is not there by AssertionError, RuntimeError or its own types.
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"device {name!r} cannot be used here: {first}") from error
    return device


def available_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(count: int) -> None:
    """Use `count` CPU threads; 0 leaves torch's default."""
    if count:
        torch.set_num_threads(count)

"""The device of a run, and whether its attention and its threads can be had there."""

from __future__ import annotations

import os

import torch

from stat_kernels import shrinking_temporal_attention
from stat_video.errors import UserError
from stat_video.model.config import STATConfig


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


def check_backend(config: STATConfig, device: torch.device) -> None:
    """Attend once with each stage's head dim. Raises UserError where the backend cannot do it.

    A backend is insisted on by model.backend or STAT_BACKEND; whatever is picked by itself works.
    """
    for dim, heads in zip(config.dims, config.num_heads, strict=True):
        tokens = torch.zeros(1, 1, 1, 1, dim // heads, device=device)
        try:
            shrinking_temporal_attention(tokens, tokens, tokens, window=1, backend=config.backend)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"model.{error}" if config.backend else str(error)) from error


def available_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(count: int) -> None:
    """Use `count` CPU threads; 0 leaves torch's default."""
    if count:
        torch.set_num_threads(count)

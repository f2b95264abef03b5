"""What a training step will need of memory, told before anything is allocated.

The model runs once on the meta device, which has shapes but no memory, and what autograd saves for
the backward pass is added up. Compilers save less and autocast halves much of it: an upper figure.
"""

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import models

STATE_COPIES = 4  # parameters, gradients, AdamW's two moments
RESERVE = 0.1  # of the memory that is free: what a measurement must leave to everybody else


@dataclass(frozen=True)
class Footprint:
    """Bytes of a trainer: what it holds between steps, what a step saves for its backward pass."""

    state_bytes: int
    saved_bytes: int


def footprint(preset: str, batch: int, backend: str | None = None) -> Footprint:
    """Of a float32 training step.

    Args:
        preset: of the model.
        batch: clips a step.
        backend: of its attention: the reference saves repeated keys and all weights.
    """
    model = models.make_model(preset, "meta", backend)
    clips, labels = models.make_clips(preset, batch, "meta")
    kept = {_storage(p): p for p in model.parameters()}
    known = len(kept)
    state_bytes = STATE_COPIES * sum(p.nbytes for p in kept.values())

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(_storage(tensor), tensor)  # holding on to it keeps its address its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        F.cross_entropy(model(clips), labels)
    saved = list(kept.values())[known:]
    return Footprint(state_bytes, sum(x.untyped_storage().nbytes() for x in saved))


def free_bytes(device: str) -> int | None:
    """Memory that a new process could have; None where the system does not say.

    Args:
        device: "cpu" or "cuda".
    """
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    if not hasattr(os, "sysconf") or not os.path.exists("/proc/meminfo"):
        return None
    with open("/proc/meminfo", encoding="utf-8") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["MemAvailable"].split()[0]) << 10


def too_large(needed: Footprint, others_state_bytes: int, device: str) -> str | None:
    """Why a step cannot fit beside the other trainers, in one sentence; None where it can."""
    free = free_bytes(device)
    total = needed.state_bytes + needed.saved_bytes + others_state_bytes
    if free is None or total <= (1 - RESERVE) * free:
        return None
    return (
        f"it needs about {_gib(total)} GiB with the other paths' weights, of {_gib(free)} GiB "
        "that are free: a smaller --batch or fewer --backends and --modes may fit"
    )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f}"

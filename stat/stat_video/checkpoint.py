"""Checkpoints: a crash leaves the former one, and each holds all that a run continues from."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from stat_video.errors import UserError

FORMAT = 1  # raised when a reader of older files would go wrong


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` under a temporary name, flush it to the disk, then give it its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, tensors and plain values only.

    Raises UserError when the file is missing, damaged, or not one of ours.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    # A damaged or foreign file makes torch.load raise any of a dozen types.
    except Exception as error:
        raise UserError(f"{path} is not a readable checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict) or "format" not in state or "model" not in state:
        raise UserError(f"{path} is not a checkpoint of stat-video")
    if state["format"] != FORMAT:
        raise UserError(
            f"{path} has checkpoint format {state['format']}, this version reads {FORMAT}"
        )
    return state


def random_states() -> dict[str, Any]:
    """States of the generators that training draws from (dropout, stochastic depth)."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Undo everything drawn since `random_states`."""
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count() and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))


def replace_folder(new: Path, old: Path) -> None:
    """Put the finished folder `new` where `old` was; between the two steps `old` is set aside."""
    aside = old.with_name(old.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    if old.exists():
        os.replace(old, aside)
    os.replace(new, old)
    shutil.rmtree(aside, ignore_errors=True)

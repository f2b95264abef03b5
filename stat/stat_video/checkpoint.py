"""Checkpoints: folders that any number of processes write together and any other number reads.

A checkpoint holds the tensors as torch.distributed.checkpoint writes them and state.json with the
rest. It is written under a temporary name and renamed when it is complete and on the disk, so that
whatever has a checkpoint's name is whole. The format's index is a pickle: load only checkpoints
that you trust, and pass on the safetensors of best/ instead.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from stat_video.distributed import World
from stat_video.errors import UserError

FORMAT = 2  # raised when a reader of older files would go wrong
STATE = "state.json"
PART = ".part"


def save_checkpoint(
    folder: Path, name: str, tensors: dict[str, Any], state: dict[str, Any], world: World
) -> Path:
    """Write the checkpoint folder/name. Every process calls it; returns its path.

    name: names sort in the order of writing.
    tensors: nested dictionaries of tensors, shards or plain values; state: for JSON, the main
        process's counts.
    """
    path, part = folder / name, folder / (name + PART)
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)  # what a killed run left
    world.wait()
    with _quiet():
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(part), no_dist=world.size == 1)
    if world.is_main:
        with (part / STATE).open("w") as file:
            json.dump({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        _flush_folder(part)
        os.rename(part, path)
        _flush_folder(folder)
    world.wait()
    return path


def checkpoints_in(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    if not folder.is_dir():
        return []
    found = (p for p in folder.iterdir() if p.suffix != PART and (p / STATE).is_file())
    return sorted(found, key=lambda path: path.name)


def keep_only(folder: Path, names: set[str]) -> None:
    """Remove every other checkpoint and what killed runs left of unfinished ones.

    Each gets a temporary name first, so that a kill in between leaves none that is half removed.
    """
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if path.name not in names:
            if path.suffix != PART:
                path = path.rename(path.with_name(path.name + ".old" + PART))
            shutil.rmtree(path)


def read_state(path: Path) -> dict[str, Any]:
    """What `state` was when the checkpoint was written. Raises UserError if it is none of ours."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    try:
        state = json.loads((path / STATE).read_text())
    except OSError as error:
        raise UserError(f"{path} is not a checkpoint of stat-video: it has no {STATE}") from error
    except ValueError as error:
        raise UserError(f"{path / STATE} is damaged: {error}") from error
    if state["format"] != FORMAT:
        raise UserError(
            f"{path} has checkpoint format {state['format']}, this version reads {FORMAT}"
        )
    return state


def load_tensors(path: Path, tensors: dict[str, Any], world: World | None = None) -> None:
    """Read into `tensors`, nested as they were saved but cut between processes as they are now.

    world: the processes that read together; None reads in this one only.
    Raises UserError when files are missing or damaged, or the tensors are others.
    """
    reader = dcp.FileSystemReader(path)
    try:
        with _quiet():
            dcp.load(tensors, storage_reader=reader, no_dist=world is None or world.size == 1)
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        reason = str(first).strip().splitlines() or [type(first).__name__]
        raise UserError(f"{path} is not a readable checkpoint: {reason[0]}") from error


def replace_folder(new: Path, old: Path) -> None:
    """Put the finished folder `new` where `old` was; between the two steps `old` is set aside."""
    aside = old.with_name(old.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    if old.exists():
        os.replace(old, aside)
    os.replace(new, old)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns that it works in a single process, also when told to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _flush_folder(folder: Path) -> None:
    """Names, too, are on the disk only once their folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

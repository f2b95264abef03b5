"""Checkpoints: folders written jointly by any number of processes and readable by any other number.

A checkpoint holds the tensors as torch.distributed.checkpoint writes them, and state.json with the
rest. It is written under a temporary name and renamed once it is complete and on the disk, so a
folder with a checkpoint's name is complete. state.json, written last, has the checksums of all
files including itself; they are verified before anything is loaded. Loading a checkpoint cannot run
code: see index.py and tensors.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from stat_video.checkpoint.checksums import SummedFiles, sum_of_file, sum_of_text
from stat_video.checkpoint.index import INDEX, is_checkpoint_file
from stat_video.checkpoint.tensors import Planner, Reader
from stat_video.distributed import World
from stat_video.errors import UserError
from stat_video.files import writing

FORMAT = 3  # raised when a reader of older files would go wrong
UNCHECKED = 2  # the same without checksums
STATE = "state.json"
SUMS = "crc32"  # in state.json: checksums by file name
PART = ".part"
NAME = re.compile(r"epoch_\d{4,}_step_\d{8,}")


class DamagedCheckpoint(UserError):
    """A checkpoint that differs from what was written; an older one may be intact."""


def save_checkpoint(
    folder: Path, name: str, tensors: dict[str, Any], state: dict[str, Any], world: World
) -> Path:
    """Write the checkpoint folder/name. Every process calls it; returns its path.

    name: must match NAME, so that names sort in the order of writing.
    tensors: nested dictionaries of tensors, shards or plain values; state: for JSON, the main
        process's counts.
    """
    path, part = folder / name, folder / (name + PART)
    with writing(path):
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(part, ignore_errors=True)  # what a killed run left
        world.wait()
        sums = _save_tensors(part, tensors, world)
        if world.is_main:
            _write_state(part / STATE, {"format": FORMAT, **state, SUMS: sums})
            _flush_folder(part)
            os.rename(part, path)
            _flush_folder(folder)
    world.wait()
    return path


def amend(path: Path, name: str, changes: dict[str, Any], world: World) -> Path:
    """Change a checkpoint's name and some of its state. Every process calls it; returns its path.

    If the process is killed in between, the checkpoint is complete under one of the names.
    """
    renamed = path.with_name(name)
    if world.is_main:
        part = path / (STATE + PART)
        with writing(path / STATE):
            _write_state(part, {**_parse_state(path), **changes})
            os.replace(part, path / STATE)
            _flush_folder(path)
            os.rename(path, renamed)
            _flush_folder(path.parent)
    world.wait()
    return renamed


def checkpoints_in(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first; some files may have been lost since.

    Other files and folders are ignored.
    """
    if not folder.is_dir():
        return []
    named = (path for path in folder.iterdir() if NAME.fullmatch(path.name))
    found = (path for path in named if any((path / n).is_file() for n in (STATE, INDEX)))
    return sorted(found, key=lambda path: path.name)


def keep_only(folder: Path, names: set[str]) -> None:
    """Remove every other checkpoint, and unfinished ones that killed runs left behind.

    Files and folders with other names are kept. Each checkpoint is first given a temporary name, so
    that a kill in between leaves no partly removed checkpoint under its own name.
    """
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if path.name in names or not path.is_dir():
            continue
        if NAME.fullmatch(path.name):
            shutil.rmtree(path.rename(path.with_name(path.name + ".old" + PART)))
        elif NAME.fullmatch(path.name.removesuffix(PART).removesuffix(".old")):
            shutil.rmtree(path)


def read_state(path: Path, world: World | None = None) -> dict[str, Any]:
    """Verify all files of a checkpoint and return the `state` it was written with.

    world: the processes that read together and share the check; None for this one alone.
    Raises UserError if `path` is not a checkpoint of this version, and DamagedCheckpoint, in every
    process, if a file is missing or differs from what was written.
    """
    state = _parse_state(path)
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    if SUMS not in state:
        if rank == 0:
            print(f"{path} has no checksums: damage to it goes unnoticed", file=sys.stderr)
        return state
    sums = state.pop(SUMS)
    damage = _damage(path, sorted(sums.items())[rank::size])
    for text in [damage] if world is None else world.gather(damage):
        if text is not None:
            raise DamagedCheckpoint(text)
    return state


def load_tensors(path: Path, tensors: dict[str, Any], world: World | None = None) -> None:
    """Read into `tensors`, nested as they were saved but cut between processes as they are now.

    world: the processes that read together; None reads in this one only.
    Raises DamagedCheckpoint when files are missing or damaged, or when the tensors do not match.
    """
    alone = world is None or world.size == 1
    try:
        with _quiet():
            dcp.load(tensors, storage_reader=Reader(path), planner=Planner(), no_dist=alone)
    except (CheckpointException, OSError, ValueError) as error:
        # one of the errors of all processes
        first = next(iter(error.failures.values()))[0] if hasattr(error, "failures") else error
        reason = str(first).strip().splitlines() or [type(first).__name__]
        raise DamagedCheckpoint(f"{path} is not a readable checkpoint: {reason[0]}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's warning about running in a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _flush_folder(folder: Path) -> None:
    """Flush a folder: file names, too, are on the disk only once their folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _save_tensors(part: Path, tensors: dict[str, Any], world: World) -> dict[str, int]:
    """Write the tensors and their index. Returns the checksums of all processes' files."""
    writer = dcp.FileSystemWriter(part)
    writer.fs = files = SummedFiles()
    with _quiet():
        dcp.save(tensors, storage_writer=writer, no_dist=world.size == 1)
    return {name: total for own in world.gather(files.sums) for name, total in own.items()}


def _write_state(path: Path, state: dict[str, Any]) -> None:
    """Write state.json to the disk, adding a checksum of itself where it has those of the files."""
    if SUMS in state:
        own = {STATE: sum_of_text(json.dumps(state))}
        state = {**state, SUMS: state[SUMS] | own}
    with path.open("w") as file:
        json.dump(state, file)
        file.flush()
        os.fsync(file.fileno())


def _parse_state(path: Path) -> dict[str, Any]:
    """Verify state.json and return its content and the checksums of the other files."""
    file = path / STATE
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if not file.is_file():
        kind = DamagedCheckpoint if (path / INDEX).is_file() else UserError
        raise kind(f"{path} is not a checkpoint of stat-video: it has no {STATE}")
    try:
        state = json.loads(file.read_text())
        if state["format"] not in (UNCHECKED, FORMAT):
            raise UserError(
                f"{path} has checkpoint format {state['format']!r}, this version reads {FORMAT}"
            )
        checked = state["format"] == FORMAT or SUMS in state
        own = state[SUMS].pop(STATE) if checked else None
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{file} is damaged: {error!r}") from error
    if checked and own != sum_of_text(json.dumps(state)):
        raise DamagedCheckpoint(f"{file} is damaged: its checksum is not that of its content")
    return state


def _damage(path: Path, sums: list[tuple[str, int]]) -> str | None:
    """The first problem found in these files of a checkpoint, or None."""
    for name, total in sums:
        file = path / name
        if not is_checkpoint_file(name) or not file.is_file():
            return f"{path} is damaged: it has no file {name}"
        try:
            found = sum_of_file(file)
        except OSError as error:
            return f"{file} cannot be read: {error.strerror}"
        if found != total:
            return f"{file} is damaged: its checksum is not the one that {STATE} has"
    return None

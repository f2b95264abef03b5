"""The folder of a run: what in it is the run's own, and the lock that keeps other runs out."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

from stat_video.distributed import World
from stat_video.errors import UserError
from stat_video.files import writing
from stat_video.ownership import claim

MARK = ".stat-run"
LOCK = "run.lock"
# best/README.md, the model card, is for people to edit.
BEST = ("best/config.json", "best/model.safetensors", "best/preprocess.json", "best.part/*")
RESULTS = (
    *("log.jsonl", "tensorboard/events.out.tfevents.*", "curves.png", "confusion.png"),
    *(f"unusable_{split}{rank}.txt" for split in ("train", "val") for rank in ("", ".[0-9]*")),
    *BEST,
)
OWN = (LOCK, "config.yaml", *RESULTS, "checkpoints/epoch_*_step_*", "bad_step_*_rank_*.pt")


@contextmanager
def occupied(folder: Path, world: World) -> Iterator[None]:
    """Make the folder this run's, and keep every other run out of it meanwhile.

    Every process of the run enters; the main one holds the lock for all. Raises UserError in each
    of them when the folder holds something that no run wrote, or another run is at work in it.
    """
    with ExitStack() as stack:

        def occupy() -> None:
            with writing(folder):
                claim(
                    folder,
                    MARK,
                    OWN,
                    "stat-video train",
                    "choose another --run.dir (--run.resume takes a checkpoint of any folder)",
                )
                stack.enter_context(_lock(folder))

        world.by_main(occupy)
        yield


def put_best(folder: Path) -> None:
    """Move the complete model in best.part/ to best/.

    Within a run only the weights ever change, so replacing file by file leaves a model that fits
    together at every moment. Files that others put there stay.
    """
    part, best = folder / "best.part", folder / "best"
    best.mkdir(exist_ok=True)
    for file in sorted(part.iterdir(), key=lambda path: path.name == "config.json"):  # see has_best
        if file.name == "README.md" and (best / file.name).exists():
            file.unlink()
        else:
            os.replace(file, best / file.name)
    part.rmdir()


def has_best(folder: Path) -> bool:
    """Whether best/ holds a model; config.json is the last file of it that is written."""
    return (folder / "best" / "config.json").is_file()


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises UserError naming the process that has it.

    It is a POSIX record lock: the kernel releases it when the process ends, however it ends, so no
    stale lock survives a kill or a reboot, and NFS and Lustre (mounted with flock) share it between
    machines. Unlike a lock of flock(2), forked loader workers do not inherit it; they may outlive a
    killed process by some seconds. The file stays behind; only the lock on it counts. This process
    must not open the file again meanwhile: closing it would release the lock.
    """
    path = folder / LOCK
    with path.open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(_refusal(folder, path)) from error
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            # Lustre mounted without flock, NFS without a lock daemon, some FUSE file systems
            print(
                f"{folder} cannot be locked on this file system ({error.strerror}): make sure "
                "that no other run uses it",
                flush=True,
            )
        file.truncate(0)
        now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, started at {now}\n")
        file.flush()
        yield


def _refusal(folder: Path, path: Path) -> str:
    holder = path.read_text().strip() or "another process"
    text = f"{folder} is in use by {holder}: stop that run or choose another --run.dir"
    if f" on {socket.gethostname()}," not in holder:
        text += (
            f" (if that machine has crashed, a file server may keep its lock for some minutes; "
            f"once no run is left, deleting {path} ends it at once)"
        )
    return text

"""The processes of a run: this process's rank, and small collectives between them.

torchrun sets RANK, WORLD_SIZE and LOCAL_RANK. Without them a run is a world of one process, in
which the collectives do nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from stat_kernels.distributed import ClipParallel
from stat_video.devices import prepare_device
from stat_video.errors import UserError

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """The processes of a run.

    rank: of this process, from 0; size: number of processes; device: this process's own.
    clip_size: number of consecutive processes that share each clip's frames.
    """

    rank: int
    size: int
    device: torch.device
    clip_size: int = 1

    @property
    def data_rank(self) -> int:
        """Which of the groups that get clips of their own this process belongs to, from 0."""
        return self.rank // self.clip_size

    @property
    def data_size(self) -> int:
        """Number of groups that get clips of their own."""
        return self.size // self.clip_size

    @property
    def leads_clip(self) -> bool:
        """Whether this process is the first of those that share a clip."""
        return self.rank % self.clip_size == 0

    def share_clips(
        self, processes: int, frames: int | None, option: str
    ) -> tuple[World, ClipParallel | None]:
        """The world in which so many processes share each clip, and how; every process must ask.

        frames: of a clip's tokens; None for a model whose frames cannot be divided.
        option: its name, for the UserError where that is impossible.
        """
        if processes == 1:
            return self, None
        if frames is None:
            raise UserError(f"{option} must be 1 for an image model, got {processes}")
        if self.size % processes:
            raise UserError(
                f"{option} must divide the number of processes, which is {self.size}, got "
                f"{processes}; torchrun --nproc-per-node starts as many as it is told"
            )
        if frames < processes:
            raise UserError(
                f"{option} must be at most {frames}, a clip's frames of tokens, got {processes}"
            )
        sizes = (self.size // processes, processes)
        mesh = init_device_mesh(self.device.type, sizes, mesh_dim_names=("data", "clip"))
        return replace(self, clip_size=processes), ClipParallel(mesh["clip"], frames)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes logs."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over the processes, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over the processes, in float64."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return list(values)
        result = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(result, operation)
        return result.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in order of rank. The value must be picklable."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """The main process's value."""
        return self.gather(value)[0]

    def by_main(self, action: Callable[[], Result]) -> Result:
        """What `action` returns in the main process, the only one that runs it.

        The result must be picklable. A UserError of the main process is raised in every process.
        """
        result, failure = None, None
        if self.is_main:
            try:
                result = action()
            except UserError as error:
                failure = error
        result, failure = self.from_main((result, failure))
        if failure is not None:
            raise failure
        return result

    def wait(self) -> None:
        """Wait for all processes."""
        self.sum([0.0])


def alone(device: str) -> World:
    """A world of this process only. Raises UserError for a device that does not exist."""
    return World(0, 1, prepare_device(device))


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The world that torchrun's environment describes, or one of this process only.

    device: as `run.device`; "auto" and "cuda" give each process of a machine a GPU of its own.
    Everything that holds the process group in C++, such as DDP's reducer, must be freed before the
    end. If it held the last reference, its destructor would wait for gloo's threads without
    releasing the GIL, which they may need (torch 2.11), and the process would hang.
    Raises UserError when the machine has fewer GPUs than processes.
    """
    size = _from_torchrun("WORLD_SIZE", "1")
    if size == 1:
        yield alone(device)
        return
    world = World(_from_torchrun("RANK"), size, _own_device(device))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    store = _store()
    if store is None:
        dist.init_process_group()
    else:
        dist.init_process_group(store=store, rank=world.rank, world_size=size)
    yield world
    # Not in a `finally`: after a failure the others may be gone, and torchrun ends this one.
    dist.destroy_process_group()


def is_restart() -> bool:
    """Whether torchrun started this process again after a failure of the run."""
    return _from_torchrun("TORCHELASTIC_RESTART_COUNT", "0") > 0


def _from_torchrun(name: str, default: str | None = None) -> int:
    value = os.environ.get(name, default)
    if value is None or not value.isdecimal():
        raise UserError(f"the environment's {name} must be a number, as torchrun sets it: {value}")
    return int(value)


def _store() -> dist.Store | None:
    """The store through which the processes find one another; None leaves it to torch.

    torchrun (seen with 2.11) keeps one store for all restarts, so new processes find the addresses
    of dead ones. On a single machine the restart count separates them. The agents of several
    machines count restarts independently, so TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 must be set for
    torchrun there.
    """
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not kept or os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False)
    return dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def _own_device(name: str) -> torch.device:
    device = prepare_device(name)
    if device.type != "cuda" or device.index is not None:
        return device
    local = _from_torchrun("LOCAL_RANK")
    if local >= torch.cuda.device_count():
        raise UserError(
            f"each process needs a GPU of its own; process {local} of this machine finds "
            f"{torch.cuda.device_count()}: lower --nproc-per-node"
        )
    return torch.device("cuda", local)

"""How a model is run: memory format, recomputation, compilation, and the share of each process."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from stat_video.distributed import World
from stat_video.errors import UserError
from stat_video.model.building import Model
from stat_video.train.options import RunOptions


def prepare(model: Model, run: RunOptions, world: World) -> bool:
    """Set the model up as `run` says. Returns whether its blocks will be compiled.

    With run.parallel "fsdp" the model's own parameters become shards, so optimisers must be made
    afterwards. Names of parameters never change.
    """
    model.set_checkpointing(run.checkpointing)
    model.set_channels_last(run.channels_last)
    compiled = compiles(run, world.device)
    if compiled:
        compile_blocks(model)
    if world.size > 1 and run.parallel == "fsdp":
        mesh = init_device_mesh(world.device.type, (world.size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return compiled


def compiles(run: RunOptions, device: torch.device) -> bool:
    """Whether the blocks are compiled. Raises UserError where run.compile asks for it in vain."""
    lacking = device.type == "cuda" and importlib.util.find_spec("triton") is None
    if run.compile is True and lacking:
        raise UserError("run.compile true needs Triton on a GPU; pip install triton")
    return run.compile is True or (run.compile == "auto" and device.type == "cuda" and not lacking)


def synchronised(model: Model, world: World) -> nn.Module:
    """The module to call in training: the model itself, or DDP around it.

    DDP's reducer holds the process group and must be gone before the group is destroyed: see
    `joined`.
    """
    if world.size == 1 or isinstance(model, FSDPModule):
        return model
    ids = [world.device.index] if world.device.type == "cuda" else None
    # the kernels' gradients differ in the strides of dimensions of size 1 alone
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")
    return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)


def compile_blocks(model: Model, backend: str = "inductor") -> None:
    """torch.compile each block on its own: parameters keep their names, FSDP its hooks.

    Blocks differ in sizes and rates and share one forward, so the number of compiled versions of
    it must be allowed to exceed torch's default of 8.
    """
    blocks = model.blocks
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 4 * len(blocks))
    for block in blocks:
        block.compile(backend=backend, fullgraph=True)


@contextmanager
def gradient_sync(module: nn.Module, enabled: bool) -> Iterator[None]:
    """Whether a backward pass inside adds the gradients up over the processes."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(enabled)
        yield
    elif isinstance(module, DistributedDataParallel) and not enabled:
        with module.no_sync():
            yield
    else:
        yield


def whole(tensor: Tensor) -> Tensor:
    """The full tensor where it is cut between processes; every process must ask."""
    # cloned: what was padded to be cut evenly is a view of a larger storage
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor

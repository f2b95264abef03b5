"""What the processes of test_distributed.py compute: the attention of a clip that they share."""

import datetime
import os
import signal
import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from stat_kernels import KVCache, ShrinkingTemporalAttention, distributed
from stat_kernels.distributed import ClipParallel, ProcessLost

GRID, FRAMES, DIM = (3, 4), 7, 32
LAYERS = {
    "class": {},
    "before": {"window": (3, 0)},
    "causal": {"window": (2, 1), "causal_long": True},
    "causal, no short": {"short": False, "causal_long": True},
    "wider than the clip": {"window": 99},
    "the frame alone": {"window": 1, "long": "none"},
    "mean": {"long": "mean", "short_stride": 1},
    "pooled over time": {"pool_kernel": (3, 3, 3), "q_stride": 2},
    "not fused": {"fused": False},
}
DIVISIONS = {2: (FRAMES, (6, 1)), 3: (FRAMES, (1, 5, 1)), 4: (FRAMES, (1, 3, 1, 2))}
Tensors = dict[str, torch.Tensor]


def start(processes: int, folder: Path, case: str) -> list:
    """Run a case in so many processes. Returns what each wrote, None for those that did not."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.spawn(
        _work, (processes, port, str(folder), case), processes, join=False
    )
    for process in context.processes:  # context.join() would end all when one has died
        process.join(300)
        assert not process.is_alive()
    files = [folder / f"{rank}.pt" for rank in range(processes)]
    return [torch.load(file) if file.exists() else None for file in files]


def _work(rank: int, processes: int, port: int, folder: str, case: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills what is not written yet with NaN
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=processes,
        timeout=datetime.timedelta(seconds=60),
    )
    found = {"compare": compare, "die": die}[case]()
    torch.save(found, Path(folder) / f"{rank}.pt")
    if case != "die":
        dist.destroy_process_group()


def layer_of(dtype: torch.dtype = torch.float64, fused: bool = True, **options):
    torch.manual_seed(0)
    layer = ShrinkingTemporalAttention(DIM, 2, **({"window": 5, "kv_stride": 2} | options))
    layer.fused = fused
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer.to(dtype)


def results(layer, clip: ClipParallel | None, call=None) -> Tensors:
    """Output and gradients of this process's frames; those of parameters are summed over all."""
    generator = torch.Generator().manual_seed(1)
    dtype, own = layer.proj.weight.dtype, slice(None) if clip is None else clip.own
    tokens = GRID[0] * GRID[1] + 1
    x, weights = torch.randn(2, 2, FRAMES, tokens, DIM, generator=generator).to(dtype)
    x = x[:, own].requires_grad_()
    y, _ = (layer if call is None else call)(x, GRID, clip=clip)
    loss = (y * weights[:, own, : y.shape[2]]).sum()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    grad_x, *grads = torch.autograd.grad(loss, (x, *parameters))
    if clip is not None:
        for grad in grads:
            dist.all_reduce(grad)
    return {"y": y.detach(), "x": grad_x, **dict(zip(names, grads, strict=True))}


def difference(found: Tensors, whole: Tensors, own: slice) -> float:
    """The largest, relative to the largest value of its tensor, or to 1 where that is small: the
    gradient of the keys' norm's bias is 0 but for rounding."""
    worst = 0.0
    for name, value in whole.items():
        part = value[:, own] if name in "xy" else value
        scale = max(1.0, part.abs().max().item())
        worst = max(worst, (found[name] - part).abs().max().item() / scale)
    return worst


class Communication(TorchDispatchMode):
    """Collectives, waits and matrix products in order, with the numbers that a collective sends."""

    def __enter__(self):
        self.calls = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[-1]
        if name in ("all_to_all_single", "all_gather_into_tensor"):
            self.calls.append((name, args[0].numel()))
        elif name in ("wait_tensor", "mm", "addmm", "sta_forward", "sta_backward"):
            self.calls.append((name, 0))
        return func(*args, **(kwargs or {}))


def compare() -> dict:
    """Every layer on shared frames against one process, and what else the tests ask."""
    size, found, group = dist.get_world_size(), {}, dist.group.WORLD
    even, uneven = (ClipParallel(group, frames) for frames in DIVISIONS[size])
    for name, options in LAYERS.items():
        layer = layer_of(**options)
        found[name] = difference(results(layer, uneven), results(layer, None), uneven.own)
    single = layer_of(torch.float32)
    for clip in (even, uneven):
        key = f"float32 {clip.frames}"
        found[key] = difference(results(single, clip), results(single, None), clip.own)
    layer, clip = layer_of(), uneven
    whole, once = results(layer, None), results(layer, clip)
    found["same bits"] = all(torch.equal(a, once[n]) for n, a in results(layer, clip).items())
    with Communication() as mode:
        results(layer, clip)
    found["calls"] = mode.calls
    for name, call in _other_calls(layer, size).items():
        found[name] = difference(results(layer, clip, call), whole, clip.own)
    for bug, wrong in {"halo gradient": _forget_halo, "neighbour": _shift}.items():
        kept = wrong(distributed)
        found[f"planted {bug}"] = difference(results(layer, clip), whole, clip.own)
        distributed._Send.backward, distributed._route = kept
    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("data", "clip"))
    sixteen, parts = layer_of(torch.bfloat16), ClipParallel(mesh["clip"], clip.frames)
    alone = {n: a[:, clip.own] if n in "xy" else a for n, a in results(sixteen, None).items()}
    found["bfloat16"] = difference(results(sixteen, parts), whole, clip.own)
    found["bfloat16 alone"] = difference(alone, whole, clip.own)
    found["refused"] = {what: _refusal(call) for what, call in _refused(layer, clip, mesh).items()}
    found["hang"] = _hang(layer)
    return found


def _refused(layer, clip: ClipParallel, mesh) -> dict:
    """What must raise before anything is exchanged."""
    group, x = dist.group.WORLD, torch.zeros(1, clip.frames[clip.rank], 13, DIM).double()
    wrapped = layer_of()
    wrapped.qkv = torch.nn.Sequential(wrapped.qkv)  # its weight may not be all that it computes
    return {
        "too few": lambda: ClipParallel(group, 1),
        "too many counts": lambda: ClipParallel(group, [1] * 5),
        "none": lambda: ClipParallel(group, [0] * clip.size),
        "no int": lambda: ClipParallel(group, 9.0),
        "two dimensions": lambda: ClipParallel(mesh, FRAMES),
        "no group": lambda: ClipParallel("world", FRAMES),
        "other frames": lambda: layer(torch.zeros(1, 7, 13, DIM).double(), GRID, clip=clip),
        "wrapped projection": lambda: wrapped(x, GRID, clip=clip),
        "cache": lambda: layer(x, GRID, cache=KVCache(), clip=clip),
    }


def _refusal(call) -> str:
    try:
        call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def _other_calls(layer, size: int) -> dict:
    """Ways to call a layer that must not change what it computes."""
    if size > 2:  # loading the compiler takes each process half a minute
        return {}
    return {
        "compiled": torch.compile(layer, backend="aot_eager", fullgraph=True),
        "checkpointed": lambda *args, **named: checkpoint(
            layer, *args, **named, use_reentrant=False
        ),
    }


def _forget_halo(module):
    """A process keeps the gradients of its frames that it computed itself, and no others."""
    kept = module._Send.backward, module._route

    def backward(ctx, _, grad):
        pieces = module._wait(grad, ctx.route).split(ctx.route.sent_lengths)
        return pieces[dist.get_rank()], None

    module._Send.backward = staticmethod(backward)
    return kept


def _shift(module):
    """A process sends each of its neighbours the frames that are one earlier."""
    kept, own_route = (module._Send.backward, module._route), module._route

    def route(clip, left, right):
        planned = own_route(clip, left, right)
        return planned._replace(sent=tuple((max(0, a - 1), b - (a > 0)) for a, b in planned.sent))

    module._route = route
    return kept


def _hang(layer) -> tuple[str, float]:
    """The last process does not take part: what the others are told, and after how many seconds."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    clip, began = ClipParallel(group, FRAMES), time.monotonic()
    told = ""
    if clip.rank < clip.size - 1:
        try:
            results(layer, clip)
        except ProcessLost as error:
            told = str(error)
    seconds = time.monotonic() - began
    dist.barrier()
    return told, seconds


def die() -> str:
    """The last process is killed between its forward and its backward pass."""
    clip, layer = ClipParallel(dist.group.WORLD, FRAMES), layer_of()
    results(layer, clip)
    x = torch.randn(2, FRAMES, 13, DIM, dtype=torch.float64)[:, clip.own].requires_grad_()
    y, _ = layer(x, GRID, clip=clip)
    if clip.rank == clip.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        y.sum().backward()
    except ProcessLost as error:
        return str(error)
    raise AssertionError("the backward pass went on without the process that was killed")

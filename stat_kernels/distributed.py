"""One clip on several processes: each holds some frames and receives the other frames' keys.

A frame reads the short keys of the frames in its window and one long key of every frame. So a
process receives a halo of short keys from its neighbours and the long keys of the whole clip; in
the backward pass it returns their gradients, which are added up in order of the processes' ranks.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from stat_kernels.checks import window_pair


class ProcessLost(RuntimeError):
    """Another process of the clip has died, or has not answered within the group's timeout."""


class ClipParallel:
    """How the frames of a clip are divided among the processes of a group, in order of their ranks.

    Pass it to `ShrinkingTemporalAttention`, whose input then is this process's part,
    ``x[:, clip.own]``. Gradients are those of the sum of all processes' losses: the gradient of a
    parameter is the sum of what the processes compute, or, where each computes the same loss from
    gathered results (as STAT does), the mean.

    Args:
        group: the processes, a process group or a DeviceMesh of one dimension (``mesh["clip"]``).
        frames: T, frames of the clip, to be divided as evenly as possible; or how many of them each
            process holds, at least one. A process may hold fewer than its window spans.

    Attributes:
        rank, size: this process within the group, and the number of processes.
        frames: number of frames of each process.
        own: slice of the clip's frames that this process holds.

    Raises:
        TypeError, ValueError: an argument is off; the message names it.
        ProcessLost: by what exchanges keys or gradients, if another process has died.
    """

    def __init__(
        self, group: "dist.ProcessGroup | DeviceMesh", frames: int | Sequence[int]
    ) -> None:
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    f"group must be a mesh of one dimension, as mesh['clip'] is, got {group}"
                )
            group = group.get_group()
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"group must be a ProcessGroup or a DeviceMesh, got {type(group).__name__}"
            )
        self.rank, self.size, self._group = group.rank(), group.size(), group.group_name
        self.frames = _divided(frames, self.size)
        self.own = _parts(self.frames)[self.rank]

    def __repr__(self) -> str:
        return f"ClipParallel(rank={self.rank}, size={self.size}, frames={self.frames})"

    @property
    def num_frames(self) -> int:
        """T, frames of the whole clip."""
        return sum(self.frames)

    def within(self, left: int, right: int) -> slice:
        """The clip's frames from `left` before this process's first to `right` after its last."""
        return slice(max(0, self.own.start - left), min(self.num_frames, self.own.stop + right))

    def extend(self, x: Tensor, left: int, right: int) -> Tensor:
        """x (B, t, ...) of this process's frames -> (B, S, ...) of those `within(left, right)`."""
        return self.receive(self.send(x.movedim(1, 0), left, right)).movedim(0, 1)

    def gather(self, x: Tensor) -> Tensor:
        """x (B, t, ...) of this process's frames -> (B, T, ...) of all."""
        return self.extend(x, self.num_frames, self.num_frames)

    def send(self, x: Tensor, left: int, right: int) -> "Arriving":
        """Start to exchange x (t, ...), whose first axis is this process's frames.

        What is computed between `send` and `receive` overlaps with the exchange, and its gradients
        with the exchange of gradients. Every process must call both, all in the same order.
        """
        own = self.frames[self.rank]
        if x.shape[0] != own:
            raise ValueError(f"process {self.rank} of {self} holds {own} frames, got {x.shape[0]}")
        if self.size == 1 or left == right == 0:
            return Arriving(x, None, None)
        route = _route(self, left, right)
        pending, gradients = _Send.apply(x, route)
        return Arriving(pending, gradients, route)

    def receive(self, arriving: "Arriving") -> Tensor:
        """Of `send`'s frames, all processes', those `within(left, right)`: (S, ...), contiguous."""
        if arriving.route is None:
            return arriving.frames
        return _Receive.apply(*arriving)  # type: ignore[no-any-return]


class Arriving(NamedTuple):
    """What `ClipParallel.send` has started; not to be read before `ClipParallel.receive`.

    gradients: has no content; its gradient is that of the frames that other processes received.
    """

    frames: Tensor
    gradients: Tensor | None
    route: "_Route | None"


class KeyExchange:
    """One layer's keys and values of a process's frames, to be completed by the other processes'.

    Making it starts the exchange; `finish` waits for it.

    Args:
        clip: how the frames are divided.
        k_short, v_short: (B, t, Ns, H, D) of this process's frames, or None.
        k_long, v_long: (B, t, H, D) of this process's frames, or None.
        window, causal_long: as in `stat_kernels.shrinking_temporal_attention`.
    """

    def __init__(
        self,
        clip: ClipParallel,
        k_short: Tensor | None,
        v_short: Tensor | None,
        k_long: Tensor | None,
        v_long: Tensor | None,
        window: int | tuple[int, int],
        causal_long: bool = False,
    ) -> None:
        left, right = (min(reach, clip.num_frames) for reach in window_pair(window))
        self.clip, self.causal_long, self.short, self.long = clip, causal_long, None, None
        self.halo = clip.within(left, right)
        if k_short is not None and v_short is not None:
            self.short = clip.send(_frames_first(k_short, v_short), left, right)
        if k_long is not None and v_long is not None:
            every = clip.num_frames
            # no frame reads long keys later than its own; short keys must be as many, see `finish`
            later = right if causal_long and self.short is not None else every
            self.long = clip.send(_frames_first(k_long, v_long), every, later)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, int]:
        """k_short, v_short, k_long, v_long and ``frame_offset`` of this process's attention."""
        short = long = None
        first = self.halo.start
        if self.short is not None:
            short = self.clip.receive(self.short)
        if self.long is not None:
            long = self.clip.receive(self.long)
        if self.causal_long:
            # The operation counts short and long frames alike, from the first of the clip.
            if short is not None:
                short = F.pad(short, [0, 0] * (short.dim() - 1) + [first, 0])
            first = 0
        elif short is None:
            first = self.clip.own.start
        return *_frames_second(short), *_frames_second(long), self.clip.own.start - first


def _frames_first(key: Tensor, value: Tensor) -> Tensor:
    """(B, t, ...) of each -> (t, 2, B, ...), of which some frames are one piece of memory."""
    return torch.stack((key, value)).movedim(2, 0)


def _frames_second(frames: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(S, 2, B, ...) -> key and value (B, S, ...), views."""
    if frames is None:
        return None, None
    key, value = frames.transpose(0, 2).unbind(1)
    return key, value


class _Route(NamedTuple):
    """Who sends which frames to whom, as this process sees it; part of a graph's constants.

    sent: for every process, first and last + 1 of this one's frames (from 0) that it receives.
    received: for every process, the number of frames that this one receives from it.
    everything: whether every process receives all frames.
    """

    clip: str
    group: str
    frames: tuple[int, ...]
    sent: tuple[tuple[int, int], ...]
    received: tuple[int, ...]
    everything: bool

    @property
    def sent_lengths(self) -> list[int]:
        return [stop - start for start, stop in self.sent]


def _route(clip: ClipParallel, left: int, right: int) -> _Route:
    total, own, parts = clip.num_frames, clip.own, _parts(clip.frames)

    def common(reader: slice, holder: slice) -> tuple[int, int]:
        start = max(holder.start, reader.start - left)
        return start, max(start, min(holder.stop, reader.stop + right))

    sent = [common(reader, own) for reader in parts]
    received = [common(own, holder) for holder in parts]
    return _Route(
        repr(clip),
        clip._group,
        clip.frames,
        tuple((start - own.start, stop - own.start) for start, stop in sent),
        tuple(stop - start for start, stop in received),
        # of no process in particular: all must choose the same collective
        left >= total - clip.frames[-1] and right >= total - clip.frames[0],
    )


class _Send(torch.autograd.Function):
    """Starts the exchange of frames; its backward waits for the gradients of `_Receive`'s."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, route: _Route) -> tuple[Tensor, Tensor]:
        ctx.route, ctx.shape = route, x.shape
        ctx.set_materialize_grads(False)
        if route.everything:
            most = max(route.frames)  # the collective wants as many frames of every process
            padded = F.pad(x, [0, 0] * (x.dim() - 1) + [0, most - x.shape[0]]).contiguous()
            pending = torch.ops._c10d_functional.all_gather_into_tensor(
                padded, len(route.frames), route.group
            )
        else:
            sent = torch.cat([x[start:stop] for start, stop in route.sent]).contiguous()
            pending = _all_to_all(sent, route.sent_lengths, list(route.received), route)
        return pending, x.new_empty(1).expand(sum(route.sent_lengths), *x.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, grad: Tensor | None) -> tuple[Tensor | None, None]:
        if grad is None:
            return None, None
        pieces = _wait(grad, ctx.route).split(ctx.route.sent_lengths)
        # sums of 16-bit gradients are rounded once, as a kernel does
        total = grad.new_zeros(ctx.shape, dtype=torch.promote_types(grad.dtype, torch.float32))
        for (start, stop), piece in zip(ctx.route.sent, pieces, strict=True):
            total[start:stop] += piece
        return total.to(grad.dtype), None


class _Receive(torch.autograd.Function):
    """Waits for the frames that `_Send` exchanges; its backward starts to return gradients."""

    @staticmethod
    def forward(ctx: Any, pending: Tensor, gradients: Tensor, route: _Route) -> Tensor:
        ctx.route = route
        frames = _wait(pending, route)
        if route.everything and len(set(route.frames)) > 1:
            parts = zip(frames.split(max(route.frames)), route.frames, strict=True)
            return torch.cat([part[:count] for part, count in parts])
        return frames

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        route = ctx.route
        sent = _all_to_all(grad.contiguous(), list(route.received), route.sent_lengths, route)
        return None, sent, None


def _all_to_all(x: Tensor, sent: list[int], received: list[int], route: _Route) -> Tensor:
    """Starts it. NCCL sends nothing where a count is 0, so that only neighbours exchange halos."""
    return torch.ops._c10d_functional.all_to_all_single(  # type: ignore[no-any-return]
        x, received, sent, route.group
    )


def _wait(x: Tensor, route: _Route) -> Tensor:
    try:
        return torch.ops._c10d_functional.wait_tensor(x)  # type: ignore[no-any-return]
    except RuntimeError as error:
        raise ProcessLost(
            f"another process of the clip has stopped or does not answer, seen by {route.clip}: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _divided(frames: int | Sequence[int], processes: int) -> tuple[int, ...]:
    """Frames of each process. Raises TypeError or ValueError."""
    if isinstance(frames, int) and not isinstance(frames, bool):
        if frames < processes:
            raise ValueError(
                f"frames must be at least one for each of the {processes} processes, got {frames}"
            )
        share, more = divmod(frames, processes)
        return tuple(share + (rank < more) for rank in range(processes))
    if not isinstance(frames, Sequence) or not all(type(count) is int for count in frames):
        raise TypeError(f"frames must be an int or an int for each process, got {frames!r}")
    if len(frames) != processes or min(frames) < 1:
        raise ValueError(
            f"frames must be a number of at least 1 for each of the {processes} processes, "
            f"got {tuple(frames)}"
        )
    return tuple(frames)


def _parts(frames: Sequence[int]) -> list[slice]:
    """The slice of the clip that each process holds."""
    ends = list(accumulate(frames))
    return [slice(end - count, end) for end, count in zip(ends, frames, strict=True)]

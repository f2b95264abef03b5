"""Keys and values of the frames so far: attention over a video whose frames arrive one by one."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from stat_kernels.checks import check_arguments, window_pair
from stat_kernels.functional import cast_for_autocast, shrinking_temporal_attention


class KVCache:
    """Keys and values of past frames, for layers that see a video frame by frame (the online case).

    One cache serves all layers of a model: each layer has its own entry, made at its first frame.
    An entry holds the short keys and values of the last ``left + 1`` frames in a ring buffer, and
    one long key and value for each frame. With the frames in order, the outputs are those of one
    call on the whole video, up to rounding.

    Args:
        long_frames: how many frames' long keys are kept, the newest ones, a frame's own included.
            None keeps all: memory and time then grow by ``2 * dim`` numbers per frame, clip and
            layer (6 KiB in float32 for 768 channels), and the buffer doubles when it is full.

    A cache belongs to one batch of videos, which start together; `reset` starts the next ones. It
    is for inference: no gradient flows through it.
    """

    def __init__(self, long_frames: int | None = None) -> None:
        count = isinstance(long_frames, int) and not isinstance(long_frames, bool)
        if long_frames is not None and not (count and long_frames >= 1):
            raise ValueError(f"long_frames must be an int of at least 1 or None, got {long_frames}")
        _call_uncompiled()
        self.long_frames = long_frames
        self._entries: WeakKeyDictionary[Any, _Entry] = WeakKeyDictionary()

    @property
    def frames(self) -> int:
        """How many frames the cache has seen since it was made or reset."""
        return max((entry.frames for entry in self._entries.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        entries = self._entries.values()
        return sum(entry.short.buffer.nbytes + entry.long.buffer.nbytes for entry in entries)

    def reset(self) -> None:
        """Forgets every frame and frees the buffers."""
        self._entries.clear()

    def attend(
        self,
        layer: Any,
        q: Tensor,
        k_cur: Tensor,
        v_cur: Tensor,
        k_short: Tensor | None = None,
        v_short: Tensor | None = None,
        k_long: Tensor | None = None,
        v_long: Tensor | None = None,
        *,
        window: int | tuple[int, int],
        scale: float | None = None,
        causal_long: bool = False,
        backend: str | None = None,
    ) -> Tensor:
        """`shrinking_temporal_attention` of the next frames, whose keys and values are added.

        Args:
            layer: the module that calls; its entry is used.
            q, k_cur, v_cur, k_short, v_short, k_long, v_long: of the T next frames, usually one;
                k_long and v_long (B, T, H, D).
            window: (left, 0).
            causal_long: True where there are long keys.
            scale, backend: as in `shrinking_temporal_attention`.

        Returns:
            out (B, T, Nq, H, D).

        Raises:
            TypeError, ValueError: an argument is off, the window reads later frames, or batch,
                size, dtype or device are not those of the frames before.
            RuntimeError: gradients are recorded.
        """
        tensors = cast_for_autocast((q, k_cur, v_cur, k_short, v_short, k_long, v_long))
        check_arguments(*tensors, window, scale, 0, causal_long)
        left, right = window_pair(window)
        if (right and k_short is not None) or (k_long is not None and not causal_long):
            raise ValueError(
                "a cache holds past frames only: it needs window=(left, 0) with short keys and "
                f"causal_long=True with long ones, got window={window}, causal_long={causal_long}"
            )
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            raise RuntimeError(
                "a cache is for inference: call the layer under torch.no_grad(), or train on whole "
                "clips without a cache"
            )
        if layer not in self._entries:
            self._entries[layer] = _Entry(left, _Ring(left + 1), _Ring(self.long_frames))
        entry = self._entries[layer]
        if entry.left != left:
            raise ValueError(f"window must stay ({entry.left}, 0) until reset(), got {window}")
        frames = zip(*(_frames(tensor, q.shape[1]) for tensor in tensors), strict=True)
        outs = [entry.attend(*frame, scale=scale, backend=backend) for frame in frames]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


@functools.cache
def _call_uncompiled() -> None:
    """Has compilers call `KVCache.attend`: traced, every frame would be a new graph.

    Not a decorator, which would load the compiler (half a second) with this module.
    """
    KVCache.attend = torch.compiler.disable(KVCache.attend)  # type: ignore[method-assign]


def _frames(tensor: Tensor | None, count: int) -> Sequence[Any]:
    """(B, T, ...) as T tensors (B, 1, ...), views; T times None for None."""
    return [None] * count if tensor is None else tensor.split(1, dim=1)


@dataclass
class _Entry:
    """A layer's past keys and values: short ones of its window, long ones."""

    left: int
    short: "_Ring"
    long: "_Ring"
    frames: int = 0

    def attend(
        self, q, k_cur, v_cur, k_short, v_short, k_long, v_long, *, scale, backend
    ) -> Tensor:  # fmt: skip
        """Of one more frame, all tensors (B, 1, ...)."""
        self.frames += 1
        slot = 0
        if k_short is not None and self.left:
            slot = self.short.append("k_short", k_short, v_short)
            k_short, v_short = self.short.filled()
        else:
            k_short = v_short = None
        if k_long is not None:
            self.long.append("k_long", k_long, v_long)
            k_long, v_long = self.long.filled()
        # a softmax does not ask for its keys' order: all of the ring but the frame's own slot
        return shrinking_temporal_attention(
            q, k_cur, v_cur, k_short, v_short, k_long, v_long,
            window=(self.left, self.left), frame_offset=slot, scale=scale, backend=backend,
        )  # fmt: skip


class _Ring:
    """The newest frames' keys and values, at most ``limit`` of them (None: all), in any order."""

    def __init__(self, limit: int | None) -> None:
        self.limit, self.count = limit, 0
        self.buffer = torch.empty(0)  # (2, B, frames, ..., H, D) from the first frame on

    def append(self, name: str, key: Tensor, value: Tensor) -> int:
        """Writes a frame's key and value, (B, 1, ..., H, D), over the oldest; their slot."""
        if not self.count:
            self.buffer = self._room(key, 0)
        held, key, value = self.buffer[0, :, 0], key[:, 0], value[:, 0]
        if (held.shape, held.dtype, held.device) != (key.shape, key.dtype, key.device):
            raise ValueError(
                f"{name} must be {tuple(held.shape)} a frame in {held.dtype} on {held.device} as "
                f"in the cache, got {tuple(key.shape)} in {key.dtype} on {key.device}; reset() "
                "starts with other videos"
            )
        slot = self.count if self.limit is None else self.count % self.limit
        if slot == self.buffer.shape[2]:
            larger = self._room(key[:, None], slot)
            larger[:, :, :slot] = self.buffer
            self.buffer = larger
        self.buffer[0, :, slot], self.buffer[1, :, slot] = key, value
        self.count += 1
        return slot

    def filled(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, frames, ..., H, D), views."""
        return self.buffer[0, :, : self.count], self.buffer[1, :, : self.count]

    def _room(self, key: Tensor, used: int) -> Tensor:
        frames = max(2 * used, 8)
        frames = frames if self.limit is None else min(frames, self.limit)
        with torch.inference_mode(False):  # a tensor that can be written outside it as well
            return key.new_empty(2, key.shape[0], frames, *key.shape[2:])

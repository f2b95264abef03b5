"""From tensors to kernel arguments, and the one place where kernels are launched."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from stat_kernels import backends
from stat_kernels.backends import Inputs, Reach
from stat_kernels.backends.triton import autotune, config, primitives

INPUTS = ("q", "k_cur", "v_cur", "k_short", "v_short", "k_long", "v_long")
SIZES = ("T", "NQ", "H", "NC", "NS", "L", "S", "OFFSET", "LEFT", "RIGHT")
TOKENS = ("SHORT_TOKEN", "LONG_TOKEN")
MATMUL = torch.backends.cuda.matmul
VECTOR_BYTES = 16  # of one load or asynchronous copy
LOG2_E = primitives.LOG2_E.value


@dataclass(frozen=True)
class Call:
    """One call's tensors and what the kernels want to know about them.

    Args:
        tensors: q, k_cur, v_cur, k_short, v_short, k_long, v_long; None where a part is missing.
        reach, scale: of the operation.
        grad_out: (B, T, Nq, H, D) in a backward call.
        grads: in a backward call the gradients to fill, in the order of ``tensors``; without
            elements where a part is missing.
    """

    tensors: Inputs
    reach: Reach
    scale: float
    grad_out: Tensor | None = None
    grads: tuple[Tensor, ...] = ()

    @property
    def q(self) -> Tensor:
        return self.tensors[0]

    @functools.cached_property
    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors, with k_cur in place of a missing one, whose rows are never read."""
        return tuple(self.tensors[1] if x is None else x for x in self.tensors)

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """The values of SIZES; a missing part has no neighbours or no rows."""
        _, k_cur, _, k_short, _, k_long, _ = self.tensors
        _, t, nq, h, _ = self.q.shape
        length = 0 if k_long is None else k_long.shape[1]
        left, right, offset, causal = self.reach
        if k_short is None:
            frames, ns, left, right = length if causal else t, 1, 0, 0
        else:
            frames, ns = k_short.shape[1:3]
        left, right = min(left, frames - 1), min(right, frames - 1)
        return t, nq, h, k_cur.shape[2], ns, length, frames, offset, left, right

    @functools.cached_property
    def pooled(self) -> tuple[int, int] | None:
        """How many tokens k_short and k_long lie behind k_cur in one buffer (B, T, tokens, H, D).

        The pooling writes such a buffer for keys and one for values. 0 for a missing part; None if
        the tensors are not views of such buffers or an offset does not fit into 32 bits.
        """
        _, k_cur, v_cur, k_short, v_short, k_long, v_long = self.tensors
        strides, size = k_cur.stride(), k_cur.element_size()
        step, clip = strides[2] * size, k_cur.shape[1] * strides[1]
        long_strides = strides[:2] + strides[3:]
        distances = []
        for k, v, wanted in ((k_short, v_short, strides), (k_long, v_long, long_strides)):
            distance = 0
            if k is not None:
                distance = k.data_ptr() - k_cur.data_ptr()
                same = k.stride() == v.stride() == wanted and k.shape[1] == k_cur.shape[1]
                if not same or distance != v.data_ptr() - v_cur.data_ptr():
                    return None
            distances.append(distance)
        reach = clip + max(abs(distance) for distance in distances) // size
        if v_cur.stride() != strides or k_cur.shape[2] == 1 or step <= 0:
            return None
        if self.reach.frame_offset or reach >= 2**31:
            return None
        tokens, rest = zip(*(divmod(distance, step) for distance in distances), strict=True)
        return None if any(rest) else tokens

    @property
    def tokens(self) -> tuple[int, int]:
        """The values of TOKENS."""
        return self.pooled or (0, 0)

    @functools.cached_property
    def unit(self) -> int:
        """The unit of strides in elements: a vector if every stride is a multiple of it, else 1.

        The kernels multiply strides by it, which tells Triton that rows are aligned. A kernel so
        has two variants, not one for each pattern of divisible strides.
        """
        tensors = [*self.inputs, *(() if self.grad_out is None else (self.grad_out,))]
        tensors += [grad for grad in self.grads if grad.numel() > 0]
        unit = VECTOR_BYTES // self.q.element_size()
        for x in tensors:
            for stride in self._strides(x):
                if stride % unit:
                    return 1
        return unit

    def strides_of(self, *tensors: Tensor) -> list[int]:
        """Strides of (B, T, N, H) of some tensors, in units; see ``stride_names``."""
        unit = self.unit
        return [s // unit for x in tensors for s in self._strides(x)]

    def _strides(self, x: Tensor) -> list[int]:
        """Strides of (B, T, N, H); 0 for an axis of one element and for the frames of long keys."""
        known = self._known_strides.get(id(x))
        if known is None:
            known = [
                0 if size == 1 else s for size, s in zip(x.shape[:-1], x.stride(), strict=False)
            ]
            if len(known) == 3:
                known.insert(1, 0)
            self._known_strides[id(x)] = known
        return known

    @functools.cached_property
    def _known_strides(self) -> dict[int, list[int]]:
        """By `id`, which is safe: the call keeps its tensors alive."""
        return {}

    @property
    def scale_log2(self) -> float:
        """The scores' factor for a softmax in base 2."""
        return self.scale * LOG2_E

    @functools.cached_property
    def constants(self) -> dict[str, int | str]:
        """The compile-time arguments that every kernel shares."""
        d = self.q.shape[-1]
        d0, d1 = chunks(d)
        # fp32_precision and not allow_tf32: that one raises where the newer switch was used.
        tf32 = self.q.dtype == torch.float32 and MATMUL.fp32_precision == "tf32"
        return {
            "UNIT": self.unit, "D": d, "D0": d0, "D1": d1, "PRECISION": "tf32" if tf32 else "ieee",
            "CAUSAL": self.reach.causal_long,
        }  # fmt: skip

    @functools.cached_property
    def key(self) -> config.Key:
        """The entry of the table that this call uses."""
        numbers = "single" if self.q.dtype == torch.float32 else "half"
        return config.key(architecture(self.q.device), numbers, self.q.shape[-1], self.q.shape[2])


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; Triton's own takes microseconds."""
    return -(-a // b)


@functools.cache
def chunks(head_dim: int) -> tuple[int, int]:
    """Powers of two that cover the head dim: (64, 32) for 96, (128, 0) for 128, (32, 16) for 40."""
    first = min(128, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - first
    return first, max(16, triton.next_power_of_2(rest)) if rest else 0


@functools.cache
def architecture(device: torch.device) -> int:
    """Of the table's entries for a GPU; the interpreter runs Hopper's tiles."""
    found = backends.gpu(str(device)) if device.type == "cuda" else None
    if found is None:
        return 90
    return config.AMD[found.amd] if found.amd else config.family(found.capability)


def stride_names(*tensors: str) -> list[str]:
    """A kernel's parameters for the strides of some tensors.

    They are single integers because Triton specialises what a tuple holds on the values: a kernel
    would be compiled again for every pattern of strides divisible by 16.
    """
    return [f"{tensor}_{axis}" for tensor in tensors for axis in "btnh"]


def interpreted() -> bool:
    """Whether the kernels were imported for Triton's interpreter."""
    return not isinstance(primitives.divide, triton.JITFunction)


def launch(
    kernel: triton.JITFunction, call: Call, name: str, programs: Callable[[config.Tile], int],
    *arguments: object, **constants: object,
) -> None:  # fmt: skip
    """Runs a kernel with the tile that the table has for it.

    Args:
        name: of the kernel, a field of Config.
        programs: how many programs to start, given the tile.
        arguments, constants: of the kernel, besides ``call.constants`` and the tile's.
    """

    def run_with(tile: config.Tile) -> None:
        run(
            kernel, call.q, programs(tile), *arguments,
            **call.constants, **constants, **tile.options,
        )  # fmt: skip

    tile = getattr(config.TABLE[call.key], name)
    if autotune.enabled() and call.q.is_cuda and not torch.cuda.is_current_stream_capturing():
        shape = (name, call.key, call.q.dtype, call.q.shape[0], call.sizes, *constants.values())
        tiles = config.candidates(call.key.architecture, call.key.numbers, name)
        tile = autotune.fastest(shape, tiles, run_with)
    run_with(tile)


def run(
    kernel: triton.JITFunction, where: Tensor, programs: int,
    *arguments: object, **options: object,
) -> None:  # fmt: skip
    """Every launch goes through here: on the device of the tensor ``where``, on a grid of one axis.

    One axis because only the first may have more than 65535 programs. ``options`` must say all that
    the kernel is compiled for besides the device and the dtype of ``where``: a kernel found by
    these is launched without Triton's own look-up, which takes longer than the rest.
    """
    key = (kernel, where.device, where.dtype, *options.values())
    compiled = _compiled.get(key)
    with torch.cuda.device_of(where):
        if compiled is None or not _as_compiled(arguments):
            with _compiler(where.device):
                compiled = kernel[(programs,)](*arguments, **options)
            if _as_compiled(arguments):
                _compiled[key] = compiled
        else:
            constants = [options[name] for name in kernel.arg_names[len(arguments) :]]
            compiled[(programs, 1, 1)](*arguments, *constants)


_compiled: dict[tuple, Any] = {}


@contextlib.contextmanager
def _compiler(device: torch.device) -> Iterator[None]:
    """Triton without buffer instructions on an AMD GPU.

    The pass that prepares them fails where a kernel selects between pointers, as ``key_pointers``
    does (triton-lang/triton#10381); it would also specialise a kernel on tensors below 2 GB, which
    the launches from ``_compiled`` do not look at.
    """
    if architecture(device) not in config.AMD.values():
        yield
        return
    with triton.knobs.amd.scope():
        triton.knobs.amd.use_buffer_ops = False
        yield


def _as_compiled(arguments: tuple[object, ...]) -> bool:
    """Whether a kernel compiled for aligned tensors and 32-bit integers takes these arguments."""
    pointers, largest = 0, 0
    for x in arguments:
        if type(x) is int:
            largest = x if x > largest else largest
        elif type(x) is Tensor:
            pointers |= x.data_ptr()
    return pointers % 16 == 0 and largest < 2**31

"""What a kernel is held against: the reference in float64, and how far a result may lie from it.

Tests use it to prove a kernel, benchmarks to refuse to time a wrong one.
"""

import ctypes
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from stat_kernels import backends
from stat_kernels.backends import Inputs
from stat_kernels.checks import window_pair
from stat_kernels.functional import shrinking_temporal_attention

INPUTS = ("q", "k_cur", "v_cur", "k_short", "v_short", "k_long", "v_long")


@dataclass(frozen=True)
class Case:
    """Sizes of one call; Ns = 0 leaves the short part out, L = 0 the long one; S = 0 is T."""

    B: int = 1
    T: int = 4
    Nq: int = 50
    H: int = 2
    D: int = 96
    Nc: int = 49
    Ns: int = 16
    L: int = 4
    window: int | tuple[int, int] = 3
    S: int = 0
    frame_offset: int = 0
    causal_long: bool = False

    def __str__(self) -> str:
        window = self.window
        text = (
            f"B{self.B}-T{self.T}-Nq{self.Nq}-H{self.H}-D{self.D}-Nc{self.Nc}-Ns{self.Ns}-L{self.L}"
            f"-w{window if isinstance(window, int) else '_'.join(map(str, window))}"
        )
        text += f"-S{self.S}-o{self.frame_offset}" if self.S else ""
        return text + "-causal" * self.causal_long

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of a call besides window and scale."""
        return {"frame_offset": self.frame_offset, "causal_long": self.causal_long}

    @property
    def reach(self) -> backends.Reach:
        """Window and options as a backend takes them."""
        return backends.Reach(*window_pair(self.window), **self.options)

    def shapes(self) -> dict[str, tuple[int, ...] | None]:
        """The shape of every input, None where it is missing."""
        frame = {"q": self.Nq, "k_cur": self.Nc, "v_cur": self.Nc}
        shapes: dict[str, tuple[int, ...]]
        shapes = {n: (self.B, self.T, size, self.H, self.D) for n, size in frame.items()}
        short = (self.B, self.S or self.T, self.Ns, self.H, self.D)
        shapes |= dict.fromkeys(("k_short", "v_short"), short)
        shapes |= dict.fromkeys(("k_long", "v_long"), (self.B, self.L, self.H, self.D))
        present = {"short": self.Ns > 0, "long": self.L > 0, "cur": True, "q": True}
        return {n: s if present[n.split("_")[-1]] else None for n, s in shapes.items()}


def make_inputs(
    case: Case,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    magnitude: float = 1.0,
) -> Inputs:
    """Normal values of standard deviation ``magnitude``, in the order of INPUTS, no gradient."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...] | None) -> Tensor | None:
        if shape is None:
            return None
        return (torch.randn(shape, generator=generator) * magnitude).to(device, dtype)

    return cast(Inputs, tuple(draw(shape) for shape in case.shapes().values()))


@dataclass(frozen=True)
class Result:
    """One call's outputs and gradients by name; gradients only where they were asked for."""

    tensors: dict[str, Tensor]


def run(
    inputs: Inputs,
    window: int | tuple[int, int],
    backend: str,
    grad_out: Tensor | None = None,
    grad_lse: Tensor | None = None,
    **options: Any,
) -> Result:
    """Forward, and backward where ``grad_out`` is given, through the public function.

    ``options``: its further arguments (scale, frame_offset, causal_long), here and below.
    """
    leaves: Any = [
        None if x is None else x.detach().requires_grad_(grad_out is not None) for x in inputs
    ]
    out, lse = shrinking_temporal_attention(
        *leaves, window=window, backend=backend, return_lse=True, **options
    )
    tensors = {"out": out.detach(), "lse": lse.detach()}
    if grad_out is not None:
        outputs, grads = [out], [grad_out]
        if grad_lse is not None:
            outputs, grads = [out, lse], [grad_out, grad_lse]
        present = [(n, x) for n, x in zip(INPUTS, leaves, strict=True) if x is not None]
        found = torch.autograd.grad(outputs, [x for _, x in present], grads)
        tensors |= {f"grad_{n}": g for (n, _), g in zip(present, found, strict=True)}
    return Result(tensors)


def oracle(
    inputs: Inputs,
    window: int | tuple[int, int],
    grad_out: Tensor | None = None,
    grad_lse: Tensor | None = None,
    **options: Any,
) -> Result:
    """The reference in float64 on the very same values."""
    double = cast(Inputs, tuple(None if x is None else x.double() for x in inputs))
    grads = [None if g is None else g.double() for g in (grad_out, grad_lse)]
    return run(double, window, "reference", *grads, **options)


# Relative RMS error allowed forward and backward, whatever the reference's own. In float64 the
# reference is the oracle itself and has no error to compare with.
RELATIVE_RMS = {torch.float32: (1e-5, 1e-4), torch.float64: (1e-13, 1e-12)}


def tolerance_errors(
    result: Result, exact: Result, same_dtype: Result, draws: Sequence[tuple[Result, Result]] = ()
) -> list[str]:
    """How a result breaks the rule; an empty list where it keeps it.

    The rule: maximal and RMS error at most twice those of the reference run in the same dtype, plus
    one rounding step of the output's dtype (at the largest value for the maximum, at the RMS value
    for the RMS); in float32 and float64 also a bound on the relative RMS error.

    Args:
        result: what the backend gave.
        exact: the oracle's, float64.
        same_dtype: the reference's in the backend's dtype.
        draws: more pairs of the latter two, of other inputs. A maximum is one element among many,
            and on one draw the reference may happen to have no bad one.
    """
    found = []
    for name, truth in exact.tensors.items():
        value = result.tensors[name]
        if not torch.isfinite(value).all():
            found.append(f"{name}: {(~torch.isfinite(value)).sum()} values are not finite")
        elif value.numel() > 0:
            references = [(e.tensors[name], s.tensors[name]) for e, s in draws]
            dtype = result.tensors["out"].dtype
            bounds = RELATIVE_RMS.get(dtype) if value.dtype.itemsize >= dtype.itemsize else None
            bound = None if bounds is None else bounds[name.startswith("grad")]
            found += _tolerance_errors_of(
                name, value, truth, same_dtype.tensors[name], references, bound
            )
    return found


def _tolerance_errors_of(
    name: str,
    value: Tensor,
    truth: Tensor,
    same_dtype: Tensor,
    draws: list[tuple[Tensor, Tensor]],
    bound: float | None,
) -> list[str]:
    found = []
    step = torch.finfo(value.dtype).eps
    rms, reference_rms, truth_rms = _rms(value - truth), _rms(same_dtype - truth), _rms(truth)
    if bound is not None and rms > bound * truth_rms:
        relative = rms / truth_rms if truth_rms else float("inf")
        found.append(f"{name}: relative RMS error {relative:.3g}, bound {bound:g}")
    if value.dtype == torch.float64:
        return found
    if rms > 2 * reference_rms + step * truth_rms:
        found.append(f"{name}: RMS error {rms:.3g}, the reference's {reference_rms:.3g}")
    largest = max(_largest(s - e) for e, s in [(truth, same_dtype), *draws])
    error = _largest(value - truth)
    if error > 2 * largest + step * _largest(truth):
        found.append(f"{name}: max error {error:.3g}, the reference's {largest:.3g}")
    return found


def error_report(
    backend: str,
    inputs: Inputs,
    window: int | tuple[int, int],
    grad_out: Tensor | None = None,
    grad_lse: Tensor | None = None,
    exact: Result | None = None,
    **options: Any,
) -> list[str]:
    """What `tolerance_errors` finds in a backend's results on these inputs.

    Args:
        backend: a backend's name.
        inputs: as `make_inputs` gives them.
        window: t_o.
        grad_out, grad_lse: incoming gradients; without the former only the forward is held.
        exact: the oracle's result where it is known already.
    """
    grads = (grad_out, grad_lse)

    def reference(these: Inputs) -> Result:
        return run(these, window, "reference", *grads, **options)

    result = run(inputs, window, backend, *grads, **options)
    exact = exact or oracle(inputs, window, *grads, **options)
    same_dtype = reference(inputs)
    found = tolerance_errors(result, exact, same_dtype)
    if not found:
        return []
    others = [_redraw(inputs, seed) for seed in range(3)]
    draws = [(oracle(these, window, *grads, **options), reference(these)) for these in others]
    return tolerance_errors(result, exact, same_dtype, draws)


def check_backend(
    backend: str,
    inputs: Inputs,
    window: int | tuple[int, int],
    backward: bool = True,
    seed: int = 1,
    **options: Any,
) -> None:
    """Raises AssertionError unless ``backend`` keeps the contract's tolerances on these inputs.

    Args:
        backend, inputs, window: as in `error_report`.
        backward: also all gradients, those that come through lse included.
        seed: of the incoming gradients.
    """
    grads = _incoming_gradients(inputs[0], seed) if backward else (None, None)
    found = error_report(backend, inputs, window, *grads, **options)
    if found:
        sizes = ", ".join(
            f"{n} {tuple(x.shape)}" for n, x in zip(INPUTS, inputs, strict=True) if x is not None
        )
        raise AssertionError(
            f"{backend} in {inputs[0].dtype} with window {window}, {options} ({sizes}):\n  "
            + "\n  ".join(found)
        )


def check_packed_gradients(backend: str, inputs: Inputs, window: int, slots: int = 3) -> None:
    """Raises AssertionError unless ``backend`` fills gradients that are slots of packed ones.

    They must have the bits of fresh gradients, and nothing beside them may be written to.
    """
    module, untouched = backends.load(backend), 7.0
    reach = backends.Reach(*window_pair(window))
    scale = inputs[0].shape[-1] ** -0.5
    grad_out, grad_lse = _incoming_gradients(inputs[0], seed=1)
    out, lse = module.forward(*inputs, reach, scale)
    arguments = (grad_out, grad_lse.contiguous(), *inputs, out, lse, reach, scale)
    plain = dict(zip(INPUTS, module.backward(*arguments), strict=True))
    buffers: dict[str, Tensor] = {}
    grads: dict[str, Any] = dict.fromkeys(INPUTS)
    for i, (name, x) in enumerate(zip(INPUTS, inputs, strict=True)):
        if x is not None:
            packed = (*x.shape[:-2], slots, *x.shape[-2:])  # (B, T, N, slots, H, D)
            buffers[name] = x.new_full(packed, untouched)
            grads[name] = buffers[name].select(-3, i % slots)
    module.backward(*arguments, grads=tuple(grads.values()))
    for name, buffer in buffers.items():
        assert torch.equal(grads[name], plain[name]), f"{backend}: grad_{name} in a packed gradient"
        grads[name].fill_(untouched)
        assert (buffer == untouched).all(), f"{backend}: written beside grad_{name}"


def _incoming_gradients(q: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Gradients of out and of lse, the latter not contiguous."""
    b, t, nq, h = q.shape[:4]
    generator = torch.Generator().manual_seed(seed)
    grad_out = torch.randn(q.shape, generator=generator)
    grad_lse = torch.randn((b, t, nq, h), generator=generator).transpose(2, 3)
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return grad_out.to(q.device, q.dtype), grad_lse.to(q.device, lse_dtype)


def _redraw(inputs: Inputs, seed: int) -> Inputs:
    """Other normal values of the same shapes and standard deviations."""
    generator = torch.Generator().manual_seed(seed)

    def draw(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        values = torch.randn(x.shape, generator=generator).to(x.device)
        return (values * x.float().std(correction=0)).to(x.dtype)

    return cast(Inputs, tuple(draw(x) for x in inputs))


def guarded(x: Tensor | None) -> Tensor | None:
    """A copy of a CPU tensor whose last byte is followed by a page that must not be touched.

    An access past the tensor's end kills the process, so run such a test in a process of its own.
    """
    if x is None:
        return None
    size = x.numel() * x.element_size()
    pages = math.ceil(size / mmap.PAGESIZE)
    buffer = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    start = pages * mmap.PAGESIZE - size
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    guard = ctypes.c_void_p(address + pages * mmap.PAGESIZE)
    if libc.mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect of the guard page failed")
    flat = torch.frombuffer(buffer, dtype=x.dtype, count=x.numel(), offset=start)
    return flat.copy_(x.flatten()).view(x.shape)


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def _largest(x: Tensor) -> float:
    return x.double().abs().max().item()

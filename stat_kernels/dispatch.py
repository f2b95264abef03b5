"""Which backend computes a call: the best usable one, or the one that the caller insists on.

On a GPU two backends compete. GPU_PREFERENCES says which is tried first; an entry that a
measurement decided cites the result file, so that it can be checked and replaced.
"""

import os
from dataclasses import dataclass

import torch

from stat_kernels import backends

ANY = None
MLP_HEAD_DIM = 64  # one that every backend takes: the parts of an MLP have none
REFERENCE = "reference"
GPU = ("cuda", "triton")
GPU_RANKINGS = {first: (first, *(n for n in GPU if n != first), "cpu", REFERENCE) for first in GPU}


@dataclass(frozen=True)
class Preference:
    """Which of the two GPU backends is tried first for some calls, and why.

    Attributes:
        first: "cuda" or "triton"; the other is next.
        because: the result file that decided it, below benchmarks/results/, or why none has yet.
        architecture: 80, 90 or 100 for the family of the GPU, or ANY.
        dtype: torch.float16, torch.bfloat16 or ANY.
        head_dim: D or ANY.
        queries: "few" (at most FEW a frame), "many" or ANY.
    """

    first: str
    because: str
    architecture: int | None = ANY
    dtype: torch.dtype | None = ANY
    head_dim: int | None = ANY
    queries: str | None = ANY


UNDECIDED = "not yet decided by a benchmark"
FEW = 64  # queries a frame: one tile of them
GPU_PREFERENCES = (
    Preference("cuda", f"{UNDECIDED}; cuda computes head dim 96 without padding", head_dim=96),
    Preference("triton", UNDECIDED),
)


def _size_class(queries: int) -> str | None:
    """ "few" or "many" of a frame's queries.

    ANY as long as no entry asks: a comparison would tie a graph traced with free sizes to one side
    of it.
    """
    if all(entry.queries is ANY for entry in GPU_PREFERENCES):
        return ANY
    return "few" if queries <= FEW else "many"


def family(capability: tuple[int, int]) -> int:
    """80 for Ampere and Ada, 90 for Hopper, 100 for Blackwell and newer."""
    return min(100, 10 * capability[0])


def preference(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, queries: str | None
) -> Preference:
    """The first preference that fits a call.

    Args:
        capability: of the GPU, (9, 0) for a Hopper.
        dtype, head_dim: of the tensors.
        queries: as ``size_class`` gives it; where it is None, entries that depend on it are
            skipped.
    """
    found = (family(capability), dtype, head_dim, queries)

    def fits(entry: Preference) -> bool:
        asked = (entry.architecture, entry.dtype, entry.head_dim, entry.queries)
        return all(a is ANY or a == f for a, f in zip(asked, found, strict=True))

    return next(entry for entry in GPU_PREFERENCES if fits(entry))  # the last one fits every call


def names() -> tuple[str, ...]:
    """Every backend's name, the reference last."""
    return (*backends.NAMES, REFERENCE)


def size_class(device: str, queries: int) -> str | None:
    """What the order of a GPU's backends may depend on besides dtype and head dim.

    Args:
        device: of the tensors, "cuda:1"; only a GPU has an order to decide.
        queries: Nq, of a frame.
    """
    return _size_class(queries) if device.startswith("cuda") else ANY


def capability(device: str) -> tuple[int, int] | None:
    """An NVIDIA GPU's compute capability, (9, 0) for a Hopper; None where there is none to ask."""
    found = backends.gpu(device) if device.startswith("cuda") else None
    return None if found is None or found.amd else found.capability


def ranking(
    device: str, dtype: torch.dtype, head_dim: int, queries: str | None = ANY
) -> tuple[tuple[str, ...], str]:
    """Every backend's name, the first choice first, and why it is; see GPU_PREFERENCES.

    Args:
        device, dtype, head_dim: as in `unsupported_reason`.
        queries: as `size_class` gives it.
    """
    found = capability(device)
    if found is None:
        return names(), ""
    entry = preference(found, dtype, head_dim, queries)
    return GPU_RANKINGS[entry.first], entry.because


Pooling = tuple[tuple[int, int, int], int]  # (kt, kh, kw) and stride of a pooling


def unsupported_reason(
    name: str, device: str, dtype: torch.dtype, head_dim: int, pooling: Pooling | None = None
) -> str | None:
    """Why a backend cannot take such a call, in one sentence; None where it can.

    Args:
        name: one of ``names()``.
        device: of the tensors, "cpu" or "cuda:1"; "cuda" is the current GPU.
        dtype: dtype of the tensors.
        head_dim: D.
        pooling: of a call that pools tokens; None for attention.
    """
    if name == REFERENCE or device == "meta":  # a meta tensor runs no kernel, only the op's fake
        return None
    module = backends.load(name)
    if pooling is None:
        return module.unsupported_reason(device, dtype, head_dim)
    if not hasattr(module, "pool_unsupported_reason"):
        return "it has no pooling kernel"
    return module.pool_unsupported_reason(device, dtype, head_dim, *pooling)


def untested_reason(name: str, device: str) -> str | None:
    """Why a backend that takes a call is used only where the caller insists, or None."""
    if name == REFERENCE:
        return None
    ask = getattr(backends.load(name), "untested_reason", None)
    return ask(device) if ask else None


def choose(
    requested: str | None,
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    queries: str | None = ANY,
    pooling: Pooling | None = None,
) -> str:
    """The backend of a call.

    Args:
        requested: the caller's ``backend=``; None looks at STAT_BACKEND, then takes the best.
        device, dtype, head_dim, queries: as in `ranking`.
        pooling: as in `unsupported_reason`.

    Raises:
        ValueError: the name is not a backend's.
        RuntimeError: the backend was insisted on and cannot take the call.
    """
    source = "backend"
    if requested is None and os.environ.get("STAT_BACKEND"):
        requested, source = os.environ["STAT_BACKEND"], "STAT_BACKEND"
    if requested is None:
        ranked, _ = ranking(device, dtype, head_dim, queries)
        call = (device, dtype, head_dim, pooling)
        return next(
            name
            for name in ranked
            if unsupported_reason(name, *call) is None and untested_reason(name, device) is None
        )
    if requested not in names():
        raise ValueError(f"{source} must be one of {', '.join(names())}, got {requested!r}")
    reason = unsupported_reason(requested, device, dtype, head_dim, pooling)
    if reason is not None:
        raise RuntimeError(f"{source}={requested!r} cannot take this call: {reason}")
    return requested


def pools(
    name: str, device: str, dtype: torch.dtype, head_dim: int, poolings: tuple[Pooling, ...]
) -> bool:
    """Whether a backend has kernels for these poolings; the reference has none."""
    call = (name, device, dtype, head_dim)
    return name != REFERENCE and all(unsupported_reason(*call, p) is None for p in poolings)


def mlp_unsupported_reason(
    name: str, device: str, dtype: torch.dtype, skip_dtype: torch.dtype
) -> str | None:
    """Why a backend cannot take a call of `stat_kernels.mlp`, in one sentence; None where it can.

    Args:
        name, device: as in `unsupported_reason`.
        dtype: of x.
        skip_dtype: of the residual; that of x where there is none.
    """
    if name == REFERENCE or device == "meta":
        return None
    module = backends.load(name)
    if not hasattr(module, "bias_gelu_forward"):
        return "it has no kernels for the parts of an MLP"
    if skip_dtype != dtype and (skip_dtype != torch.float32 or dtype.itemsize != 2):
        return f"it adds {dtype} to a residual of the same dtype or float32, not to {skip_dtype}"
    return module.unsupported_reason(device, dtype, MLP_HEAD_DIM)


def choose_mlp(
    requested: str | None, device: str, dtype: torch.dtype, skip_dtype: torch.dtype
) -> str:
    """The backend of a call of `stat_kernels.mlp`.

    STAT_BACKEND names the backend of the attention; here it is followed where it can be.

    Args:
        requested: the caller's ``backend=``; None is the best usable one.
        device, dtype, skip_dtype: as in `mlp_unsupported_reason`.

    Raises:
        ValueError, RuntimeError: as `choose`.
    """
    reasons = {n: mlp_unsupported_reason(n, device, dtype, skip_dtype) for n in names()}
    if requested is None:
        usable = [name for name, reason in reasons.items() if reason is None]
        preferred = os.environ.get("STAT_BACKEND")
        if preferred in usable:
            return preferred
        return next(name for name in usable if untested_reason(name, device) is None)
    if requested not in reasons:
        raise ValueError(f"backend must be one of {', '.join(names())}, got {requested!r}")
    if reasons[requested] is not None:
        raise RuntimeError(f"backend={requested!r} cannot take this call: {reasons[requested]}")
    return requested


def traces_to_save() -> bool:
    """Whether torch.export or torch.jit.trace is making a graph that may run without Python."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


# Constant for the compiler: the answer depends on the machine and on what was built, not on values.
# torch.compiler.assume_constant_result sets this very mark, but imports the compiler for it (1 s).
# traces_to_save asks Python itself: torch.compile takes is_exporting for true wherever it traces.
for _function in (choose, pools, choose_mlp, traces_to_save):
    setattr(_function, "_dynamo_marked_constant", True)  # noqa: B010


def report(
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    queries: str | None = ANY,
    pooling: Pooling | None = None,
) -> str:
    """One line a backend, the first choice first: usable, chosen and why, or why not."""
    ranked, because = ranking(device, dtype, head_dim, queries)
    call = (device, dtype, head_dim, pooling)
    refusals = {name: unsupported_reason(name, *call) for name in ranked}
    best = next(n for n in ranked if refusals[n] is None and untested_reason(n, device) is None)
    if because and best != ranked[0]:
        because = f"{ranked[0]} comes first where it can"
    insisted = os.environ.get("STAT_BACKEND") or None
    return _lines(device, refusals, None if insisted else best, because, insisted)


def mlp_report(device: str, dtype: torch.dtype, skip_dtype: torch.dtype) -> str:
    """The same for a call of `stat_kernels.mlp`, for which STAT_BACKEND is a wish."""
    call = (device, dtype, skip_dtype)
    best = choose_mlp(None, *call)
    because = "STAT_BACKEND" if os.environ.get("STAT_BACKEND") == best else ""
    refusals = {name: mlp_unsupported_reason(name, *call) for name in names()}
    return _lines(device, refusals, best, because)


def _lines(
    device: str,
    refusals: dict[str, str | None],
    best: str | None,
    because: str = "",
    insisted: str | None = None,
) -> str:
    """One line a backend: ``best`` is chosen, and why; None where one is insisted on."""
    lines = []
    for name, reason in refusals.items():
        state = "usable" if reason is None else f"not usable: {reason}"
        if name == insisted:
            state += ", insisted on by STAT_BACKEND"
        elif name == best:
            state += f", chosen ({because})" if because else ", chosen"
        elif reason is None and (untested := untested_reason(name, device)):
            state += f" if insisted on: {untested}"
        elif reason is None and best is not None:
            state += f", but {best} comes first"
        lines.append(f"{name:<10} {state}")
    return "\n".join(lines)

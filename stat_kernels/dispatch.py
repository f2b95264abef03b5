"""Which backend computes a call: the best usable one, or the one insisted on, or a sentence."""

import os

import torch

from stat_kernels import backends, order

REFERENCE = "reference"
GPU = ("cuda", "triton")
GPU_RANKINGS = {first: (first, *(n for n in GPU if n != first), "cpu", REFERENCE) for first in GPU}


def names() -> tuple[str, ...]:
    """Every backend's name, the reference last."""
    return (*backends.NAMES, REFERENCE)


def size_class(device: str, queries: int) -> str | None:
    """What the order of a GPU's backends may depend on besides dtype and head dim.

    Args:
        device: type of the tensors' device; only "cuda" has an order to decide.
        queries: Nq, of a frame.
    """
    return order.size_class(queries) if device == "cuda" else order.ANY


def capability(device: str) -> tuple[int, int] | None:
    """The GPU's compute capability, (9, 0) for a Hopper; None where there is none to ask."""
    if device != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability()


def ranking(
    device: str, dtype: torch.dtype, head_dim: int, queries: str | None = order.ANY
) -> tuple[tuple[str, ...], str]:
    """Every backend's name, the first choice first, and why it is; see :mod:`stat_kernels.order`.

    Args:
        device, dtype, head_dim: as in :func:`refusal`.
        queries: as :func:`size_class` gives it.
    """
    found = capability(device)
    if found is None:
        return names(), ""
    entry = order.decide(found, dtype, head_dim, queries)
    return GPU_RANKINGS[entry.first], entry.because


def refusal(name: str, device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a backend cannot take such a call, in one sentence; None where it can.

    Args:
        name: one of ``names()``.
        device: device type of the tensors, "cpu" or "cuda".
        dtype: dtype of the tensors.
        head_dim: D.
    """
    if name == REFERENCE or device == "meta":  # a meta tensor runs no kernel, only the op's fake
        return None
    return backends.load(name).refusal(device, dtype, head_dim)


def choose(
    requested: str | None,
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    queries: str | None = order.ANY,
) -> str:
    """The backend of a call.

    Args:
        requested: the caller's ``backend=``; None looks at STAT_BACKEND, then takes the best.
        device, dtype, head_dim, queries: as in :func:`ranking`.

    Raises:
        ValueError: the name is not a backend's.
        RuntimeError: the backend was insisted on and cannot take the call.
    """
    source = "backend"
    if requested is None and os.environ.get("STAT_BACKEND"):
        requested, source = os.environ["STAT_BACKEND"], "STAT_BACKEND"
    if requested is None:
        ranked, _ = ranking(device, dtype, head_dim, queries)
        return next(n for n in ranked if refusal(n, device, dtype, head_dim) is None)
    if requested not in names():
        raise ValueError(f"{source} must be one of {', '.join(names())}, got {requested!r}")
    reason = refusal(requested, device, dtype, head_dim)
    if reason is not None:
        raise RuntimeError(f"{source}={requested!r} cannot take this call: {reason}")
    return requested


# Constant for the compiler: the answer depends on the machine and on what was built, not on values.
# torch.compiler.assume_constant_result sets this very mark, but imports the compiler for it (1 s).
choose._dynamo_marked_constant = True


def report(device: str, dtype: torch.dtype, head_dim: int, queries: str | None = order.ANY) -> str:
    """One line a backend, the first choice first: usable, chosen and why, or why not."""
    ranked, because = ranking(device, dtype, head_dim, queries)
    refusals = {name: refusal(name, device, dtype, head_dim) for name in ranked}
    best = next(name for name in ranked if refusals[name] is None)
    if because and best != ranked[0]:
        because = f"{ranked[0]} comes first where it can"
    insisted = os.environ.get("STAT_BACKEND") or None
    lines = []
    for name, reason in refusals.items():
        state = "usable" if reason is None else f"not usable: {reason}"
        if name == insisted:
            state += ", insisted on by STAT_BACKEND"
        elif name == best and insisted is None:
            state += f", chosen ({because})" if because else ", chosen"
        elif reason is None and insisted is None:
            state += f", but {best} comes first"
        lines.append(f"{name:<10} {state}")
    return "\n".join(lines)

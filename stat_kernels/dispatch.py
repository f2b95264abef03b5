"""Which backend computes a call: the best usable one, or the one insisted on, or a sentence."""

import os

import torch

from stat_kernels import backends

REFERENCE = "reference"


def names() -> tuple[str, ...]:
    """Every backend's name, the reference last."""
    return (*backends.NAMES, REFERENCE)


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


def choose(requested: str | None, device: str, dtype: torch.dtype, head_dim: int) -> str:
    """The backend of a call.

    Args:
        requested: the caller's ``backend=``; None looks at STAT_BACKEND, then takes the best.
        device, dtype, head_dim: as in :func:`refusal`.

    Raises:
        ValueError: the name is not a backend's.
        RuntimeError: the backend was insisted on and cannot take the call.
    """
    source = "backend"
    if requested is None and os.environ.get("STAT_BACKEND"):
        requested, source = os.environ["STAT_BACKEND"], "STAT_BACKEND"
    if requested is None:
        usable = (n for n in names() if refusal(n, device, dtype, head_dim) is None)
        return next(usable)
    if requested not in names():
        raise ValueError(f"{source} must be one of {', '.join(names())}, got {requested!r}")
    reason = refusal(requested, device, dtype, head_dim)
    if reason is not None:
        raise RuntimeError(f"{source}={requested!r} cannot take this call: {reason}")
    return requested


# Constant for the compiler: the answer depends on the machine and on what was built, not on values.
# torch.compiler.assume_constant_result sets this very mark, but imports the compiler for it (1 s).
choose._dynamo_marked_constant = True


def report(device: str, dtype: torch.dtype, head_dim: int) -> str:
    """One line a backend: usable, or why not."""
    lines = []
    for name in names():
        reason = refusal(name, device, dtype, head_dim)
        lines.append(f"{name:<10} {'usable' if reason is None else 'not usable: ' + reason}")
    return "\n".join(lines)

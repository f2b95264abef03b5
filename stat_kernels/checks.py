"""Validation of the operation's arguments: one sentence with what was expected and found."""

import math
from numbers import Real

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_arguments(
    q: Tensor,
    k_cur: Tensor,
    v_cur: Tensor,
    k_short: Tensor | None,
    v_short: Tensor | None,
    k_long: Tensor | None,
    v_long: Tensor | None,
    window: int,
    scale: float | None,
) -> None:
    """Raises TypeError or ValueError unless the arguments are a shrinking temporal attention."""
    named = {
        "q": q,
        "k_cur": k_cur,
        "v_cur": v_cur,
        "k_short": k_short,
        "v_short": v_short,
        "k_long": k_long,
        "v_long": v_long,
    }
    for name, tensor in named.items():
        optional = name not in ("q", "k_cur", "v_cur")
        if not isinstance(tensor, Tensor) and not (optional and tensor is None):
            what = "a torch.Tensor or None" if optional else "a torch.Tensor"
            raise TypeError(f"{name} must be {what}, got {type(tensor).__name__}")
    for key, value in (("k_short", "v_short"), ("k_long", "v_long")):
        if (named[key] is None) != (named[value] is None):
            given, missing = (value, key) if named[key] is None else (key, value)
            raise ValueError(f"{key} and {value} come together: {given} was given, {missing} not")
    _check_shapes(named)
    _check_dtypes_and_devices(named)
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"window must be an int, got {type(window).__name__}")
    if window < 1 or window % 2 == 0:
        raise ValueError(
            f"window must be odd and at least 1 (the frame itself and as many neighbours on "
            f"either side), got {window}"
        )
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, Real):
            raise TypeError(f"scale must be a float or None, got {type(scale).__name__}")
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")


def _check_shapes(named: dict[str, Tensor | None]) -> None:
    q = named["q"]
    if q.dim() != 5:
        raise ValueError(f"q must be (B, T, Nq, H, D), got {tuple(q.shape)}")
    b, t, _, h, d = q.shape
    if t < 1 or h < 1 or d < 1:
        raise ValueError(f"q must have at least one frame, head and channel, got {tuple(q.shape)}")
    for name, axis in (("k_cur", "Nc"), ("k_short", "Ns")):
        tensor = named[name]
        if tensor is None:
            continue
        if tensor.dim() != 5 or (*tensor.shape[:2], *tensor.shape[3:]) != (b, t, h, d):
            raise ValueError(
                f"{name} must be (B, T, {axis}, H, D) with B, T, H, D as in q "
                f"({b}, {t}, ..., {h}, {d}), got {tuple(tensor.shape)}"
            )
        if tensor.shape[2] < 1:
            raise ValueError(f"{name} must hold at least one token a frame, got none")
    k_long = named["k_long"]
    if k_long is not None:
        if k_long.dim() != 4 or (k_long.shape[0], *k_long.shape[2:]) != (b, h, d):
            raise ValueError(
                f"k_long must be (B, L, H, D) with B, H, D as in q "
                f"({b}, ..., {h}, {d}), got {tuple(k_long.shape)}"
            )
        if k_long.shape[1] < 1:
            raise ValueError("k_long must hold at least one token, got none")
    for part in ("cur", "short", "long"):
        key, value = named[f"k_{part}"], named[f"v_{part}"]
        if key is not None and key.shape != value.shape:
            raise ValueError(
                f"v_{part} must have the shape of k_{part} {tuple(key.shape)}, "
                f"got {tuple(value.shape)}"
            )


def _check_dtypes_and_devices(named: dict[str, Tensor | None]) -> None:
    q = named["q"]
    if q.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"q must be one of {names}, got {q.dtype}")
    for name, tensor in named.items():
        if tensor is None:
            continue
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {tensor.device}")
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} must be a dense strided tensor, got {tensor.layout}")

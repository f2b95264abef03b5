"""Validation of the operation's arguments: one sentence with what was expected and found."""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

LARGEST = 2**63 - 1  # an operator's integers have 64 bits
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_arguments(
    q: Tensor,
    k_cur: Tensor,
    v_cur: Tensor,
    k_short: Tensor | None,
    v_short: Tensor | None,
    k_long: Tensor | None,
    v_long: Tensor | None,
    window: int | tuple[int, int],
    scale: float | None,
    frame_offset: int = 0,
    causal_long: bool = False,
) -> None:
    """Raises TypeError or ValueError unless the arguments are a shrinking temporal attention."""
    named: dict[str, Any] = {
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
    _check_frames(named, frame_offset, causal_long)
    _check_dtypes_and_devices(named)
    check_window(window)
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, Real):
            raise TypeError(f"scale must be a float or None, got {type(scale).__name__}")
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")


def check_window(window: int | tuple[int, int]) -> None:
    """Raises TypeError or ValueError unless this is an odd int or a pair (left, right)."""
    counts = window if isinstance(window, (tuple, list)) else (window, window)
    if len(counts) != 2 or not all(_is_int(count) for count in counts):
        raise TypeError(
            f"window must be an int or a pair of ints (left, right), got {type(window).__name__} "
            f"{window!r}"
        )
    if not isinstance(window, int) and min(counts) < 0:
        raise ValueError(f"window must be a pair of neighbours' numbers from 0 on, got {window}")
    if isinstance(window, int) and (window < 1 or window % 2 == 0):
        raise ValueError(
            f"window must be odd and at least 1 (the frame itself and as many neighbours on "
            f"either side), got {window}"
        )
    if max(counts) > LARGEST:
        raise ValueError(f"window must be below 2**63, got {window}")


def window_pair(window: int | tuple[int, int]) -> tuple[int, int]:
    """How many frames before and after its own a frame reads, of a checked window."""
    left, right = window if isinstance(window, (tuple, list)) else (window // 2, window // 2)
    return left, right


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_frames(named: dict[str, Any], frame_offset: int, causal_long: bool) -> None:
    """Whether the short and long keys have the frames that the queries are said to be."""
    if not _is_int(frame_offset):
        raise TypeError(f"frame_offset must be an int, got {type(frame_offset).__name__}")
    if not isinstance(causal_long, bool):
        raise TypeError(f"causal_long must be a bool, got {type(causal_long).__name__}")
    if frame_offset < 0:
        raise ValueError(f"frame_offset must be at least 0, got {frame_offset}")
    t, k_short, k_long = named["q"].shape[1], named["k_short"], named["k_long"]
    if causal_long and k_long is None:
        raise ValueError("causal_long needs long keys, got k_long=None")
    if k_short is not None:
        name, frames = "k_short", k_short.shape[1]
    elif causal_long:
        name, frames = "k_long", k_long.shape[1]
    else:
        name, frames = "q", t
    if frame_offset + t > frames:
        raise ValueError(
            f"frame_offset + T must be at most the {frames} frames of {name}, got "
            f"{frame_offset} + {t}"
        )
    if causal_long and k_long.shape[1] != frames:
        raise ValueError(
            f"k_long must hold one token for each of the {frames} frames of k_short where "
            f"causal_long=True, got {k_long.shape[1]}"
        )


def _check_shapes(named: dict[str, Any]) -> None:
    q = named["q"]
    if q.dim() != 5:
        raise ValueError(f"q must be (B, T, Nq, H, D), got {tuple(q.shape)}")
    b, t, _, h, d = q.shape
    if t < 1 or h < 1 or d < 1:
        raise ValueError(f"q must have at least one frame, head and channel, got {tuple(q.shape)}")
    k_cur, k_short = named["k_cur"], named["k_short"]
    if k_cur.dim() != 5 or (*k_cur.shape[:2], *k_cur.shape[3:]) != (b, t, h, d):
        raise ValueError(
            f"k_cur must be (B, T, Nc, H, D) with B, T, H, D as in q "
            f"({b}, {t}, ..., {h}, {d}), got {tuple(k_cur.shape)}"
        )
    if k_short is not None and (
        k_short.dim() != 5 or (k_short.shape[0], *k_short.shape[3:]) != (b, h, d)
    ):
        raise ValueError(
            f"k_short must be (B, S, Ns, H, D) with B, H, D as in q "
            f"({b}, ..., {h}, {d}), got {tuple(k_short.shape)}"
        )
    for name in ("k_cur", "k_short"):
        if named[name] is not None and named[name].shape[2] < 1:
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


def _check_dtypes_and_devices(named: dict[str, Any]) -> None:
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


def check_pooling(
    tokens: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    grid: tuple[int, int],
    stride: int,
    short_stride: int | None,
    class_token: bool,
    long: str,
    eps: float,
) -> None:
    """Raises TypeError or ValueError unless the arguments are a pooling of tokens."""
    named = {
        "tokens": tokens,
        "weight": weight,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
    }
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(f"{name} must be one of {names}, got {tensor.dtype}")
        if tensor.device != tokens.device:
            raise ValueError(
                f"{name} must be on the tokens' device {tokens.device}, got {tensor.device}"
            )
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} must be a dense strided tensor, got {tensor.layout}")
    if norm_bias.dtype != norm_weight.dtype:
        raise TypeError(
            f"norm_bias must have norm_weight's dtype {norm_weight.dtype}, got {norm_bias.dtype}"
        )
    for name, value in (("stride", stride), ("short_stride", short_stride)):
        optional = name == "short_stride"
        if not _is_count(value) and not (optional and value is None):
            what = "an int of at least 1 or None" if optional else "an int of at least 1"
            raise ValueError(f"{name} must be {what}, got {value!r}")
    if not isinstance(grid, (tuple, list)) or len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"grid must be (height, width), two ints of at least 1, got {grid!r}")
    _check_long(long, class_token)
    if isinstance(eps, bool) or not isinstance(eps, Real) or not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a finite number of at least 0, got {eps!r}")
    _check_pooling_shapes(named, tuple(grid), bool(class_token))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_long(long: str, class_token: bool) -> None:
    if long not in ("class", "mean", "none"):
        raise ValueError(f"long must be one of 'class', 'mean', 'none', got {long!r}")
    if long == "class" and not class_token:
        raise ValueError("long must be 'mean' or 'none' without a class token, got 'class'")


def _check_pooling_shapes(
    named: dict[str, Tensor], grid: tuple[int, int], class_token: bool
) -> None:
    tokens, weight = named["tokens"], named["weight"]
    if tokens.dim() != 5:
        raise ValueError(f"tokens must be (B, T, N, H, D), got {tuple(tokens.shape)}")
    _, t, n, h, d = tokens.shape
    if t < 1 or h < 1 or d < 1:
        raise ValueError(
            f"tokens must have at least one frame, head and channel, got {tuple(tokens.shape)}"
        )
    expected = grid[0] * grid[1] + class_token
    if n != expected:
        what = "a class token and " if class_token else ""
        raise ValueError(
            f"tokens must hold {expected} tokens a frame, {what}the {grid[0]} x {grid[1]} grid's, "
            f"got {n} in {tuple(tokens.shape)}"
        )
    if weight.dim() != 5 or tuple(weight.shape[:2]) != (d, 1):
        raise ValueError(
            f"weight must be (D, 1, kt, kh, kw) with D {d} as in tokens, got {tuple(weight.shape)}"
        )
    if any(size % 2 == 0 for size in weight.shape[2:]):
        raise ValueError(
            f"weight must have odd kernel sizes (time, height, width), got "
            f"{tuple(weight.shape[2:])}"
        )
    for name in ("norm_weight", "norm_bias"):
        if tuple(named[name].shape) != (d,):
            raise ValueError(f"{name} must be ({d},), got {tuple(named[name].shape)}")


def check_bias(x: Tensor, bias: Tensor) -> None:
    """Raises TypeError or ValueError unless bias is one for the last axis of x."""
    _check_floating("x", x, x)
    _check_floating("bias", bias, x)
    if x.dim() < 1:
        raise ValueError("x must be (..., C), got a scalar")
    if tuple(bias.shape) != (x.shape[-1],):
        raise ValueError(f"bias must be ({x.shape[-1]},) as x's last axis, got {tuple(bias.shape)}")


def check_residual(skip: Tensor, x: Tensor, bias: Tensor, scale: Tensor | None) -> None:
    """Raises TypeError or ValueError unless the arguments are a bias and a residual."""
    check_bias(x, bias)
    _check_floating("skip", skip, x)
    if x.dim() < 2:
        raise ValueError(f"x must be (B, ..., C), got {tuple(x.shape)}")
    if skip.shape != x.shape:
        raise ValueError(f"skip must have x's shape {tuple(x.shape)}, got {tuple(skip.shape)}")
    if scale is None:
        return
    _check_floating("scale", scale, x)
    if tuple(scale.shape) != (x.shape[0],):
        raise ValueError(f"scale must be ({x.shape[0]},), one a clip, got {tuple(scale.shape)}")
    if scale.requires_grad:
        raise ValueError("scale must not require a gradient: none is computed for it")


def _check_floating(name: str, tensor: Tensor, x: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name} must be one of {names}, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} must be a dense strided tensor, got {tensor.layout}")

"""The public functions: validation, autocast, choice of a backend, one call."""

import operator
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor

from stat_kernels import dispatch, ops, pool_ops
from stat_kernels.checks import check_arguments, check_pooling, window_pair
from stat_kernels.pool_layout import pool_layout
from stat_kernels.reference import (
    pool_tokens_reference,
    shrinking_temporal_attention_reference,
)

Tensors = TypeVar("Tensors", bound=tuple[Tensor | None, ...])


@overload
def shrinking_temporal_attention(
    q: Tensor, k_cur: Tensor, v_cur: Tensor, k_short: Tensor | None = ...,
    v_short: Tensor | None = ..., k_long: Tensor | None = ..., v_long: Tensor | None = ...,
    *, window: int | tuple[int, int] = ..., scale: float | None = ..., frame_offset: int = ...,
    causal_long: bool = ..., backend: str | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def shrinking_temporal_attention(
    q: Tensor, k_cur: Tensor, v_cur: Tensor, k_short: Tensor | None = ...,
    v_short: Tensor | None = ..., k_long: Tensor | None = ..., v_long: Tensor | None = ...,
    *, window: int | tuple[int, int] = ..., scale: float | None = ..., frame_offset: int = ...,
    causal_long: bool = ..., backend: str | None = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def shrinking_temporal_attention(
    q: Tensor, k_cur: Tensor, v_cur: Tensor, k_short: Tensor | None = ...,
    v_short: Tensor | None = ..., k_long: Tensor | None = ..., v_long: Tensor | None = ...,
    *, window: int | tuple[int, int] = ..., scale: float | None = ..., frame_offset: int = ...,
    causal_long: bool = ..., backend: str | None = ..., return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def shrinking_temporal_attention(
    q: Tensor,
    k_cur: Tensor,
    v_cur: Tensor,
    k_short: Tensor | None = None,
    v_short: Tensor | None = None,
    k_long: Tensor | None = None,
    v_long: Tensor | None = None,
    *,
    window: int | tuple[int, int] = 7,
    scale: float | None = None,
    frame_offset: int = 0,
    causal_long: bool = False,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Shrinking temporal attention (STAT, AAAI 2022, eq. 4-8) without repeated keys in memory.

    Every query of frame i attends, in one softmax, to the keys of its own frame, to the coarser
    keys of the ``window // 2`` frames on either side, and to one key a frame of the whole clip.
    Neighbours outside the clip contribute no keys.

    Args:
        q: (B, T, Nq, H, D) queries.
        k_cur, v_cur: (B, T, Nc, H, D) keys and values of the same frame.
        k_short, v_short: (B, S, Ns, H, D) keys and values read for the neighbour frames, or None;
            S = T unless they hold frames that q does not, see ``frame_offset``.
        k_long, v_long: (B, L, H, D) keys and values of the whole clip, or None; L need not be T.
        window: t_o of the paper, odd: the frame itself and ``window // 2`` neighbours either side;
            or a pair (left, right), how many neighbours before and after it.
        scale: factor of the scores; None is ``D ** -0.5``.
        frame_offset: frame i of q is frame ``i + frame_offset`` of k_short, at most S - T. A
            process that has some frames of a clip needs the other frames' short keys only within
            the window.
        causal_long: frame i reads the long keys up to its own only, ``k_long[:, : i +
            frame_offset + 1]``; L = S then. Without a short part, frames are counted in k_long.
        backend: None for the best usable one, or a name to insist on (see `explain`).
        return_lse: also return the logsumexp of the scaled scores; it is differentiable.

    Any strides; float32, float16, bfloat16 (sums in float32) or float64, one dtype for all. Under
    autocast the inputs are cast to the autocast dtype.

    Returns:
        out (B, T, Nq, H, D), contiguous, in q's dtype; with ``return_lse`` also lse (B, T, H, Nq)
        in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument is off; the message names it.
        RuntimeError: the backend insisted on cannot take the call; the message says why.
    """
    tensors = cast_for_autocast((q, k_cur, v_cur, k_short, v_short, k_long, v_long))
    check_arguments(*tensors, window, scale, frame_offset, causal_long)
    q = tensors[0]
    head_dim = operator.index(q.shape[-1])  # one number, also where a compiler traces free sizes
    scale = head_dim**-0.5 if scale is None else float(scale)
    queries = dispatch.size_class(str(q.device), q.shape[2])
    name = dispatch.choose(backend, str(q.device), q.dtype, head_dim, queries)
    if name == dispatch.REFERENCE:
        out, lse = shrinking_temporal_attention_reference(
            *tensors, window=window, scale=scale, frame_offset=frame_offset, causal_long=causal_long
        )
    else:
        reach = (*window_pair(window), frame_offset, causal_long)
        out, lse = ops.sta_forward(*tensors, *reach, scale, name)
    return (out, lse) if return_lse else out


def pool_tokens(
    tokens: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    grid: tuple[int, int],
    stride: int = 1,
    short_stride: int | None = 2,
    class_token: bool = True,
    long: str | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Pools a frame's tokens to three granularities (STAT, AAAI 2022, eq. 2, 3 and 6).

    ``current`` is a depthwise convolution of the spatial tokens, with the same weights for all
    heads and a padding of half the kernel, followed by a LayerNorm over the head dim. ``short`` is
    an average pooling of it; a window that the grid's edge cuts is averaged over what it holds.
    ``long`` is one token a frame: the class token after the LayerNorm, or the mean of ``current``.

    Args:
        tokens: (B, T, N, H, D), N = class_token + h * w; a class token comes first.
        weight: (D, 1, kt, kh, kw) of the convolution, odd sizes.
        norm_weight, norm_bias: (D,) of the LayerNorm.
        grid: (h, w) of the spatial tokens.
        stride: of the convolution, along height and width.
        short_stride: of the average pooling; None for no short tokens.
        class_token: whether each frame has one.
        long: "class", "mean" or "none"; None is "class" where there is a class token, else "none".
        eps: of the LayerNorm.
        backend: None for the best usable one, or a name to insist on.

    Tokens may have any strides and be float32, float16, bfloat16 or float64; sums are in float32
    (float64 for float64) and each result is rounded once. The parameters may have another dtype
    than the tokens. Under autocast the tokens are cast to the autocast dtype, the parameters are
    not.

    Returns:
        current (B, T, Nc, H, D), short (B, T, Ns, H, D) or None, long (B, T, H, D) or None, in the
        dtype of the tokens. The kernels return views of one buffer (B, T, 1 + Nc + Ns, H, D).

    Raises:
        TypeError, ValueError: an argument is off; the message names it.
        RuntimeError: the backend insisted on cannot take the call; the message says why.
    """
    (tokens,) = cast_for_autocast((tokens,))
    long = ("class" if class_token else "none") if long is None else long
    check_pooling(
        tokens, weight, norm_weight, norm_bias,
        grid, stride, short_stride, class_token, long, eps,
    )  # fmt: skip
    name = dispatch.choose(backend, **_pooling_call(tokens, weight, stride))
    if name == dispatch.REFERENCE:
        return pool_tokens_reference(
            tokens, weight, norm_weight, norm_bias,
            grid=grid, stride=stride, short_stride=short_stride, class_token=class_token,
            long=long, eps=eps,
        )  # fmt: skip
    pooled, _ = pool_ops.pool_forward(
        tokens, weight, norm_weight, norm_bias,
        grid, stride, short_stride, bool(class_token), long, float(eps), name,
    )  # fmt: skip
    return pool_layout(grid, stride, short_stride, long).split(pooled)


def explain_pooling(tokens: Tensor, weight: Tensor, *, stride: int = 1) -> str:
    """One line a backend: usable for such a call of `pool_tokens`, or why not.

    Args:
        tokens, weight, stride: as in `pool_tokens`; nothing else of a call matters.
    """
    (tokens,) = cast_for_autocast((tokens,))
    return dispatch.report(**_pooling_call(tokens, weight, stride))


def _pooling_call(tokens: Tensor, weight: Tensor, stride: int) -> dict[str, Any]:
    """What the choice of a backend depends on."""
    return {
        "device": str(tokens.device),
        "dtype": tokens.dtype,
        "head_dim": operator.index(tokens.shape[-1]),
        "pooling": (tuple(weight.shape[2:]), stride),
    }


def explain(
    q: Tensor,
    k_cur: Tensor,
    v_cur: Tensor,
    k_short: Tensor | None = None,
    v_short: Tensor | None = None,
    k_long: Tensor | None = None,
    v_long: Tensor | None = None,
    *,
    window: int | tuple[int, int] = 7,
    scale: float | None = None,
    frame_offset: int = 0,
    causal_long: bool = False,
) -> str:
    """One line a backend: usable for such a call, or the one sentence why not.

    Takes the arguments of `shrinking_temporal_attention` and raises as it does.
    """
    tensors = cast_for_autocast((q, k_cur, v_cur, k_short, v_short, k_long, v_long))
    check_arguments(*tensors, window, scale, frame_offset, causal_long)
    q = tensors[0]
    queries = dispatch.size_class(str(q.device), q.shape[2])
    return dispatch.report(str(q.device), q.dtype, q.shape[-1], queries)


def cast_for_autocast(tensors: Tensors) -> Tensors:
    """Casts as autocast casts a matrix product: every floating tensor but float64."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "meta"
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor | None) -> Tensor | None:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return tensor
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    return tuple(cast(tensor) for tensor in tensors)  # type: ignore[return-value]

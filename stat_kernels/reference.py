"""The specification in plain PyTorch: attention with every repeated key, pooling, MLP parts.

This file is the oracle that every kernel is tested against (run in float64) and the eager peer that
the benchmarks compare with. It favours the paper's notation over speed and over memory.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def shrinking_temporal_attention_reference(
    q: Tensor,
    k_cur: Tensor,
    v_cur: Tensor,
    k_short: Tensor | None = None,
    v_short: Tensor | None = None,
    k_long: Tensor | None = None,
    v_long: Tensor | None = None,
    *,
    window: int | tuple[int, int],
    scale: float,
    frame_offset: int = 0,
    causal_long: bool = False,
) -> tuple[Tensor, Tensor]:
    """Equations 4 to 8 of the STAT paper, one softmax a query over three kinds of keys.

    For clip b, frame i and head h, with ``l, r = window // 2, window // 2``::

        K(i)   = k_cur[b, i] ++ k_short[b, j] for j in i-l .. i+r, j != i, 0 <= j < T ++ k_long[b]
        S      = scale * q[b, i] K(i)^T             (eq. 8; scale is 1/sqrt(D) by default)
        out    = softmax(S) V(i)
        lse    = log(sum(exp(S)))

    A neighbour outside the clip contributes no keys: its scores are masked to -inf. Not in the
    paper: a window that is not symmetric, queries of some frames of the clip, and long keys that
    are read up to the frame itself only.

    Args:
        q: (B, T, Nq, H, D) queries, any floating dtype, any device.
        k_cur, v_cur: (B, T, Nc, H, D) tokens of the same frame.
        k_short, v_short: (B, S, Ns, H, D) coarser tokens, read for the neighbour frames only;
            S = T, or more with ``frame_offset``.
        k_long, v_long: (B, L, H, D) one token a frame of the whole clip.
        window: t_o of the paper, odd, or (l, r).
        scale: factor of the scores.
        frame_offset: frame i of q is frame ``i + frame_offset`` of the short keys (and of the long
            ones, where these are causal).
        causal_long: mask the long keys after a frame's own; L = S.

    Returns:
        out (B, T, Nq, H, D) in q's dtype and lse (B, T, H, Nq) in float32 (float64 for float64).
        Scores and sums are in q's dtype, the softmax in float32, as an eager model computes them.
    """
    left, right = window if isinstance(window, (tuple, list)) else (window // 2, window // 2)
    own = torch.arange(q.shape[1], device=q.device)[:, None] + frame_offset  # (T, 1)
    keys, values = [k_cur], [v_cur]
    masks = [k_cur.new_zeros(q.shape[1], k_cur.shape[2], dtype=torch.bool)]  # (T, Nc)
    if k_short is not None:
        frames, absent = _neighbours(own, k_short.shape[1], left, right)  # both (T, l + r)
        keys.append(k_short[:, frames].flatten(2, 3))  # (B, T, (l + r) * Ns, H, D)
        values.append(v_short[:, frames].flatten(2, 3))  # type: ignore[index]
        masks.append(absent.repeat_interleave(k_short.shape[2], dim=1))
    if k_long is not None:  # eq. 4 to 6: expand, then one copy a frame
        keys.append(k_long[:, None].expand(-1, q.shape[1], -1, -1, -1))
        values.append(v_long[:, None].expand(-1, q.shape[1], -1, -1, -1))  # type: ignore[index]
        later = torch.arange(k_long.shape[1], device=q.device) > own  # (T, L)
        masks.append(later if causal_long else torch.zeros_like(later))
    k_all, v_all = torch.cat(keys, dim=2), torch.cat(values, dim=2)  # eq. 7: (B, T, M, H, D)
    mask = torch.cat(masks, dim=1)[:, None, None, :]  # (T, 1, 1, M), True where there is no key

    scores = torch.einsum("btqhd,btkhd->bthqk", q * scale, k_all)
    scores = scores.masked_fill(mask, float("-inf"))
    accumulate = torch.promote_types(q.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=accumulate).to(q.dtype)
    out = torch.einsum("bthqk,btkhd->btqhd", weights, v_all).contiguous()
    return out, scores.to(accumulate).logsumexp(dim=-1)


def _neighbours(own: Tensor, num_frames: int, left: int, right: int) -> tuple[Tensor, Tensor]:
    """Every frame's neighbours, and whether they lie outside the clip's S; both (T, l + r).

    A window wider than the clip is cut to it: frames further away than S - 1 do not exist.
    """
    left, right = min(left, num_frames - 1), min(right, num_frames - 1)
    offsets = [o for o in range(-left, right + 1) if o != 0]
    frames = own + torch.tensor(offsets, dtype=torch.long, device=own.device)
    return frames.clamp(0, num_frames - 1), (frames < 0) | (frames >= num_frames)


def pool_tokens_reference(
    tokens: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    grid: tuple[int, int],
    stride: int,
    short_stride: int | None,
    class_token: bool,
    long: str,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Equations 2, 3 and 6: tokens of one frame pooled to three granularities.

    For clip b, frame t and head h, with the same weights for all heads::

        y       = depthwise convolution of the spatial tokens, zero padding of half the kernel
        z       = (y - mean(y)) / sqrt(var(y) + eps) * norm_weight + norm_bias       over D
        current = z
        short   = averages of z over cells of short_stride x short_stride positions; a cell that the
                  grid's edge cuts is averaged over what it holds
        long    = the class token, normalised as y is, or the mean of z over all positions

    Everything is computed in float32 (float64 for float64) from the inputs' exact values and is
    rounded once, when it is written: short and the mean come from the unrounded z.

    Args:
        tokens: (B, T, N, H, D), N = class_token + h * w, any floating dtype, any device.
        weight: (D, 1, kt, kh, kw), odd sizes; this and the norm's may have another floating dtype.
        norm_weight, norm_bias: (D,).
        grid: (h, w) of the spatial tokens.
        stride: along height and width; along time it is 1.
        short_stride: None for no short tokens.
        class_token: whether each frame's first token is one; the convolution does not read it.
        long: "class", "mean" or "none".
        eps: of the LayerNorm.

    Returns:
        current (B, T, Nc, H, D), short (B, T, Ns, H, D) or None, long (B, T, H, D) or None, all in
        the dtype of ``tokens``.
    """
    accumulate = torch.promote_types(tokens.dtype, torch.float32)
    x, weight, norm_weight, norm_bias = (
        a.to(accumulate) for a in (tokens, weight, norm_weight, norm_bias)
    )
    video = x[:, :, int(class_token) :].unflatten(2, grid)  # (B, T, h, w, H, D)
    y = _depthwise_convolution(video, weight, stride)  # (B, T, h', w', H, D)
    z = F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, eps)
    current, short = z.flatten(2, 3), None
    if short_stride is not None:
        images = z.flatten(4).permute(0, 1, 4, 2, 3).flatten(0, 1)  # (B * T, H * D, h', w')
        images = F.avg_pool2d(images, short_stride, ceil_mode=True, count_include_pad=False)
        short = images.flatten(2).transpose(1, 2).reshape(*x.shape[:2], -1, *x.shape[3:])
    pooled_long = None
    if long == "class":
        pooled_long = F.layer_norm(x[:, :, 0], y.shape[-1:], norm_weight, norm_bias, eps)
    elif long == "mean":
        pooled_long = current.mean(2)
    results = (current, short, pooled_long)
    return tuple(None if r is None else r.to(tokens.dtype) for r in results)  # type: ignore[return-value]


def _depthwise_convolution(video: Tensor, weight: Tensor, stride: int) -> Tensor:
    """(B, T, h, w, H, D) -> (B, T, h', w', H, D): a sum of shifted copies, one for each tap."""
    frames, height, width = video.shape[1:4]
    kt, kh, kw = sizes = weight.shape[2:]
    padding = [half for size in reversed(sizes) for half in (size // 2, size // 2)]
    padded = F.pad(video, (0, 0, 0, 0, *padding))
    return sum(  # type: ignore[return-value]
        padded[:, t : t + frames, i : i + height : stride, j : j + width : stride]
        * weight[:, 0, t, i, j]
        for t, i, j in itertools.product(range(kt), range(kh), range(kw))
    )


def bias_gelu_reference(x: Tensor, bias: Tensor) -> Tensor:
    """``gelu(x + bias)`` with the exact GELU, z * Phi(z), of torch.nn.GELU.

    Computed in float32 (float64 for float64) from the inputs' exact values and rounded once.

    Args:
        x: (..., C), any floating dtype, any device.
        bias: (C,), of any floating dtype.

    Returns:
        (..., C) in the dtype of x.
    """
    accumulate = torch.promote_types(x.dtype, torch.float32)
    return F.gelu(x.to(accumulate) + bias.to(accumulate)).to(x.dtype)


def bias_residual_reference(skip: Tensor, x: Tensor, bias: Tensor, scale: Tensor | None) -> Tensor:
    """``skip + scale * (x + bias)``, rounded as `bias_gelu_reference` is.

    Args:
        skip, x: (B, ..., C), any floating dtypes, any device.
        bias: (C,).
        scale: (B,), a factor for each clip, or None.

    Returns:
        (B, ..., C) in the wider dtype of skip and x.
    """
    accumulate = torch.promote_types(x.dtype, torch.float32)
    branch = x.to(accumulate) + bias.to(accumulate)
    if scale is not None:
        branch = branch * scale.to(accumulate).view(-1, *[1] * (x.dim() - 1))
    return (skip + branch).to(torch.promote_types(skip.dtype, x.dtype))

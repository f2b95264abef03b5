"""The specification: shrinking temporal attention in plain PyTorch, every repeated key written out.

This file is the oracle that every kernel is tested against (run in float64) and the eager peer that
the benchmarks compare with. It favours the paper's notation over speed and over memory.
"""

import torch
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
        values.append(v_short[:, frames].flatten(2, 3))
        masks.append(absent.repeat_interleave(k_short.shape[2], dim=1))
    if k_long is not None:  # eq. 4 to 6: expand, then one copy a frame
        keys.append(k_long[:, None].expand(-1, q.shape[1], -1, -1, -1))
        values.append(v_long[:, None].expand(-1, q.shape[1], -1, -1, -1))
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

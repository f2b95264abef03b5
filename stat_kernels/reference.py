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
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Equations 4 to 8 of the STAT paper, one softmax a query over three kinds of keys.

    For clip b, frame i and head h, with ``r = window // 2``::

        K(i)   = k_cur[b, i] ++ k_short[b, j] for j in i-r .. i+r, j != i, 0 <= j < T ++ k_long[b]
        S      = scale * q[b, i] K(i)^T             (eq. 8; scale is 1/sqrt(D) by default)
        out    = softmax(S) V(i)
        lse    = log(sum(exp(S)))

    A neighbour outside the clip contributes no keys: its scores are masked to -inf.

    Args:
        q: (B, T, Nq, H, D) queries, any floating dtype, any device.
        k_cur, v_cur: (B, T, Nc, H, D) tokens of the same frame.
        k_short, v_short: (B, T, Ns, H, D) coarser tokens, read for the neighbour frames only.
        k_long, v_long: (B, L, H, D) one token a frame of the whole clip.
        window: t_o of the paper, odd.
        scale: factor of the scores.

    Returns:
        out (B, T, Nq, H, D) in q's dtype and lse (B, T, H, Nq) in float32 (float64 for float64).
        Scores and sums are in q's dtype, the softmax in float32, as an eager model computes them.
    """
    keys, values = [k_cur], [v_cur]
    masks = [k_cur.new_zeros(q.shape[1], k_cur.shape[2], dtype=torch.bool)]  # (T, Nc)
    if k_short is not None:
        frames, absent = _neighbours(q.shape[1], window, q.device)  # both (T, 2r)
        keys.append(k_short[:, frames].flatten(2, 3))  # (B, T, 2r * Ns, H, D)
        values.append(v_short[:, frames].flatten(2, 3))
        masks.append(absent.repeat_interleave(k_short.shape[2], dim=1))
    if k_long is not None:  # eq. 4 to 6: expand, then one copy a frame
        keys.append(k_long[:, None].expand(-1, q.shape[1], -1, -1, -1))
        values.append(v_long[:, None].expand(-1, q.shape[1], -1, -1, -1))
        masks.append(k_long.new_zeros(q.shape[1], k_long.shape[1], dtype=torch.bool))
    k_all, v_all = torch.cat(keys, dim=2), torch.cat(values, dim=2)  # eq. 7: (B, T, M, H, D)
    mask = torch.cat(masks, dim=1)[:, None, None, :]  # (T, 1, 1, M), True where there is no key

    scores = torch.einsum("btqhd,btkhd->bthqk", q * scale, k_all)
    scores = scores.masked_fill(mask, float("-inf"))
    accumulate = torch.promote_types(q.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=accumulate).to(q.dtype)
    out = torch.einsum("bthqk,btkhd->btqhd", weights, v_all).contiguous()
    return out, scores.to(accumulate).logsumexp(dim=-1)


def _neighbours(num_frames: int, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Frame index of every frame's neighbours, and whether it lies outside the clip; both (T, 2r).

    A window wider than the clip is cut to it: frames further away than T - 1 do not exist.
    """
    radius = min(window // 2, num_frames - 1)
    offsets = [o for o in range(-radius, radius + 1) if o != 0]
    frames = torch.arange(num_frames, device=device)[:, None] + torch.tensor(
        offsets, dtype=torch.long, device=device
    )
    return frames.clamp(0, num_frames - 1), (frames < 0) | (frames >= num_frames)

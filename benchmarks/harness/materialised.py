"""Peers that materialise every frame's keys: the paper's own formulation, and SDPA on these keys.

All take the operation's seven inputs without repeats, so the cost of repeating keys is part of
their time. Each is written to be as fast as possible: one copy per key (the reference copies short
keys twice), masks made beforehand, and no logsumexp.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from stat_kernels.testing import Case

Attention = Callable[..., Tensor]  # the seven inputs -> out (B, T, Nq, H, D), any strides


def radius_of(case: Case) -> int:
    """Neighbours on either side that exist for some frame."""
    return min(case.window // 2, case.T - 1) if case.Ns else 0


def neighbour_offsets(case: Case) -> list[int]:
    """-r .. r without 0."""
    radius = radius_of(case)
    return [o for o in range(-radius, radius + 1) if o != 0]


def repeated(case: Case, cur: Tensor, short: Tensor | None, long: Tensor | None, pad: int = 0):
    """Every frame's keys or values, (B, T, M, H, D); zeros for neighbours outside the clip.

    Args:
        case: sizes.
        cur, short, long: keys or values as the operation takes them.
        pad: rows of zeros after the last key.
    """
    parts = [cur]
    radius = radius_of(case)
    if radius:
        padded = F.pad(short, (0, 0, 0, 0, 0, 0, radius, radius))
        parts += [padded[:, radius + o : radius + o + case.T] for o in neighbour_offsets(case)]
    if long is not None:
        parts.append(long[:, None].expand(-1, case.T, -1, -1, -1))
    if pad:
        parts.append(cur.new_zeros(()).expand(case.B, case.T, pad, case.H, case.D))
    return torch.cat(parts, dim=2)


def key_is_there(case: Case, pad: int = 0) -> Tensor:
    """(T, M) in the order of `repeated`: False where a frame has no such key."""
    frames = torch.arange(case.T)
    parts = [torch.ones(case.T, case.Nc, dtype=torch.bool)]
    for offset in neighbour_offsets(case):
        inside = (frames + offset >= 0) & (frames + offset < case.T)
        parts.append(inside[:, None].expand(-1, case.Ns))
    parts.append(torch.ones(case.T, case.L, dtype=torch.bool))
    parts.append(torch.zeros(case.T, pad, dtype=torch.bool))
    return torch.cat(parts, dim=1)


def eager(case: Case, device: str) -> Attention:
    """Equations 4 to 8: repeat, scores, mask, softmax in at least float32, weighted sum."""
    absent = ~key_is_there(case).to(device)[:, None, None, :]  # (T, 1, 1, M)
    scale = case.D**-0.5

    def attend(q, k_cur, v_cur, k_short, v_short, k_long, v_long):
        keys = repeated(case, k_cur, k_short, k_long)
        values = repeated(case, v_cur, v_short, v_long)
        scores = torch.einsum("btqhd,btkhd->bthqk", q * scale, keys)
        scores = scores.masked_fill(absent, float("-inf"))
        accumulate = torch.promote_types(q.dtype, torch.float32)
        weights = scores.softmax(dim=-1, dtype=accumulate).to(q.dtype)
        return torch.einsum("bthqk,btkhd->btqhd", weights, values)

    return attend


def sdpa_masked(case: Case, device: str) -> Attention:
    """One call for all frames; a mask hides the neighbours that border frames do not have."""
    keys = case.Nc + len(neighbour_offsets(case)) * case.Ns + case.L
    # the CUDA kernels with a mask want rows of 8: a few more keys are cheaper than their own copy
    pad = -keys % 8 if device == "cuda" else 0
    there = key_is_there(case, pad)[:, None, None, :]  # (T, 1, 1, M)
    there = there.expand(case.B, -1, -1, -1, -1).flatten(0, 1).to(device)
    # -inf and 0: PyTorch would write a mask of booleans out for every query
    mask = torch.zeros(there.shape, device=device).masked_fill(~there, float("-inf"))
    whole = bool(there.all())  # nothing to hide, so no mask

    def attend(q, k_cur, v_cur, k_short, v_short, k_long, v_long):
        keys = repeated(case, k_cur, k_short, k_long, pad)
        values = repeated(case, v_cur, v_short, v_long, pad)
        q, keys, values = (x.flatten(0, 1).transpose(1, 2) for x in (q, keys, values))
        attn_mask = None if whole else mask.to(q.dtype)
        if device == "cuda" and not whole:  # the CPU's kernel broadcasts, a compiler would write
            attn_mask = attn_mask.expand(-1, q.shape[1], q.shape[2], -1)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=attn_mask)
        return out.transpose(1, 2).unflatten(0, (case.B, case.T))

    return attend


def sdpa_grouped(case: Case, device: str) -> Attention:
    """No mask: frames with all their neighbours in one call, each border frame in its own."""
    radius = radius_of(case)
    interior = range(radius, case.T - radius)

    def frame_keys(i: int, cur: Tensor, short: Tensor | None, long: Tensor | None) -> Tensor:
        """(B, 1, M(i), H, D)"""
        parts = [cur[:, 0]]
        if radius:
            parts.append(short[:, max(i - radius, 0) : i].flatten(1, 2))
            parts.append(short[:, i + 1 : i + 1 + radius].flatten(1, 2))
        if long is not None:
            parts.append(long)
        return torch.cat(parts, dim=1)[:, None]

    def interior_keys(cur: Tensor, short: Tensor | None, long: Tensor | None) -> Tensor:
        """(B, T - 2r, M, H, D)"""
        first, last = interior.start, interior.stop
        parts = [cur]
        parts += [short[:, first + o : last + o] for o in neighbour_offsets(case)]
        if long is not None:
            parts.append(long[:, None].expand(-1, len(interior), -1, -1, -1))
        return torch.cat(parts, dim=2)

    def call(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        frames = q.shape[1]
        q, keys, values = (x.flatten(0, 1).transpose(1, 2) for x in (q, keys, values))
        out = F.scaled_dot_product_attention(q, keys, values)
        return out.transpose(1, 2).unflatten(0, (case.B, frames))

    # split, not slices: its gradient is one concatenation, a slice's is a tensor of zeros each
    sizes = [1] * min(radius, case.T) + [len(interior)] * (len(interior) > 0)
    sizes += [1] * (case.T - sum(sizes))

    def attend(q, k_cur, v_cur, k_short, v_short, k_long, v_long):
        outs, i = [], 0
        parts = (x.split(sizes, dim=1) for x in (q, k_cur, v_cur))
        for queries, keys, values in zip(*parts, strict=True):
            frames = queries.shape[1]
            if i in interior:
                keys = interior_keys(keys, k_short, k_long)
                values = interior_keys(values, v_short, v_long)
            else:
                keys = frame_keys(i, keys, k_short, k_long)
                values = frame_keys(i, values, v_short, v_long)
            outs.append(call(queries, keys, values))
            i += frames
        return torch.cat(outs, dim=1)

    return attend

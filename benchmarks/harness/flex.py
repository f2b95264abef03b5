"""Peer: FlexAttention over the unrepeated keys of the whole clip, with a block mask."""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.harness.materialised import Attention, radius_of
from stat_kernels.testing import Case

MASK_ELEMENTS = 250_000_000  # create_block_mask writes the whole mask out, in integers


def flex(case: Case, device: str) -> Attention:
    """Keys of all frames, current then short then long, in one sequence; the mask selects a
    frame's keys.

    Raises:
        NotImplementedError: the mask would not fit in memory while it is made.
    """
    block_mask = _block_mask(case, device)
    short = radius_of(case) > 0

    def whole(cur: Tensor, neighbours: Tensor | None, long: Tensor | None) -> Tensor:
        parts = [cur.flatten(1, 2)]
        parts += [neighbours.flatten(1, 2)] if short else []
        parts += [long] if long is not None else []
        return torch.cat(parts, dim=1).transpose(1, 2)  # (B, H, T * (Nc + Ns) + L, D)

    def attend(q, k_cur, v_cur, k_short, v_short, k_long, v_long):
        query = q.flatten(1, 2).transpose(1, 2)  # (B, H, T * Nq, D)
        keys, values = whole(k_cur, k_short, k_long), whole(v_cur, v_short, v_long)
        out = flex_attention(query, keys, values, block_mask=block_mask)
        return out.transpose(1, 2).unflatten(1, (case.T, case.Nq))

    return attend


def _block_mask(case: Case, device: str) -> BlockMask:
    radius = radius_of(case)
    cur_end = case.T * case.Nc
    short_end = cur_end + (case.T * case.Ns if radius else 0)
    queries, keys = case.T * case.Nq, short_end + case.L
    if queries * keys > MASK_ELEMENTS:
        raise NotImplementedError(f"its mask of {queries} x {keys} is too large to be made here")
    short_tokens = max(case.Ns, 1)

    def visible(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        frame = q_index // case.Nq
        cur = (k_index < cur_end) & (k_index // case.Nc == frame)
        distance = (k_index - cur_end) // short_tokens - frame
        short = (k_index >= cur_end) & (k_index < short_end)
        short = short & (distance != 0) & (distance.abs() <= radius)
        return cur | short | (k_index >= short_end)

    return create_block_mask(visible, None, None, queries, keys, device=device)

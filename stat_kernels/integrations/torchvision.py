"""torchvision's MViT (``mvit_v1_b``, ``mvit_v2_s``) with the fused layer: ``convert``."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stat_kernels.integrations.optional import require
from stat_kernels.integrations.tokens import TemporalAttentionConfig, sequence_attention

mvit = require("torchvision.models.video.mvit", "0.26")


def convert(
    model: nn.Module,
    window: int = 3,
    long: str = "mean",
    short_stride: int = 2,
    backend: str | None = None,
    stages: Iterable[int] | None = None,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
) -> nn.Module:
    """Replaces the attention of an MViT, in place: the softmax over all frames by the fused one.

    Projections, pooling convolutions, norms, the query shortcut and MViTv2's relative positions
    stay, with their parameters' names, so torchvision's weights fit before and after. The clip's
    class token attends to every key as before and is attended to by all.

    Args:
        model: a torchvision MViT.
        window, long, short_stride, backend: see
            `stat_kernels.integrations.TemporalAttentionConfig`.
        stages: which stages, from 0; a stage begins where queries are pooled. None is all.
        frames, size: of the clips from now on, and (height, width) of their pixels; None leaves the
            model's. MViTv1's positions are interpolated now, linearly over time and bicubically
            over a frame; MViTv2's relative ones are when they are used.

    Returns:
        the same model.

    Raises:
        TypeError, ValueError: the model or a setting cannot be used; the message says what would.
    """
    temporal = TemporalAttentionConfig(window, 1, short_stride, long, backend)
    if not isinstance(model, mvit.MViT):
        raise TypeError(
            f"convert takes torchvision's MViT (mvit_v1_b, mvit_v2_s), got {type(model).__name__}"
        )
    if long == "class":
        raise ValueError(
            "long='class' needs a class token in each frame, and MViT has one for the clip: "
            "'mean' or 'none' work"
        )
    blocks = _by_stage(model)
    chosen = sorted(blocks) if stages is None else list(stages)
    if not set(chosen) <= set(blocks):
        raise ValueError(f"stages must be among {sorted(blocks)}, got {chosen}")
    attentions = [(block, block.attn) for stage in chosen for block in blocks[stage]]
    for _, attention in attentions:
        _check_attention(attention)
    _set_sizes(model.pos_encoding, *_token_sizes(model, frames, size))
    for block, attention in attentions:
        block.attn = ClipAttention(attention, temporal)
    return model


class ClipAttention(nn.Module):
    """torchvision's MultiscaleAttention with its own modules, frames joined by the fused operation.

    Args:
        old: the MultiscaleAttention to take over.
        temporal: how the frames are joined.
    """

    def __init__(self, old: Any, temporal: TemporalAttentionConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scaler = old.num_heads, old.head_dim, old.scaler
        self.residual_pool = old.residual_pool
        self.residual_with_cls_embed = old.residual_with_cls_embed
        self.qkv, self.project = old.qkv, old.project
        self.pool_q, self.pool_k, self.pool_v = old.pool_q, old.pool_k, old.pool_v
        self.rel_pos_h, self.rel_pos_w, self.rel_pos_t = old.rel_pos_h, old.rel_pos_w, old.rel_pos_t
        self.temporal = temporal
        self.train(old.training)

    def forward(self, x: Tensor, thw: tuple[int, int, int]) -> tuple[Tensor, tuple[int, int, int]]:
        """x (B, 1 + T * h * w, C) -> the same of the pooled queries, and their (T, h', w')."""
        # (B, H, N, D) each, the layout of torchvision's pooling
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        k, k_thw = (k, thw) if self.pool_k is None else self.pool_k(k, thw)
        v = v if self.pool_v is None else self.pool_v(v, thw)[0]
        q, thw = (q, thw) if self.pool_q is None else self.pool_q(q, thw)
        q, k, v = (tokens.transpose(1, 2) for tokens in (q, k, v))
        if self.rel_pos_h is None:
            out = self._attend(q, k, v, k_thw)
        else:
            out = self._attend(*self._with_positions(q, k, v, thw, k_thw), k_thw)
            out = out[..., : self.head_dim]
        if self.residual_pool:
            first = 0 if self.residual_with_cls_embed else 1
            out = torch.cat((out[:, :first], out[:, first:] + q[:, first:]), dim=1)
        return self.project(out.flatten(2)), thw

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, k_thw: tuple[int, int, int]) -> Tensor:
        frames, height, width = k_thw
        return sequence_attention(
            q, k, v, frames, (height, width), self.temporal, class_token=True, scale=self.scaler
        )

    def _with_positions(
        self, q: Tensor, k: Tensor, v: Tensor, thw: tuple[int, ...], k_thw: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values of more channels, whose products hold the relative positions.

        MViTv2 adds to a score one term for each axis, query times the embedding of the distance.
        That is a product of the query's terms for every key coordinate with the key's coordinate
        in one-hot form. An averaged key has averaged coordinates, hence its tokens' mean term.
        """
        spatial = q[:, 1:].unflatten(1, thw)  # (B, T, h, w, H, D)
        tables = (self.rel_pos_t, self.rel_pos_h, self.rel_pos_w)
        distances = [_distances(*sizes) for sizes in zip(tables, thw, k_thw, strict=True)]
        terms = torch.cat(
            [
                torch.einsum("bthwnd,tkd->bthwnk", spatial, distances[0]),
                torch.einsum("bthwnd,hkd->bthwnk", spatial, distances[1]),
                torch.einsum("bthwnd,wkd->bthwnk", spatial, distances[2]),
            ],
            dim=-1,
        ).flatten(1, 3)
        extra = -(-(self.head_dim + sum(k_thw)) // 8) * 8 - self.head_dim  # kernels take whole 8s
        places = F.pad(_one_hot_places(k_thw, k), (0, extra - sum(k_thw), 1, 0))
        places = places[None, :, None].expand(*k.shape[:3], -1)
        # the terms are not scaled as the products are; no term for the class token
        terms = F.pad(terms / self.scaler, (0, extra - sum(k_thw), 0, 0, 1, 0))
        return (
            torch.cat((q, terms.to(q.dtype)), dim=-1),
            torch.cat((k, places), dim=-1),
            F.pad(v, (0, extra)),
        )

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, {self.temporal}"


def _distances(table: Tensor, q_size: int, k_size: int) -> Tensor:
    """Embeddings of the distances along one axis: (queries, keys, D), as MViTv2 counts them."""
    length = 2 * max(q_size, k_size) - 1
    if table.shape[0] != length:
        table = F.interpolate(table.T[None], size=length, mode="linear")[0].T
    q_step, k_step = max(k_size / q_size, 1.0), max(q_size / k_size, 1.0)
    queries = torch.arange(q_size, device=table.device) * q_step
    keys = (torch.arange(k_size, device=table.device) + (1.0 - k_size)) * k_step
    return table[(queries[:, None] - keys[None, :]).long()]


def _one_hot_places(thw: tuple[int, ...], like: Tensor) -> Tensor:
    """(T * h * w, T + h + w): each token's coordinates, one-hot, in ``like``'s dtype."""
    axes = [torch.eye(size, device=like.device, dtype=like.dtype) for size in thw]
    t, h, w = thw
    return torch.cat(
        [
            axes[0][:, None, None].expand(t, h, w, t),
            axes[1][None, :, None].expand(t, h, w, h),
            axes[2][None, None, :].expand(t, h, w, w),
        ],
        dim=-1,
    ).flatten(0, 2)


def _token_sizes(model: Any, frames: int | None, size: tuple[int, int] | None) -> list[int]:
    """Frames, height, width of the stem's tokens, for clips of other sizes; None leaves them."""
    encoding, stem = model.pos_encoding, model.conv_proj
    found = [encoding.temporal_size, *encoding.spatial_size]
    pair = isinstance(size, (tuple, list)) and len(size) == 2
    if size is not None and not pair:
        raise ValueError(f"size must be (height, width) in pixels or None, got {size!r}")
    height, width = size if size is not None else (None, None)
    for axis, (name, value) in enumerate((("frames", frames), ("size", height), ("size", width))):
        if value is None:
            continue
        least = max(stem.kernel_size[axis] - 2 * stem.padding[axis], 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
        found[axis] = (value - least) // stem.stride[axis] + 1
    return found


def _set_sizes(encoding: Any, frames: int, height: int, width: int) -> None:
    """Interpolates MViTv1's positions; MViTv2 has none here."""
    old_frames, old_size = encoding.temporal_size, encoding.spatial_size
    encoding.temporal_size, encoding.spatial_size = frames, (height, width)
    old = encoding.temporal_pos
    if old is not None and frames != old_frames:
        new = F.interpolate(old.detach().T[None], size=frames, mode="linear")[0].T
        encoding.temporal_pos = nn.Parameter(new.contiguous(), old.requires_grad)
    old = encoding.spatial_pos
    if old is not None and (height, width) != tuple(old_size):
        image = old.detach().T.unflatten(1, old_size)[None]
        new = F.interpolate(image, size=(height, width), mode="bicubic", antialias=True)
        encoding.spatial_pos = nn.Parameter(new[0].flatten(1).T.contiguous(), old.requires_grad)


def _by_stage(model: Any) -> dict[int, list[Any]]:
    """Blocks by stage; a stage begins where the skip is pooled as the queries are."""
    stages: dict[int, list[Any]] = {}
    stage = 0
    for index, block in enumerate(model.blocks):
        stage += index > 0 and block.pool_skip is not None
        stages.setdefault(stage, []).append(block)
    return stages


def _check_attention(attention: nn.Module) -> None:
    """Raises where an attention is replaced already, or changes the number of frames."""
    if isinstance(attention, ClipAttention):
        raise TypeError("convert takes an MViT with its own attention, got one converted already")
    for name in ("pool_q", "pool_k"):
        pool = getattr(attention, name)
        if pool is not None and pool.pool.stride[0] != 1:
            raise ValueError(
                f"{name} must keep the number of frames (a stride of 1 in time), got stride "
                f"{tuple(pool.pool.stride)}"
            )

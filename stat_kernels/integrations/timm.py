"""timm's image transformers as video transformers: ``to_video``."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stat_kernels.integrations.optional import require
from stat_kernels.integrations.tokens import TemporalAttentionConfig, frame_attention

OLDEST = "1.0.9"
timm = require("timm", OLDEST)
layers = require("timm.layers", OLDEST)
vision_transformer: Any = require("timm.models.vision_transformer", OLDEST)
deit: Any = require("timm.models.deit", OLDEST)
eva: Any = require("timm.models.eva", OLDEST)

ATTENTION = (vision_transformer.Attention, eva.EvaAttention, getattr(layers, "AttentionRope", None))


def to_video(
    vit: nn.Module | str,
    frames: int = 16,
    window: int = 3,
    kv_stride: int = 1,
    long: str = "class",
    short_stride: int = 2,
    backend: str | None = None,
    **create: Any,
) -> nn.Module:
    """A timm VisionTransformer or Eva as a video transformer, its frames joined by the fused layer.

    Every frame goes through the image model, and in each block its queries attend, in one softmax,
    to their own frame, to averages of the neighbour frames' keys, and to one key of every frame.
    All weights are taken over; the one new parameter, the temporal position embedding, is zero.
    With ``window=1, long="none", kv_stride=1`` the outputs are the image model's, frame by frame.
    Rotary positions turn queries and keys as in the image model, before keys are averaged.

    The result keeps the image model's methods and the names in its state dict (with
    ``temporal_embed`` besides), so image checkpoints load into it with ``strict=False``. It maps
    clips (B, C, T, H, W) to logits (B, classes), averaged over the frames; ``forward_features``
    gives every frame's tokens (B, T, N, dim), ``forward_intermediates`` every block's. Stochastic
    depth drops whole clips, not single frames. ``set_input_size(img_size=(H, W), frames=T)``
    interpolates the position embeddings for another image size or for longer clips.

    Args:
        vit: a VisionTransformer, VisionTransformerDistilled or Eva (it stays as it is: the result
            is a copy), or a name for ``timm.create_model``.
        frames: the largest number of frames of a clip; shorter clips use the first of its temporal
            positions.
        window, kv_stride, long, short_stride, backend: see
            `stat_kernels.integrations.TemporalAttentionConfig`.
        create: with a name, arguments for ``timm.create_model`` (``pretrained=True``,
            ``num_classes=...``).

    Raises:
        TypeError, ValueError: the model or a setting cannot be used; the message says what would.
    """
    temporal = TemporalAttentionConfig(window, kv_stride, short_stride, long, backend)
    _check_frames(frames)
    if isinstance(vit, str):
        vit = timm.create_model(vit, **create)
    elif create:
        raise TypeError(
            f"to_video takes {', '.join(create)} with a model's name only, for timm.create_model"
        )
    _check_model(vit, temporal)
    video: Any = copy.deepcopy(vit)
    video.__class__ = VIDEO_CLASSES[type(vit)]  # the same modules and attributes, clips as inputs
    video.frames = frames
    example = next(video.parameters())
    embed = torch.zeros(1, frames, 1, video.embed_dim, device=example.device, dtype=example.dtype)
    video.temporal_embed = nn.Parameter(embed)
    grid = tuple(video.patch_embed.grid_size)
    _replace(
        video.blocks,
        lambda old: ClipAttention(old, grid, video.num_prefix_tokens, temporal),
    )
    return video


class ClipAttention(nn.Module):
    """timm's attention over the frames of a clip, with its very projections and norms.

    Args:
        image: the Attention, EvaAttention or AttentionRope to take over.
        grid: (h, w) of a frame's spatial tokens.
        prefix: class and register tokens before them.
        temporal: how the frames are joined.
    """

    q_norm: Any
    k_norm: Any
    norm: Any
    qkv: Any  # or the three projections
    q_proj: Any
    k_proj: Any
    v_proj: Any
    q_bias: Any
    v_bias: Any
    gate: Any

    def __init__(
        self, image: Any, grid: tuple[int, int], prefix: int, temporal: TemporalAttentionConfig
    ) -> None:
        super().__init__()
        self.num_heads: int = image.num_heads
        self.head_dim, self.scale = image.proj.in_features // self.num_heads, image.scale
        self.grid, self.prefix, self.temporal = grid, prefix, temporal
        self.rotate_half = getattr(image, "rotate_half", False)
        # not every kind of attention has each of them, nor every version of timm
        for name in ("q_norm", "k_norm", "norm"):
            setattr(self, name, getattr(image, name, None) or nn.Identity())
        for name in ("qkv", "q_proj", "k_proj", "v_proj", "q_bias", "v_bias", "gate"):
            setattr(self, name, getattr(image, name, None))
        self.proj, self.proj_drop = image.proj, image.proj_drop
        self.train(image.training)

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """x (B, T, N, C) and the rotary embedding of a frame's spatial tokens -> as x.

        Raises:
            ValueError: a mask is given; the fused operation has none.
        """
        _refuse_masks(attn_mask=attn_mask, is_causal=is_causal)
        q, k, v = self._project(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self._rotate(q, rope).type_as(v), self._rotate(k, rope).type_as(v)
        out = frame_attention(q, k, v, self.grid, self.temporal, self.prefix, self.scale)
        out = self.norm(out.flatten(3))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys, values (B, T, N, H, D)."""
        if self.qkv is None:
            q, k, v = (
                project(x).unflatten(-1, (-1, self.head_dim))
                for project in (self.q_proj, self.k_proj, self.v_proj)
            )
            groups = self.num_heads // k.shape[3]  # of queries that share a key
            if groups > 1:
                k, v = (y.repeat_interleave(groups, dim=3) for y in (k, v))
            return q, k, v
        qkv = self.qkv(x)
        if self.q_bias is not None:
            qkv = qkv + torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        return qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(3)

    def _rotate(self, tokens: Tensor, rope: Tensor) -> Tensor:
        """(B, T, N, H, D) with the spatial tokens turned by their positions."""
        first, spatial = tokens[:, :, : self.prefix], tokens[:, :, self.prefix :]
        layout = {"half": True} if self.rotate_half else {}
        spatial = spatial.flatten(0, 1).transpose(1, 2)  # timm's (B, H, N, D)
        turned = layers.apply_rot_embed_cat(spatial, rope, **layout).transpose(1, 2)
        return torch.cat((first, turned.unflatten(0, first.shape[:2])), dim=2)

    def extra_repr(self) -> str:
        return f"grid={self.grid}, prefix={self.prefix}, {self.temporal}"


_Image: Any = object  # stands for the image model, which follows in a subclass's bases


class _Video(_Image):
    """What a converted model does with clips; the image model's own methods do the rest."""

    frames: int
    temporal_embed: nn.Parameter

    def forward(self, x: Tensor, **masks: Any) -> Tensor:
        """Clips (B, C, T, H, W) -> logits (B, classes), the mean over the frames."""
        return self.forward_head(self.forward_features(x, **masks))

    def forward_features(self, x: Tensor, **masks: Any) -> Tensor:
        """Clips (B, C, T, H, W) -> every frame's tokens (B, T, N, dim), prefix tokens first."""
        _refuse_masks(**masks)
        return self.norm(self._run(x, self.blocks)[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, T, N, dim) -> logits (B, classes), or features, the mean over the frames."""
        # two of a distilled DeiT in training
        heads = super().forward_head(x.flatten(0, 1), pre_logits)
        mean: Any = lambda head: head.unflatten(0, x.shape[:2]).mean(1)  # noqa: E731
        return tuple(map(mean, heads)) if isinstance(heads, tuple) else mean(heads)  # type: ignore

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **masks: Any,
    ) -> Any:
        """As timm's, with (B, T, ...) where an image model has (B, ...)."""
        _refuse_masks(**masks)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take, last = vision_transformer.feature_take_indices(len(self.blocks), indices)
        tokens, taken = self._run(x, self.blocks[: last + 1] if stop_early else self.blocks, take)
        taken = [self.norm(y) for y in taken] if norm else taken
        prefixes = [y[:, :, : self.num_prefix_tokens] for y in taken]
        maps: Any = [y[:, :, self.num_prefix_tokens :] for y in taken]
        if output_fmt == "NCHW":
            maps = [y.mT.unflatten(-1, self.patch_embed.grid_size).contiguous() for y in maps]
        if return_prefix_tokens and self.num_prefix_tokens:
            maps = list(zip(maps, prefixes, strict=True))
        return maps if intermediates_only else (self.norm(tokens), maps)

    def set_input_size(self, *args: Any, frames: int | None = None, **kwargs: Any) -> None:
        """As timm's; the attention follows the new grid.

        Args:
            args, kwargs: image and patch size.
            frames: the new largest number of frames; the temporal positions are interpolated
                linearly, over the same span of time.
        """
        super().set_input_size(*args, **kwargs)
        grid = tuple(self.patch_embed.grid_size)
        for module in self.modules():
            if isinstance(module, ClipAttention):
                module.temporal.check_grid(grid)
                module.grid = grid
        if frames is not None and frames != self.frames:
            _check_frames(frames)
            old = self.temporal_embed
            embed = F.interpolate(old.detach()[:, :, 0].mT, size=frames, mode="linear")
            self.temporal_embed = nn.Parameter(embed.mT[:, :, None], old.requires_grad)
            self.frames = frames

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"temporal_embed"}

    def _run(self, x: Tensor, blocks: Any, take: Any = ()) -> tuple[Tensor, list[Tensor]]:
        """Clips (B, C, T, H, W) -> tokens (B, T, N, dim), and those after blocks ``take``."""
        t, (h, w) = x.shape[2] if x.dim() == 5 else 0, self.patch_embed.img_size
        if not 1 <= t <= self.frames or tuple(x.shape[3:]) != (h, w):
            raise ValueError(
                f"x must be clips (B, C, T, {h}, {w}) with T from 1 to {self.frames}, got "
                f"{tuple(x.shape)}; set_input_size(img_size=(H, W), frames=T) changes the model"
            )
        embedded = self._pos_embed(self.patch_embed(x.transpose(1, 2).flatten(0, 1)))
        tokens, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
        tokens = tokens.unflatten(0, (-1, t)) + self.temporal_embed[:, :t]
        tokens = getattr(self, "norm_pre", nn.Identity())(tokens)  # Eva of timm 1.0.9 has none
        taken = []
        for i, block in enumerate(blocks):
            positions = {}
            if rope is not None:
                positions = {"rope": rope[i] if getattr(self, "rope_mixed", False) else rope}
            if self.grad_checkpointing:
                tokens = checkpoint(block, tokens, use_reentrant=False, **positions)
            else:
                tokens = block(tokens, **positions)
            if i in take:
                taken.append(tokens)
        return tokens, taken


class VideoVisionTransformer(_Video, vision_transformer.VisionTransformer):
    """A VisionTransformer for clips; made by `to_video`."""


class VideoVisionTransformerDistilled(_Video, deit.VisionTransformerDistilled):
    """A distilled DeiT for clips; made by `to_video`."""


class VideoEva(_Video, eva.Eva):
    """An Eva (EVA, EVA02, DINOv3, ViT with rotary positions) for clips; made by `to_video`."""


VIDEO_CLASSES = {
    vision_transformer.VisionTransformer: VideoVisionTransformer,
    deit.VisionTransformerDistilled: VideoVisionTransformerDistilled,
    eva.Eva: VideoEva,
}


def _check_frames(frames: int) -> None:
    if not isinstance(frames, int) or isinstance(frames, bool) or frames < 1:
        raise ValueError(f"frames must be an int of at least 1, got {frames!r}")


def _check_model(vit: Any, temporal: TemporalAttentionConfig) -> None:
    """Raises where the model is none that can be converted."""
    if isinstance(vit, _Video):
        raise TypeError(
            f"to_video takes an image model, got a {type(vit).__name__} that is converted already "
            f"(for {vit.frames} frames); convert the image model again for other settings"
        )
    if type(vit) not in VIDEO_CLASSES:
        raise TypeError(
            "to_video takes timm's VisionTransformer, VisionTransformerDistilled or Eva (the ViT, "
            "DeiT, AugReg, DINOv2, CLIP, SigLIP, EVA, EVA02 and DINOv3 names), got "
            f"{type(vit).__name__}"
        )
    foreign = {_described(b) for b in vit.blocks if not any(map(_replaceable, b.modules()))}
    if foreign:
        raise ValueError(
            "to_video takes models whose blocks hold timm's Attention, EvaAttention or "
            "AttentionRope (Block, ResPostBlock, ParallelThingsBlock, EvaBlock), got blocks "
            f"{', '.join(sorted(foreign))}"
        )
    if any(m.attn_drop.p for m in vit.modules() if _replaceable(m)):
        raise ValueError(
            "the fused attention drops no scores: create the model without attn_drop_rate"
        )
    if not isinstance(getattr(vit, "patch_drop", None) or nn.Identity(), nn.Identity):
        raise ValueError(
            "each frame needs its whole grid: create the model without patch_drop_rate"
        )
    if temporal.long == "class" and vit.cls_token is None:
        raise ValueError(
            "long='class' needs a model with a class token, and this one has none: long='mean' or "
            "'none' work"
        )
    temporal.check_grid(tuple(vit.patch_embed.grid_size))


def _refuse_masks(**masks: Any) -> None:
    """timm's attn_mask and is_causal, where they are more than their defaults."""
    given = [name for name, value in masks.items() if value is not None and value is not False]
    if given:
        raise ValueError(
            f"{' and '.join(given)} must be left out: the fused attention has no masks"
        )


def _replaceable(module: nn.Module) -> bool:
    """A subclass is none: it may attend otherwise."""
    return type(module) in ATTENTION


def _described(block: nn.Module) -> str:
    """A block's class and those of the attention in it."""
    names = {type(m).__name__ for m in block.modules() if "Attention" in type(m).__name__}
    return " with ".join([type(block).__name__, *sorted(names)])


def _replace(module: nn.Module, make: Callable[[nn.Module], nn.Module]) -> None:
    """Every attention, wherever it lies, by what ``make`` makes of it."""
    for name, child in list(module.named_children()):
        if _replaceable(child):
            setattr(module, name, make(child))
        else:
            _replace(child, make)

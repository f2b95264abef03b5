"""timm's image transformers as video transformers: ``to_video``."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stat_kernels.integrations.optional import require
from stat_kernels.integrations.tokens import TemporalAttentionConfig, frame_attention

OLDEST = "1.0.9"
timm = require("timm", OLDEST)
layers = require("timm.layers", OLDEST)
vision_transformer: Any = require("timm.models.vision_transformer", OLDEST)
deit: Any = require("timm.models.deit", OLDEST)


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
    """A timm VisionTransformer as a video transformer whose frames are joined by the fused layer.

    Every frame goes through the image model, and in each block its queries attend, in one softmax,
    to their own frame, to averages of the neighbour frames' keys, and to one key of every frame.
    All weights are taken over; the one new parameter, the temporal position embedding, is zero.
    With ``window=1, long="none", kv_stride=1`` the outputs are the image model's, frame by frame.

    The result keeps the image model's methods and the names in its state dict (with
    ``temporal_embed`` besides), so image checkpoints load into it with ``strict=False``. It maps
    clips (B, C, T, H, W) to logits (B, classes), averaged over the frames; ``forward_features``
    gives every frame's tokens (B, T, N, dim), ``forward_intermediates`` every block's. Stochastic
    depth drops whole clips, not single frames.

    Args:
        vit: a VisionTransformer or VisionTransformerDistilled (it stays as it is: the result is a
            copy), or a name for ``timm.create_model``.
        frames: T, the number of frames of a clip.
        window, kv_stride, long, short_stride, backend: see
            `stat_kernels.integrations.TemporalAttentionConfig`.
        create: with a name, arguments for ``timm.create_model`` (``pretrained=True``,
            ``num_classes=...``).

    Raises:
        TypeError, ValueError: the model or a setting cannot be used; the message says what would.
    """
    temporal = TemporalAttentionConfig(window, kv_stride, short_stride, long, backend)
    if not isinstance(frames, int) or isinstance(frames, bool) or frames < 1:
        raise ValueError(f"frames must be an int of at least 1, got {frames!r}")
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
        vision_transformer.Attention,
        lambda old: ClipAttention(old, frames, grid, video.num_prefix_tokens, temporal),
    )
    _replace(video.blocks, layers.DropPath, lambda old: ClipDropPath(old, frames))
    return video


class ClipAttention(nn.Module):
    """timm's Attention over the frames of a clip, with its very projections and norms.

    Args:
        image: the Attention to take over.
        frames: T.
        grid: (h, w) of a frame's spatial tokens.
        prefix: class and register tokens before them.
        temporal: how the frames are joined.
    """

    def __init__(
        self,
        image: Any,
        frames: int,
        grid: tuple[int, int],
        prefix: int,
        temporal: TemporalAttentionConfig,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = image.num_heads, image.head_dim, image.scale
        self.frames, self.grid, self.prefix, self.temporal = frames, grid, prefix, temporal
        self.qkv, self.q_norm, self.k_norm = image.qkv, image.q_norm, image.k_norm
        # an output norm and gate came with later versions of timm
        self.norm = getattr(image, "norm", nn.Identity())
        self.gate = getattr(image, "gate", None)
        self.proj, self.proj_drop = image.proj, image.proj_drop
        self.train(image.training)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x (B * T, N, C) -> the same.

        Raises:
            ValueError: a mask is given; the fused operation has none.
        """
        _refuse_masks(attn_mask=attn_mask, is_causal=is_causal)
        clips = x.unflatten(0, (-1, self.frames))
        q, k, v = self.qkv(clips).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(3)
        q, k = self.q_norm(q), self.k_norm(k)
        out = frame_attention(q, k, v, self.grid, self.temporal, self.prefix, self.scale)
        out = self.norm(out.flatten(3).flatten(0, 1))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def extra_repr(self) -> str:
        return f"frames={self.frames}, grid={self.grid}, prefix={self.prefix}, {self.temporal}"


class ClipDropPath(nn.Module):
    """Stochastic depth that drops a clip's residual as a whole: x (B * T, N, C) -> the same."""

    def __init__(self, image: Any, frames: int) -> None:
        super().__init__()
        self.frames, self.drop_path = frames, image

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path(x.unflatten(0, (-1, self.frames))).flatten(0, 1)


_Image: Any = object  # stands for the image model, which follows in a subclass's bases


class _Video(_Image):
    """What a converted model does with clips; the image model's own methods do the rest."""

    def forward(self, x: Tensor, **masks: Any) -> Tensor:
        """Clips (B, C, T, H, W) -> logits (B, classes), the mean over the frames."""
        return self.forward_head(self.forward_features(x, **masks))

    def forward_features(self, x: Tensor, **masks: Any) -> Tensor:
        """Clips (B, C, T, H, W) -> every frame's tokens (B, T, N, dim), prefix tokens first."""
        _refuse_masks(**masks)
        return self._clips(super().forward_features(self._images(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, T, N, dim) -> logits (B, classes), or features, the mean over the frames."""
        heads = super().forward_head(x.flatten(0, 1), pre_logits)
        return _map(lambda head: self._clips(head).mean(1), heads)  # a distilled DeiT has two

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As timm's, with (B, T, ...) where an image model has (B, ...)."""
        return _map(self._clips, super().forward_intermediates(self._images(x), *args, **kwargs))

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """As timm's; the attention follows the new grid."""
        super().set_input_size(*args, **kwargs)
        grid = tuple(self.patch_embed.grid_size)
        for module in self.modules():
            if isinstance(module, ClipAttention):
                module.temporal.check_grid(grid)
                module.grid = grid

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"temporal_embed"}

    def _pos_embed(self, x: Tensor) -> Tensor:
        embedded = super()._pos_embed(x).unflatten(0, (-1, self.frames))
        return (embedded + self.temporal_embed).flatten(0, 1)

    def _images(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B * T, C, H, W), checked."""
        t, (h, w) = self.frames, self.patch_embed.img_size
        if x.dim() != 5 or tuple(x.shape[2:]) != (t, h, w):
            raise ValueError(
                f"x must be clips (B, C, T, H, W) with T, H, W = {t}, {h}, {w}, for which the "
                f"model was converted, got {tuple(x.shape)}"
            )
        return x.transpose(1, 2).flatten(0, 1)

    def _clips(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, self.frames))


class VideoVisionTransformer(_Video, vision_transformer.VisionTransformer):
    """A VisionTransformer for clips; made by `to_video`."""


class VideoVisionTransformerDistilled(_Video, deit.VisionTransformerDistilled):
    """A distilled DeiT for clips; made by `to_video`."""


VIDEO_CLASSES = {
    vision_transformer.VisionTransformer: VideoVisionTransformer,
    deit.VisionTransformerDistilled: VideoVisionTransformerDistilled,
}


def _check_model(vit: Any, temporal: TemporalAttentionConfig) -> None:
    """Raises where the model is none that can be converted."""
    if isinstance(vit, _Video):
        raise TypeError(
            f"to_video takes an image model, got a {type(vit).__name__} that is converted already "
            f"(for {vit.frames} frames); convert the image model again for other settings"
        )
    if type(vit) not in VIDEO_CLASSES:
        raise TypeError(
            "to_video takes timm's VisionTransformer or VisionTransformerDistilled (the ViT, DeiT, "
            f"AugReg, DINOv2, CLIP and SigLIP names), got {type(vit).__name__}"
        )
    foreign = {_described(b) for b in vit.blocks if not _holds(b, vision_transformer.Attention)}
    if foreign:
        raise ValueError(
            "to_video takes models whose blocks hold timm's Attention (Block, ResPostBlock, "
            f"ParallelThingsBlock), got blocks {', '.join(sorted(foreign))}"
        )
    if any(m.attn_drop.p for m in vit.modules() if isinstance(m, vision_transformer.Attention)):
        raise ValueError(
            "the fused attention drops no scores: create the model without attn_drop_rate"
        )
    if not isinstance(getattr(vit, "patch_drop", nn.Identity()), nn.Identity):
        raise ValueError(
            "each frame needs its whole grid: create the model without patch_drop_rate"
        )
    if vit.dynamic_img_size:
        raise ValueError(
            "each frame needs the one grid: create the model with img_size=... instead of "
            "dynamic_img_size=True"
        )
    if temporal.long == "class" and not vit.has_class_token:
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


def _holds(module: nn.Module, kind: type) -> bool:
    """A subclass is none: it may attend otherwise."""
    return any(type(m) is kind for m in module.modules())


def _described(block: nn.Module) -> str:
    """A block's class and those of the attention in it."""
    names = {type(m).__name__ for m in block.modules() if "Attention" in type(m).__name__}
    return " with ".join([type(block).__name__, *sorted(names)])


def _replace(module: nn.Module, kind: type, make: Callable[[nn.Module], nn.Module]) -> None:
    """Every submodule of a kind, wherever it lies, by what ``make`` makes of it."""
    for name, child in list(module.named_children()):
        if type(child) is kind:
            setattr(module, name, make(child))
        else:
            _replace(child, kind, make)


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``function`` of every tensor in timm's nested outputs."""
    if isinstance(value, dict):
        return {name: _map(function, v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map(function, v) for v in value)
    return function(value)

"""Video models of the transformers library with the fused layer: ``convert`` and ``load``.

ViViT and VideoMAE choose their attention by name, so importing this file registers one more,
``attn_implementation="shrinking_temporal"``. TimeSformer has no such choice: its self-attention
modules are replaced. No parameter is added or renamed, so checkpoints fit both ways.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stat_kernels.integrations.optional import require
from stat_kernels.integrations.tokens import (
    TemporalAttentionConfig,
    frame_attention,
    sequence_attention,
)

OLDEST = "4.56"
transformers = require("transformers", OLDEST)
timesformer = require("transformers.models.timesformer.modeling_timesformer", OLDEST)
videomae = require("transformers.models.videomae.modeling_videomae", OLDEST)
vivit = require("transformers.models.vivit.modeling_vivit", OLDEST)

NAME = "shrinking_temporal"
FAMILIES: tuple[Any, ...] = (
    timesformer.TimesformerPreTrainedModel,
    vivit.VivitPreTrainedModel,
    videomae.VideoMAEPreTrainedModel,
)
PER_FRAME = ("space_only", "divided_space_time")  # TimeSformer's layouts with T clips as images
NO_WEIGHTS = "output_attentions must be False: the fused attention keeps no weights"


def convert(
    model: nn.Module,
    window: int = 3,
    kv_stride: int = 1,
    long: str = "mean",
    short_stride: int = 2,
    backend: str | None = None,
    keep_temporal: bool = False,
) -> nn.Module:
    """Replaces the attention of a TimeSformer, ViViT or VideoMAE model, in place.

    The settings are kept in ``model.config.shrinking_temporal``, so ``save_pretrained`` writes them
    and `load` finds them. ViViT's class token, and TimeSformer's in one sequence, attends to
    every token as before and is attended to by all.

    TimeSformer's divided layers lose their temporal attention, whose work the window and the
    long-term keys do in the same softmax: their type becomes "joint_space_time".

    Args:
        model: a model of the three families, with or without a head; VideoMAE's for pre-training
            is none of them, because it attends to the visible tokens alone.
        window, kv_stride, long, short_stride, backend: see
            `stat_kernels.integrations.TemporalAttentionConfig`.
        keep_temporal: TimeSformer only: keep divided layers' temporal attention, and join the
            frames in their spatial attention besides.

    Returns:
        the same model.

    Raises:
        TypeError, ValueError: the model or a setting cannot be used; the message says what would.
    """
    temporal = TemporalAttentionConfig(window, kv_stride, short_stride, long, backend)
    _check_model(model, temporal, keep_temporal)
    settings = {
        "window": window,
        "kv_stride": kv_stride,
        "long": long,
        "short_stride": short_stride,
        "backend": backend,
    }
    if isinstance(model, timesformer.TimesformerPreTrainedModel):
        settings["keep_temporal"] = keep_temporal
        _convert_timesformer(model, temporal, keep_temporal)
    else:
        model.set_attn_implementation(NAME)  # type: ignore[operator]
        _refuse_weights_in(model)
    setattr(model.config, NAME, settings)
    return model


def load(cls: Any, *args: Any, **kwargs: Any) -> nn.Module:
    """``cls.from_pretrained(...)`` of a model that was converted and saved, converted again.

    Args:
        cls: a transformers class, for example ``VideoMAEForVideoClassification``.
        args, kwargs: of its ``from_pretrained``.

    Raises:
        ValueError: the saved configuration tells of no conversion.
    """
    model = cls.from_pretrained(*args, **kwargs)
    settings = getattr(model.config, NAME, None)
    if settings is None:
        raise ValueError(
            f"{args[0] if args else cls.__name__} has no {NAME!r} in its config: use "
            f"{cls.__name__}.from_pretrained and then convert"
        )
    return convert(model, **settings)


def shrinking_temporal_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What ``attn_implementation="shrinking_temporal"`` calls.

    Args:
        module: the attention module; its ``config`` tells frames, grid and settings.
        query, key, value: (B, H, N, D).
        attention_mask, dropout: must be None and 0; the fused operation has neither.
        scaling: of the scores.

    Returns:
        (B, N, H, D), and None for the weights, which are never written.

    Raises:
        ValueError: a mask, dropout, or tokens that are no clip as the configuration tells it.
    """
    if attention_mask is not None or dropout:
        raise ValueError("the fused attention takes no attention_mask and no attention dropout")
    config: Any = module.config
    frames, grid = clip_shape(config)
    settings = getattr(config, NAME, {"long": "mean"})
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = sequence_attention(
        q,
        k,
        v,
        frames=frames,
        grid=grid,
        temporal=TemporalAttentionConfig(**settings),
        class_token=config.model_type == "vivit",
        scale=scaling,
    )
    return out, None


class ClipSelfAttention(nn.Module):
    """TimeSformer's self-attention with its very projection, joined by the fused operation.

    Args:
        old: the TimesformerSelfAttention to take over.
        config: of the model; its ``attention_type`` tells the layout of the tokens.
        temporal: how the frames are joined.
    """

    def __init__(self, old: Any, config: Any, temporal: TemporalAttentionConfig) -> None:
        super().__init__()
        self.num_heads, self.scale, self.qkv = old.num_heads, old.scale, old.qkv
        self.frames, self.grid = clip_shape(config)
        self.per_frame = config.attention_type in PER_FRAME
        self.temporal = temporal
        self.train(old.training)

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor]:
        """hidden_states (B * T, 1 + N, C), or (B, 1 + N * T, C) in one sequence -> the same.

        Raises:
            ValueError: attention weights are asked for; they are never written.
        """
        if output_attentions:
            raise ValueError(NO_WEIGHTS)
        if self.per_frame:
            q, k, v = self._project(hidden_states.unflatten(0, (-1, self.frames)))
            out = frame_attention(q, k, v, self.grid, self.temporal, 1, self.scale)
            return (out.flatten(3).flatten(0, 1),)
        tokens = self.grid[0] * self.grid[1]
        q, k, v = self._project(_swap(hidden_states, tokens, self.frames))
        out = sequence_attention(q, k, v, self.frames, self.grid, self.temporal, True, self.scale)
        return (_swap(out.flatten(2), self.frames, tokens),)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., C) -> three times (..., H, D)."""
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)


def _swap(x: Tensor, outer: int, inner: int) -> Tensor:
    """(B, 1 + outer * inner, C) with the two orders of the tokens exchanged, class token first."""
    if x.shape[1] != 1 + outer * inner:
        raise ValueError(
            f"hidden_states must be (B, 1 + {outer} * {inner}, C) as the configuration tells, "
            f"got {tuple(x.shape)}"
        )
    swapped = x[:, 1:].unflatten(1, (outer, inner)).transpose(1, 2).flatten(1, 2)
    return torch.cat((x[:, :1], swapped), dim=1)


def clip_shape(config: Any) -> tuple[int, tuple[int, int]]:
    """Frames of tokens and the grid of a frame, as the model's configuration tells them."""
    image = _pair(config.image_size)
    if config.model_type == "vivit":
        depth, *patch = config.tubelet_size
    elif config.model_type == "videomae":
        depth, patch = config.tubelet_size, _pair(config.patch_size)
    else:
        depth, patch = 1, _pair(config.patch_size)
    return config.num_frames // depth, (image[0] // patch[0], image[1] // patch[1])


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _holds(model: nn.Module, kind: type) -> bool:
    return any(isinstance(module, kind) for module in model.modules())


def _convert_timesformer(
    model: Any, temporal: TemporalAttentionConfig, keep_temporal: bool
) -> None:
    if model.config.attention_type == "divided_space_time" and not keep_temporal:
        model.config.attention_type = "joint_space_time"
        for layer in model.modules():
            if isinstance(layer, timesformer.TimesformerLayer):
                layer.attention_type = "joint_space_time"
                del layer.temporal_layernorm, layer.temporal_attention, layer.temporal_dense
    for layer in model.modules():
        if isinstance(layer, timesformer.TimesformerLayer):
            attention = layer.attention
            attention.attention = ClipSelfAttention(attention.attention, model.config, temporal)


def _check_model(model: Any, temporal: TemporalAttentionConfig, keep_temporal: bool) -> None:
    """Raises where the model is none that can be converted."""
    if not isinstance(model, FAMILIES) or isinstance(model, videomae.VideoMAEForPreTraining):
        raise TypeError(
            "convert takes a transformers TimeSformer, ViViT or VideoMAE model (VideoMAE's encoder "
            f"or classifier, not its pre-training), got {type(model).__name__}"
        )
    config = model.config
    if config._attn_implementation == NAME or _holds(model, ClipSelfAttention):
        raise TypeError(
            f"convert takes a model with its own attention, got a {type(model).__name__} that is "
            "converted already"
        )
    if config.attention_probs_dropout_prob:
        raise ValueError(
            "the fused attention drops no scores: attention_probs_dropout_prob must be 0, got "
            f"{config.attention_probs_dropout_prob}"
        )
    divided = getattr(config, "attention_type", None)
    if keep_temporal and divided != "divided_space_time":
        raise ValueError(
            "keep_temporal=True needs a TimeSformer with attention_type 'divided_space_time', got "
            f"{type(model).__name__} with {divided!r}"
        )
    if temporal.long == "class" and divided != "space_only":
        raise ValueError(
            "long='class' needs a class token in each frame, which only TimeSformer's 'space_only' "
            f"has; for {type(model).__name__} 'mean' or 'none' work"
        )
    temporal.check_grid(clip_shape(config)[1])


def _refuse_weights(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """A forward pre-hook: transformers collects weights, and would find none without a word."""
    asked = kwargs.get("output_attentions")
    if model.config._attn_implementation == NAME and (
        model.config.output_attentions if asked is None else asked
    ):
        raise ValueError(NO_WEIGHTS)


def _refuse_weights_in(model: Any) -> None:
    """Adds the hook to a model and the models in it, once."""
    for module in model.modules():
        if isinstance(module, FAMILIES) and (
            _refuse_weights not in module._forward_pre_hooks.values()
        ):
            module.register_forward_pre_hook(_refuse_weights, with_kwargs=True)


def _checked_by_name(family: Any) -> Callable[..., None]:
    """The family's ``__init__``, the one place that every way to choose attention by name passes.

    Raises:
        ValueError: the family does not choose its attention by name, and would ignore the choice.
    """
    init = family.__init__

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if family is not timesformer.TimesformerPreTrainedModel:
            _refuse_weights_in(self)
        elif self.config._attn_implementation == NAME:
            raise ValueError(
                f"{type(self).__name__} does not choose its attention by name: load it without "
                f"attn_implementation={NAME!r}, then call "
                "stat_kernels.integrations.transformers.convert"
            )

    return checked


transformers.AttentionInterface.register(NAME, shrinking_temporal_attention_forward)
for _family in FAMILIES:
    _family.__init__ = _checked_by_name(_family)

"""The configuration of an image model for clips: a frozen dataclass, checked at birth."""

from __future__ import annotations

from dataclasses import dataclass

from stat_video.model.config import check_common


@dataclass(frozen=True)
class ImageModelConfig:
    """A timm image model for clips, made by `stat_kernels.integrations.timm.to_video`.

    Attributes:
        image_model: its name in timm, for example vit_small_patch16_224; a VisionTransformer.
        frames: T, frames of a clip.
        image_size: H = W of a frame, pixels.
        num_classes: logits of the classifier.
        class_names: a name per class, or nothing.
        window: frames that short-term attention spans, odd.
        kv_stride: average pooling of a frame's own keys and values; must divide its grid of tokens.
        short_stride: average pooling from those to the short-term keys.
        long: what every frame adds to the keys of all: "class" token, "mean" of its keys, "none".
        drop_path: rate of stochastic depth in the last block, rising linearly from 0 in the first.
        dropout: rate of dropout before the classifier.
        backend: of the attention; None takes the best usable one.
    """

    image_model: str
    frames: int = 16
    image_size: int = 224
    num_classes: int = 400
    class_names: tuple[str, ...] = ()
    window: int = 3
    kv_stride: int = 1
    short_stride: int = 2
    long: str = "class"
    drop_path: float = 0.0
    dropout: float = 0.0
    backend: str | None = None

    in_channels = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if not self.image_model:
            raise ValueError("image_model must name a VisionTransformer of timm, got ''")
        check_common(self)

    @property
    def token_frames(self) -> int:
        """Frames of tokens: an image model makes tokens of every frame."""
        return self.frames

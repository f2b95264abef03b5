"""A timm image model as a video classifier, and its image weights."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stat_kernels.distributed import ClipParallel
from stat_video.model.image_config import ImageModelConfig
from stat_video.model.pretrained import PretrainedMixin

PIXEL_MEAN, PIXEL_STD = 0.45, 0.225  # of the normalisation that clips come with, as STAT's
PRETRAINED = "pretrained"

MODEL_CARD = """---
{{ card_data }}
---

# A timm image model for video

The image model of config.json on every frame, joined by shrinking temporal attention.

    from stat_video.evaluate.loading import load_model

    loaded = load_model("this directory")
    logits = loaded.model(video)  # (B, 3, T, H, W), normalised with mean 0.45 and deviation 0.225
"""


class ImageModel(
    nn.Module,
    PretrainedMixin,
    library_name="stat-kernels",
    license="apache-2.0",
    pipeline_tag="video-classification",
    model_card_template=MODEL_CARD,
):
    """Video clip to class logits by a timm image model whose frames the fused attention joins.

    Clips come normalised as STAT's; the model renormalises them as its image weights expect.

    Args:
        config: what to build.

    Raises:
        ValueError: timm has no such model, or it cannot be converted.
    """

    config_class = ImageModelConfig

    def __init__(self, config: ImageModelConfig) -> None:
        super().__init__()
        from stat_kernels.integrations.timm import timm, to_video

        self.config = config
        try:
            self.net: Any = to_video(
                config.image_model,
                config.frames,
                config.window,
                config.kv_stride,
                config.long,
                config.short_stride,
                config.backend,
                img_size=config.image_size,
                dynamic_img_size=False,
                num_classes=config.num_classes,
                drop_path_rate=config.drop_path,
                drop_rate=config.dropout,
            )
        except OSError as error:  # of an hf-hub: or local-dir: name
            raise ValueError(f"image_model {config.image_model} cannot be read: {error}") from error
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            if str(error).startswith("grid must"):
                raise ValueError(
                    f"image_size must be at least a patch of {config.image_model}, "
                    f"got {config.image_size}"
                ) from error
            if re.split(r"\W", str(error))[0] in vars(config):
                raise  # it names the field that is off
            raise ValueError(
                f"image_model must name a VisionTransformer of timm, got {config.image_model}: "
                f"{error}"
            ) from error
        known = timm.get_pretrained_cfg(config.image_model)
        mean, std = (known.mean, known.std) if known else ((0.5,) * 3, (0.5,) * 3)
        # not among the weights, and never on the meta device, from which no weights would move them
        mean, std = (torch.tensor(x, device="cpu").view(3, 1, 1, 1) for x in (mean, std))
        self.gain: Tensor
        self.shift: Tensor
        self.register_buffer("gain", PIXEL_STD / std, persistent=False)
        self.register_buffer("shift", (PIXEL_MEAN - mean) / std, persistent=False)

    def forward(self, video: Tensor, *, clip: ClipParallel | None = None) -> Tensor:
        """video (B, 3, T, H, W), normalised as STAT's -> logits (B, num_classes).

        clip: as STAT's, but its clips cannot be shared.
        """
        return self.net(torch.addcmul(self.shift.to(video.dtype), video, self.gain.to(video.dtype)))

    def part(self, video: Tensor, clip: ClipParallel | None) -> Tensor:
        """The whole video."""
        return video

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, first to last."""
        return list(self.net.blocks)

    @property
    def head_dims(self) -> set[int]:
        """Head dims of the attention."""
        return {block.attn.head_dim for block in self.net.blocks}

    def set_checkpointing(self, enabled: bool = True) -> None:
        """Activation checkpointing of every block: less memory in training, one more forward."""
        self.net.set_grad_checkpointing(enabled)

    def set_channels_last(self, enabled: bool) -> None:
        """For STAT's stem; patches do not overlap, so their embedding has no use for it."""

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that timm's recipes do not decay."""
        return {f"net.{name}" for name in self.net.no_weight_decay()}

    def load_image_weights(self, source: str) -> list[str]:
        """Take over an image model's weights, in place.

        source: "pretrained", which timm downloads, or a file that timm can read (safetensors, or a
            torch checkpoint, which is read without running code). Position embeddings of another
            grid are interpolated, a classifier for another number of classes is left out.
        Returns a sentence for each thing that was not simply copied.
        Raises ValueError when the weights cannot be read or are another model's.
        """
        weights = self._image_weights(source)
        own = self.net.state_dict()
        heads = {name for name in own if name.startswith("head")}
        fresh = {n for n in heads if n not in weights or weights[n].shape != own[n].shape}
        weights = {n: w for n, w in weights.items() if n not in fresh}
        wrong = sorted((own.keys() - fresh - {"temporal_embed"}) ^ weights.keys()) or [
            name for name in weights if weights[name].shape != own[name].shape
        ]
        if wrong:
            name = wrong[0]
            there, here = (tuple(w[name].shape) if name in w else "missing" for w in (weights, own))
            raise ValueError(
                f"{source} does not hold the weights of {self.config.image_model}: {name} is "
                f"{there} there and {here} in the model"
            )
        self.net.load_state_dict(weights, strict=False)
        return ["the classifier starts anew"] if fresh else []

    def _image_weights(self, source: str) -> dict[str, Tensor]:
        """State dict of the image model, its positions fitted to this model's grid."""
        from stat_kernels.integrations.timm import timm

        try:
            if source == PRETRAINED:  # with its own classifier, which fits or is left out
                name, size = self.config.image_model, self.config.image_size
                return timm.create_model(name, pretrained=True, img_size=size).state_dict()
            weights = timm.models.load_state_dict(source, weights_only=True)
            return timm.models.vision_transformer.checkpoint_filter_fn(weights, self.net)
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.PickleError) as error:
            first = re.split(r"\n|\. ", str(error).strip())[0]
            told = f"image weights {source} cannot be read: {first}"
            if source == PRETRAINED and isinstance(error, OSError):
                told = (
                    f"the weights of {self.config.image_model} cannot be downloaded ({first}); "
                    "without a network, name a file of them"
                )
            raise ValueError(told) from error


def is_image_weights(source: str) -> bool:
    """Whether `run.init` names image weights and not a model of this project."""
    return source == PRETRAINED or Path(source).is_file()

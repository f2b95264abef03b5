"""From decoded frames to a normalised clip, with torchvision.transforms.v2.

All frames of a clip go through a transform together, so they share its random parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stat_video.options import DataOptions

MEAN, STD = 0.45, 0.225  # the recipe's, for each of the three channels

Transform = Callable[[Tensor], Tensor]


def train_transform(image_size: int, options: DataOptions) -> Transform:
    """Random resized crop, flip, normalisation: (T, 3, H, W) uint8 -> (3, T, S, S) float32.

    Draws from torch's global generator; seed that to repeat it.
    """
    from torchvision.transforms import v2

    steps: list[Callable] = [
        v2.RandomResizedCrop(
            image_size, scale=options.crop_area, ratio=options.crop_ratio, antialias=True
        )
    ]
    if options.flip > 0:
        steps.append(v2.RandomHorizontalFlip(options.flip))
    return v2.Compose([*steps, *_normalise()])


def eval_transform(image_size: int, short_side: int = 0) -> Transform:
    """Scale to the short side, centre crop: (T, 3, H, W) uint8 -> (3, T, S, S) float32.

    short_side: in pixels, at least `image_size`; 0 stands for 256/224 of it.
    """
    from torchvision.transforms import v2

    short_side = short_side or round(image_size * 256 / 224)
    if short_side < image_size:
        raise ValueError(
            f"data.short_side must be at least the model's image size {image_size}, "
            f"got {short_side}"
        )
    return v2.Compose(
        [v2.Resize(short_side, antialias=True), v2.CenterCrop(image_size), *_normalise()]
    )


def _normalise() -> list[Callable]:
    from torchvision.transforms import v2

    return [
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([MEAN] * 3, [STD] * 3),
        v2.Lambda(_time_second),
    ]


def _time_second(clip: Tensor) -> Tensor:
    """(T, 3, H, W) -> (3, T, H, W), the layout of 3-d convolutions."""
    return clip.transpose(0, 1).contiguous()

"""Transforms from decoded frames to a clip, with torchvision.transforms.v2; normalisation.

All frames of a clip go through a transform together, so they share its random parameters. Clips
stay uint8 until they are on the model's device: a quarter of the bytes to collate and to copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stat_video.data.options import DataOptions
from stat_video.errors import UserError

MEAN, STD = 0.45, 0.225  # the recipe's, for each of the three channels

Transform = Callable[[Tensor], Tensor]


def normalise(clips: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 pixels of any shape -> (pixel / 255 - MEAN) / STD in `dtype`, on their own device.

    Computed in float32 and rounded once, in one pass over the clips.
    """
    shift = torch.tensor(-MEAN / STD)  # on the CPU: an operand without dimensions may stay there
    out = torch.empty_like(clips, dtype=dtype)
    return torch.add(shift, clips, alpha=1 / (255 * STD), out=out)


# Frames that go through a training transform together. More would be slower: their float copies no
# longer fit into what the allocator keeps, and fresh memory costs more than the arithmetic.
_CHUNK = 16
# A strength of RandAugment goes from 0 to 10; it is drawn to a tenth.
_STEPS = 100
# Each operation is applied with this probability, as in timm, whose RandAugment the recipe is of.
_OPERATION_PROBABILITY = 0.5


def train_transform(image_size: int, options: DataOptions) -> Transform:
    """Random resized crop, flip, RandAugment and random erasing, by the options.

    (T, 3, H, W) uint8 -> (3, T, S, S) uint8. Draws from torch's global generator; seed that to
    repeat it. RandAugment follows the crop, as for images, because there are fewer pixels then.
    """
    from torchvision.transforms import v2

    steps: list[Callable] = [
        v2.RandomResizedCrop(
            image_size, scale=options.crop_area, ratio=options.crop_ratio, antialias=True
        )
    ]
    if options.flip > 0:
        steps.append(v2.RandomHorizontalFlip(options.flip))
    steps += _randaugment(options)
    if options.erasing > 0:
        steps.append(_noise_box(options.erasing))
    return _in_chunks(v2.Compose([*steps, v2.Lambda(_time_second)]))


def _in_chunks(transform: Transform) -> Transform:
    """The same transform of (T, ...) to (3, T, ...), a few frames at a time with equal draws."""

    def apply(clip: Tensor) -> Tensor:
        state, parts = torch.get_rng_state(), []
        for part in clip.split(_CHUNK):
            torch.set_rng_state(state)
            parts.append(transform(part))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    return apply


def _noise_box(probability: float) -> Callable:
    """Random erasing of uint8 frames: standard normal noise once the clip is normalised.

    As in any other pixel, what is below 0 or above 255 is cut off, at -2 and 2.4 deviations.
    """
    from torchvision.transforms import v2

    class NoiseBox(v2.RandomErasing):
        def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
            params = super().make_params(flat_inputs)
            if params["v"] is not None:
                pixels = (params["v"] * STD + MEAN) * 255
                params["v"] = pixels.round().clamp(0, 255).to(torch.uint8)
            return params

    return NoiseBox(probability, scale=(0.02, 1 / 3), value="random")


def _randaugment(options: DataOptions) -> list[Callable]:
    """The operations of RandAugment in sequence, each with its own random kind and strength.

    torchvision's class uses one strength for all; here it varies normally, as in the recipe.
    """
    from torchvision.transforms import v2

    middle = (127, 127, 127)  # what moves into the picture is grey
    bilinear = v2.InterpolationMode.BILINEAR

    def operation(clip: Tensor) -> Tensor:
        if torch.rand(()) >= _OPERATION_PROBABILITY:
            return clip
        drawn = options.randaugment_magnitude + options.randaugment_std * torch.randn(()).item()
        bin_ = round(min(max(drawn / 10, 0), 1) * _STEPS)
        return v2.RandAugment(1, bin_, _STEPS + 1, interpolation=bilinear, fill=middle)(clip)

    return [v2.Lambda(operation)] * options.randaugment_ops


def eval_transform(image_size: int, short_side: int = 0) -> Transform:
    """Scale to the short side, centre crop: (T, 3, H, W) uint8 -> (3, T, S, S) uint8.

    short_side: in pixels; 0 means 256/224 of `image_size`. Raises UserError if it is smaller than
    `image_size`.
    """
    crops = crops_transform(image_size, short_side, 1)
    return lambda clip: crops(clip)[0]


def crops_transform(image_size: int, short_side: int, crops: int) -> Transform:
    """Scale to the short side, crop along the long side: -> (crops, 3, T, S, S) uint8.

    crops: 1 for the centre crop; more are spaced evenly from end to end. The other arguments are
    those of `eval_transform`.
    """
    from torchvision.transforms import v2

    short_side = effective_short_side(image_size, short_side)
    if short_side < image_size:
        raise UserError(
            f"data.short_side must be at least model.image_size {image_size}, got {short_side}; "
            "0 stands for 256/224 of it"
        )
    resize = v2.Resize(short_side, antialias=True)

    def transform(clip: Tensor) -> Tensor:
        clip = resize(clip)
        corners = _corners(clip.shape[-2], clip.shape[-1], image_size, crops)
        return torch.stack(
            [_time_second(clip[..., y : y + image_size, x : x + image_size]) for y, x in corners]
        )

    return transform


def effective_short_side(image_size: int, short_side: int) -> int:
    """Pixels that frames are scaled to; `short_side` 0 means 256/224 of `image_size`."""
    return short_side or round(image_size * 256 / 224)


def _corners(height: int, width: int, side: int, crops: int) -> list[tuple[int, int]]:
    """The upper left corner of each square crop, centred along the short side."""
    shares = [0.5] if crops == 1 else [i / (crops - 1) for i in range(crops)]
    if height > width:
        return [(round((height - side) * s), round((width - side) / 2)) for s in shares]
    return [(round((height - side) / 2), round((width - side) * s)) for s in shares]


def _time_second(clip: Tensor) -> Tensor:
    """(T, 3, H, W) -> (3, T, H, W), the layout of 3-d convolutions."""
    return clip.transpose(0, 1).contiguous()

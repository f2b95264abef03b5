"""Images and clips for the examples, drawn in memory by the project's own generator.

Image task: does a photograph show a zero, a one, or neither? Clip task: which of the two comes
first? A reversed clip is an equally likely clip of the other class, so a model that ignores the
order of the frames is at chance, no matter how well it recognises digits.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from stat_video.clips.materials import load_materials
from stat_video.clips.render import render_clip

LOOKS = {"size": 64, "speed": (0.8, 1.6), "distractors": 1, "drift": 0.2}
SPLITS = ("train", "val")


def order_clips(split: str, count: int, frames: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clips (count, 3, T, 64, 64) in [-1, 1]; labels (count,), 0 where the zero comes first."""
    materials = load_materials(split)
    clips, labels = [], torch.arange(count) % 2
    for index, label in enumerate(labels.tolist()):
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        clips.append(render_clip(rng, materials, "order", label, frames=frames, **LOOKS))
    return _normalised(np.stack(clips)), labels


def digit_images(split: str, count: int) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 64, 64) in [-1, 1]; labels as in `digit_clips`."""
    clips, labels = digit_clips(split, count, frames=1)
    return clips.squeeze(2), labels


def digit_clips(split: str, count: int, frames: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Clips (count, 3, T, 64, 64) in [-1, 1]; labels: a zero or a one drifts, or neither (2)."""
    materials = load_materials(split)
    shown = [materials.digits[materials.digit_classes == digit] for digit in (0, 1)]
    shown.append(np.zeros_like(shown[0][:1]))  # a digit without ink
    pools = [replace(materials, digits=d, digit_classes=np.zeros(len(d), int)) for d in shown]
    clips, labels = [], torch.arange(count) % len(pools)
    for index, label in enumerate(labels.tolist()):
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        clips.append(render_clip(rng, pools[label], "direction", 0, frames=frames, **LOOKS))
    return _normalised(np.stack(clips)), labels


def _normalised(clips: np.ndarray) -> Tensor:
    """(N, T, H, W, 3) uint8 -> (N, 3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1

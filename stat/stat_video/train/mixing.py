"""Mixup and CutMix: clips of a batch are blended, or pasted into one another, and so are labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from stat_video.data.options import DataOptions


@dataclass(frozen=True)
class Mixer:
    """Mixes each clip with the one before it in the batch, all with the same share.

    mixup, cutmix: parameters of the beta distributions that the share is drawn from; 0 for never.
    probability: of mixing a batch at all; switch: of CutMix where both could be.
    num_classes: C.
    """

    mixup: float
    cutmix: float
    probability: float
    switch: float
    num_classes: int

    def __call__(self, clips: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """clips (B, 3, T, H, W), labels (B,) -> mixed clips and targets (B, C) float32.

        A target is made of shares that add up to 1; smooth it by cross_entropy's label_smoothing.
        Draws from torch's global CPU generator. The box of CutMix is the same in all frames.
        """
        targets = F.one_hot(labels, self.num_classes).float()
        if len(clips) < 2 or torch.rand(()) >= self.probability:
            return clips, targets
        images = clips.flatten(1, 2)  # (B, 3 T, H, W): channels and frames alike
        images, targets = self._transform()(images, targets)
        return images.unflatten(1, clips.shape[1:3]), targets

    def _transform(self):
        from torchvision.transforms import v2

        if self.cutmix and (not self.mixup or torch.rand(()) < self.switch):
            return v2.CutMix(alpha=self.cutmix, num_classes=self.num_classes)
        return v2.MixUp(alpha=self.mixup, num_classes=self.num_classes)


def build(options: DataOptions, num_classes: int) -> Mixer | None:
    """The mixer that the options ask for, or None."""
    if not (options.mixup or options.cutmix) or not options.mix_prob:
        return None
    return Mixer(options.mixup, options.cutmix, options.mix_prob, options.mix_switch, num_classes)

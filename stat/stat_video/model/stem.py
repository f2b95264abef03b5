"""Token embedding: a few plain 3-D convolutions from a video clip to overlapping tokens."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


class ConvStem(nn.Module):
    """Three (or any number of) Conv3d that shrink a clip to a grid of tokens a frame.

    The paper ("Token Embedding Block", Table 5) says vanilla 3D-convolutional layers and no more.
    Here a LayerNorm over the channels and a GELU stand between two convolutions: unlike a batch
    norm it depends neither on the batch (small for video, split over devices) nor on the mode, and
    without any norm the default initialisation shrinks the signal from layer to layer. Neither
    follows the last convolution: the first block of the network starts with its own norm.

    Args:
        channels: channels from the clip's to the tokens', one more than there are convolutions.
        kernel: (time, height, width), odd; padded by half of it.
        strides: (time, height, width) of each convolution.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        kernel: tuple[int, int, int],
        strides: tuple[tuple[int, int, int], ...],
    ) -> None:
        super().__init__()
        kt, kh, kw = kernel
        padding = (kt // 2, kh // 2, kw // 2)
        self.convs: Any = nn.ModuleList(  # of Conv3d; a ModuleList's items are typed as Module
            nn.Conv3d(c_in, c_out, kernel, stride=stride, padding=padding)
            for (c_in, c_out), stride in zip(pairwise(channels), strides, strict=True)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(c, eps=1e-6) for c in channels[1:-1])
        self.activation = nn.GELU()
        self.set_channels_last(True)

    def set_channels_last(self, enabled: bool) -> None:
        """Layout of the clip in memory, which the convolutions keep up. Channels last, the default,
        makes the norms, and the tokens at the end, views and not transposed copies."""
        self.memory_format = torch.channels_last_3d if enabled else torch.contiguous_format

    def forward(self, video: Tensor) -> Tensor:
        """video (B, C, T, H, W) -> tokens (B, T', H' * W', dim), sizes divided by the strides.

        On a CPU autocast leaves the stem in float32: torch's bfloat16 gradient of conv3d reads
        memory that it has not written (2.11), so it is not always finite.
        """
        if video.device.type == "cpu":
            with torch.autocast("cpu", enabled=False):
                return self._embed(video)
        return self._embed(video)

    def _embed(self, video: Tensor) -> Tensor:
        x = video.contiguous(memory_format=self.memory_format)
        for i, conv in enumerate(self.convs):
            x = conv(x)
            if i < len(self.norms):
                x = self.activation(self.norms[i](x.movedim(1, -1))).movedim(-1, 1)
        return x.movedim(1, -1).flatten(2, 3)

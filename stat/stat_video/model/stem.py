"""Token embedding: a few plain 3-D convolutions from a video clip to overlapping tokens."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
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

    def reads(self, frames: int, own: slice) -> list[slice]:
        """For some frames of tokens of a clip: the frames that each convolution reads, then `own`.

        frames: T of the whole clip; own: the frames of tokens that are wanted, of T'.
        """
        sizes = [frames]
        for conv in self.convs:
            sizes.append(-(-sizes[-1] // conv.stride[0]))
        reads = [own]
        for conv, size in zip(self.convs[::-1], sizes[-2::-1], strict=True):
            first, last = _reach(conv, reads[0])
            reads.insert(0, slice(max(0, first), min(size, last)))
        return reads

    def forward(self, video: Tensor, reads: list[slice] | None = None) -> Tensor:
        """video (B, C, T, H, W) -> tokens (B, T', H' * W', dim), sizes divided by the strides.

        reads: of some frames of a clip, as `reads` returns it; video is ``reads[0]`` of its frames.

        On a CPU autocast leaves the stem in float32: torch's bfloat16 gradient of conv3d reads
        memory that it has not written (2.11), so it is not always finite.
        """
        if video.device.type == "cpu":
            with torch.autocast("cpu", enabled=False):
                return self._embed(video, reads)
        return self._embed(video, reads)

    def _embed(self, video: Tensor, reads: list[slice] | None) -> Tensor:
        x = video.contiguous(memory_format=self.memory_format)
        for i, conv in enumerate(self.convs):
            x = conv(x) if reads is None else _convolve(conv, x, reads[i], reads[i + 1])
            if i < len(self.norms):
                x = self.activation(self.norms[i](x.movedim(1, -1))).movedim(-1, 1)
        return x.movedim(1, -1).flatten(2, 3)


def _reach(conv: nn.Conv3d, out: slice) -> tuple[int, int]:
    """First frame, and last + 1, that a convolution reads for some frames; beyond the clip too."""
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    first = out.start * stride - kernel // 2
    return first, (out.stop - out.start - 1) * stride + first + kernel


def _convolve(conv: nn.Conv3d, x: Tensor, read: slice, out: slice) -> Tensor:
    """Some frames of a convolution's result; zeros stand only for frames outside the clip."""
    first, last = _reach(conv, out)
    if (first, last) != (read.start, read.stop):
        x = F.pad(x, (0, 0, 0, 0, read.start - first, last - read.stop))
    padding = (0, *conv.padding[1:])
    return F.conv3d(x, conv.weight, conv.bias, conv.stride, padding)

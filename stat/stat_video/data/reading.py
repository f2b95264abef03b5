"""One way to read the frames of a video, whatever holds them and whoever decodes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from stat_video.data.decode import read_clip
from stat_video.data.frame_folders import read_frames
from stat_video.data.torchcodec_reader import check_torchcodec, read_clip_torchcodec
from stat_video.data.video import Video

Decoder = Literal["pyav", "torchcodec"]


def read_video(
    video: Video,
    choose: Callable[[int], np.ndarray],
    *,
    min_frames: int = 2,
    decoder: Decoder = "pyav",
) -> np.ndarray:
    """The frames that `choose` picks from the number of frames there are.

    Returns (T, H, W, 3) uint8 RGB, one for each index. Raises VideoError.
    """
    if video.frames is not None:
        return read_frames(video, choose, min_frames=min_frames)
    if decoder == "torchcodec":
        return read_clip_torchcodec(video.path, choose, min_frames=min_frames)
    return read_clip(video.path, choose, min_frames=min_frames)


def check_decoder(decoder: Decoder) -> None:
    """Try the decoder that was chosen. Raises UserError when it cannot be used here."""
    if decoder == "torchcodec":
        check_torchcodec()

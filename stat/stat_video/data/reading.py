"""Reading the frames of a video from a file or a folder of images, with one kind of error."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from stat_video.data.decode import read_clip
from stat_video.data.frame_folders import read_frames
from stat_video.data.video import Video
from stat_video.errors import VideoError


def read_video(
    video: Video, choose: Callable[[int], np.ndarray], *, min_frames: int = 2, threads: int = 1
) -> np.ndarray:
    """Decode the frames that `choose` picks.

    choose: maps the number of frames in the video to frame indices, in ascending order; repeats
        are allowed. It is asked again when a file has fewer frames than its packets promise.
    min_frames: a video with fewer frames is refused as too short.
    threads: of FFmpeg; one by default, since loader workers already run in parallel. 0 takes one
        per core.
    Returns (T, H, W, 3) uint8 RGB, one for each index, upright.
    Raises VideoError, one sentence, whatever is wrong with the video.
    """
    try:
        if video.frames is not None:
            return read_frames(video, choose, min_frames=min_frames)
        return read_clip(video.path, choose, min_frames=min_frames, threads=threads)
    except VideoError:
        raise
    # Damaged files make PyAV and PIL raise more kinds of exceptions than they document, among them
    # IndexError, AttributeError, SyntaxError and MemoryError. None of them must end a run.
    except Exception as error:
        # strerror: FFmpeg's own words without the number and the file name around them
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = reason.splitlines()[0]
        if isinstance(error, OSError):  # a permission, the disk
            raise VideoError(f"{video.path} cannot be read: {reason}") from error
        raise VideoError(
            f"{video.path} cannot be decoded: it is truncated, damaged or no video ({reason})"
        ) from error

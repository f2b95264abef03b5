"""Small videos for the tests, encoded once a session. Tests copy what they want to change."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import av
import numpy as np

from stat_video.clips.make import ClipOptions, write_clips, write_mp4

OPTIONS = ClipOptions(size=32, frames=16, train=12, val=6, seed=3)

_FOLDER = tempfile.TemporaryDirectory(prefix="stat-video-tests-")


@cache
def clips() -> Path:
    """A generated benchmark: 12 training and 6 validation clips of 16 frames of 32x32."""
    folder = Path(_FOLDER.name) / "clips"
    write_clips(folder, OPTIONS)
    return folder


@cache
def numbered() -> Path:
    """A video of 36 numbered frames with a key frame every twelve."""
    path = Path(_FOLDER.name) / "a video, numbered.mp4"
    write_mp4(path, numbered_frames(36), fps=25, gop=12)
    return path


def encode(path, images, codec="mpeg4", *, prepare=None, encoder=None, **container) -> None:
    """Write frames, each (H, W, 3) uint8, with PyAV; `prepare` may change the stream before.

    encoder: options of the codec; container: of `av.open`.
    """
    with av.open(str(path), "w", **container) as output:
        stream = output.add_stream(codec, rate=25, options=encoder)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        if prepare is not None:
            prepare(stream)
        for image in images:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        output.mux(stream.encode(None))


def numbered_frames(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """(count, height, width, 3) uint8 whose grey level tells the frame's number, six a frame."""
    levels = 20 + 6 * np.arange(count, dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def frame_numbers(images: np.ndarray) -> list[int]:
    """The frame numbers that `numbered_frames` wrote, read back after compression."""
    return ((images.mean((1, 2, 3)) - 20) / 6).round().astype(int).tolist()

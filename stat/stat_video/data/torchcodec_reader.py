"""Decoding with torchcodec, for machines that have it and the FFmpeg libraries that it needs.

Frames are sought exactly, by the packets' own times: the approximate mode trusts the header, and
gives wrong frames on files whose header lies.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from stat_video.data.decode import check_file, check_length, read_clip
from stat_video.errors import UserError, VideoError


def read_clip_torchcodec(
    path: Path, choose: Callable[[int], np.ndarray], *, min_frames: int = 2
) -> np.ndarray:
    """As `decode.read_clip`, with one FFmpeg thread: loader workers already run side by side."""
    from torchcodec.decoders import VideoDecoder

    check_file(path)
    try:
        decoder = VideoDecoder(
            str(path), seek_mode="exact", num_ffmpeg_threads=1, dimension_order="NHWC"
        )
        count = len(decoder)
        check_length(path, count, min_frames)
        indices = np.asarray(choose(count))
        unique, places = np.unique(indices, return_inverse=True)
        frames = decoder.get_frames_at(unique.tolist()).data.numpy()
    except (RuntimeError, ValueError, IndexError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise VideoError(
            f"{path} cannot be decoded: it is truncated, damaged or no video ({reason})"
        ) from error
    return frames[places]


@cache
def check_torchcodec() -> None:
    """Decode a small clip with torchcodec and with PyAV and compare them.

    Raises UserError when torchcodec cannot be imported, cannot decode, or gives other frames.
    """
    try:
        import torchcodec.decoders  # noqa: F401
    # The import loads FFmpeg's libraries and reports a missing one by RuntimeError or OSError.
    except (ImportError, RuntimeError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(_refusal(reason)) from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trial.mp4"
        _write_trial(path)
        wanted = read_clip(path, np.arange)
        try:
            found = read_clip_torchcodec(path, np.arange)
        except VideoError as error:
            raise UserError(_refusal(str(error))) from error
    if found.shape != wanted.shape or np.abs(found.astype(int) - wanted).mean() > 3:
        raise UserError(_refusal("it gives other frames than PyAV for a trial clip"))


def _refusal(reason: str) -> str:
    return (
        f"data.decoder torchcodec cannot be used here ({reason}); install the torchcodec for this "
        "torch and FFmpeg's shared libraries, or choose pyav"
    )


def _write_trial(path: Path) -> None:
    """Twelve frames that get brighter, with a key frame every four."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25, options={"g": "4"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in range(20, 240, 20):
            image = np.full((48, 64, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))

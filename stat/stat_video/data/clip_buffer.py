"""A buffer for the frames of a clip while they are read, with limits on the memory it may use."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from stat import S_ISREG

import numpy as np

from stat_video.errors import VideoError

MAX_PIXELS = 8192 * 4352  # of a frame: the largest of H.264 and H.265 up to level 6.2
MAX_RATIO = 20  # of a frame's sides: scaling the short one up must not make the long one huge
MAX_BYTES = 4 * 2**30  # of all frames that are read for one video at a time


class ClipBuffer:
    """An array of frames, filled one by one in any order.

    wanted: the frame numbers of the clip, each once, in ascending order.
    frames: (T, H, W, 3) uint8; empty until the first frame is put in, which sets H and W.
    """

    def __init__(self, path: Path, indices: Iterable[int]) -> None:
        self.path = path
        self.frames = np.empty((0, 0, 0, 3), np.uint8)
        self._places: dict[int, list[int]] = defaultdict(list)
        for place, index in enumerate(indices):
            self._places[int(index)].append(place)
        self.wanted = sorted(self._places)

    def put(self, index: int, image: np.ndarray) -> None:
        """Store frame `index`, (H, W, 3) uint8. Raises VideoError when it is too large, or when
        its size differs from that of earlier frames."""
        if not len(self.frames):
            shape = (sum(map(len, self._places.values())), *image.shape)
            check_size(self.path, *image.shape[:2])
            if (size := shape[0] * image.nbytes) > MAX_BYTES:
                raise VideoError(
                    f"{self.path} is too large: {shape[0]} frames of {_size(image.shape)} take "
                    f"{size / 2**30:.1f} GiB, at most {MAX_BYTES / 2**30:g} are read at a time"
                )
            self.frames = np.empty(shape, np.uint8)
        elif image.shape != self.frames.shape[1:]:  # streams that were cut together
            raise VideoError(
                f"{self.path} changes its picture size from {_size(self.frames.shape[1:])} to "
                f"{_size(image.shape)}"
            )
        self.frames[self._places[index]] = image


def check_file(path: Path) -> None:
    """Raise VideoError unless there is a file with something in it. Opening a FIFO would wait for
    its writer, so nothing is opened."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise VideoError(f"{path} does not exist") from error
    if not S_ISREG(status.st_mode):
        raise VideoError(f"{path} is not a file")
    if not status.st_size:
        raise VideoError(f"{path} is empty (0 bytes)")


def check_size(path: Path, height: int, width: int) -> None:
    """Raise VideoError when a frame has too many pixels, or is too narrow to be scaled."""
    if height * width > MAX_PIXELS:
        raise VideoError(
            f"{path} is too large: frames of {_size((height, width))} pixels, at most "
            f"{MAX_PIXELS:,} pixels are read"
        )
    if max(height, width) > MAX_RATIO * min(height, width):
        raise VideoError(
            f"{path} is too narrow: frames of {_size((height, width))} pixels, one side is more "
            f"than {MAX_RATIO} times the other"
        )


def check_length(path: Path, count: int, min_frames: int) -> None:
    """Raise VideoError when there are fewer frames than are needed."""
    if count < min_frames:
        raise VideoError(f"{path} is too short: {count} frames, at least {min_frames} are needed")


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"

"""Videos that were taken apart into a folder of images, one a frame."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from stat_video.data.decode import check_length
from stat_video.data.formats import IMAGE_SUFFIXES
from stat_video.data.video import Video
from stat_video.errors import VideoError


def read_frames(
    video: Video, choose: Callable[[int], np.ndarray], *, min_frames: int = 2
) -> np.ndarray:
    """Read the images that `choose` picks, as `decode.read_clip` does for a file.

    Returns (T, H, W, 3) uint8 RGB. Raises VideoError when the folder or an image is missing or
    damaged, when there are too few of them, or when their sizes differ.
    """
    names = video.frames.splitlines() if video.frames else _images(video.path)
    check_length(video.path, len(names), min_frames)
    indices = [int(i) for i in choose(len(names))]
    images = {i: _read_image(video.path / names[i]) for i in sorted(set(indices))}
    shapes = {image.shape for image in images.values()}
    if len(shapes) > 1:
        raise VideoError(f"{video.path} holds frames of different sizes: {sorted(shapes)[:2]}")
    return np.stack([images[i] for i in indices])


def _images(folder: Path) -> list[str]:
    """The names of a folder's images in order of their numbers, so that 10 comes after 9."""
    try:
        names = [p.name for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES]
    except FileNotFoundError as error:
        raise VideoError(f"{folder} does not exist") from error
    except OSError as error:
        raise VideoError(f"{folder} cannot be read: {error.strerror}") from error
    return sorted(names, key=lambda n: [(len(d), d) for d in re.findall(r"\d+", n)] or [(0, n)])


def _read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError as error:
        raise VideoError(f"{path} does not exist") from error
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise VideoError(f"{path} is no image that can be read ({type(error).__name__})") from error

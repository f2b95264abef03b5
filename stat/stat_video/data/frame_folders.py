"""Videos stored as a folder of images, one image per frame."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from stat_video.data.clip_buffer import ClipBuffer, check_file, check_length, check_size
from stat_video.data.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Video
from stat_video.errors import VideoError

# Pillow is asked for these only: it would hand an EPS called .jpg to Ghostscript.
_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")


def read_frames(
    video: Video, choose: Callable[[int], np.ndarray], *, min_frames: int = 2
) -> np.ndarray:
    """Read the images that `choose` picks, as `decode.read_clip` does for a file.

    Returns (T, H, W, 3) uint8 RGB. Raises VideoError when the folder or an image is missing or
    damaged, when there are too few of them, or when their sizes differ.
    """
    names = video.frames.splitlines() if video.frames else _images(video.path)
    check_length(video.path, len(names), min_frames)
    clip = ClipBuffer(video.path, choose(len(names)))
    for index in clip.wanted:
        clip.put(index, _read_image(video.path / names[index]))
    return clip.frames


def _images(folder: Path) -> list[str]:
    """The names of a folder's images in numerical order: 10 comes after 9."""
    try:
        found = [name for name in os.listdir(folder) if name[0] != "."]
    except FileNotFoundError as error:
        raise VideoError(f"{folder} does not exist") from error
    names = [name for name in found if name.lower().endswith(IMAGE_SUFFIXES)]
    if not names:
        text = f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})"
        if any(name.lower().endswith(VIDEO_SUFFIXES) for name in found):
            text += ", but videos: these must lie in the folder of their class itself"
        raise VideoError(text)
    return sorted(names, key=lambda n: [(len(d), d) for d in re.findall(r"\d+", n)] or [(0, n)])


def _read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8."""
    from PIL import Image

    check_file(path)
    try:
        with Image.open(path, formats=_FORMATS) as image:
            check_size(path, image.height, image.width)
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(f"{path} is no image that can be read ({type(error).__name__})") from error

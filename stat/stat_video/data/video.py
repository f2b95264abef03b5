"""What an annotation says of one video."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

VIDEO_SUFFIXES = (
    *(".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg"),
    *(".mpg", ".ogg", ".ogv", ".ts", ".webm", ".wmv"),
)
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


@dataclass(frozen=True)
class Video:
    """One video and the number of its class.

    path: a video file, or a folder of images. label: -1 where it is not known.
    frames: None for a file; for a folder the names of its frames, one a line, or "" for all images
        in it. One string rather than a tuple: a million short strings cost more than their text,
        and reference counts that worker processes write to would copy them all.
    """

    path: Path
    label: int
    frames: str | None = None

"""One video of an annotation list."""

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

    path: a video file or a folder of images. label: -1 if unknown.
    frames: None for a file; for a folder, the names of its frames, one per line, or "" for all
        images in it. This is one string rather than a tuple because a million short strings take
        more memory than their text, and because worker processes that touch their reference counts
        would copy them all.
    """

    path: Path
    label: int
    frames: str | None = None

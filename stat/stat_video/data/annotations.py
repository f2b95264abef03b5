"""Annotation lists in the Kinetics format: `path label`, one video a line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from stat_video.errors import UserError

# The last number is the label, what is before it the path, which may contain spaces and commas.
_LINE = re.compile(r"""^\s*(?P<quote>["']?)(?P<path>.+?)(?P=quote)\s*[\s,]\s*(?P<label>\d+)\s*$""")


@dataclass(frozen=True)
class Video:
    """One line of an annotation list: the file and the number of its class."""

    path: Path
    label: int


def read_annotations(file: Path, root: Path, num_classes: int | None = None) -> list[Video]:
    """Read `path label` lines, separated by spaces, a tab or a comma; paths are relative to `root`.

    Raises UserError naming the line when a line has another form or a label is not below
    `num_classes`, and when the list is missing or empty.
    """
    videos = []
    for number, line in enumerate(_read_lines(file), start=1):
        if not line.strip():
            continue
        match = _LINE.match(line)
        if match is None:
            raise UserError(f"{file}, line {number}: expected 'path label', got {line.strip()!r}")
        label = int(match["label"])
        if num_classes is not None and label >= num_classes:
            raise UserError(
                f"{file}, line {number}: label {label} is not below the number of classes "
                f"{num_classes}"
            )
        videos.append(Video(root / match["path"], label))
    if not videos:
        raise UserError(f"{file} lists no videos")
    return videos


def read_class_names(file: Path) -> tuple[str, ...]:
    """Class names, one a line, in label order. Raises UserError when there are none."""
    names = tuple(line.strip() for line in _read_lines(file) if line.strip())
    if not names:
        raise UserError(f"{file} names no classes")
    return names


def _read_lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from error

"""Annotations: which videos there are and the class of each. The format is found out by content.

A folder with a folder a class, the official JSON of Something-Something V2, lists of frames with a
header (PySlowFast), `folder frames label` and `path label` lines. docs/guides/data.md shows each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stat_video.data import formats
from stat_video.data.video import Video
from stat_video.errors import UserError

# The last number is the label, what is before it the path, which may contain spaces and commas.
_LINE = re.compile(r"""^\s*(?P<quote>["']?)(?P<path>.+?)(?P=quote)\s*[\s,]\s*(?P<label>\d+)\s*$""")


def read_annotations(
    source: Path, root: Path, classes: int | Sequence[str] | None = None
) -> list[Video]:
    """Read annotations in any of the formats that docs/guides/data.md lists.

    source: a list or a folder with a folder of videos for each class.
    root: what the paths in a list are relative to.
    classes: how many there are, or their names in label order; folders and templates are looked up
        in the names.
    Raises UserError naming the line when it has another form or a label is not below the number of
    classes, and when the source is missing or empty.
    """
    if source.is_dir():
        videos = formats.read_class_folders(source, _names(source, classes))
    else:
        text = _read_text(source)
        lines = [(n, line) for n, line in enumerate(text.splitlines(), start=1) if line.strip()]
        if not lines:
            raise UserError(f"{source} lists no videos")
        if (records := _json(source, text)) is not None:
            videos = formats.read_records(source, records, root, _names(source, classes))
        elif formats.is_frame_list(lines[0][1]):
            videos = formats.read_frame_list(source, lines, root, classes)
        elif formats.is_folder_list(source, lines, root):
            videos = formats.read_folder_list(lines, root)
        else:
            videos = [Video(root / path, label) for path, label in _path_labels(source, lines)]
    _check_labels(source, videos, classes)
    return videos


def read_class_names(file: Path) -> tuple[str, ...]:
    """Class names in label order: one a line, or JSON, a list or an object of name to number.

    Raises UserError when there are none, or the numbers are not 0, 1, 2 and so on.
    """
    text = _read_text(file)
    content = _json(file, text)
    if content is None:
        content = [line.strip() for line in text.splitlines() if line.strip()]
    elif isinstance(content, dict):
        content = _by_number(file, content)
    if not content:
        raise UserError(f"{file} names no classes")
    return tuple(str(name).strip('"') for name in content)


def _read_text(file: Path) -> str:
    """The text of a file. Raises UserError when it is missing or no text."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from error


def _json(file: Path, text: str) -> Any | None:
    """The content of a JSON list or object; None for any other text."""
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        if _LINE.match(text.splitlines()[0]):  # a path may begin with a bracket
            return None
        raise UserError(f"{file} begins like JSON, but is damaged: {error}") from error


def _path_labels(file: Path, lines: list[tuple[int, str]]) -> list[tuple[str, int]]:
    pairs = []
    for number, line in lines:
        match = _LINE.match(line)
        if match is None:
            raise UserError(f"{file}, line {number}: expected 'path label', got {line.strip()!r}")
        pairs.append((match["path"], int(match["label"])))
    return pairs


def _by_number(file: Path, numbers: dict[str, Any]) -> list[str]:
    try:
        ordered = sorted(numbers, key=lambda name: int(numbers[name]))
        found = [int(numbers[name]) for name in ordered]
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} must map class names to numbers: {error}") from error
    if found != list(range(len(found))):
        raise UserError(f"{file} must number the classes from 0 to {len(found) - 1}, each once")
    return ordered


def _names(source: Path, classes: int | Sequence[str] | None) -> Sequence[str]:
    if isinstance(classes, int) or classes is None:
        raise UserError(f"{source} tells classes by name; a list of the names is needed")
    return classes


def _check_labels(source: Path, videos: list[Video], classes: int | Sequence[str] | None) -> None:
    if not videos:
        raise UserError(f"{source} lists no videos")
    if classes is None:
        return
    count = classes if isinstance(classes, int) else len(classes)
    for video in videos:
        if video.label >= count:
            raise UserError(
                f"{source}: label {video.label} of {video.path} is not below the number of "
                f"classes {count}"
            )

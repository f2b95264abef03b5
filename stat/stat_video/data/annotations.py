"""Annotations: the videos of a data set and the class of each. The format is detected.

Supported are one folder per class, the official JSON of Something-Something V2, frame lists with a
header (PySlowFast), and lines of `folder frames label` or `path label`. docs/guides/data.md shows
each of them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from stat_video.data import formats
from stat_video.data.text_files import quote, split_number, to_number
from stat_video.data.video import Video
from stat_video.errors import UserError
from stat_video.files import parse_json, read_text


def read_annotations(source: Path, root: Path, names: Sequence[str]) -> list[Video]:
    """Read annotations in any of the formats that docs/guides/data.md lists.

    source: a list or a folder with a folder of videos for each class.
    root: what the paths in a list are relative to.
    names: of the classes in label order; folders and templates are looked up in them.
    Raises UserError naming the line when it has another form or a label is not below the number of
    classes, and when the source is missing or empty.
    """
    if source.is_dir():
        videos = formats.read_class_folders(source, names)
    else:
        text = read_text(source)
        lines = [(n, line) for n, line in enumerate(text.splitlines(), start=1) if line.strip()]
        if not lines:
            raise UserError(f"{source} lists no videos")
        if (records := _json(source, text)) is not None:
            videos = formats.read_records(source, records, root, names)
        elif formats.is_frame_list(lines[0][1]):
            videos = formats.read_frame_list(source, lines, root, names)
        else:
            videos = formats.read_lines(source, lines, root)
    if not videos:
        raise UserError(f"{source} lists no videos")
    for video in videos:
        if video.label >= len(names):
            raise UserError(
                f"{source}: label {video.label} of {video.path} is not below the number of "
                f"classes {len(names)}"
            )
    return videos


def read_class_names(file: Path) -> tuple[str, ...]:
    """Class names in label order: one a line, or JSON, a list or an object of name to number.

    Raises UserError when there are none, one is there twice or cannot be printed, or the numbers
    are not 0, 1, 2 and so on.
    """
    text = read_text(file)
    content = _json(file, text)
    if content is None:
        content = [line.strip() for line in text.splitlines() if line.strip()]
    elif isinstance(content, dict):
        content = _by_number(file, content)
    if not all(isinstance(name, str) for name in content):
        raise UserError(f"{file} must be a list of class names, or map class names to numbers")
    return checked_names(file, (name.strip('"') for name in content))


def checked_names(source: Path, names: Iterable[str]) -> tuple[str, ...]:
    """Class names that were found in `source`. Raises UserError as `read_class_names` does."""
    numbers: dict[str, int] = {}
    for number, name in enumerate(names):
        if name in numbers:
            raise UserError(
                f"{source} names class {quote(name)} twice, as number {numbers[name]} and {number}"
            )
        # control characters would reach the terminal, halves of surrogate pairs no file
        if not name or any(unicodedata.category(char) in ("Cc", "Cs") for char in name):
            raise UserError(f"{source}: {quote(name)}, number {number}, is no name for a class")
        numbers[name] = number
    if not numbers:
        raise UserError(f"{source} names no classes")
    return tuple(numbers)


def _json(file: Path, text: str) -> Any | None:
    """The content of a JSON list or object; None for any other text."""
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        return parse_json(file, text)
    except UserError:
        if split_number(text.splitlines()[0]):  # a path may begin with a bracket
            return None
        raise


def _by_number(file: Path, numbers: dict[str, Any]) -> list[str]:
    parsed = ((name, to_number(str(number))) for name, number in numbers.items())
    found = {name: number for name, number in parsed if number is not None}
    if len(found) < len(numbers):
        raise UserError(f"{file} must map class names to numbers")
    if sorted(found.values()) != list(range(len(found))):
        raise UserError(f"{file} must number the classes from 0 to {len(found) - 1}, each once")
    return sorted(found, key=lambda name: found[name])

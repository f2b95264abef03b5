"""Annotation formats: one function per format, from the content of a file to videos."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from stat_video.data.text_files import quote, split_number, to_number
from stat_video.data.video import VIDEO_SUFFIXES, Video
from stat_video.errors import UserError
from stat_video.files import parse_json, read_text

# -- a folder with a folder a class ----------------------------------------------------------------


def class_folders(folder: Path) -> tuple[str, ...]:
    """The class names: the sorted names of a folder's subfolders, without hidden ones."""
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != "."))


def read_class_folders(folder: Path, names: Sequence[str]) -> list[Video]:
    """`folder/CLASS/VIDEO`, where VIDEO is a file or a folder of images. Hidden files and files
    with other suffixes are ignored.

    Raises UserError for a folder that is not a class.
    """
    numbers = {name: number for number, name in enumerate(names)}
    videos = []
    for name in class_folders(folder):
        if name not in numbers:
            raise UserError(f"{folder / name} is no class: the class names do not list {name!r}")
        with os.scandir(folder / name) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name[0] == ".":
                    continue
                if entry.is_dir():
                    videos.append(Video(Path(entry), numbers[name], frames=""))
                elif entry.name.lower().endswith(VIDEO_SUFFIXES):
                    videos.append(Video(Path(entry), numbers[name]))
    return videos


# -- Something-Something V2 ------------------------------------------------------------------------


def read_records(file: Path, records: Any, root: Path, names: Sequence[str]) -> list[Video]:
    """The official JSON: a list of objects with `id` and `template`; videos are `root/ID.webm`.

    Other suffixes, or folders of images named ID, are detected by looking for the first videos.
    """
    labels = _template_labels(file, records, names)
    suffix = _suffix_of(root, labels)
    frames = "" if suffix == "" else None
    return [Video(root / f"{name}{suffix}", label, frames) for name, label in labels.items()]


def _template_labels(file: Path, records: Any, names: Sequence[str]) -> dict[str, int]:
    """Labels by id. A template is a class name with brackets around its placeholders."""
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise UserError(f"{file} must be a JSON list of objects with 'id' and 'template'")
    numbers = {name: number for number, name in enumerate(names)}
    labels = {}
    for position, record in enumerate(records):
        video, template = record.get("id"), record.get("template")
        if not isinstance(video, str | int) or not isinstance(template, str):
            raise UserError(f"{file}, entry {position}: 'id' and 'template' are needed")
        name = template.replace("[", "").replace("]", "")
        if name not in numbers:
            raise UserError(f"{file}, entry {position}: {quote(name)} is not among the class names")
        labels[str(video)] = numbers[name]
    return labels


def _suffix_of(root: Path, ids: Iterable[str]) -> str:
    """The suffix of the files named by the ids ("" for folders); ".webm" if none is found."""
    for name in islice(ids, 20):
        for suffix in (".webm", ".mp4", ".avi", ".mkv"):
            if os.path.isfile(root / f"{name}{suffix}"):  # no error for names that are too long
                return suffix
        if os.path.isdir(root / name):
            return ""
    return ".webm"


# -- a line a frame (PySlowFast) -------------------------------------------------------------------


def is_frame_list(header: str) -> bool:
    """Whether a first line is `original_vido_id video_id frame_id path labels`."""
    return {"frame_id", "path", "labels"} <= set(header.split())


def read_frame_list(
    file: Path, lines: list[tuple[int, str]], root: Path, names: Sequence[str]
) -> list[Video]:
    """One line per frame, grouped by the first column. Empty labels, as in the lists for
    Something-Something V2, are looked up in that data set's JSON in the same folder.

    Raises UserError for a line with a wrong number of columns and for a video with several labels
    or none.
    """
    columns = lines[0][1].split()
    frame_column, path_column = columns.index("frame_id"), columns.index("path")
    label_column = columns.index("labels")
    frames: dict[str, list[tuple[int, str]]] = {}
    labels: dict[str, str] = {}
    for number, line in lines[1:]:
        row = line.split()
        frame = to_number(row[frame_column]) if len(row) == len(columns) else None
        if frame is None:
            raise UserError(
                f"{file}, line {number}: expected {quote(' '.join(columns))}, got {quote(line)}"
            )
        frames.setdefault(row[0], []).append((frame, row[path_column]))
        labels[row[0]] = row[label_column].strip("\"'")
    known = {}
    if not all(labels.values()):
        known = _labels_beside(file, names)
    videos = []
    for name, entries in frames.items():
        label = to_number(labels[name]) if labels[name] else known.get(name)
        if label is None:
            raise UserError(f"{file}: video {name} must have one label, got {quote(labels[name])}")
        paths = [path for _, path in sorted(entries)]
        folder = Path(paths[0]).parent
        if any(Path(path).parent != folder for path in paths):
            raise UserError(f"{file}: the frames of video {name} must lie in one folder")
        listed = "\n".join(Path(path).name for path in paths)
        videos.append(Video(root / folder, label, listed))
    return videos


def _labels_beside(file: Path, names: Sequence[str]) -> dict[str, int]:
    """Labels by id, from every official JSON list in the folder of `file`."""
    found: dict[str, int] = {}
    for path in sorted(file.parent.glob("*.json")):
        try:
            records = parse_json(path, read_text(path))
        except UserError:
            continue
        first = records[0] if records and isinstance(records, list) else None
        if isinstance(first, dict) and "template" in first:
            found |= _template_labels(path, records, names)
    return found


# -- `path label` and `folder frames label` (mmaction2) lines --------------------------------------


def read_lines(file: Path, lines: list[tuple[int, str]], root: Path) -> list[Video]:
    """Lines of `path label`, or of `folder frames label` if all lines end with two numbers.

    `path label` lines whose paths end with a number look the same; whether the path exists decides.
    The number of frames is ignored: the images are counted when the folder is read.
    Raises UserError for any other line, and for a video file followed by two numbers.
    """
    pairs = []
    for number, line in lines:
        if (pair := split_number(line)) is None:
            raise UserError(f"{file}, line {number}: expected 'path label', got {quote(line)}")
        pairs.append(pair)
    folders = [pair for path, _ in pairs if (pair := split_number(path))]
    if len(folders) < len(pairs) or os.path.exists(root / pairs[0][0]):
        return [Video(root / path, label) for path, label in pairs]
    if os.path.isfile(root / folders[0][0]):
        raise UserError(f"{file}, line {lines[0][0]}: one label a video is wanted, got several")
    return [
        Video(root / path, label, frames="")
        for (path, _), (_, label) in zip(folders, pairs, strict=True)
    ]

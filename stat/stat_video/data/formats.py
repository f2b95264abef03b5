"""The annotation formats besides `path label` lines, each a function from its content to videos."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from stat_video.data.video import VIDEO_SUFFIXES, Video
from stat_video.errors import UserError

_FOLDER_LINE = re.compile(r"^\s*(?P<path>.+?)[\s,]+(?P<frames>\d+)[\s,]+(?P<label>\d+)\s*$")

# -- a folder with a folder a class ----------------------------------------------------------------


def class_folders(folder: Path) -> tuple[str, ...]:
    """The names of a folder's folders, sorted, hidden ones left out: the classes."""
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != "."))


def read_class_folders(folder: Path, names: Sequence[str]) -> list[Video]:
    """`folder/CLASS/VIDEO`, where VIDEO is a file or a folder of images; other files are no videos.

    Raises UserError for a folder that is no class.
    """
    numbers = {name: number for number, name in enumerate(names)}
    videos = []
    for name in class_folders(folder):
        if name not in numbers:
            raise UserError(f"{folder / name} is no class: the class names do not list {name!r}")
        for path in sorted((folder / name).iterdir()):
            if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file():
                videos.append(Video(path, numbers[name]))
            elif path.is_dir() and path.name[0] != ".":
                videos.append(Video(path, numbers[name], frames=""))
    return videos


# -- Something-Something V2 ------------------------------------------------------------------------


def read_records(file: Path, records: Any, root: Path, names: Sequence[str]) -> list[Video]:
    """The official JSON: a list of objects with `id` and `template`; videos are `root/ID.webm`.

    Another suffix, or folders of images called ID, are found by looking for the first videos.
    """
    labels = _template_labels(file, records, names)
    suffix = _suffix_of(root, labels)
    frames = "" if suffix == "" else None
    return [Video(root / f"{name}{suffix}", label, frames) for name, label in labels.items()]


def _template_labels(file: Path, records: Any, names: Sequence[str]) -> dict[str, int]:
    """Label by id. A template is a class name with brackets around what it leaves open."""
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise UserError(f"{file} must be a JSON list of objects with 'id' and 'template'")
    numbers = {name: number for number, name in enumerate(names)}
    labels = {}
    for position, record in enumerate(records):
        if "id" not in record or "template" not in record:
            raise UserError(f"{file}, entry {position}: 'id' and 'template' are needed")
        name = record["template"].replace("[", "").replace("]", "")
        if name not in numbers:
            raise UserError(f"{file}, entry {position}: {name!r} is not among the class names")
        labels[str(record["id"])] = numbers[name]
    return labels


def _suffix_of(root: Path, ids: Iterable[str]) -> str:
    """What follows the ids in the names of files (a folder: nothing), .webm if none is found."""
    for name in islice(ids, 20):
        for suffix in (".webm", ".mp4", ".avi", ".mkv"):
            if (root / f"{name}{suffix}").is_file():
                return suffix
        if (root / name).is_dir():
            return ""
    return ".webm"


# -- a line a frame (PySlowFast) -------------------------------------------------------------------


def is_frame_list(header: str) -> bool:
    """Whether a first line is `original_vido_id video_id frame_id path labels`."""
    return {"frame_id", "path", "labels"} <= set(header.split())


def read_frame_list(
    file: Path, lines: list[tuple[int, str]], root: Path, classes: int | Sequence[str] | None
) -> list[Video]:
    """A line a frame, grouped by the first column. Labels that are left empty, as in the lists for
    Something-Something V2, come from that data set's JSON in the same folder.

    Raises UserError for a line with another number of columns, more than one label or none.
    """
    columns = lines[0][1].split()
    frame_column, path_column = columns.index("frame_id"), columns.index("path")
    label_column = columns.index("labels")
    frames: dict[str, list[tuple[int, str]]] = {}
    labels: dict[str, str] = {}
    for number, line in lines[1:]:
        row = line.split()
        if len(row) != len(columns) or not row[frame_column].isdigit():
            raise UserError(f"{file}, line {number}: expected {' '.join(columns)}, got {line!r}")
        frames.setdefault(row[0], []).append((int(row[frame_column]), row[path_column]))
        labels[row[0]] = row[label_column].strip("\"'")
    known = {}
    if not all(labels.values()):
        known = _labels_beside(file, classes)
    videos = []
    for name, entries in frames.items():
        label = labels[name] or str(known.get(name, ""))
        if not label.isdigit():
            raise UserError(f"{file}: video {name} must have one label, got {label!r}")
        paths = [path for _, path in sorted(entries)]
        folder = Path(paths[0]).parent
        if any(Path(path).parent != folder for path in paths):
            raise UserError(f"{file}: the frames of video {name} must lie in one folder")
        names = "\n".join(Path(path).name for path in paths)
        videos.append(Video(root / folder, int(label), names))
    return videos


def _labels_beside(file: Path, classes: int | Sequence[str] | None) -> dict[str, int]:
    """Label by id from every official JSON list in the folder of `file`."""
    found: dict[str, int] = {}
    if classes is None or isinstance(classes, int):
        return found
    for path in sorted(file.parent.glob("*.json")):
        try:
            records = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError):
            continue
        if isinstance(records, list) and records and "template" in records[0]:
            found |= _template_labels(path, records, classes)
    return found


# -- `folder frames label` (mmaction2) -------------------------------------------------------------


def is_folder_list(file: Path, lines: list[tuple[int, str]], root: Path) -> bool:
    """Whether all lines end with two numbers and the first one's path is a folder.

    `path label` lines whose paths end with a number look the same; the disk tells them apart.
    Raises UserError where a video file is followed by two numbers: several labels a video.
    """
    if not all(_FOLDER_LINE.match(line) for _, line in lines):
        return False
    first = _FOLDER_LINE.match(lines[0][1])
    if (root / first["path"]).is_file():
        raise UserError(f"{file}, line {lines[0][0]}: one label a video is wanted, got several")
    return not (root / f"{first['path']} {first['frames']}").exists()


def read_folder_list(lines: list[tuple[int, str]], root: Path) -> list[Video]:
    """The number of frames is left aside: the images in the folder are counted when it is read."""
    matches = [_FOLDER_LINE.match(line) for _, line in lines]
    return [Video(root / match["path"], int(match["label"]), frames="") for match in matches]

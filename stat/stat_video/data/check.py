"""`stat-video check-data`: read every video of a data set once before training on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
from torch.utils.data import DataLoader, Dataset

from stat_video.data.clip_buffer import MAX_BYTES
from stat_video.data.loader import leave_interrupts_to_parent
from stat_video.data.options import DataOptions
from stat_video.data.reading import read_video
from stat_video.data.sources import list_videos
from stat_video.data.video import Video
from stat_video.errors import UserError, VideoError, printable
from stat_video.files import write_json, write_lines

_PIECE = 64  # frames that are held at once when all of a video are decoded


@dataclass(frozen=True)
class CheckOptions:
    """What `stat-video check-data` reads and writes.

    Args:
        full: decode every frame of each video, not only the first, the middle and the last.
        dir: folder for check.json and the lists of unusable videos.
    """

    full: bool = False
    dir: str = "runs/check-data"


@dataclass(frozen=True)
class Probe:
    """One video: its number of frames, their height and width, or the reason it is unusable."""

    index: int
    frames: int = 0
    size: tuple[int, int] = (0, 0)
    error: str | None = None


@dataclass(frozen=True)
class Findings:
    """The findings about a split. videos, probes: in the same order; names: of the classes."""

    split: str
    names: tuple[str, ...]
    videos: Sequence[Video]
    probes: Sequence[Probe]

    @property
    def bad(self) -> list[str]:
        """The reason why each unusable video is unusable."""
        return [probe.error for probe in self.probes if probe.error]

    @property
    def empty_classes(self) -> list[str]:
        """Classes without a usable video."""
        usable = {v.label for v, p in zip(self.videos, self.probes, strict=True) if not p.error}
        return [name for label, name in enumerate(self.names) if label not in usable]

    def record(self) -> dict[str, Any]:
        """The findings as written to check.json."""
        good = [probe for probe in self.probes if not probe.error]
        lengths = [probe.frames for probe in good]
        sizes = Counter(f"{width}x{height}" for height, width in (probe.size for probe in good))
        return {
            "videos": len(self.videos),
            "unusable": len(self.bad),
            "classes": len(self.names),
            "empty_classes": self.empty_classes,
            "frames": {"least": min(lengths), "median": median(lengths), "most": max(lengths)}
            if good
            else None,
            "sizes": dict(sizes.most_common()),
        }

    def describe(self) -> str:
        """The findings in a few readable lines."""
        record = self.record()
        share = 100 * len(self.bad) / len(self.videos)
        lines = [
            f"{self.split}: {len(self.videos)} videos, {len(self.names)} classes, "
            f"{len(self.bad)} unusable ({share:.1f} %)"
        ]
        if record["frames"]:
            lengths = " / ".join(f"{n:g}" for n in record["frames"].values())
            sizes = [f"{size} ({count})" for size, count in list(record["sizes"].items())[:4]]
            more = " ..." if len(record["sizes"]) > 4 else ""
            lines.append(f"  frames, least / median / most: {lengths}")
            lines.append(f"  picture sizes: {', '.join(sizes)}{more}")
        if self.empty_classes:
            some = printable(", ".join(self.empty_classes[:5]))
            more = " ..." if len(self.empty_classes) > 5 else ""
            lines.append(f"  {len(self.empty_classes)} classes have no usable video: {some}{more}")
        return "\n".join(lines)


def check_data(data: DataOptions, options: CheckOptions) -> list[Findings]:
    """Read the videos of both splits with `data.workers` processes and a progress bar.

    Prints the findings and writes check.json and unusable_SPLIT.txt. Raises UserError for malformed
    annotations, too large a share of unusable videos, and videos that are in both splits.
    """
    folder, found = Path(options.dir), []
    for split in ("train", "val"):
        findings = _check_split(data, split, options.full)
        print(findings.describe(), flush=True)
        found.append(findings)
    write_json(folder / "check.json", {findings.split: findings.record() for findings in found})
    for findings in found:
        write_lines(folder / f"unusable_{findings.split}.txt", findings.bad)
    _complain(found, data, folder)
    return found


def _complain(found: list[Findings], data: DataOptions, folder: Path) -> None:
    for findings in found:
        if len(findings.bad) > data.max_bad_share * len(findings.videos):
            raise UserError(
                f"{len(findings.bad)} of {len(findings.videos)} {findings.split} videos are "
                f"unusable, more than data.max_bad_share {data.max_bad_share:g} allows; they are "
                f"listed in {folder / f'unusable_{findings.split}.txt'}"
            )
    first, second = ({video.path for video in findings.videos} for findings in found)
    if shared := sorted(first & second):
        raise UserError(
            f"{len(shared)} videos are both in data.train and in data.val, {shared[0]} for one"
        )


def _check_split(data: DataOptions, split: Literal["train", "val"], full: bool) -> Findings:
    from tqdm import tqdm

    names, videos = list_videos(data, split)
    loader = DataLoader(
        _Probes(videos, data.min_frames, full),
        batch_size=None,
        num_workers=data.workers,
        worker_init_fn=leave_interrupts_to_parent,
    )
    bar = tqdm(loader, total=len(videos), desc=f"check {split}", unit="video", leave=False)
    return Findings(split, names, videos, list(bar))


class _Probes(Dataset):
    """A data set whose item i is the `Probe` of video i."""

    def __init__(self, videos: Sequence[Video], min_frames: int, full: bool) -> None:
        self.videos, self.min_frames, self.full = videos, min_frames, full

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> Probe:
        try:
            frames, images = self._read(index, lambda length: [0, length // 2, length - 1])
            piece = min(_PIECE, MAX_BYTES // images[0].nbytes)
            for start in range(0, frames if self.full else 0, piece):
                self._read(index, lambda n, a=start: range(min(a, n - 1), min(a + piece, n)))
        except VideoError as error:
            return Probe(index, error=str(error))
        return Probe(index, frames, images.shape[1:3])

    def _read(self, index: int, choose) -> tuple[int, np.ndarray]:
        """The number of frames of a video and those that `choose` picks."""
        lengths = []

        def remember(length: int) -> np.ndarray:
            lengths.append(length)
            return np.array(choose(length))

        images = read_video(self.videos[index], remember, min_frames=self.min_frames)
        return lengths[-1], images

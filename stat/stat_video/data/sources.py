"""The data set, sampler and loader for one annotation list, built from the options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch.utils.data import DataLoader

from stat_video.data import formats
from stat_video.data.annotations import checked_names, read_annotations, read_class_names
from stat_video.data.dataset import ClipDataset, FrameOrder
from stat_video.data.loader import ALONE, EpochBatches, Share, SkipCount, make_loader
from stat_video.data.options import DataOptions
from stat_video.data.transforms import crops_transform, train_transform
from stat_video.data.video import Video
from stat_video.errors import UserError


@dataclass(frozen=True)
class Source:
    """A list of videos as batches.

    dataset, batches, loader: see their modules; class_names: in label order.
    """

    options: DataOptions
    class_names: tuple[str, ...]
    dataset: ClipDataset
    batches: EpochBatches
    loader: DataLoader

    def new_skip_count(self, report: Path | None = None) -> SkipCount:
        """A new count of unusable videos, listed in `report` (one file per process)."""
        rank = self.batches.share.rank
        if report is not None and rank:
            report = report.with_name(f"{report.stem}.{rank}{report.suffix}")
        return SkipCount(len(self.dataset), self.options.max_bad_share, report)

    def preload(self, title: str) -> None:
        """Fill the memory cache if `data.cache_gib` asks for one."""
        if self.options.cache_gib:
            self.dataset.preload(self.options.cache_gib, title)


def open_source(
    options: DataOptions,
    *,
    frames: int,
    image_size: int,
    split: Literal["train", "val"],
    seed: int = 0,
    frame_order: FrameOrder = "forward",
    share: Share = ALONE,
    views: tuple[int, int] = (1, 1),
) -> Source:
    """Read annotations and build their data set and loader.

    frames, image_size: of a clip, in frames and pixels; share: this process's part.
    views: (clips in time, crops) of each validation video.
    Raises UserError when the folder, the list or the label file is missing or malformed.
    """
    training = split == "train"
    names, videos = list_videos(options, split)
    dataset = ClipDataset(
        videos,
        train_transform(image_size, options)
        if training
        else crops_transform(image_size, options.short_side, views[1]),
        frames=frames,
        training=training,
        seed=seed,
        min_frames=options.min_frames,
        frame_order=frame_order,
        repeats=options.repeats,
        views=views,
    )
    batches = EpochBatches(
        len(dataset),
        options.batch_size // options.repeats if training else options.batch_size,
        shuffle=training,
        seed=seed,
        share=share,
        views=dataset.clips_a_video,
    )
    loader = make_loader(dataset, batches, options.workers)
    return Source(options, names, dataset, batches, loader)


def list_videos(
    options: DataOptions, split: Literal["train", "val"]
) -> tuple[tuple[str, ...], list[Video]]:
    """The class names and the videos of a split. Raises UserError as `open_source` does."""
    root = Path(options.root)
    try:
        if not root.is_dir():
            raise UserError(f"data.root {root} is not a folder")
        names = _class_names(options, root)
        return names, read_annotations(root / getattr(options, split), root / options.videos, names)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error


def _class_names(options: DataOptions, root: Path) -> tuple[str, ...]:
    """Class names from the label file or, without one, from the folders of a split."""
    labels = root / options.labels
    if labels.exists():
        return read_class_names(labels)
    for split in (root / options.train, root / options.val):
        if split.is_dir() and (names := formats.class_folders(split)):
            return checked_names(split, names)
    here = [f"--data.{name} {name}" for name in ("train", "val") if (root / name).is_dir()]
    raise UserError(
        f"{labels} does not exist: write the class names into it, one per line in label order, or "
        "set data.train and data.val to folders with a folder of videos for each class"
        + (f" ({' '.join(here)})" if here else "")
    )

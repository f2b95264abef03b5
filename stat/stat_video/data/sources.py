"""Everything that a run needs from one annotation list, opened by the options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch.utils.data import DataLoader

from stat_video.config import STATConfig
from stat_video.data.annotations import read_annotations, read_class_names
from stat_video.data.dataset import ClipDataset, FrameOrder
from stat_video.data.loader import ALONE, EpochBatches, Share, SkipCount, make_loader
from stat_video.data.transforms import eval_transform, train_transform
from stat_video.errors import UserError
from stat_video.options import DataOptions


@dataclass(frozen=True)
class Source:
    """A list of videos as batches.

    dataset, batches, loader: as their modules say; class_names: in label order.
    """

    options: DataOptions
    class_names: tuple[str, ...]
    dataset: ClipDataset
    batches: EpochBatches
    loader: DataLoader

    def fit_config(self, config: STATConfig) -> STATConfig:
        """The configuration with this data's classes."""
        return replace(config, num_classes=len(self.class_names), class_names=self.class_names)

    def new_skip_count(self) -> SkipCount:
        """A fresh count of unusable videos."""
        return SkipCount(len(self.dataset), self.options.max_bad_share)

    def preload(self, title: str) -> None:
        """Fill the memory cache if there is to be one."""
        if self.options.cache_gib:
            self.dataset.preload(self.options.cache_gib, title)


def open_source(
    options: DataOptions,
    config: STATConfig,
    *,
    split: Literal["train", "val"],
    seed: int = 0,
    frame_order: FrameOrder = "forward",
    share: Share = ALONE,
) -> Source:
    """Read an annotation list and make its data set and loader.

    config: gives the number of frames and the image size of a clip; share: of this process.
    Raises UserError when the folder, the list or the label file is missing or malformed.
    """
    root, training = Path(options.root), split == "train"
    if not root.is_dir():
        raise UserError(f"data.root {root} is not a folder")
    names = read_class_names(root / options.labels)
    videos = read_annotations(root / getattr(options, split), root, len(names))
    transform = (
        train_transform(config.image_size, options)
        if training
        else eval_transform(config.image_size, options.short_side)
    )
    dataset = ClipDataset(
        videos,
        transform,
        frames=config.frames,
        training=training,
        seed=seed,
        min_frames=options.min_frames,
        frame_order=frame_order,
    )
    batches = EpochBatches(
        len(dataset), options.batch_size, shuffle=training, seed=seed, share=share
    )
    loader = make_loader(dataset, batches, options.workers)
    return Source(options, names, dataset, batches, loader)

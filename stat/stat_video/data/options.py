"""Where the videos are and how they become clips.

The command line turns each field into an option (`--data.root`) and into a key of a recipe file;
the texts under Args are its help.
"""

from __future__ import annotations

from dataclasses import dataclass

from stat_video.option_checks import MAX_THREADS, at_least, check_views, within


@dataclass(frozen=True)
class DataOptions:
    """Where the videos are and how they become clips.

    Args:
        root: folder that everything below is relative to.
        train: annotations of the training videos: a list in any format of docs/guides/data.md, or a
            folder with a folder of videos for each class.
        val: annotations of the validation videos, likewise.
        labels: class names, one a line, or JSON that maps names to numbers. May be missing where
            train and val are folders.
        videos: folder that the paths in the lists are relative to; empty stands for root.
        batch_size: clips an update, over all processes and `run.accumulate` pieces together.
        workers: decoding processes; 0 decodes in the main one.
        cache_gib: keep decoded videos in memory, up to this many GiB; 0 keeps none.
        repeats: clips that a training video is made into each time it is decoded, each augmented on
            its own; batch_size counts clips, an epoch takes every video once.
        crop_area: smallest and largest share of a frame that the training crop covers.
        crop_ratio: narrowest and widest aspect ratio of the training crop.
        flip: probability of a left-right flip in training; 0 where directions matter.
        randaugment_ops: operations of RandAugment on a training clip; 0 for none.
        randaugment_magnitude: their strength, from 0 to 10.
        randaugment_std: standard deviation of the strength.
        erasing: probability that a box of a training clip is replaced by noise.
        mixup: parameter of the beta distribution that Mixup draws its shares from; 0 for no Mixup.
        cutmix: the same for CutMix.
        mix_prob: probability that a batch is mixed.
        mix_switch: probability that CutMix mixes it where both are on.
        short_side: frames are scaled to this short side before the centre crop of evaluation, in
            pixels; 0 stands for 256/224 of the crop.
        views: clips in time and crops of each that `stat-video eval` averages over a video;
            validation while training takes one.
        min_frames: videos with fewer frames are refused as too short.
        max_bad_share: share of unusable videos above which a run stops.
    """

    root: str = "."
    train: str = "train.txt"
    val: str = "val.txt"
    labels: str = "labels.txt"
    videos: str = ""
    batch_size: int = 16
    workers: int = 0
    cache_gib: float = 0.0
    repeats: int = 1
    crop_area: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: float = 0.5
    randaugment_ops: int = 0
    randaugment_magnitude: float = 7.0
    randaugment_std: float = 0.5
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    mix_switch: float = 0.5
    short_side: int = 0
    views: tuple[int, int] = (1, 1)
    min_frames: int = 2
    max_bad_share: float = 0.1

    def __post_init__(self) -> None:
        at_least("data", self, 1, "batch_size", "min_frames", "repeats")
        at_least("data", self, 0, "cache_gib", "short_side", "mixup", "cutmix")
        within("data", self, 0, MAX_THREADS, "workers")
        at_least("data", self, 0, "randaugment_ops", "randaugment_std")
        within("data", self, 0, 10, "randaugment_magnitude")
        within("data", self, 0, 1, "flip", "erasing", "mix_prob", "mix_switch", "max_bad_share")
        if self.batch_size % self.repeats:
            raise ValueError(
                f"data.batch_size must be a multiple of data.repeats {self.repeats}, "
                f"got {self.batch_size}"
            )
        check_views("data.views", self.views)
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            raise ValueError(f"data.crop_area must satisfy 0 < low <= high <= 1, got {low}, {high}")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"data.crop_ratio must satisfy 0 < low <= high, got {low}, {high}")

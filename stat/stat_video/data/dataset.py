"""A torch data set of videos. Its random choices depend only on (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stat_video.data.reading import read_video
from stat_video.data.sampling import sample_frames
from stat_video.data.transforms import Transform
from stat_video.data.video import Video
from stat_video.errors import VideoError

REPLACEMENTS = 10  # how many other videos may be tried in place of an unusable one

FrameOrder = Literal["forward", "reverse", "shuffle"]

# (epoch, index), or (epoch, index, first view, view after the last) for a part of the views
Key = tuple[int, int] | tuple[int, int, int, int]


def seed_of(*parts: int) -> int:
    """A 63-bit seed computed from all `parts`."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass(frozen=True)
class Sample:
    """The clips of one video; without clips if a video of the evaluation list is unusable.

    clips: (V, 3, T, H, W) uint8 or None; views: the view number of each of the V clips;
        label: class number.
    index: the video that was used; skipped: index and error of each unusable video tried before it.
    """

    clips: Tensor | None
    views: tuple[int, ...]
    label: int
    index: int
    skipped: tuple[tuple[int, str], ...] = ()


class ClipDataset(Dataset):
    """Videos with labels; item (epoch, index) is a `Sample`.

    transform: (T, 3, H, W) uint8 -> (3, T, S, S) or, for several crops, (crops, 3, T, S, S).
    training: if True, a random frame of each segment is taken and an unusable video is replaced by
        another one drawn from (seed, epoch, index); otherwise the frames are fixed and the sample
        of an unusable video has no clip.
    repeats: number of times that the decoded clip of a training video is augmented.
    views: (clips in time, crops) of an evaluation video; view v is crop v % crops of clip
        v // crops. The video is decoded once for all of them.
    threads: of FFmpeg for a video; 0 uses one per core. Loader workers already run in parallel.
    frame_order: "reverse" and "shuffle" test whether a model uses the order of the frames.
    """

    def __init__(
        self,
        videos: Sequence[Video],
        transform: Transform,
        *,
        frames: int,
        training: bool,
        seed: int = 0,
        min_frames: int = 2,
        frame_order: FrameOrder = "forward",
        repeats: int = 1,
        views: tuple[int, int] = (1, 1),
        threads: int = 1,
    ) -> None:
        self.videos, self.transform = list(videos), transform
        self.frames, self.training, self.seed = frames, training, seed
        self.min_frames, self.frame_order = min_frames, frame_order
        self.repeats, self.times, self.crops = repeats, views[0], views[1]
        self.threads = threads
        self._cache: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: Key) -> Sample:
        epoch, index, *part = key
        views = range(*part) if part else range(self.clips_a_video)
        skipped: list[tuple[int, str]] = []
        for candidate in self._candidates(epoch, index):
            seeds = self.seed, epoch, index
            try:
                images = self.read(candidate, seed_of(*seeds), views)
            except VideoError as error:
                skipped.append((candidate, str(error)))
                continue
            clips = self.augment(images, seeds, views)
            label = self.videos[candidate].label
            return Sample(clips, tuple(views), label, candidate, tuple(skipped))
        return Sample(None, (), self.videos[index].label, index, tuple(skipped))

    @property
    def clips_a_video(self) -> int:
        """The number of clips per video: repeats in training, views in evaluation."""
        return self.repeats if self.training else self.times * self.crops

    def preload(self, limit_gib: float, title: str) -> None:
        """Decode whole videos into memory until `limit_gib` is reached.

        Call it before the loader workers start, so that they share the memory. Unusable videos are
        reported later by `__getitem__`.
        """
        from tqdm import tqdm

        room = limit_gib * 2**30
        for index in tqdm(range(len(self.videos)), desc=title, unit="video"):
            try:
                frames = self._decode(index, np.arange)
            except VideoError:
                continue
            room -= frames.nbytes
            if room < 0:
                return
            self._cache[index] = frames

    def read(self, index: int, seed: int, views: range) -> Tensor:
        """The frames of the clips that `views` need, (clips, T, 3, H, W) uint8.

        One clip in training, one per temporal position in evaluation. Raises VideoError.
        """
        times = self._times(views)
        draws = None
        if self.training:
            generator = torch.Generator().manual_seed(seed)
            draws = torch.rand(self.frames, generator=generator).numpy()

        def choose(length: int) -> np.ndarray:
            chosen = (
                sample_frames(length, self.frames, draws, view=(time, self.times)) for time in times
            )
            return np.concatenate(list(chosen))

        cached = self._cache.get(index)
        images = self._decode(index, choose) if cached is None else cached[choose(len(cached))]
        return torch.from_numpy(images).permute(0, 3, 1, 2).unflatten(0, (len(times), -1))

    def augment(self, images: Tensor, seeds: tuple[int, ...], views: range) -> Tensor:
        """The clips from `read`, transformed: (V, 3, T, S, S) uint8, one for each of `views`."""
        clips = []
        with torch.random.fork_rng(devices=[]):
            if self.training:
                for repeat in views:
                    # A repeat's crop must not follow from the draws that chose the frames.
                    torch.default_generator.manual_seed(seed_of(*seeds, repeat, 1))
                    clips.append(self.transform(self._ordered(images[0])))
                return _stack(clips)
            for time, clip in zip(self._times(views), images, strict=True):
                torch.default_generator.manual_seed(seed_of(*seeds))
                crops = self.transform(self._ordered(clip))
                crops = crops if crops.dim() == 5 else crops[None]
                first = time * self.crops
                clips += [crops[view - first] for view in views if 0 <= view - first < self.crops]
        return _stack(clips)

    def _times(self, views: range) -> range:
        """The temporal positions of `views`."""
        if self.training:
            return range(1)
        return range(views.start // self.crops, (views.stop - 1) // self.crops + 1)

    def _ordered(self, clip: Tensor) -> Tensor:
        if self.frame_order == "reverse":
            return clip.flip(0)
        if self.frame_order == "shuffle":
            return clip[torch.randperm(len(clip))]
        return clip

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        """The video itself and, in training, the videos that may replace it."""
        yield index
        if self.training:
            rng = np.random.default_rng([self.seed, epoch, index])
            yield from rng.integers(len(self.videos), size=REPLACEMENTS).tolist()

    def _decode(self, index: int, choose) -> np.ndarray:
        video = self.videos[index]
        return read_video(video, choose, min_frames=self.min_frames, threads=self.threads)


def _stack(clips: list[Tensor]) -> Tensor:
    """torch.stack, but a single clip is not copied."""
    return torch.stack(clips) if len(clips) > 1 else clips[0][None]

"""A list of videos as a torch data set whose randomness depends on (seed, epoch, index) only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stat_video.data.annotations import Video
from stat_video.data.decode import read_clip
from stat_video.data.sampling import sample_frames
from stat_video.data.transforms import Transform
from stat_video.errors import VideoError

REPLACEMENTS = 10  # how many other videos may be tried in place of an unusable one

FrameOrder = Literal["forward", "reverse", "shuffle"]


def seed_of(*parts: int) -> int:
    """A 63-bit seed that is a function of all `parts`."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass(frozen=True)
class Sample:
    """One clip, or none where a video of the evaluation list cannot be used.

    clip: (3, T, H, W) float32 or None; label: class number.
    index: the video that was used; skipped: index and error of each unusable one met before it.
    """

    clip: Tensor | None
    label: int
    index: int
    skipped: tuple[tuple[int, str], ...] = ()


class ClipDataset(Dataset):
    """Videos with labels; item (epoch, index) is a `Sample`.

    training: random frame of each segment, and an unusable video is replaced by another one drawn
        from (seed, epoch, index); otherwise the middle frames, and its sample has no clip.
    frame_order: "reverse" and "shuffle" are controls for what a model knows about time.
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
    ) -> None:
        self.videos, self.transform = list(videos), transform
        self.frames, self.training, self.seed = frames, training, seed
        self.min_frames, self.frame_order = min_frames, frame_order
        self._cache: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        skipped: list[tuple[int, str]] = []
        for candidate in self._candidates(epoch, index):
            try:
                clip = self._clip(candidate, seed_of(self.seed, epoch, index))
            except VideoError as error:
                skipped.append((candidate, str(error)))
                continue
            return Sample(clip, self.videos[candidate].label, candidate, tuple(skipped))
        return Sample(None, self.videos[index].label, index, tuple(skipped))

    def preload(self, limit_gib: float, title: str) -> None:
        """Decode videos into memory, whole and as they are, until `limit_gib` is reached.

        Call it before loader workers start: they then share the memory. Unusable videos are left
        for `__getitem__` to report.
        """
        from tqdm import tqdm

        room = limit_gib * 2**30
        for index, video in enumerate(tqdm(self.videos, desc=title, unit="video")):
            try:
                frames = read_clip(video.path, np.arange, min_frames=self.min_frames)
            except VideoError:
                continue
            room -= frames.nbytes
            if room < 0:
                return
            self._cache[index] = frames

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        """The video itself, and in training others that may stand in for it."""
        yield index
        if self.training:
            rng = np.random.default_rng([self.seed, epoch, index])
            yield from rng.integers(len(self.videos), size=REPLACEMENTS).tolist()

    def _clip(self, index: int, seed: int) -> Tensor:
        """Decode, sample and transform one video. Returns (3, T, H, W) float32."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            draws = torch.rand(self.frames).numpy() if self.training else None
            images = self._read(index, draws)
            if self.frame_order == "reverse":
                images = images[::-1].copy()
            elif self.frame_order == "shuffle":
                images = images[torch.randperm(self.frames).numpy()]
            return self.transform(torch.from_numpy(images).permute(0, 3, 1, 2))

    def _read(self, index: int, draws: np.ndarray | None) -> np.ndarray:
        """The sampled frames, (T, H, W, 3) uint8."""
        cached = self._cache.get(index)
        if cached is not None:
            return cached[sample_frames(len(cached), self.frames, draws)]
        return read_clip(
            self.videos[index].path,
            lambda length: sample_frames(length, self.frames, draws),
            min_frames=self.min_frames,
        )

"""Batches in an order that is a function of (seed, epoch), and a count of what had to be skipped.

The sampler hands out (epoch, index) keys, so worker processes need no word of the epoch and may
live through all of them.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from stat_video.data.dataset import ClipDataset, Sample, seed_of
from stat_video.errors import UserError


@dataclass(frozen=True)
class Batch:
    """clips: (B, 3, T, H, W) float32; labels: (B,) int64; indices: the video of each clip."""

    clips: Tensor
    labels: Tensor
    indices: tuple[int, ...]
    skipped: tuple[tuple[int, str], ...]


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Lists of (epoch, index) keys; shuffled by (seed, epoch) in training.

    Training drops the last batch when it is not full, unless it is the only one.
    """

    def __init__(self, length: int, batch_size: int, *, shuffle: bool, seed: int = 0) -> None:
        self.length, self.batch_size = length, min(batch_size, length)
        self.shuffle, self.seed = shuffle, seed
        self._epoch, self._start = 0, 0

    def set_position(self, epoch: int, start: int = 0) -> None:
        """The next iteration goes through `epoch`, leaving out its first `start` batches."""
        self._epoch, self._start = epoch, start

    def __len__(self) -> int:
        """Number of batches in a whole epoch."""
        return (self.length if self.shuffle else self.length + self.batch_size - 1) // (
            self.batch_size
        )

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = self._epoch, list(range(self.length))
        if self.shuffle:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
            order = torch.randperm(self.length, generator=generator).tolist()
        for batch in range(self._start, len(self)):
            part = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(epoch, index) for index in part]


def make_loader(dataset: ClipDataset, batches: EpochBatches, workers: int) -> DataLoader:
    """A loader of `Batch` objects. Its own generator leaves torch's global one untouched."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_leave_interrupts_to_parent,
        persistent_workers=workers > 0,
        generator=torch.Generator(),
    )


def collate(samples: list[Sample]) -> Batch:
    """Stack the samples that have a clip; the batch may be empty, with clips of shape (0,)."""
    usable = [sample for sample in samples if sample.clip is not None]
    return Batch(
        clips=torch.stack([s.clip for s in usable]) if usable else torch.empty(0),
        labels=torch.tensor([s.label for s in usable], dtype=torch.int64),
        indices=tuple(s.index for s in usable),
        skipped=tuple(bad for s in samples for bad in s.skipped),
    )


@dataclass
class SkipCount:
    """Keeps count of unusable videos and stops a run that meets too many.

    total: videos in the list; max_share: share of unusable ones that is put up with.
    """

    total: int
    max_share: float
    bad: dict[int, str] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)

    def update(self, batch: Batch) -> None:
        """Take in a batch. Raises UserError when too many videos are unusable."""
        self.seen.update(batch.indices)
        for index, message in batch.skipped:
            self.seen.add(index)
            self.bad.setdefault(index, message)
        # A handful of bad videos early in a long list is no reason to stop yet.
        base = max(len(self.seen), min(self.total, 100))
        if len(self.bad) > self.max_share * base:
            first = self.bad[min(self.bad)]
            raise UserError(
                f"{len(self.bad)} of the {len(self.seen)} videos read so far are unusable, more "
                f"than data.max_bad_share {self.max_share:g} allows; for example: {first}"
            )

    def state(self) -> dict[str, object]:
        """For a checkpoint."""
        return {"bad": self.bad, "seen": torch.tensor(sorted(self.seen), dtype=torch.int64)}

    def restore(self, state: dict[str, object]) -> None:
        """Go on from a checkpoint's `state`."""
        self.bad, self.seen = dict(state["bad"]), set(state["seen"].tolist())


def _leave_interrupts_to_parent(worker: int) -> None:
    """Ctrl-C reaches the whole process group; the main process ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

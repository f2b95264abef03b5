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


@dataclass(frozen=True)
class Share:
    """Which part of each batch a process gets, and in how many pieces.

    rank, world: this process and the number of them; pieces: lists that its part comes in.
    """

    rank: int = 0
    world: int = 1
    pieces: int = 1


ALONE = Share()


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Lists of (epoch, index) keys; shuffled by (seed, epoch) in training.

    In training a batch is cut into world x pieces equal lists, of which this process yields
    `pieces` consecutive ones: which clips make up a batch does not depend on the number of
    processes. The last batch is dropped when it is not full, unless it is the only one.
    In evaluation each process goes through every world-th clip, each clip once.

    batch_size: keys a batch, over all processes. Raises UserError when it cannot be cut evenly.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        share: Share = ALONE,
    ) -> None:
        self.length, self.batch_size = length, min(batch_size, length)
        self.shuffle, self.seed, self.share = shuffle, seed, share
        self._epoch, self._start = 0, 0
        parts = share.world * share.pieces
        if shuffle and self.batch_size % parts:
            raise UserError(
                f"data.batch_size must be a multiple of {share.world} processes x run.accumulate "
                f"{share.pieces}, got {self.batch_size}"
            )

    def set_position(self, epoch: int, start: int = 0) -> None:
        """The next iteration goes through `epoch`, leaving out its first `start` batches."""
        self._epoch, self._start = epoch, start

    @property
    def steps(self) -> int:
        """Whole batches an epoch, in training the number of updates."""
        if self.shuffle:
            return self.length // self.batch_size
        return (self.length + self.batch_size - 1) // self.batch_size

    @property
    def piece_size(self) -> int:
        """Keys in one list of a training epoch."""
        return self.batch_size // (self.share.world * self.share.pieces)

    def __len__(self) -> int:
        """Number of lists that this process yields in a whole epoch."""
        if self.shuffle:
            return self.steps * self.share.pieces
        return -(-len(range(self.share.rank, self.length, self.share.world)) // self._eval_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self._epoch
        for part in self._training_lists() if self.shuffle else self._evaluation_lists():
            yield [(epoch, index) for index in part]

    def _training_lists(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self._epoch))
        order = torch.randperm(self.length, generator=generator).tolist()
        first, size = self.share.rank * self.share.pieces, self.piece_size
        for batch in range(self._start, self.steps):
            for piece in range(first, first + self.share.pieces):
                begin = batch * self.batch_size + piece * size
                yield order[begin : begin + size]

    def _evaluation_lists(self) -> Iterator[list[int]]:
        mine = range(self.share.rank, self.length, self.share.world)
        for begin in range(self._start * self._eval_size, len(mine), self._eval_size):
            yield list(mine[begin : begin + self._eval_size])

    @property
    def _eval_size(self) -> int:
        return max(1, self.batch_size // self.share.world)


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

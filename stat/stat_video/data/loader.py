"""Batches in an order that depends only on (seed, epoch), and a count of skipped videos.

The sampler yields (epoch, index) keys, so worker processes need not be told the epoch and can
persist across epochs.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from stat_video.data.dataset import ClipDataset, Key, Sample, seed_of
from stat_video.errors import UserError
from stat_video.files import write_lines


@dataclass(frozen=True)
class Batch:
    """clips: (B, 3, T, H, W) uint8; labels: (B,) int64.

    indices: the video of each clip; views: the view number of each clip within its video.
    skipped: index and error of each unusable video.
    """

    clips: Tensor
    labels: Tensor
    indices: tuple[int, ...]
    views: tuple[int, ...]
    skipped: tuple[tuple[int, str], ...]

    def pin_memory(self) -> Batch:
        """What a DataLoader asks for, so that copies to a GPU do not hold up the host."""
        return replace(self, clips=self.clips.pin_memory(), labels=self.labels.pin_memory())


@dataclass(frozen=True)
class Share:
    """Which part of each batch a process gets, and in how many pieces.

    rank, world: this process and the number of processes; pieces: lists that its part comes in.
    """

    rank: int = 0
    world: int = 1
    pieces: int = 1


ALONE = Share()


class EpochBatches(Sampler[list[Key]]):
    """Lists of keys, one key per video of an epoch; shuffled by (seed, epoch) in training.

    In training a batch is split into world x pieces equal lists, and this process yields `pieces`
    consecutive ones: the clips of a batch do not depend on the number of processes. The last batch
    is dropped if it is not full, unless it is the only one.
    In evaluation each process takes every world-th video, each video once. The last batch is not
    padded, so one process may yield one list more than another.

    batch_size: keys per batch in training, clips per batch in evaluation, over all processes.
    views: clips per video in evaluation. A list holds as many videos as make up batch_size clips;
        the views of one video are split over several lists if there are more than that.
    Raises UserError when a training batch cannot be cut evenly.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        share: Share = ALONE,
        views: int = 1,
    ) -> None:
        self.length, self.batch_size = length, min(batch_size, length) if shuffle else batch_size
        self.shuffle, self.seed, self.share, self.views = shuffle, seed, share, views
        self._epoch, self._start = 0, 0
        parts = share.world * share.pieces
        if shuffle and self.batch_size % parts:
            raise UserError(
                f"data.batch_size over data.repeats must be a multiple of {share.world} processes "
                f"x run.accumulate {share.pieces}, got {self.batch_size}"
            )

    def set_position(self, epoch: int, start: int = 0) -> None:
        """Make the next iteration go through `epoch` from batch `start` on."""
        self._epoch, self._start = epoch, start

    @property
    def steps(self) -> int:
        """Whole batches per epoch; in training, the number of updates."""
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
        return len(self._evaluation_lists())

    def __iter__(self) -> Iterator[list[Key]]:
        if self.shuffle:
            for part in self._training_lists():
                yield [(self._epoch, index) for index in part]
            return
        for views in self._evaluation_lists()[self._start :]:
            yield [(self._epoch, *key) for key in views]

    def _training_lists(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self._epoch))
        order = torch.randperm(self.length, generator=generator).tolist()
        first, size = self.share.rank * self.share.pieces, self.piece_size
        for batch in range(self._start, self.steps):
            for piece in range(first, first + self.share.pieces):
                begin = batch * self.batch_size + piece * size
                yield order[begin : begin + size]

    def _evaluation_lists(self) -> list[list[tuple[int, int, int]]]:
        """Lists of (index, first view, view after the last)."""
        clips = max(1, self.batch_size // self.share.world)
        videos = range(self.share.rank, self.length, self.share.world)
        if self.views > clips:
            parts = [range(self.views)[i : i + clips] for i in range(0, self.views, clips)]
            return [[(index, part.start, part.stop)] for index in videos for part in parts]
        together = clips // self.views
        return [
            [(index, 0, self.views) for index in videos[i : i + together]]
            for i in range(0, len(videos), together)
        ]


def make_loader(dataset: ClipDataset, batches: Iterable[list[Key]], workers: int) -> DataLoader:
    """A loader of `Batch` objects. Its own generator leaves torch's global one untouched."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=leave_interrupts_to_parent,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )


def collate(samples: list[Sample]) -> Batch:
    """The clips of all samples that have any; the batch may be empty, with clips of shape (0,).

    The first clips of all videos come before their second ones, so that Mixup and CutMix, which mix
    neighbours in the batch, mix different videos.
    """
    usable = [sample for sample in samples if sample.clips is not None]
    views = range(max((len(s.views) for s in usable), default=0))
    order = [(s, view) for view in views for s in usable if view < len(s.views)]
    clips = [s.clips[view] for s, view in order]  # type: ignore[index]
    return Batch(
        clips=torch.stack(clips) if clips else torch.empty(0, dtype=torch.uint8),
        labels=torch.tensor([s.label for s, _ in order], dtype=torch.int64),
        indices=tuple(s.index for s, _ in order),
        views=tuple(s.views[view] for s, view in order),
        skipped=tuple(bad for s in samples for bad in s.skipped),
    )


@dataclass
class SkipCount:
    """Counts unusable videos and stops a run that meets too many of them.

    total: videos in the list; max_share: largest tolerated share of unusable ones.
    report: file for one line per unusable video with the reason, overwritten; None for no file.
    """

    total: int
    max_share: float
    report: Path | None = None
    bad: dict[int, str] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)

    def update(self, batch: Batch) -> None:
        """Count the skipped videos of a batch. Raises UserError when there are too many."""
        self.seen.update(batch.indices)
        new = {index: text for index, text in batch.skipped if index not in self.bad}
        self.seen.update(new)
        if new:
            self._write(new, anew=not self.bad)
            self.bad |= new
        # A handful of bad videos early in a long list is no reason to stop yet.
        base = max(len(self.seen), min(self.total, 100))
        if len(self.bad) > self.max_share * base:
            first = self.bad[min(self.bad)]
            raise UserError(
                f"{len(self.bad)} of the {len(self.seen)} videos read so far are unusable, more "
                f"than data.max_bad_share {self.max_share:g} allows; for example: {first}"
                + (f" (all are listed in {self.report})" if self.report else "")
            )

    def state(self) -> dict[str, list]:
        """The counts as JSON values, for a checkpoint."""
        return {"bad": sorted(self.bad.items()), "seen": sorted(self.seen)}

    @staticmethod
    def merge(states: list[dict[str, list]]) -> dict[str, list]:
        """Merge the `state` of several processes."""
        bad = {index: message for state in states for index, message in state["bad"]}
        seen = {index for state in states for index in state["seen"]}
        return {"bad": sorted(bad.items()), "seen": sorted(seen)}

    def restore(self, state: dict[str, list]) -> None:
        """Continue from a checkpoint's `state`."""
        self.bad = dict(state["bad"])
        self.seen = set(state["seen"])
        if self.bad:
            self._write(self.bad, anew=True)

    def _write(self, bad: dict[int, str], anew: bool) -> None:
        if self.report is not None:
            write_lines(self.report, bad.values(), anew=anew)


def leave_interrupts_to_parent(worker: int) -> None:
    """Ignore Ctrl-C in a worker: it reaches the whole process group, and the main process ends its
    workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

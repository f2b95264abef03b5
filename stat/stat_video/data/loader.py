"""Batches in an order that is a function of (seed, epoch), and a count of what had to be skipped.

The sampler hands out (epoch, index) keys, so worker processes need no word of the epoch and may
live through all of them.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from stat_video.data.dataset import ClipDataset, Key, Sample, seed_of
from stat_video.errors import UserError
from stat_video.files import writing


@dataclass(frozen=True)
class Batch:
    """clips: (B, 3, T, H, W) float32; labels: (B,) int64.

    indices: the video of each clip; views: which of its video's clips each one is.
    skipped: index and error of each unusable video that was met.
    """

    clips: Tensor
    labels: Tensor
    indices: tuple[int, ...]
    views: tuple[int, ...]
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


class EpochBatches(Sampler[list[Key]]):
    """Lists of keys, each a video of an epoch; shuffled by (seed, epoch) in training.

    In training a batch is cut into world x pieces equal lists, of which this process yields
    `pieces` consecutive ones: which clips make up a batch does not depend on the number of
    processes. The last batch is dropped when it is not full, unless it is the only one.
    In evaluation each process goes through every world-th video, each video once: none is there to
    pad the last batch, so one process may have a list more than another.

    batch_size: in training keys, in evaluation clips a batch, over all processes.
    views: clips of a video, in evaluation. A list holds as many videos as make batch_size clips;
        the views of one video are split where they are more than that.
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
        generator=torch.Generator(),
    )


def collate(samples: list[Sample]) -> Batch:
    """The clips of all samples that have any; the batch may be empty, with clips of shape (0,).

    The first clips of all videos come before their second ones: what mixes a clip with its
    neighbour in the batch then mixes different videos.
    """
    usable = [sample for sample in samples if sample.clips is not None]
    views = range(max((len(s.views) for s in usable), default=0))
    order = [(s, view) for view in views for s in usable if view < len(s.views)]
    return Batch(
        clips=torch.stack([s.clips[view] for s, view in order]) if order else torch.empty(0),  # type: ignore[index]
        labels=torch.tensor([s.label for s, _ in order], dtype=torch.int64),
        indices=tuple(s.index for s, _ in order),
        views=tuple(s.views[view] for s, view in order),
        skipped=tuple(bad for s in samples for bad in s.skipped),
    )


@dataclass
class SkipCount:
    """Keeps count of unusable videos and stops a run that meets too many.

    total: videos in the list; max_share: share of unusable ones that is put up with.
    report: file that gets a line with the reason for each, begun anew; None for none.
    """

    total: int
    max_share: float
    report: Path | None = None
    bad: dict[int, str] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)

    def update(self, batch: Batch) -> None:
        """Take in a batch. Raises UserError when too many videos are unusable."""
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
        """For a checkpoint, as JSON."""
        return {"bad": sorted(self.bad.items()), "seen": sorted(self.seen)}

    @staticmethod
    def merge(states: list[dict[str, list]]) -> dict[str, list]:
        """The `state` of several processes as one."""
        bad = {index: message for state in states for index, message in state["bad"]}
        seen = {index for state in states for index in state["seen"]}
        return {"bad": sorted(bad.items()), "seen": sorted(seen)}

    def restore(self, state: dict[str, list]) -> None:
        """Go on from a checkpoint's `state`."""
        self.bad = dict(state["bad"])
        self.seen = set(state["seen"])
        if self.bad:
            self._write(self.bad, anew=True)

    def _write(self, bad: dict[int, str], anew: bool) -> None:
        if self.report is None:
            return
        with writing(self.report):
            self.report.parent.mkdir(parents=True, exist_ok=True)
            mode = "w" if anew else "a"
            # a file name need not be UTF-8
            with self.report.open(mode, encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(f"{text}\n" for text in bad.values())


def leave_interrupts_to_parent(worker: int) -> None:
    """Ctrl-C reaches the whole process group; the main process ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

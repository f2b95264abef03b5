"""Steps whose loss or gradient is not finite: passed over, counted, and at some point too many."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from stat_video.data.loader import Batch
from stat_video.distributed import World
from stat_video.errors import UserError
from stat_video.files import writing
from stat_video.train.step import StepReport


@dataclass
class BadSteps:
    """Keeps count and knows when to give up.

    limit: bad steps in a row that are put up with; folder: where the last batch is left then.
    total, in_a_row: bad steps so far, saved with the run.
    """

    limit: int
    folder: Path
    total: int = 0
    in_a_row: int = 0

    def count(self, report: StepReport, pieces: list[Batch], step: int, world: World) -> None:
        """Take in step number `step`; every process calls it, with its pieces of the batch.

        Raises UserError after more than `limit` bad steps in a row.
        """
        if report.applied:
            self.in_a_row = 0
            return
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        if self.in_a_row <= self.limit:
            return
        path = self.folder / f"bad_step_{step}_rank_{world.rank}.pt"
        clips = [{"clips": p.clips, "labels": p.labels, "indices": p.indices} for p in pieces]
        with writing(path):
            torch.save({"step": step, "pieces": clips}, path)
        world.wait()  # torchrun ends the other processes as soon as the first one has left
        raise UserError(
            f"step {step} is the last of {self.in_a_row} in a row with a loss or a gradient that "
            f"is not finite (here {report.loss:g} and a norm of {report.grad_norm:g}), its clips "
            f"are in {path}; try a lower optim.lr or --run.precision fp32"
        )

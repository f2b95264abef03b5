"""All that a run continues from, as checkpoints hold it.

The order of the clips comes from (seed, epoch), their augmentation from (seed, epoch, index), what
a step draws from (seed, step): how far the run is stands for the state of all generators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)

from stat_video.checkpoint import (
    STATE,
    DamagedCheckpoint,
    amend,
    checkpoints_in,
    keep_only,
    load_tensors,
    read_state,
    save_checkpoint,
)
from stat_video.data.loader import SkipCount
from stat_video.data.options import DataOptions
from stat_video.distributed import World
from stat_video.errors import UserError
from stat_video.model.building import Model
from stat_video.train.averaging import WeightAverage
from stat_video.train.bad_steps import BadSteps
from stat_video.train.options import OptimOptions
from stat_video.train.precision import Precision

# Options that a resumed run may change: they decide how fast it goes, not what it computes.
FREE_DATA_OPTIONS = {"root", "videos", "workers", "cache_gib", "views", "max_bad_share"}


@dataclass
class Progress:
    """How far a run is.

    epoch: epochs finished; batch: batches finished in the one after; step: updates in all.
    best_top1: highest validation top-1 so far, as a share.
    loss_sum, correct, clips: running sums of the epoch in progress.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_top1: float = -1.0
    loss_sum: float = 0.0
    correct: int = 0
    clips: int = 0

    def __post_init__(self) -> None:
        for each in fields(self):
            value, counted = getattr(self, each.name), each.type == "int"
            good = type(value) is int and value >= 0 if counted else type(value) in (int, float)
            if not good or not math.isfinite(value):
                raise ValueError(f"{each.name} cannot be {value!r}")


@dataclass
class RunState:
    """What is saved and restored. Every process calls each method.

    folder: of the checkpoints; options: groups of options by name, for the record and for checking
    that a resumed run goes on with the options that it began with.
    saved: the newest checkpoint in `folder` that this run wrote or goes on from.
    """

    folder: Path
    world: World
    model: Model
    optimizer: torch.optim.Optimizer
    precision: Precision
    average: WeightAverage | None
    skips: SkipCount
    bad_steps: BadSteps
    options: dict[str, dict[str, Any]]
    progress: Progress = field(default_factory=Progress)
    saved: Path | None = None

    def __post_init__(self) -> None:
        fill_state(self.model, self.optimizer)

    def save(self, keep: int) -> Path:
        """Write a checkpoint, unless this moment has one already. Returns its path.

        keep: number of the newest checkpoints that are not removed.
        """
        if self.saved is not None and self.saved.name == self.name:
            return self.saved
        skips = SkipCount.merge(self.world.gather(self.skips.state()))
        state = {
            "options": self.options,
            "progress": asdict(self.progress),
            "skipped": skips,
            "bad_steps": [self.bad_steps.total, self.bad_steps.in_a_row],
            "scaler": self.precision.scaler.state_dict(),
            "processes": self.world.size,
        }
        path = save_checkpoint(self.folder, self.name, self._tensors(), state, self.world)
        self.saved = path
        if self.world.is_main:
            keep_only(self.folder, {p.name for p in checkpoints_in(self.folder)[-keep:]})
        return path

    def finish_epoch(self) -> None:
        """Count the epoch whose last step is saved as finished, here and in its checkpoint."""
        assert self.saved is not None
        progress = self.progress
        progress.epoch, progress.batch = progress.epoch + 1, 0
        progress.loss_sum, progress.correct, progress.clips = 0.0, 0, 0
        self.saved = amend(self.saved, self.name, {"progress": asdict(progress)}, self.world)

    @property
    def name(self) -> str:
        """Of the checkpoint of this moment; names sort in the order of training."""
        return f"epoch_{self.progress.epoch:04d}_step_{self.progress.step:08d}"

    def restore_first(self, paths: Sequence[Path], say: Callable[[str], None]) -> Path | None:
        """Go on from the first of these checkpoints that is whole; `say` is told of the others.

        Returns its path, or None where `paths` is empty. Raises UserError as `restore` does, and
        when none is whole.
        """
        damages = []
        for path in paths:
            try:
                self.restore(path)
            except DamagedCheckpoint as error:
                damages.append(error)
            else:
                for damage in damages:
                    say(f"{damage}; going back to {path}")
                return path
        if len(damages) > 1:
            raise UserError(f"no checkpoint in {self.folder} is whole: {damages[0]}")
        if damages:
            raise damages[0]
        return None

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint. Raises DamagedCheckpoint, or UserError for other options."""
        state = read_state(path, self.world)
        try:
            check_same_options(path, state["options"], self.options)
            progress = Progress(**state["progress"])
            skipped = SkipCount.merge([state["skipped"]])
            total, in_a_row = map(int, state["bad_steps"])
            if state["scaler"]:  # of a run in fp16
                self.precision.scaler.load_state_dict(state["scaler"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedCheckpoint(f"{path / STATE} is damaged: {error!r}") from error
        tensors = self._tensors()
        load_tensors(path, tensors, self.world)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizer"],
        )
        self.progress = progress
        self.skips.restore(skipped)
        self.bad_steps.total, self.bad_steps.in_a_row = total, in_a_row
        if path.parent.resolve() == self.folder.resolve():
            self.saved = path

    def drop_later(self) -> None:
        """Remove the checkpoints that lie ahead of where the run is: it will write its own."""
        if self.world.is_main:
            own = "" if self.saved is None else self.saved.name
            names = {p.name for p in checkpoints_in(self.folder)}
            keep_only(self.folder, {name for name in names if name < self.name or name == own})

    def _tensors(self) -> dict[str, Any]:
        """Everything that may be cut between processes. Loading into the result changes the
        average, but neither the model nor the optimiser: those need `set_state_dict`."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        tensors = {"model": model, "optimizer": optimizer}
        if self.average is not None:
            tensors["average"] = self.average.average
        return tensors


def find_checkpoints(resume: str, folder: Path, *, restarted: bool) -> list[Path]:
    """The checkpoints that `run.resume` means, the one to try first first; none to start afresh.

    folder: of this run's checkpoints; restarted: the run failed and was started again by itself,
    so that it goes on from its own newest checkpoint whatever `resume` says.
    """
    own = checkpoints_in(folder)[::-1]
    if resume == "auto" or (restarted and resume == "none"):
        return own
    if resume == "none":
        return []
    named = Path(resume)
    return [*(p for p in own if restarted and p.name > named.name), named]


def fill_state(model: Model, optimizer: torch.optim.Optimizer) -> None:
    """Make the optimiser's moments, all zero, before the first step.

    A checkpoint then holds the same tensors whenever it is written.
    """
    get_optimizer_state_dict(model, optimizer)  # takes a step at a learning rate of zero
    for state in optimizer.state.values():
        for moment in state.values():  # that step is counted, and SGD's has seen the weight decay
            moment.zero_()


def check_same_options(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """A resumed run goes on with the options that it began with. Raises UserError.

    path: where `saved` was found; both are groups of options by name.
    """
    # an option that is younger than the checkpoint had its default value
    defaults = {"data": asdict(DataOptions()), "optim": asdict(OptimOptions())}
    names = [(group, name) for group in ("model", "data", "optim") for name in now[group]]
    for group, name in [*names, ("run", "seed")]:
        before = _plain((defaults.get(group, {}) | saved[group]).get(name))
        value = _plain(now[group][name])
        if before != value and not (group == "data" and name in FREE_DATA_OPTIONS):
            raise UserError(
                f"cannot resume from {path}: {group}.{name} was {before} and is {value} now; use "
                "--run.resume none or another --run.dir; to train on from these weights, another "
                f"--run.dir with --run.init {path}"
            )


def _plain(value: Any) -> Any:
    """Tuples and lists compare equal."""
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value

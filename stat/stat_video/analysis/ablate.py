"""`stat-video ablate`: which kinds of attention does a small STAT need to use time?

It repeats the paper's Tables 1 and 3 at small scale on two sets of generated clips: one depends on
neighbouring frames, the other on distant ones. Variants of one network are trained with several
seeds and scored on validation clips as they are, reversed, and with shuffled frames. Every run is
an ordinary training run in its own folder, so an interrupted ablation can be continued, and
several runs can proceed in parallel.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

from stat_video.analysis.plots import plot_run
from stat_video.clips.make import ClipOptions, Task, write_clips
from stat_video.data.dataset import FrameOrder
from stat_video.data.options import DataOptions
from stat_video.data.sources import open_source
from stat_video.data.transforms import normalise
from stat_video.devices import available_cpus, prepare_device
from stat_video.errors import UserError
from stat_video.evaluate.evaluation import evaluate
from stat_video.files import read_json, write_json
from stat_video.model.config import STATConfig
from stat_video.model.flops import count_multiply_adds
from stat_video.model.info import count_parameters
from stat_video.train.options import OptimOptions, RunOptions
from stat_video.train.run_state import check_same_options
from stat_video.train.trainer import Trainer

# What each row changes in the recipe's model. CA: the frame's own tokens; SA: the neighbours';
# LA: one token of every frame. The last one, a control, is a function of the set of frames.
VARIANTS: dict[str, dict[str, Any]] = {
    "CA": {"short": False, "long": "none"},
    "CA + SA": {"short": True, "long": "none"},
    "CA + LA": {"short": False, "long": "class"},
    "CA + SA + LA": {"short": True, "long": "class"},
    "CA + SA + LA, mean token": {"short": True, "long": "mean", "class_token": False},
    "order-blind": {"short": False, "long": "class", "temporal_position": False},
}
ORDERS: tuple[FrameOrder, ...] = ("forward", "reverse", "shuffle")
TIMED_STEPS = 8


@dataclass(frozen=True)
class AblateOptions:
    """What to train.

    Args:
        tasks: tasks of the clips, one table each (see `stat-video make-clips --help`).
        seeds: runs of each variant, with the seeds run.seed, run.seed + 1, ...
        only: variants to train, by the table's names; empty for all.
        jobs: parallel runs, each in its own process; 0 means as many as there are CPUs for, with
            run.threads each.
        estimate: train nothing; time a few steps of each variant and print the expected total time.
    """

    tasks: tuple[Task, ...] = ("coherence", "return")
    seeds: int = 3
    only: tuple[str, ...] = ()
    jobs: int = 0
    estimate: bool = False

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"ablate.tasks must name each task once, got {list(self.tasks)}")
        if self.seeds < 1:
            raise ValueError(f"ablate.seeds must be at least 1, got {self.seeds}")
        if self.jobs < 0:
            raise ValueError(f"ablate.jobs must not be negative, got {self.jobs}")
        unknown = set(self.only) - set(VARIANTS)
        if unknown:
            known = ", ".join(repr(name) for name in VARIANTS)
            raise ValueError(f"ablate.only must be among {known}, got {sorted(unknown)[0]!r}")


class Run(NamedTuple):
    """One training run of the ablation: its task, variant (a row of the table) and seed."""

    task: str
    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task}, {self.variant}, seed {self.seed}"


@dataclass(frozen=True)
class Ablation:
    """The options of all runs; run.dir is the folder of the ablation."""

    ablate: AblateOptions
    clips: ClipOptions
    data: DataOptions
    model: STATConfig
    optim: OptimOptions
    run: RunOptions

    @property
    def folder(self) -> Path:
        """The folder of the ablation."""
        return Path(self.run.dir)

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants to train, in the table's order."""
        return tuple(name for name in VARIANTS if name in (self.ablate.only or VARIANTS))

    @property
    def jobs(self) -> int:
        """The number of parallel runs."""
        if (
            self.ablate.jobs
            or not self.run.threads
            or prepare_device(self.run.device).type != "cpu"
        ):
            return self.ablate.jobs or 1
        return max(1, available_cpus() // self.run.threads)

    def runs(self) -> Iterator[Run]:
        """Every run; all tasks and variants of a seed before the next seed."""
        for number in range(self.ablate.seeds):
            for task in self.ablate.tasks:
                for variant in self.variants:
                    yield Run(task, variant, self.run.seed + number)

    def clips_of(self, task: str) -> Path:
        """The folder of a task's clips."""
        return self.folder / "clips" / task

    def folder_of(self, run: Run) -> Path:
        """The folder of a run, which has a result.json once the run is over."""
        name = "".join(c if c.isalnum() else "_" for c in run.variant)
        return self.folder / "runs" / f"{run.task}_{name}_seed_{run.seed}"

    def trainer(self, run: Run, folder: Path) -> Trainer:
        """The trainer of one run."""
        data = replace(self.data, root=str(self.clips_of(run.task)))
        model = replace(self.model, **VARIANTS[run.variant])
        options = replace(self.run, dir=str(folder), seed=run.seed, resume="auto")
        return Trainer(data, model, self.optim, options)

    def result(self, run: Run) -> dict[str, Any] | None:
        """A run's result, or None if it has none yet. Raises UserError for another run's result."""
        folder = self.folder_of(run)
        path = folder / "result.json"
        if not path.exists():
            return None
        result = read_json(path, {"top1", "options", "seconds"})
        check_same_options(path, result["options"], self.trainer(run, folder).state.options)
        return result


def train(ablation: Ablation, run: Run) -> None:
    """Train one run, or what is left of it, and write its result.

    Raises Interrupted with the run saved, and UserError.
    """
    folder = ablation.folder_of(run)
    result = _train_and_score(ablation.trainer(run, folder), run)
    write_json(folder / "result.json", result)


def _train_and_score(trainer: Trainer, run: Run) -> dict[str, Any]:
    """Train and score the final weights, not those with the best validation accuracy."""
    began = time.monotonic()
    plot_run(trainer.folder, trainer.fit(), trainer.config.class_names)
    model, scores = trainer.snapshot(), {}
    for order in ORDERS:
        source = open_source(
            trainer.data,
            frames=trainer.config.frames,
            image_size=trainer.config.image_size,
            split="val",
            seed=run.seed,
            frame_order=order,
        )
        scores[order] = evaluate(
            model,
            source.loader,
            trainer.config.num_classes,
            world=trainer.world,
            skips=source.new_skip_count(),
            title=order,
        ).top1
    config: Any = trainer.config  # a STATConfig
    return {
        **run._asdict(),
        "top1": scores,
        "videos": len(source.dataset),
        "classes": trainer.config.num_classes,
        "parameters": sum(count_parameters(config).values()),
        "multiply_adds": sum(count_multiply_adds(config).values()),
        "seconds": round(time.monotonic() - began, 1),
        "options": trainer.state.options,
    }


def make_clips(ablation: Ablation) -> None:
    """Write each task's clips if they are missing. Raises UserError if other clips are there."""
    for task in ablation.ablate.tasks:
        folder = ablation.clips_of(task)
        clips = replace(ablation.clips, task=task)
        mark, options = folder / "options.json", asdict(clips)
        if mark.exists():
            found = read_json(mark)
            if found != options:
                name = next(n for n in options if found.get(n) != options[n])
                raise UserError(
                    f"the clips in {folder} were made with clips.{name} {found.get(name)}, not "
                    f"{options[name]}; use another --run.dir"
                )
        else:
            write_clips(folder, clips, force=True)
            write_json(mark, options)


def estimate_seconds(ablation: Ablation) -> dict[str, float]:
    """Seconds that one run of each variant would take, from a few steps and validation clips."""
    make_clips(ablation)
    seconds = {}
    with tempfile.TemporaryDirectory() as scratch:
        for variant in ablation.variants:
            run = Run(ablation.ablate.tasks[0], variant, ablation.run.seed)
            seconds[variant] = _estimate_one(ablation.trainer(run, Path(scratch)))
    return seconds


def _estimate_one(trainer: Trainer) -> float:
    """An estimate from the fastest of a few steps, the one least disturbed by other processes."""
    batches = trainer.train_source.batches
    loader = chain.from_iterable(repeat(trainer.train_source.loader))
    pieces = list(islice(loader, TIMED_STEPS))
    update = min(_seconds(trainer.updater.update, [piece], 0) for piece in pieces)
    videos = range(min(TIMED_STEPS, len(trainer.val_source.dataset)))
    decode = min(_seconds(trainer.val_source.dataset.__getitem__, (0, v, 0, 1)) for v in videos)
    batch = next(iter(trainer.val_source.loader))
    model = trainer.snapshot()
    forward = min(_seconds(model, normalise(batch.clips)) for _ in range(3)) / len(batch.labels)
    epochs, val = trainer.optim.epochs, len(trainer.val_source.dataset)
    # Decoded once into the cache, and again for the scores in each order at the end.
    decoding = (batches.length + (1 + len(ORDERS)) * val) * decode
    scoring = (epochs + len(ORDERS)) * val * forward
    return epochs * batches.steps * update + scoring + decoding


def _seconds(function: Callable[..., Any], *arguments: Any) -> float:
    began = time.monotonic()
    function(*arguments)
    return time.monotonic() - began

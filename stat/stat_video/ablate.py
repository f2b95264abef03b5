"""`stat-video ablate`: which kinds of attention does a small STAT need to see what time does?

The paper's Tables 1 and 3 at small scale, on generated clips: variants of one network, each trained
with several seeds and scored on validation clips as they are, backwards, and with their frames
shuffled. Every run is a run of the trainer in a folder of its own, so an interrupted ablation goes
on where it was.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

from stat_video.clips.make import ClipOptions, write_clips
from stat_video.config import STATConfig
from stat_video.data.sources import open_source
from stat_video.errors import UserError
from stat_video.evaluation import evaluate
from stat_video.flops import count_multiply_adds
from stat_video.info import count_parameters
from stat_video.options import DataOptions, OptimOptions, RunOptions
from stat_video.run_state import check_same_options
from stat_video.trainer import Trainer

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
# The clips that the recipe "ablation" is made for.
CLIPS = {
    "clips.task": "coherence",
    "clips.size": 32,
    "clips.frames": 16,
    "clips.train": 1600,
    "clips.val": 400,
    "clips.speed_min": 1.2,
    "clips.speed_max": 2.4,
    "clips.distractors": 0,
    "clips.drift": 0.1,
}
ORDERS = ("forward", "reverse", "shuffle")
TIMED_STEPS = 8


@dataclass(frozen=True)
class AblateOptions:
    """What to train.

    Args:
        seeds: runs of each variant, with the seeds run.seed, run.seed + 1, ...
        only: variants to train, by the table's names; empty for all.
        estimate: train nothing, time a few steps of each variant and say how long all would take.
    """

    seeds: int = 3
    only: tuple[str, ...] = ()
    estimate: bool = False

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"ablate.seeds must be at least 1, got {self.seeds}")
        unknown = set(self.only) - set(VARIANTS)
        if unknown:
            known = ", ".join(repr(name) for name in VARIANTS)
            raise ValueError(f"ablate.only must be among {known}, got {sorted(unknown)[0]!r}")


@dataclass(frozen=True)
class Ablation:
    """The options of all runs; run.dir is the folder of the whole."""

    ablate: AblateOptions
    clips: ClipOptions
    data: DataOptions
    model: STATConfig
    optim: OptimOptions
    run: RunOptions
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.run.dir))
        data = replace(self.data, root=str(self.folder / "clips"))
        object.__setattr__(self, "data", data)

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants to train, in the table's order."""
        return tuple(name for name in VARIANTS if name in (self.ablate.only or VARIANTS))

    def runs(self) -> Iterator[tuple[str, int]]:
        """(variant, seed) of each run; all variants of a seed before the next seed."""
        for number in range(self.ablate.seeds):
            for variant in self.variants:
                yield variant, self.run.seed + number

    def trainer(self, variant: str, seed: int, folder: Path) -> Trainer:
        """The trainer of one run."""
        model = replace(self.model, **VARIANTS[variant])
        run = replace(self.run, dir=str(folder), seed=seed, resume="auto")
        return Trainer(self.data, model, self.optim, run)


def run_ablation(ablation: Ablation) -> list[dict[str, Any]]:
    """Train what has no result yet. Returns the results of all runs.

    Raises Interrupted with the run in progress saved, and UserError.
    """
    make_clips(ablation)
    results = []
    runs = list(ablation.runs())
    for number, (variant, seed) in enumerate(runs, 1):
        name = "".join(c if c.isalnum() else "_" for c in variant)
        folder = ablation.folder / "runs" / f"{name}_seed_{seed}"
        path = folder / "result.json"
        trainer = ablation.trainer(variant, seed, folder)
        if path.exists():
            result = json.loads(path.read_text())
            check_same_options(path, result["options"], trainer.state.options)
        else:
            print(f"run {number} of {len(runs)}: {variant}, seed {seed}", flush=True)
            result = train_one(trainer, variant, seed)
            _write_whole(path, result)
        results.append(result)
    return results


def train_one(trainer: Trainer, variant: str, seed: int) -> dict[str, Any]:
    """Train and score the final weights, not the best on the validation clips."""
    began = time.monotonic()
    trainer.fit()
    model, scores = trainer.snapshot(), {}
    for order in ORDERS:
        source = open_source(
            trainer.data, trainer.config, split="val", seed=seed, frame_order=order
        )
        scores[order] = evaluate(
            model,
            source.loader,
            trainer.world.device,
            trainer.config.num_classes,
            skips=source.new_skip_count(),
            title=order,
        ).top1
    return {
        "variant": variant,
        "seed": seed,
        "top1": scores,
        "videos": len(source.dataset),
        "classes": trainer.config.num_classes,
        "parameters": sum(count_parameters(trainer.config).values()),
        "multiply_adds": sum(count_multiply_adds(trainer.config).values()),
        "seconds": round(time.monotonic() - began, 1),
        "options": trainer.state.options,
    }


def make_clips(ablation: Ablation) -> None:
    """Write the clips if they are not there. Raises UserError where others are."""
    folder = ablation.folder / "clips"
    mark, options = folder / "options.json", asdict(ablation.clips)
    if mark.exists():
        found = json.loads(mark.read_text())
        if found != options:
            name = next(n for n in options if found.get(n) != options[n])
            raise UserError(
                f"the clips in {folder} were made with clips.{name} {found.get(name)}, not "
                f"{options[name]}; use another --run.dir"
            )
        return
    write_clips(folder, ablation.clips, force=True)
    _write_whole(mark, options)


def estimate_seconds(ablation: Ablation) -> dict[str, float]:
    """Seconds that one run of each variant would take, from a few steps and validation clips."""
    make_clips(ablation)
    seconds = {}
    with tempfile.TemporaryDirectory() as scratch:
        for variant in ablation.variants:
            trainer = ablation.trainer(variant, ablation.run.seed, Path(scratch))
            seconds[variant] = _estimate_one(trainer)
    return seconds


def _estimate_one(trainer: Trainer) -> float:
    """From the fastest of a few steps, which is what a step takes when nothing else disturbs."""
    batches = trainer.train_source.batches
    loader = chain.from_iterable(repeat(trainer.train_source.loader))
    pieces = list(islice(loader, TIMED_STEPS))
    update = min(_seconds(trainer.updater.update, [piece], 0) for piece in pieces)
    videos = range(min(TIMED_STEPS, len(trainer.val_source.dataset)))
    decode = min(_seconds(trainer.val_source.dataset.__getitem__, (0, v, 0, 1)) for v in videos)
    batch = next(iter(trainer.val_source.loader))
    model = trainer.snapshot()
    forward = min(_seconds(model, batch.clips) for _ in range(3)) / len(batch.labels)
    epochs, val = trainer.optim.epochs, len(trainer.val_source.dataset)
    # Decoded once into the cache, and again for the scores in each order at the end.
    decoding = (batches.length + (1 + len(ORDERS)) * val) * decode
    scoring = (epochs + len(ORDERS)) * val * forward
    return epochs * batches.steps * update + scoring + decoding


def _seconds(function: Callable[..., Any], *arguments: Any) -> float:
    began = time.monotonic()
    function(*arguments)
    return time.monotonic() - began


def _write_whole(path: Path, value: Any) -> None:
    """Write JSON so that the file is either complete or not there."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(part, path)

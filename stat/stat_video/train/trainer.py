"""The training loop: epochs, validation, logs and files.

What a step computes is in step.py, what is saved in run_state.py, how the model is run in
parallel.py. Every process runs the same loop; the main one prints and writes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from stat_video.data.loader import Batch, EpochBatches, Share, SkipCount
from stat_video.data.options import DataOptions
from stat_video.data.preprocess import Preprocess
from stat_video.data.sources import Source, open_source
from stat_video.devices import peak_flops
from stat_video.distributed import World, alone, is_restart
from stat_video.evaluate.backend import check_backend
from stat_video.evaluate.evaluation import Scores, Stopped, evaluate
from stat_video.files import writing
from stat_video.model.building import Config, Model, build_model, frames_to_share
from stat_video.model.flops import count_training_flops
from stat_video.ownership import clear
from stat_video.train import mixing
from stat_video.train.averaging import WeightAverage
from stat_video.train.bad_steps import BadSteps
from stat_video.train.finetuning import start_from
from stat_video.train.journal import Journal
from stat_video.train.optim import (
    build_optimizer,
    build_scheduler,
    for_batch,
    initialise,
    weigh_classes,
)
from stat_video.train.options import OptimOptions, RunOptions
from stat_video.train.parallel import prepare, synchronised, whole
from stat_video.train.precision import Precision
from stat_video.train.run_folder import BEST, RESULTS, has_best, occupied, put_best
from stat_video.train.run_state import Progress, RunState, find_checkpoints
from stat_video.train.signals import Interrupted, StopRequest
from stat_video.train.step import StepReport, Updater


class Trainer:
    """Trains a STAT on an annotation list of videos.

    data, model, optim, run: the options; `model.num_classes` and `model.class_names` are replaced
        by what the data's label file says.
    world: the processes that train together; None for this one alone.
    After `fit`, the run's folder holds config.yaml, log.jsonl, tensorboard/, checkpoints/,
    and best/ (as `STAT.from_pretrained` reads it).
    """

    def __init__(
        self,
        data: DataOptions,
        model: Config,
        optim: OptimOptions,
        run: RunOptions,
        world: World | None = None,
    ) -> None:
        self.data, self.optim, self.run = data, optim, run
        self.folder = Path(run.dir)
        self.world = alone(run.device) if world is None else world
        precision = Precision(run.precision, self.world.device)
        if run.threads:
            torch.set_num_threads(run.threads)
        torch.manual_seed(run.seed)
        self.world, self.clip = self.world.share_clips(
            run.clip_parallel, frames_to_share(model), "run.clip_parallel"
        )
        share = Share(self.world.data_rank, self.world.data_size, run.accumulate)
        clip: Any = {"frames": model.frames, "image_size": model.image_size}
        self.train_source = open_source(data, **clip, split="train", seed=run.seed, share=share)
        self.val_source = open_source(data, **clip, split="val", share=replace(share, pieces=1))
        names = self.train_source.class_names
        self.config = replace(model, num_classes=len(names), class_names=names)
        self.model = build_model(self.config)
        check_backend(self.model, self.world.device)
        initialise(self.model, optim.init_gain, optim.stem_gain)
        if run.init and not self._to_resume():
            for note in start_from(self.model, run.init):
                self._say(note)
        self.model.to(self.world.device)
        if prepare(self.model, run, self.world):
            self._say(
                "blocks are compiled in the first steps (--run.compile false leaves that out)"
            )
        labels = [video.label for video in self.train_source.dataset.videos]
        weights = weigh_classes(optim.class_weights, labels, names)
        rates = for_batch(optim, data.batch_size)
        self.optimizer = build_optimizer(self.model, rates)
        self.scheduler = build_scheduler(self.optimizer, rates, self._batches.steps)
        self.updater = Updater(
            self.model,
            self.model,
            self.optimizer,
            precision,
            self.world,
            optim,
            run.seed,
            piece_clips=self._batches.piece_size * data.repeats,
            average=WeightAverage(self.model, optim.ema) if optim.ema else None,
            mixer=mixing.build(data, self.config.num_classes),
            class_weights=None if weights is None else weights.to(self.world.device),
            clip=self.clip,
        )
        self.state = RunState(
            self._checkpoints,
            self.world,
            self.model,
            self.optimizer,
            precision,
            self.updater.average,
            self._skip_count(self.train_source, "unusable_train.txt"),
            BadSteps(run.max_bad_steps, self.folder),
            self._options(),
        )
        peak = peak_flops(self.world.device, precision.dtype or torch.float32)
        # seconds that a clip would take all processes at the peak rate of their devices, if known
        self._peak_s = peak and count_training_flops(self.config) / (peak * self.world.size)
        self.stop_request = StopRequest()
        self.journal: Journal | None = None  # of the main process, in training

    @property
    def progress(self) -> Progress:
        """How far the run is."""
        return self.state.progress

    @property
    def _batches(self) -> EpochBatches:
        return self.train_source.batches

    def fit(self) -> Scores:
        """Train to the end, resuming as `run.resume` says. Returns the last validation's scores.

        Raises Interrupted after SIGINT or SIGTERM, once a checkpoint is written, and UserError
        for a folder that is not a run's or in use, a checkpoint that does not fit, unusable videos,
        or too many steps that are not finite.
        """
        with occupied(self.folder, self.world):
            resumed = self._resume()
            self._prepare_folder()
            self.train_source.preload("cache train")
            self.val_source.preload("cache val")
            if self.progress.epoch < self.optim.epochs:
                return self._train()
            where = f"the finished run at {resumed}" if resumed else "an earlier run"
            self._say(f"nothing left to train: {where} has {self.progress.epoch} epochs")
            weights = self.snapshot()
            scores = self._validate(weights)
            self._keep_if_best(weights, scores)
            return scores

    def _train(self) -> Scores:
        """Train the epochs that are left. Returns the last validation's scores."""
        if self.world.is_main:
            self.journal = Journal(self.folder, self.progress.step, self.progress.epoch)
        self.updater.module = synchronised(self.model, self.world)
        try:
            with self.stop_request.listening():
                while self.progress.epoch < self.optim.epochs:
                    self._train_epoch()
                    scores = self._finish_epoch()
        finally:
            self.updater.module = self.model
            if self.journal is not None:
                self.journal.close()
        return scores

    # -- one epoch ---------------------------------------------------------------------------

    def _train_epoch(self) -> None:
        """Go through what is left of the epoch."""
        from tqdm import tqdm

        progress = self.progress
        self._batches.set_position(progress.epoch, progress.batch)
        self.model.train()
        bar = tqdm(
            total=self._batches.steps * self.data.batch_size,
            initial=progress.batch * self.data.batch_size,
            desc=f"epoch {progress.epoch + 1}/{self.optim.epochs}",
            unit="clip",
            disable=not self.world.is_main,
        )
        with bar:
            for pieces, wait_s in _timed(self.train_source.loader, self.run.accumulate):
                began = time.perf_counter()
                report = self._step(pieces)
                self._report(bar, report, time.perf_counter() - began + wait_s, wait_s)
                self._save_if_due(report)

    def _step(self, pieces: list[Batch]) -> StepReport:
        """One update, and what it means for the run's progress."""
        progress = self.progress
        for piece in pieces:
            self.state.skips.update(piece)
        report = self.updater.update(pieces, progress.step, self.stop_request)
        progress.step += 1
        progress.batch += 1
        self.state.bad_steps.count(report, pieces, progress.step, self.world)
        if report.applied:
            progress.loss_sum += report.loss * report.clips
            progress.correct += report.correct
            progress.clips += report.clips
        self.scheduler.step_update(progress.step)
        return report

    def _report(self, bar, report: StepReport, seconds: float, wait_s: float) -> None:
        """Move the bar and, every `run.log_every` steps, write to the log."""
        progress, clips = self.progress, max(1, self.progress.clips)
        text = f"loss {progress.loss_sum / clips:.3f}, top1 {100 * progress.correct / clips:.1f} %"
        bar.set_postfix_str(text, refresh=False)
        bar.update(self.data.batch_size)
        if progress.step % self.run.log_every == 0:
            self._log(
                "step",
                epoch=progress.epoch,
                loss=report.loss,
                lr=self.optimizer.param_groups[0]["lr"],
                grad_norm=report.grad_norm,
                bad_steps=self.state.bad_steps.total,
                clips_per_s=round(report.clips / seconds, 2),
                **(
                    {"mfu": round(self._peak_s * report.clips / seconds, 4)} if self._peak_s else {}
                ),
                data_wait_s=round(wait_s, 5),
            )

    def _save_if_due(self, report: StepReport) -> None:
        """Write a checkpoint every `run.save_every` steps, and before stopping for a signal."""
        due = self.run.save_every and self.progress.step % self.run.save_every == 0
        if due or report.stop:
            path = self.state.save(self.run.keep)
            if report.stop:
                raise Interrupted(path, report.stop)

    def _finish_epoch(self) -> Scores:
        """Write the checkpoint, validate, log, and keep the model if it is the best.

        The checkpoint comes first, so that a run that ends in the validation resumes with it.
        """
        progress, clips = self.progress, max(1, self.progress.clips)
        self.state.save(self.run.keep)
        weights = self.snapshot()
        scores = self._validate(weights)
        train_loss = progress.loss_sum / clips
        self._log(
            "epoch",
            epoch=progress.epoch + 1,
            train_loss=train_loss,
            train_top1=progress.correct / clips,
            val_loss=scores.loss,
            val_top1=scores.top1,
            val_top5=scores.top5,
            bad_steps=self.state.bad_steps.total,
            unusable_train=len(self.state.skips.bad),
            unusable_val=len(scores.skipped),
        )
        self._say(
            f"epoch {progress.epoch + 1}: training loss {train_loss:.3f}, "
            f"validation loss {scores.loss:.3f}, top-1 {100 * scores.top1:.1f} %"
        )
        self._keep_if_best(weights, scores)
        self.state.finish_epoch()
        return scores

    def snapshot(self) -> Model:
        """A model to validate and to keep: the weights as they are, or their average.

        It shares the weights where they are whole; every process must ask.
        """
        weights = self.model.state_dict()
        if self.updater.average is not None:
            weights |= self.updater.average.average
        with torch.device("meta"):
            model = build_model(self.config)
        model.load_state_dict({name: whole(w) for name, w in weights.items()}, assign=True)
        model.set_channels_last(self.run.channels_last)
        return model.to(self.world.device).eval()

    def _validate(self, model: Model) -> Scores:
        """Raises Interrupted after a signal; the state of this moment is saved already."""
        try:
            return evaluate(
                model,
                self.val_source.loader,
                self.config.num_classes,
                world=self.world,
                skips=self._skip_count(self.val_source, "unusable_val.txt"),
                bf16=self.updater.precision.dtype == torch.bfloat16,
                title="validate",
                clip=self.clip,
                stop=lambda: self.stop_request.signum,
            )
        except Stopped as stopped:
            assert self.state.saved is not None
            raise Interrupted(self.state.saved, stopped.signum) from None

    def _keep_if_best(self, model: Model, scores: Scores) -> None:
        """Write best/ if no validation before this one had a higher top-1."""
        if scores.top1 > self.progress.best_top1:
            self.progress.best_top1 = scores.top1
            if self.world.is_main:
                part = self.folder / "best.part"
                with writing(part):
                    shutil.rmtree(part, ignore_errors=True)
                    model.save_pretrained(part)
                    Preprocess(self.config.image_size, self.data.short_side).save(part)
                    put_best(self.folder)

    # -- files -------------------------------------------------------------------------------

    def _skip_count(self, source: Source, name: str) -> SkipCount:
        """A fresh count of unusable videos; one process writes the report of those of a clip."""
        return source.new_skip_count(self.folder / name if self.world.leads_clip else None)

    def _log(self, kind: str, **values: Any) -> None:
        if self.journal is not None:
            self.journal.write(kind, self.progress.step, **values)

    def _say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _to_resume(self) -> list[Path]:
        """What `run.resume` may go on from, in the order of trying."""
        return find_checkpoints(self.run.resume, self._checkpoints, restarted=is_restart())

    def _resume(self) -> Path | None:
        """Load the state that `run.resume` names. Returns the checkpoint's path."""
        path = self.state.restore_first(self.world.from_main(self._to_resume()), self._say)
        if path is not None:
            at = f"step {self.progress.step}, epoch {self.progress.epoch + 1}"
            self._say(f"resuming from {path} at {at}")
        self.scheduler.step_update(self.progress.step)
        return path

    def _prepare_folder(self) -> None:
        """Remove what the run will write anew, and write the options down."""
        import yaml

        def prepare() -> bool:
            with writing(self.folder / "config.yaml"):
                self.state.drop_later()
                if self.progress.step == 0:
                    clear(self.folder, RESULTS)
                elif self.state.saved is None:  # the run goes on from another folder
                    clear(self.folder, BEST)
                options = json.loads(json.dumps(self._options()))  # tuples as lists
                (self.folder / "config.yaml").write_text(yaml.safe_dump(options, sort_keys=False))
            return has_best(self.folder)

        if not self.world.by_main(prepare):
            self.progress.best_top1 = -1.0  # of a model that is not here

    def _options(self) -> dict[str, dict[str, Any]]:
        return {
            "data": asdict(self.data),
            "model": asdict(self.config),
            "optim": asdict(self.optim),
            "run": asdict(self.run),
        }


def _timed(loader, pieces: int) -> Iterator[tuple[list[Batch], float]]:
    """The pieces of each batch, with the seconds waited for them."""
    batches = iter(loader)
    while True:
        began = time.perf_counter()
        if not (found := list(islice(batches, pieces))):
            return
        yield found, time.perf_counter() - began

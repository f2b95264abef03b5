"""The training loop: one class that holds the state of a run, so that it can be saved and resumed.

What a step computes is a function of the options and of the saved state alone: the order of the
clips comes from (seed, epoch), their augmentation from (seed, epoch, index), dropout and
stochastic depth from torch's generators, whose states are in the checkpoint.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from stat_video.checkpoint import (
    load_checkpoint,
    random_states,
    replace_folder,
    restore_random_states,
    save_checkpoint,
)
from stat_video.config import STATConfig
from stat_video.data.loader import Batch, EpochBatches
from stat_video.data.sources import open_source
from stat_video.devices import pick_device, set_threads
from stat_video.errors import UserError
from stat_video.evaluation import Scores, evaluate
from stat_video.journal import Journal, read_journal
from stat_video.model import STAT
from stat_video.optim import build_optimizer, build_scheduler, initialise
from stat_video.options import DataOptions, OptimOptions, RunOptions
from stat_video.plots import plot_confusion, plot_curves
from stat_video.preprocess import Preprocess

# Options that a resumed run may change: they decide how fast it goes, not what it computes.
FREE_DATA_OPTIONS = {"root", "workers", "cache_gib", "max_bad_share"}


class Interrupted(Exception):
    """Training was stopped by a signal; its checkpoint is at `path`."""

    def __init__(self, path: Path, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.path, self.signum = path, signum


@dataclass
class Progress:
    """How far a run is, all of it saved.

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


class Trainer:
    """Trains a STAT on an annotation list of videos.

    data, model, optim, run: the options; `model.num_classes` and `model.class_names` are replaced
        by what the data's label file says.
    After `fit`, the run's folder holds config.yaml, log.jsonl, tensorboard/, checkpoints/last.pt,
    best/ (as `STAT.from_pretrained` reads it), curves.png and confusion.png.
    """

    def __init__(
        self, data: DataOptions, model: STATConfig, optim: OptimOptions, run: RunOptions
    ) -> None:
        self.data, self.optim, self.run = data, optim, run
        self.folder = Path(run.dir)
        self.device = pick_device(run.device)
        if run.precision == "bf16" and self.device.type == "cpu":
            raise UserError(
                "run.precision bf16 needs a GPU: on a CPU, torch's bfloat16 conv3d gradient is at "
                "times not finite (seen with torch 2.11)"
            )
        set_threads(run.threads)
        torch.manual_seed(run.seed)
        self.train_source = open_source(data, model, split="train", seed=run.seed)
        self.val_source = open_source(data, model, split="val")
        self.config = self.train_source.fit_config(model)
        self.model = STAT(self.config)
        initialise(self.model, optim.init_gain)
        self.model.to(self.device)
        self.optimizer = build_optimizer(self.model, optim)
        self.scheduler = build_scheduler(self.optimizer, optim, len(self._batches))
        self.scheduler.step_update(0)
        self.progress = Progress()
        self.train_skips = self.train_source.new_skip_count()
        self._signal: int | None = None

    @property
    def checkpoint_path(self) -> Path:
        """The checkpoint that is rewritten after each epoch and at an interruption."""
        return self.folder / "checkpoints" / "last.pt"

    @property
    def _batches(self) -> EpochBatches:
        return self.train_source.batches

    def fit(self) -> Scores:
        """Train to the end, resuming as `run.resume` says. Returns the last validation's scores.

        Raises Interrupted after SIGINT or SIGTERM, once a checkpoint is written, and UserError
        for a checkpoint that does not fit, unusable videos, or a loss that is not finite.
        """
        resumed = self._resume()
        self._prepare_folder()
        self.train_source.preload("cache train")
        self.val_source.preload("cache val")
        self.journal = Journal(self.folder, self.progress.step)
        try:
            with self._catch_signals():
                scores = None
                while self.progress.epoch < self.optim.epochs:
                    self._train_epoch()
                    scores = self._finish_epoch()
        finally:
            self.journal.close()
        if scores is None:
            where = f"the finished run at {resumed}" if resumed else "an earlier run"
            print(f"nothing left to train: {where} has {self.progress.epoch} epochs")
            scores = self._validate()
        self._draw(scores)
        return scores

    # -- one epoch ---------------------------------------------------------------------------

    def _train_epoch(self) -> None:
        """Go through what is left of the epoch."""
        from tqdm import tqdm

        progress = self.progress
        self._batches.set_position(progress.epoch, progress.batch)
        self.model.train()
        bar = tqdm(
            total=len(self._batches) * self._batches.batch_size,
            initial=progress.batch * self._batches.batch_size,
            desc=f"epoch {progress.epoch + 1}/{self.optim.epochs}",
            unit="clip",
        )
        with bar:
            for batch, wait_s in _timed(self.train_source.loader):
                began = time.perf_counter()
                self.train_skips.update(batch)
                loss, grad_norm = self._step(batch)
                seconds = time.perf_counter() - began + wait_s
                self._report(bar, loss, grad_norm, len(batch.labels) / seconds, wait_s)
                self._stop_if_asked()

    def _step(self, batch: Batch) -> tuple[float, float]:
        """One update. Returns the loss and the gradient norm before clipping."""
        progress = self.progress
        clips = batch.clips.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.precision == "bf16"):
            logits = self.model(clips)
            loss = F.cross_entropy(
                logits.float(), labels, label_smoothing=self.optim.label_smoothing
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        limit = self.optim.clip_grad or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit).item()
        value = loss.item()
        if not math.isfinite(value) or not math.isfinite(norm):
            raise UserError(
                f"the loss is {value:g} and the gradient norm {norm:g} at step "
                f"{progress.step + 1}; try a lower optim.lr or run.precision fp32"
            )
        self.optimizer.step()
        progress.step += 1
        progress.batch += 1
        progress.loss_sum += value * len(labels)
        progress.correct += int((logits.argmax(1) == labels).sum())
        progress.clips += len(labels)
        self.scheduler.step_update(progress.step)
        return value, norm

    def _report(self, bar, loss: float, norm: float, clips_per_s: float, wait_s: float) -> None:
        """Move the bar and, every `run.log_every` steps, write to the log."""
        progress, lr = self.progress, self.optimizer.param_groups[0]["lr"]
        mean = progress.loss_sum / progress.clips
        bar.set_postfix_str(
            f"loss {mean:.3f}, top1 {100 * progress.correct / progress.clips:.1f} %", refresh=False
        )
        bar.update(self._batches.batch_size)
        if progress.step % self.run.log_every == 0:
            self.journal.write(
                "step",
                progress.step,
                epoch=progress.epoch,
                loss=loss,
                lr=lr,
                grad_norm=norm,
                clips_per_s=round(clips_per_s, 2),
                data_wait_s=round(wait_s, 5),
            )

    def _finish_epoch(self) -> Scores:
        """Validate, log, keep the model if it is the best, write the checkpoint."""
        progress = self.progress
        scores = self._validate()
        self.journal.write(
            "epoch",
            progress.step,
            epoch=progress.epoch + 1,
            train_loss=progress.loss_sum / progress.clips,
            train_top1=progress.correct / progress.clips,
            val_loss=scores.loss,
            val_top1=scores.top1,
            val_top5=scores.top5,
            unusable_train=len(self.train_skips.bad),
            unusable_val=len(scores.skipped),
        )
        print(
            f"epoch {progress.epoch + 1}: training loss {progress.loss_sum / progress.clips:.3f}, "
            f"validation loss {scores.loss:.3f}, top-1 {100 * scores.top1:.1f} %",
            flush=True,
        )
        if scores.top1 > progress.best_top1:
            progress.best_top1 = scores.top1
            self._save_best()
        progress.epoch, progress.batch = progress.epoch + 1, 0
        progress.loss_sum, progress.correct, progress.clips = 0.0, 0, 0
        self._save()
        return scores

    def _validate(self) -> Scores:
        return evaluate(
            self.model,
            self.val_source.loader,
            self.device,
            self.config.num_classes,
            skips=self.val_source.new_skip_count(),
            bf16=self.run.precision == "bf16",
            title="validate",
        )

    # -- files -------------------------------------------------------------------------------

    def _prepare_folder(self) -> None:
        """Make the run's folder and write its options down."""
        import yaml

        fresh = self.progress.step == 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if fresh:  # what an earlier run left would be mistaken for this one's
                for name in ("checkpoints", "best", "tensorboard"):
                    shutil.rmtree(self.folder / name, ignore_errors=True)
            options = json.loads(json.dumps(self._options()))  # tuples as lists
            (self.folder / "config.yaml").write_text(yaml.safe_dump(options, sort_keys=False))
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}") from error

    def _options(self) -> dict[str, Any]:
        return {
            "data": asdict(self.data),
            "model": asdict(self.config),
            "optim": asdict(self.optim),
            "run": asdict(self.run),
        }

    def _save(self) -> None:
        save_checkpoint(
            self.checkpoint_path,
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "progress": asdict(self.progress),
                "skipped": self.train_skips.state(),
                "random": random_states(),
                "options": self._options(),
            },
        )

    def _save_best(self) -> None:
        """Write best/ completely, then put it in the place of the former one."""
        part = self.folder / "best.part"
        shutil.rmtree(part, ignore_errors=True)
        self.model.save_pretrained(part)
        Preprocess.of(self.data, self.config).save(part)
        replace_folder(part, self.folder / "best")

    def _resume(self) -> Path | None:
        """Load the state that `run.resume` names. Returns the checkpoint's path."""
        if self.run.resume == "none":
            return None
        path = self.checkpoint_path if self.run.resume == "auto" else Path(self.run.resume)
        if self.run.resume == "auto" and not path.exists():
            return None
        state = load_checkpoint(path)
        self._check_same_options(path, state["options"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.progress = Progress(**state["progress"])
        self.train_skips.restore(state["skipped"])
        restore_random_states(state["random"])
        print(f"resuming from {path} at step {self.progress.step}, epoch {self.progress.epoch + 1}")
        return path

    def _check_same_options(self, path: Path, saved: dict[str, Any]) -> None:
        """A resumed run goes on with the options that it began with."""
        mine = self._options()
        for group in ("model", "data", "optim"):
            for name, value in mine[group].items():
                before = saved[group].get(name)
                free = group == "data" and name in FREE_DATA_OPTIONS
                if not free and _plain(before) != _plain(value):
                    raise UserError(
                        f"cannot resume from {path}: {group}.{name} was {_plain(before)} and is "
                        f"{_plain(value)} now; use --run.resume none or another --run.dir"
                    )
        if saved["run"]["seed"] != self.run.seed:
            raise UserError(
                f"cannot resume from {path}: run.seed was {saved['run']['seed']} and is "
                f"{self.run.seed} now; use --run.resume none or another --run.dir"
            )

    def _draw(self, scores: Scores) -> None:
        """The plots at the end of a run."""
        plot_curves(read_journal(self.journal.path), self.folder / "curves.png")
        names = self.config.class_names
        plot_confusion(scores.confusion, names, self.folder / "confusion.png")

    # -- interruptions -----------------------------------------------------------------------

    @contextmanager
    def _catch_signals(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM wait for the end of a step; a second one acts at once."""
        former = {}

        def remember(signum: int, frame: object) -> None:
            self._signal = signum
            signal.signal(signum, former[signum])

        for signum in (signal.SIGINT, signal.SIGTERM):
            former[signum] = signal.signal(signum, remember)
        try:
            yield
        finally:
            for signum, handler in former.items():
                signal.signal(signum, handler)

    def _stop_if_asked(self) -> None:
        if self._signal is not None:
            self._save()
            raise Interrupted(self.checkpoint_path, self._signal)


def _timed(loader) -> Iterator[tuple[Batch, float]]:
    """Batches with the seconds waited for each."""
    batches = iter(loader)
    while True:
        began = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        if len(batch.labels):
            yield batch, time.perf_counter() - began


def _plain(value: Any) -> Any:
    """Tuples and lists compare equal."""
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value

"""One update of the weights: pieces of a batch forwards and backwards, then the optimiser's step.

The random numbers of a piece (dropout, stochastic depth, mixing) are a function of the run's seed,
the step, and the piece's number within the whole batch. So a resumed run needs no generator's
state, and a batch gives the same gradient whether one process takes its pieces one after the other
or several processes take them at once.
"""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stat_kernels.distributed import ClipParallel
from stat_video.data.dataset import seed_of
from stat_video.data.loader import Batch
from stat_video.data.transforms import normalise
from stat_video.distributed import World
from stat_video.model.building import Model
from stat_video.train.averaging import WeightAverage
from stat_video.train.mixing import Mixer
from stat_video.train.options import OptimOptions
from stat_video.train.parallel import gradient_sync, whole
from stat_video.train.precision import Precision
from stat_video.train.signals import StopRequest

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class StepReport:
    """What an update did, the same in every process.

    loss: mean over the batch's clips; grad_norm: before clipping.
    correct, clips: number of clips classified rightly, and in all.
    applied: False where the loss or the norm was not finite, so that the weights were left alone.
    stop: number of a signal that asked one of the processes to stop, or 0.
    """

    loss: float
    grad_norm: float
    correct: int
    clips: int
    applied: bool
    stop: int


@dataclass
class Updater:
    """Makes updates; every process of `world` takes part in each.

    module: what `parallel.synchronised` returned, to be called; model: the one inside, whose
    parameters the optimizer holds; average: of the weights, or None.
    piece_clips: clips in a full piece. Where unusable videos leave fewer, their gradient weighs as
    much less.
    clip: how processes share each clip, or None.
    """

    module: nn.Module
    model: Model
    optimizer: torch.optim.Optimizer
    precision: Precision
    world: World
    optim: OptimOptions
    seed: int
    piece_clips: int
    average: WeightAverage | None = None
    mixer: Mixer | None = None
    class_weights: Tensor | None = None
    clip: ClipParallel | None = None

    def update(
        self, pieces: list[Batch], step: int, request: StopRequest | None = None
    ) -> StepReport:
        """Update the weights from this process's pieces of a batch.

        step: number of updates before this one; request: to stop, told to the other processes.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss, correct, clips = 0.0, 0.0, 0.0
        for number, piece in enumerate(pieces):
            index = self.world.data_rank * len(pieces) + number
            torch.manual_seed(seed_of(self.seed, step, index))
            with gradient_sync(self.module, enabled=number == len(pieces) - 1):
                mean, right = self._backward(piece, 1 / len(pieces))
            loss += mean * len(piece.labels)
            correct, clips = correct + right, clips + len(piece.labels)
        norm = self._clip()
        # asked as late as possible, so that a signal in mid-step ends this step and not the next
        asked = [float(request is not None and request.signum == s) for s in SIGNALS]
        loss, correct, clips, *asked = self.world.sum([loss, correct, clips, *asked])
        loss = loss / clips if clips else 0.0
        applied = math.isfinite(loss) and math.isfinite(norm)
        if applied:
            self.precision.scaler.step(self.optimizer)
            if self.average is not None:
                self.average.update()
        self.precision.scaler.update()
        stop = next((int(s) for s, count in zip(SIGNALS, asked, strict=True) if count), 0)
        sharing = self.world.clip_size  # all of them counted their clip
        return StepReport(loss, norm, int(correct / sharing), int(clips / sharing), applied, stop)

    def _backward(self, piece: Batch, weight: float) -> tuple[float, int]:
        """Add the piece's gradient, `weight` times. Returns its mean loss and right answers."""
        device, dtype = self.world.device, self.precision.clip_dtype
        labels = piece.labels.to(device, non_blocking=True)
        clips, targets = piece.clips, labels
        if not len(labels):  # the others still wait for this process's part of the sum
            clips = torch.zeros(1, *self.clip_shape, dtype=torch.uint8)
        clips = self.model.part(clips, self.clip).to(device, non_blocking=True)
        clips = normalise(clips, dtype)
        if self.mixer is not None and len(labels):
            clips, targets = self.mixer(clips, labels)
        with self.precision.autocast():
            logits = self.module(clips, clip=self.clip).float()
            if len(labels):
                smoothing = self.optim.label_smoothing
                # over the clips, not over the sum of their weights, which differs between pieces
                total = F.cross_entropy(
                    logits, targets, self.class_weights, reduction="sum", label_smoothing=smoothing
                )
                loss = total / len(labels)
            else:
                loss = logits.sum() * 0
        share = len(labels) / self.piece_clips
        self.precision.scaler.scale(loss * (weight * share)).backward()
        correct = (logits.argmax(1) == labels).sum().item() if len(labels) else 0
        return loss.item(), int(correct)

    def _clip(self) -> float:
        """Scale the gradients down to optim.clip_grad. Returns their norm before that."""
        self.precision.scaler.unscale_(self.optimizer)
        limit = self.optim.clip_grad or math.inf
        return whole(nn.utils.clip_grad_norm_(self.model.parameters(), limit)).item()

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """(channels, frames, height, width) of a clip."""
        config = self.model.config
        return config.in_channels, config.frames, config.image_size, config.image_size

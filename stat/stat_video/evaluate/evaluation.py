"""Scoring a model on a list of videos: loss, top-1, top-5, confusion matrix, accuracy by class."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from stat_kernels.distributed import ClipParallel
from stat_video.data.loader import SkipCount
from stat_video.data.transforms import normalise
from stat_video.distributed import World
from stat_video.errors import UserError
from stat_video.evaluate.tally import Tally
from stat_video.files import writing
from stat_video.model.building import Model


@dataclass(frozen=True)
class Scores:
    """loss, top1, top5: means over `videos` videos, the accuracies as shares.

    A video's prediction is the mean softmax of its views, its loss the mean of theirs.
    top5: share of videos whose class is among the first min(5, classes).
    confusion: (C, C) int64 counts, the true class along the rows.
    class_top5: (C,) float64, top5 of the videos of each class, NaN for a class without any.
    skipped: videos that could not be used, with the reason of each.
    """

    loss: float
    top1: float
    top5: float
    videos: int
    confusion: np.ndarray
    class_top5: np.ndarray
    skipped: tuple[str, ...]


class Stopped(Exception):
    """A signal, `signum`, ended the evaluation before its end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@torch.inference_mode()
def evaluate(
    model: Model,
    loader: DataLoader,
    num_classes: int,
    *,
    world: World,
    skips: SkipCount,
    bf16: bool = False,
    title: str = "eval",
    clip: ClipParallel | None = None,
    stop: Callable[[], int] = lambda: 0,
) -> Scores:
    """Run the model over all clips of the loader, with a progress bar, in eval mode.

    world: the processes that go through the videos together, each with its own loader; all get the
        scores of all. clip: how they share each clip, or None.
    stop: asked before each batch for the signal that is to end the evaluation; 0 for none.
    Raises UserError when more videos are unusable than `skips` allows, or none is left, and Stopped
    when `stop` asks for it; in a world, the others raise what one raises, after the same batch.
    """
    was_training, tally, failure = model.training, Tally(), None
    model.eval()
    try:
        _collect(model, loader, world, tally, skips, bf16, title, clip, stop)
    except UserError as error:
        failure = error
    finally:
        model.train(was_training)
    if world.size > 1:
        everyone = world.gather((tally, skips.bad, str(failure) if failure else None))
        tally = Tally()
        tally.merge([part for part, _, _ in everyone])
        skips.bad = {index: text for _, bad, _ in everyone for index, text in bad.items()}
        failure = next((UserError(text) for _, _, text in everyone if text), None)
    if failure is not None:
        raise failure
    if not len(tally):
        raise UserError(f"no video of the list can be used: {skips.bad[min(skips.bad)]}")
    return _scores(*tally.result(), num_classes, skips)


def _collect(
    model: Model,
    loader: DataLoader,
    world: World,
    tally: Tally,
    skips: SkipCount,
    bf16: bool,
    title: str,
    clip: ClipParallel | None,
    stop: Callable[[], int],
) -> None:
    """Add every batch's logits to the tally. Raises as `evaluate` does.

    One process may have a batch more than another, but all make the same number of rounds, so that
    all stop together when one of them fails or is asked to stop.
    """
    from tqdm import tqdm

    failure, signum, batches = None, 0, iter(loader)
    rounds = int(world.max([len(loader)])[0])
    with tqdm(
        total=len(loader), desc=title, unit="batch", leave=False, disable=not world.is_main
    ) as bar:
        for _ in range(rounds):
            failed, signum = map(int, world.max([failure is not None, stop()]))
            if failed or signum:
                break
            try:
                if (batch := next(batches, None)) is None:
                    continue
                skips.update(batch)
            except UserError as error:
                failure = error
                continue
            if len(batch.labels):
                clips = model.part(batch.clips, clip).to(world.device, non_blocking=True)
                with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
                    logits = model(normalise(clips), clip=clip)
                tally.add(batch, logits.cpu())
            bar.update()
    if signum:
        raise Stopped(signum)
    if failure is not None:
        raise failure


def _scores(
    means: Tensor, labels: Tensor, losses: np.ndarray, num_classes: int, skips: SkipCount
) -> Scores:
    predicted = means.argmax(1)
    among_first = (means.topk(min(5, num_classes)).indices == labels[:, None]).any(1).double()
    pairs = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    right_by_class = torch.bincount(labels, among_first, minlength=num_classes)
    return Scores(
        loss=float(losses.mean()),
        top1=(predicted == labels).double().mean().item(),
        top5=among_first.mean().item(),
        videos=len(labels),
        confusion=pairs.view(num_classes, num_classes).numpy(),
        class_top5=(right_by_class / torch.bincount(labels, minlength=num_classes)).numpy(),
        skipped=tuple(skips.bad[index] for index in sorted(skips.bad)),
    )


def write_class_table(scores: Scores, names: Sequence[str], path: Path) -> None:
    """A CSV with one row per class: videos, top-1, top-5, and its most frequent confusion."""
    with writing(path), path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["label", "class", "videos", "top1", "top5", "taken_for", "times"])
        for label, row in enumerate(scores.confusion):
            videos, wrong = int(row.sum()), row.copy()
            wrong[label] = 0
            other = int(wrong.argmax())
            shares = ["", ""]
            if videos:
                shares = [f"{row[label] / videos:.4f}", f"{scores.class_top5[label]:.4f}"]
            mistaken = [names[other], int(wrong[other])] if wrong[other] else ["", 0]
            table.writerow([label, names[label], videos, *shares, *mistaken])

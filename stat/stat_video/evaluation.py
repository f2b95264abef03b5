"""Scoring a model on a list of videos: loss, top-1, top-5 and the confusion matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from stat_video.data.loader import SkipCount
from stat_video.errors import UserError


@dataclass(frozen=True)
class Scores:
    """loss, top1, top5: means over `videos` clips, the accuracies as shares.

    top5: share of clips whose class is among the first min(5, classes).
    confusion: (C, C) int64 counts, the true class along the rows.
    skipped: videos that could not be used, with the reason of each.
    """

    loss: float
    top1: float
    top5: float
    videos: int
    confusion: np.ndarray
    skipped: tuple[str, ...]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    num_classes: int,
    *,
    skips: SkipCount,
    bf16: bool = False,
    title: str = "eval",
) -> Scores:
    """Run the model over all clips of the loader, with a progress bar, in eval mode.

    Raises UserError when more videos are unusable than `skips` allows, or none is left.
    """
    from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix
    from tqdm import tqdm

    top1 = MulticlassAccuracy(num_classes, top_k=1, average="micro")
    top5 = MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro")
    confusion = MulticlassConfusionMatrix(num_classes)
    was_training, total_loss, videos = model.training, 0.0, 0
    model.eval()
    with tqdm(total=skips.total, desc=title, unit="clip", leave=False) as bar:
        for batch in loader:
            skips.update(batch)
            if not len(batch.labels):
                continue
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(batch.clips.to(device, non_blocking=True))
            logits = logits.float().cpu()
            total_loss += F.cross_entropy(logits, batch.labels, reduction="sum").item()
            for metric in (top1, top5, confusion):
                metric.update(logits, batch.labels)
            videos += len(batch.labels)
            bar.update(len(batch.labels))
    model.train(was_training)
    if not videos:
        raise UserError(f"no video of the list can be used: {skips.bad[min(skips.bad)]}")
    return Scores(
        loss=total_loss / videos,
        top1=top1.compute().item(),
        top5=top5.compute().item(),
        videos=videos,
        confusion=confusion.compute().numpy(),
        skipped=tuple(skips.bad[index] for index in sorted(skips.bad)),
    )

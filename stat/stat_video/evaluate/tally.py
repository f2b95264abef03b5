"""Averages of a model's outputs over the views of each video."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stat_video.data.loader import Batch


@dataclass
class _Answer:
    """One video: its class, the views counted so far, and sums over them."""

    label: int
    views: set[int]
    probabilities: Tensor  # (C,) float64
    loss: float


class Tally:
    """Sums of softmax and loss per video. A view that is added twice counts once."""

    def __init__(self) -> None:
        self._answers: dict[int, _Answer] = {}

    def __len__(self) -> int:
        return len(self._answers)

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Add the logits (B, C) of a batch's clips."""
        logits = logits.double()
        losses = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")
        rows = zip(
            *(
                batch.indices,
                batch.views,
                batch.labels.tolist(),
                logits.softmax(1),
                losses.tolist(),
            ),
            strict=True,
        )
        for index, view, label, probabilities, loss in rows:
            answer = self._answers.get(index)
            if answer is None:
                self._answers[index] = _Answer(label, {view}, probabilities.clone(), loss)
            elif view not in answer.views:
                answer.views.add(view)
                answer.probabilities += probabilities
                answer.loss += loss

    def merge(self, others: list[Tally]) -> None:
        """Merge the sums of other processes. A video seen by two of them is taken from the one that
        saw more of its views, so that no video counts twice."""
        for other in others:
            for index, answer in other._answers.items():
                mine = self._answers.get(index)
                if mine is None or len(mine.views) < len(answer.views):
                    self._answers[index] = answer

    def result(self) -> tuple[Tensor, Tensor, np.ndarray]:
        """Mean softmax (V, C), classes (V,) and mean losses (V,), in order of video index."""
        answers = [self._answers[index] for index in sorted(self._answers)]
        means = torch.stack([a.probabilities / len(a.views) for a in answers])
        labels = torch.tensor([a.label for a in answers])
        return means, labels, np.array([a.loss / len(a.views) for a in answers])

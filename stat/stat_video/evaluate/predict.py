"""Naming what a video shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from stat_video.data.reading import read_video
from stat_video.data.sampling import sample_frames
from stat_video.data.transforms import normalise
from stat_video.data.video import Video
from stat_video.devices import pick_device
from stat_video.evaluate.backend import check_backend
from stat_video.evaluate.loading import LoadedModel


@dataclass(frozen=True)
class Prediction:
    """One class with its probability, a share."""

    name: str
    label: int
    probability: float


def predict(
    video: str | Path, loaded: LoadedModel, *, top: int = 5, device: str = "auto"
) -> list[Prediction]:
    """The `top` most probable classes of a video file, best first.

    The clip is the middle frame of each of the model's segments, centre-cropped.
    Raises VideoError when the video cannot be used.
    """
    frames = loaded.model.config.frames
    source = Video(Path(video), label=-1)
    images = read_video(source, lambda length: sample_frames(length, frames), threads=0)
    clip = loaded.preprocess.transform()(torch.from_numpy(images).permute(0, 3, 1, 2))
    target = pick_device(device)
    check_backend(loaded.model.config, target)
    model = loaded.model.to(target)
    with torch.inference_mode():
        shares = model(normalise(clip[None].to(target))).float().softmax(-1)[0].cpu()
    values, labels = shares.topk(min(top, len(shares)))
    return [
        Prediction(loaded.class_name(label), label, value)
        for label, value in zip(labels.tolist(), values.tolist(), strict=True)
    ]

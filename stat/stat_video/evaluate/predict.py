"""Classifies videos with a trained model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stat_video.data.dataset import ClipDataset
from stat_video.data.transforms import crops_transform, normalise
from stat_video.data.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Video
from stat_video.distributed import World, alone
from stat_video.errors import UserError, VideoError, named
from stat_video.evaluate.backend import check_backend
from stat_video.evaluate.loading import LoadedModel
from stat_video.model.building import frames_to_share

CLIPS_AT_ONCE = 4  # views of a video that go through the model together


@dataclass(frozen=True)
class Prediction:
    """One class with its probability, a share."""

    name: str
    label: int
    probability: float


def find_videos(paths: Sequence[str]) -> list[Video]:
    """The videos that `paths` name: files, folders of frames, or folders of videos.

    A folder is searched with its subfolders, in the order of names; hidden files and files of other
    suffixes are left out. Raises UserError for a folder without videos and for an empty name.
    """
    found: list[Video] = []
    for path in map(Path, named("VIDEO", *paths)):
        if not path.is_dir():
            found.append(Video(path, label=-1))
            continue
        inside = [p for p in sorted(path.rglob("*")) if _is_shown(p.relative_to(path))]
        videos = [p for p in inside if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file()]
        if videos:
            found += [Video(p, label=-1) for p in videos]
        elif any(p.suffix.lower() in IMAGE_SUFFIXES for p in inside if p.parent == path):
            found.append(Video(path, label=-1, frames=""))
        else:
            raise UserError(f"{path} holds neither videos nor the frames of one")
    return found


def _is_shown(path: Path) -> bool:
    return not any(part.startswith(".") for part in path.parts)


@torch.inference_mode()
def predict(
    videos: Sequence[Video],
    loaded: LoadedModel,
    *,
    top: int = 5,
    views: tuple[int, int] = (1, 1),
    device: str = "auto",
    world: World | None = None,
    clip_parallel: int = 1,
) -> Iterator[tuple[Video, list[Prediction] | VideoError]]:
    """Each video with its `top` most probable classes, best first, or the reason why it has none.

    views: (clips in time, crops along the long side) whose softmax is averaged, as `stat-video
        eval` does; one is the middle frame of each of the model's segments, centre-cropped.
    world, clip_parallel: the processes that all are asked for the same videos, and how many of them
        share each clip's frames; None for this process alone, on `device`.
    Raises UserError for the device or the backend.
    """
    config, prepared = loaded.model.config, loaded.preprocess
    world = alone(device) if world is None else world
    _, sharing = world.share_clips(clip_parallel, frames_to_share(config), "--clip_parallel")
    target = world.device
    check_backend(loaded.model, target)
    model = loaded.model.to(target)
    dataset = ClipDataset(
        videos,
        crops_transform(prepared.image_size, prepared.short_side, views[1]),
        frames=config.frames,
        training=False,
        views=views,
        threads=0,
    )
    for index, video in enumerate(videos):
        sample = dataset[0, index]
        if sample.clips is None:
            yield video, VideoError(sample.skipped[0][1])
            continue
        own = model.part(sample.clips, sharing).split(CLIPS_AT_ONCE)
        parts = [model(normalise(clips.to(target)), clip=sharing) for clips in own]
        shares = torch.cat(parts).float().softmax(-1).mean(0).cpu()
        if not shares.isfinite().all():  # neither is JSON's NaN
            yield video, VideoError(f"{video.path}: the model's probabilities are not finite")
            continue
        values, labels = shares.topk(min(top, len(shares)))
        yield (
            video,
            [
                Prediction(loaded.class_name(label), label, value)
                for label, value in zip(labels.tolist(), values.tolist(), strict=True)
            ],
        )

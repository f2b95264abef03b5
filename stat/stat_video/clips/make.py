"""`stat-video make-clips`: write the generated benchmark as MP4 files with annotation lists."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from stat_video.clips.materials import Materials, load_materials
from stat_video.clips.render import class_names, render_clip
from stat_video.errors import UserError
from stat_video.files import writing
from stat_video.ownership import claim, clear

Task = Literal["direction", "order", "coherence", "return"]

MARK = ".stat-clips"
OWN = (
    *("train.txt", "val.txt", "labels.txt", "contact_sheet.png"),
    *(f"{split}/[0-9][0-9][0-9][0-9][0-9]*_*.mp4" for split in ("train", "val")),
)


@dataclass(frozen=True)
class ClipOptions:
    """What to generate.

    Args:
        task: "direction": which way does the bright digit drift? "order": which digit comes first?
            "coherence": does it drift, or are the same frames scrambled? "return": is the view
            after the dark frames the same as before them?
        classes: 2 (left, right) or 4 directions (also up, down); the other tasks have 2.
        size: width and height of the clips in pixels, even.
        frames: frames per clip.
        fps: frames per second written into the files.
        train: number of training clips.
        val: number of validation clips.
        distractors: number of round pieces of other photographs that drift about.
        speed_min: slowest motion of the digit in pixels a frame (direction, coherence).
        speed_max: fastest motion of the digit in pixels a frame (direction, coherence).
        drift: fastest motion of the photograph in pixels a frame; the distractors' is twice that.
        contrast: largest brightness that the photograph adds to a base of 0.1; digits stand out
            more at lower values. 0.6 in the return task, which is about photographs.
        seed: the same seed writes the same frames.
    """

    task: Task = "direction"
    classes: Literal[2, 4] = 2
    size: int = 64
    frames: int = 32
    fps: int = 16
    train: int = 800
    val: int = 200
    distractors: int = 2
    speed_min: float = 0.8
    speed_max: float = 1.6
    drift: float = 0.2
    contrast: float = 0.6
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task != "direction" and self.classes != 2:
            raise ValueError(f"classes must be 2 for the {self.task} task, got {self.classes}")
        if self.size < 32 or self.size % 2:
            raise ValueError(f"size must be even and at least 32, got {self.size}")
        if self.frames < 8:
            raise ValueError(f"frames must be at least 8, got {self.frames}")
        for name in ("fps", "train", "val"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("distractors", "drift"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.contrast <= 0.9:
            raise ValueError(f"contrast must be from 0 to 0.9, got {self.contrast}")
        if not 0 < self.speed_min <= self.speed_max < self.size / 4:
            raise ValueError(
                f"0 < speed_min <= speed_max < size/4 must hold, got {self.speed_min} and "
                f"{self.speed_max} at size {self.size}"
            )


def write_clips(out: Path, options: ClipOptions, *, force: bool = False) -> Path:
    """Write train/*.mp4, val/*.mp4, train.txt, val.txt, labels.txt and contact_sheet.png to `out`.

    Classes alternate, so they are balanced to within one clip. Without `force` the folder must be
    empty; with it, files of an earlier call are replaced and other files stay. Returns the path of
    the contact sheet.
    Raises UserError when the folder is not empty, holds files of those names that this command did
    not write, is not a folder, or cannot be written.
    """
    _prepare(out, force)
    names = class_names(options.task, options.classes)
    (out / "labels.txt").write_text("".join(f"{name}\n" for name in names))
    samples: list[tuple[str, np.ndarray]] = []
    for split_index, (split, count) in enumerate((("train", options.train), ("val", options.val))):
        materials = load_materials(split)
        lines = []
        for index, clip in _render_split(split_index, count, materials, options):
            label = index % len(names)
            path = f"{split}/{index:05d}_{names[label]}.mp4"
            write_mp4(out / path, clip, fps=options.fps)
            lines.append(f"{path} {label}\n")
            if split == "train" and index < 2 * len(names):
                samples.append((names[label], clip))
        (out / f"{split}.txt").write_text("".join(lines))
    return _contact_sheet(out / "contact_sheet.png", samples)


def write_mp4(path: Path, clip: np.ndarray, *, fps: int, gop: int = 1, crf: int = 18) -> None:
    """Encode a clip, (T, H, W, 3) uint8 with even H and W, as MP4.

    gop: frames from one key frame to the next. The default, 1, makes every frame a key frame:
    predicted frames carry traces of earlier frames, which would reveal the direction of time to a
    model that looks at single frames.
    """
    import av

    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    options = {"crf": str(crf), "preset": "veryfast"} if codec == "libx264" else {"qscale": "3"}
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1  # the same bytes whatever the machine
        for image in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def _prepare(out: Path, force: bool) -> None:
    """Make the folders train and val and remove the clips of an earlier call."""
    with writing(out):
        if out.is_dir() and any(out.iterdir()) and not force:
            raise UserError(f"{out} is not empty; choose another folder or add --force")
        claim(out, MARK, OWN, "make-clips", "choose another folder")
        clear(out, OWN)
        for split in ("train", "val"):
            (out / split).mkdir(exist_ok=True)


def _render_split(split_index: int, count: int, materials: Materials, options: ClipOptions):
    """Yield (index, clip) with a progress bar. A clip depends only on (seed, split, index)."""
    from tqdm import tqdm

    classes = len(class_names(options.task, options.classes))
    name = ("train", "val")[split_index]
    for index in tqdm(range(count), desc=f"make-clips {name}", unit="clip"):
        rng = np.random.default_rng([options.seed, split_index, index])
        clip = render_clip(
            rng,
            materials,
            options.task,
            index % classes,
            size=options.size,
            frames=options.frames,
            speed=(options.speed_min, options.speed_max),
            distractors=options.distractors,
            drift=options.drift,
            contrast=options.contrast,
        )
        yield index, clip


def _contact_sheet(path: Path, samples: list[tuple[str, np.ndarray]], columns: int = 8) -> Path:
    """A PNG with one row per clip, time from left to right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.3 * columns + 1.2, 1.35 * len(samples)), layout="constrained")
    axes = figure.subplots(len(samples), columns, squeeze=False)
    for row, (name, clip) in zip(axes, sorted(samples, key=lambda s: s[0]), strict=True):
        picks = np.linspace(0, len(clip) - 1, columns).round().astype(int)
        for axis, t in zip(row, picks, strict=True):
            axis.imshow(clip[t], interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(f"t={t}", fontsize=7, pad=2)
        row[0].set_ylabel(name, fontsize=8)
    figure.savefig(path, dpi=110)
    return path

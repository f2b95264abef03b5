"""Everything that can be set besides the model: frozen dataclasses, checked at birth.

The parser of `recipes.py` turns each field into a command line option (`--data.root`) and into a
key of a recipe file; the texts under Args are its help.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataOptions:
    """Where the videos are and how they become clips.

    Args:
        root: folder that everything below is relative to.
        train: annotations of the training videos: a list in any format of docs/data.md, or a folder
            with a folder of videos for each class.
        val: annotations of the validation videos, likewise.
        labels: class names, one a line, or JSON that maps names to numbers. May be missing where
            train and val are folders.
        videos: folder that the paths in the lists are relative to; empty stands for root.
        decoder: "pyav", or "torchcodec" where that and its FFmpeg libraries are installed.
        batch_size: clips an update, over all processes and `run.accumulate` pieces together.
        workers: decoding processes; 0 decodes in the main one.
        cache_gib: keep decoded videos in memory, up to this many GiB; 0 keeps none.
        repeats: clips that a training video is made into each time it is decoded, each augmented on
            its own; batch_size counts clips, an epoch takes every video once.
        crop_area: smallest and largest share of a frame that the training crop covers.
        crop_ratio: narrowest and widest aspect ratio of the training crop.
        flip: probability of a left-right flip in training; 0 where directions matter.
        randaugment_ops: operations of RandAugment on a training clip; 0 for none.
        randaugment_magnitude: their strength, from 0 to 10.
        randaugment_std: standard deviation of the strength.
        erasing: probability that a box of a training clip is replaced by noise.
        mixup: parameter of the beta distribution that Mixup draws its shares from; 0 for no Mixup.
        cutmix: the same for CutMix.
        mix_prob: probability that a batch is mixed.
        mix_switch: probability that CutMix mixes it where both are on.
        short_side: frames are scaled to this short side before the centre crop of evaluation, in
            pixels; 0 stands for 256/224 of the crop.
        views: clips in time and crops of each that `stat-video eval` averages over a video;
            validation while training takes one.
        min_frames: videos with fewer frames are refused as too short.
        max_bad_share: share of unusable videos above which a run stops.
    """

    root: str = "."
    train: str = "train.txt"
    val: str = "val.txt"
    labels: str = "labels.txt"
    videos: str = ""
    decoder: Literal["pyav", "torchcodec"] = "pyav"
    batch_size: int = 16
    workers: int = 0
    cache_gib: float = 0.0
    repeats: int = 1
    crop_area: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: float = 0.5
    randaugment_ops: int = 0
    randaugment_magnitude: float = 7.0
    randaugment_std: float = 0.5
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    mix_switch: float = 0.5
    short_side: int = 0
    views: tuple[int, int] = (1, 1)
    min_frames: int = 2
    max_bad_share: float = 0.1

    def __post_init__(self) -> None:
        _at_least("data", self, 1, "batch_size", "min_frames", "repeats")
        _at_least("data", self, 0, "workers", "cache_gib", "short_side", "mixup", "cutmix")
        _at_least("data", self, 0, "randaugment_ops", "randaugment_std")
        _within("data", self, 0, 10, "randaugment_magnitude")
        _within("data", self, 0, 1, "flip", "erasing", "mix_prob", "mix_switch", "max_bad_share")
        if self.batch_size % self.repeats:
            raise ValueError(
                f"data.batch_size must be a multiple of data.repeats {self.repeats}, "
                f"got {self.batch_size}"
            )
        if self.views[0] < 1 or self.views[1] not in (1, 3):
            raise ValueError(
                "data.views must be at least 1 clip in time and 1 or 3 crops, "
                f"got {self.views[0]} and {self.views[1]}"
            )
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            raise ValueError(f"data.crop_area must satisfy 0 < low <= high <= 1, got {low}, {high}")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"data.crop_ratio must satisfy 0 < low <= high, got {low}, {high}")


@dataclass(frozen=True)
class OptimOptions:
    """AdamW with linear warm-up and half-cosine decay, the recipe of MViT.

    Args:
        name: "adamw", or "sgd" with Nesterov momentum.
        epochs: passes over the training list.
        lr: highest learning rate.
        lr_clips: clips an update that `lr` is meant for: it is scaled by data.batch_size over this;
            0 takes it as it is.
        lr_start: learning rate that the warm-up begins with, as a share of lr.
        lr_end: learning rate that the cosine ends with, as a share of lr.
        warmup_epochs: length of the warm-up; may be a fraction.
        weight_decay: not applied to biases and other 1-d parameters.
        betas: decay rates of AdamW's two moments.
        momentum: of SGD.
        clip_grad: gradients are scaled down to this L2 norm; 0 leaves them.
        ema: decay of an exponential moving average of the weights, which is then what is validated
            and kept as the best model; 0 keeps none.
        label_smoothing: share of the target spread over all classes.
        init_gain: draw the linear layers' initial weights with a standard deviation of this over
            the square root of their input channels; 0 keeps the recipe's 0.02. That is 0.55 at
            768 channels, and too small for a model of 64 to start learning.
        stem_gain: the same of the stem's convolutions, whose biases then start at 0; 0 keeps
            PyTorch's initial weights, which let biases outweigh what a dark clip shows.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    epochs: int = 200
    lr: float = 1.6e-3
    lr_clips: int = 0
    lr_start: float = 0.01
    lr_end: float = 0.01
    warmup_epochs: float = 30.0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    clip_grad: float = 1.0
    ema: float = 0.0
    label_smoothing: float = 0.1
    init_gain: float = 0.0
    stem_gain: float = 0.0

    def __post_init__(self) -> None:
        _at_least("optim", self, 1, "epochs")
        _at_least("optim", self, 0, "warmup_epochs", "weight_decay", "clip_grad", "init_gain")
        _at_least("optim", self, 0, "lr_clips", "momentum", "stem_gain")
        _within("optim", self, 0, 1, "lr_start", "lr_end", "label_smoothing")
        if not 0 <= self.ema < 1:
            raise ValueError(f"optim.ema must be in [0, 1), got {self.ema}")
        if self.lr <= 0:
            raise ValueError(f"optim.lr must be positive, got {self.lr}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"optim.warmup_epochs must be below optim.epochs {self.epochs}, "
                f"got {self.warmup_epochs}"
            )


@dataclass(frozen=True)
class RunOptions:
    """Where and how a training run goes.

    Args:
        dir: folder for checkpoints, logs, plots and the best model.
        resume: "auto" goes on from the last checkpoint in dir if there is one, "none" starts over
            (what a former run left in dir is replaced), anything else is a checkpoint's path.
        init: model that training starts from (a folder of a model or of a run, or a checkpoint); a
            classifier for other classes is replaced. Empty for random weights.
        seed: of the initial weights, the order of the clips, and the augmentation.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        threads: CPU threads of torch; 0 leaves its default.
        precision: "bf16" or "fp16" (with a scaled loss) autocast, "fp32", or "auto": bf16 on a GPU
            and fp32 on a CPU.
        parallel: how several processes (torchrun) share the work: "ddp" copies the model to each,
            "fsdp" cuts parameters, gradients and optimiser state between them.
        accumulate: pieces that a process cuts its share of a batch into, one after the other.
        checkpointing: keep no activations inside the blocks; they are computed once more.
        compile: run the blocks through torch.compile.
        channels_last: the stem's convolutions read and write channels-last tensors.
        save_every: steps from one checkpoint to the next; 0 writes one after each epoch only.
        keep: newest checkpoints that are kept.
        max_bad_steps: steps in a row that may be skipped for a loss or gradient that is not finite;
            one more stops the run and leaves its batch in dir for inspection.
        log_every: steps from one line of the log to the next.
    """

    dir: str = "runs/stat"
    resume: str = "auto"
    init: str = ""
    seed: int = 0
    device: str = "auto"
    threads: int = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    accumulate: int = 1
    checkpointing: bool = False
    compile: bool = False
    channels_last: bool = True
    save_every: int = 0
    keep: int = 2
    max_bad_steps: int = 10
    log_every: int = 10

    def __post_init__(self) -> None:
        _at_least("run", self, 0, "seed", "threads", "save_every", "max_bad_steps")
        _at_least("run", self, 1, "log_every", "accumulate", "keep")


@dataclass(frozen=True)
class EvalOptions:
    """Which question an evaluation asks.

    Args:
        reverse: show each clip backwards.
        shuffle_frames: show each clip's frames in a random order (a fixed one for each clip).
        seed: of the shuffled order.
        dir: folder for eval.json and confusion.png; empty stands for "eval" beside the model.
        device: "auto", "cpu", "cuda", ...
        bf16: forward under bfloat16 autocast.
    """

    reverse: bool = False
    shuffle_frames: bool = False
    seed: int = 0
    dir: str = ""
    device: str = "auto"
    bf16: bool = False

    def __post_init__(self) -> None:
        if self.reverse and self.shuffle_frames:
            raise ValueError("eval.reverse and eval.shuffle_frames exclude each other")

    @property
    def frame_order(self) -> Literal["forward", "reverse", "shuffle"]:
        """The order in which the frames of a clip are shown."""
        return "reverse" if self.reverse else "shuffle" if self.shuffle_frames else "forward"


def _at_least(group: str, options: object, least: float, *names: str) -> None:
    for name in names:
        if getattr(options, name) < least:
            raise ValueError(
                f"{group}.{name} must be at least {least}, got {getattr(options, name)}"
            )


def _within(group: str, options: object, low: float, high: float, *names: str) -> None:
    for name in names:
        if not low <= getattr(options, name) <= high:
            raise ValueError(
                f"{group}.{name} must be from {low} to {high}, got {getattr(options, name)}"
            )

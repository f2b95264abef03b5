"""How a model is optimised, and how a training run goes: see `data.options`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stat_video.option_checks import MAX_SEED, MAX_THREADS, at_least, within


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
        temporal_lr: learning rate of the temporal positions over that of the other weights. Those
            of an image model start at zero beside weights that are trained already.
        momentum: of SGD.
        clip_grad: gradients are scaled down to this L2 norm; 0 leaves them.
        ema: decay of an exponential moving average of the weights, which is then what is validated
            and kept as the best model; 0 keeps none.
        label_smoothing: share of the target spread over all classes.
        class_weights: "balanced" weighs the loss of a clip by the inverse of its class's share of
            the training videos; or one weight per class, in label order. Either way scaled so that
            the training videos' mean weight is 1. Empty weighs all alike.
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
    temporal_lr: float = 1.0
    momentum: float = 0.9
    clip_grad: float = 1.0
    ema: float = 0.0
    label_smoothing: float = 0.1
    class_weights: Literal["balanced"] | tuple[float, ...] = ()
    init_gain: float = 0.0
    stem_gain: float = 0.0

    def __post_init__(self) -> None:
        at_least("optim", self, 1, "epochs")
        at_least("optim", self, 0, "warmup_epochs", "weight_decay", "clip_grad", "init_gain")
        at_least("optim", self, 0, "lr_clips", "momentum", "stem_gain")
        within("optim", self, 0, 1, "lr_start", "lr_end", "label_smoothing")
        if self.class_weights != "balanced" and not all(w >= 0 for w in self.class_weights):
            raise ValueError(
                "optim.class_weights must be 'balanced' or numbers of at least 0, "
                f"got {self.class_weights}"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"optim.ema must be in [0, 1), got {self.ema}")
        for name in ("lr", "temporal_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optim.{name} must be positive, got {getattr(self, name)}")
        if not self.warmup_epochs < self.epochs:
            raise ValueError(
                f"optim.warmup_epochs must be below optim.epochs {self.epochs}, "
                f"got {self.warmup_epochs}"
            )


@dataclass(frozen=True)
class RunOptions:
    """Where and how a training run goes.

    Args:
        dir: folder for checkpoints, logs, plots and the best model; a folder that holds anything of
            such a name that no run wrote is refused.
        resume: "auto" goes on from the last checkpoint in dir if there is one, "none" starts over
            (what a former run left in dir is replaced), anything else is a checkpoint's path.
        init: model that training starts from (a folder of a model or of a run, or a checkpoint); a
            classifier for other classes is replaced. An image model also takes "pretrained", for
            weights that timm downloads, or a file of such weights. Empty for random weights.
        seed: of the initial weights, the order of the clips, and the augmentation.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        threads: CPU threads of torch; 0 leaves its default.
        precision: "bf16" or "fp16" (with a scaled loss) autocast, "fp32", or "auto": bf16 on a GPU
            and fp32 on a CPU.
        parallel: how several processes (torchrun) share the work: "ddp" copies the model to each,
            "fsdp" cuts parameters, gradients and optimiser state between them.
        clip_parallel: processes that share each clip, which hold a part of its frames each; the
            number of processes must be a multiple of it.
        accumulate: pieces that a process cuts its share of a batch into, one after the other.
        checkpointing: keep no activations inside the blocks; they are computed once more.
        compile: run the blocks through torch.compile; "auto" does so on a GPU, where Triton is
            installed.
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
    clip_parallel: int = 1
    accumulate: int = 1
    checkpointing: bool = False
    compile: bool | Literal["auto"] = "auto"
    channels_last: bool = True
    save_every: int = 0
    keep: int = 2
    max_bad_steps: int = 10
    log_every: int = 10

    def __post_init__(self) -> None:
        if not self.dir:
            raise ValueError("run.dir must name a folder, got ''")
        at_least("run", self, 0, "save_every", "max_bad_steps")
        within("run", self, 0, MAX_SEED, "seed")
        within("run", self, 0, MAX_THREADS, "threads")
        at_least("run", self, 1, "log_every", "clip_parallel", "accumulate", "keep")

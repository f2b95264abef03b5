"""Initial weights, the optimiser with its decay groups, linear warm-up and half a cosine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stat_video.errors import UserError
from stat_video.model.building import Model
from stat_video.model.image import ImageModel
from stat_video.train.options import OptimOptions

FUSED = ("cpu", "cuda")  # devices with one kernel for all of AdamW's arithmetic


def initialise(model: Model, gain: float, stem_gain: float = 0.0) -> None:
    """Draw weights anew, with a deviation of a gain / sqrt(inputs of an output).

    gain: of all linear layers, whose biases stay; stem_gain: of the stem's convolutions, whose
    biases become 0. A gain of 0 leaves them as the model made them, as are norms and tokens.
    """
    if isinstance(model, ImageModel):
        if gain or stem_gain:
            raise UserError("optim.init_gain and optim.stem_gain must be 0 for an image model")
        return
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for layers, deviation in ((linear, gain), (model.stem.convs, stem_gain)):
        for layer in layers if deviation else ():
            nn.init.trunc_normal_(layer.weight, std=deviation * layer.weight[0].numel() ** -0.5)
    if stem_gain:
        for conv in model.stem.convs:
            nn.init.zeros_(conv.bias)


def weigh_classes(
    choice: Literal["balanced"] | Sequence[float], labels: Sequence[int], names: Sequence[str]
) -> Tensor | None:
    """The weight of each class in the loss, (C,) float32, with a mean of 1 over the videos.

    choice: as `OptimOptions.class_weights`; labels: of the training videos; names: of the classes.
    None where all weigh alike. Raises UserError when there are not as many weights as classes.
    """
    if not choice:
        return None
    counts = torch.bincount(torch.tensor(labels), minlength=len(names)).float()
    if choice == "balanced":
        weights = torch.where(counts > 0, 1 / counts, 0.0)
    elif len(choice) == len(names):
        weights = torch.tensor([float(weight) for weight in choice])
    else:
        raise UserError(
            f"optim.class_weights must have one weight per class ({len(names)}), got {len(choice)}"
        )
    mean = (weights * counts).sum() / counts.sum()
    if not mean > 0:
        raise UserError("optim.class_weights gives every class of the training videos weight 0")
    return weights / mean


def decay_groups(
    model: nn.Module, weight_decay: float, temporal_lr: float = 1.0
) -> list[dict[str, Any]]:
    """Parameter groups: matrices, kernels and tokens decay; biases and norms do not.

    A class or video token is stored with one dimension, but is an input and not a scale, and the
    recipe decays it. What a model's `no_weight_decay` names does not decay.
    temporal_lr: learning rate of the temporal positions over that of the rest; groups of their own
        where it is not 1.
    """
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {(weight_decay, 1): [], (0.0, 1): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim > 1 or name.endswith("_token")
            decay = weight_decay if matrix and name not in exempt else 0.0
            scale = temporal_lr if "temporal_" in name else 1
            groups.setdefault((decay, scale), []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, **({} if scale == 1 else {"lr_scale": scale})}
        for (decay, scale), members in groups.items()
    ]


def for_batch(options: OptimOptions, clips: int) -> OptimOptions:
    """The options with the learning rate for `clips` an update, in proportion to `lr_clips`."""
    if not options.lr_clips:
        return options
    return replace(options, lr=options.lr * clips / options.lr_clips, lr_clips=0)


def build_optimizer(model: nn.Module, options: OptimOptions) -> torch.optim.Optimizer:
    """AdamW with the recipe's betas and eps 1e-8, fused, or SGD with Nesterov momentum."""
    groups = decay_groups(model, options.weight_decay, options.temporal_lr)
    if options.name == "sgd":
        nesterov = options.momentum > 0
        return torch.optim.SGD(groups, options.lr, options.momentum, nesterov=nesterov)
    fused = all(p.device.type in FUSED for p in model.parameters())
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=1e-8, fused=fused)


def build_scheduler(optimizer: torch.optim.Optimizer, options: OptimOptions, steps: int):
    """timm's cosine schedule, stepped once an update by `step_update(number of updates done)`.

    steps: updates an epoch.
    """
    from timm.scheduler import CosineLRScheduler

    warmup = math.ceil(options.warmup_epochs * steps)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, options.epochs * steps - warmup),
        lr_min=options.lr * options.lr_end,
        warmup_t=warmup,
        warmup_lr_init=options.lr * options.lr_start,
        warmup_prefix=True,
        t_in_epochs=False,
    )

"""Starting from the weights of another model: other classes, another number of frames."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stat_video.errors import UserError
from stat_video.evaluate.loading import load_model
from stat_video.model.stat import STAT

HEAD = ("head.weight", "head.bias")
TIME = "temporal_position"


def start_from(model: STAT, path: str) -> list[str]:
    """Copy the weights of the model at `path` (as `load_model` takes it) into `model`, in place.

    The classifier is left as it is where the classes differ, in number or in name. Temporal
    positions are interpolated where the number of frames differs. Attention windows have no
    weights, so they may differ too.
    Returns a sentence for each thing that was not simply copied. Raises UserError when any other
    weight has no counterpart of its shape.
    """
    source = load_model(path).model
    weights, own, notes = source.state_dict(), model.state_dict(), []
    classes, mine = source.config.class_names, model.config.class_names
    if own[HEAD[0]].shape != weights[HEAD[0]].shape or (classes and mine and classes != mine):
        weights |= {name: own[name] for name in HEAD}
        notes.append(
            f"the classifier starts anew: {len(own[HEAD[1]])} classes here, "
            f"{source.config.num_classes} there"
        )
    if TIME in own and TIME in weights and own[TIME].shape[0] != weights[TIME].shape[0]:
        notes.append(f"{len(weights[TIME])} temporal positions are stretched to {len(own[TIME])}")
        weights[TIME] = _stretch(weights[TIME], len(own[TIME]))
    wrong = sorted(own.keys() ^ weights.keys()) or [
        name for name in own if own[name].shape != weights[name].shape
    ]
    if wrong:
        there, here = (
            str(tuple(w[wrong[0]].shape)) if wrong[0] in w else "missing" for w in (weights, own)
        )
        raise UserError(
            f"training cannot start from {path}: {wrong[0]} is {there} there and {here} here"
        )
    model.load_state_dict(weights)
    return notes


def _stretch(positions: Tensor, frames: int) -> Tensor:
    """(T, C) -> (frames, C), linearly."""
    with torch.no_grad():
        return F.interpolate(positions.T[None], frames, mode="linear", align_corners=False)[0].T

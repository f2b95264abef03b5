"""Starting from the weights of another model: other classes, another number of frames."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from stat_video.errors import UserError
from stat_video.evaluate.loading import load_model
from stat_video.model.building import Model
from stat_video.model.image import ImageModel, is_image_weights

# temporal positions, by name, with the dimension that counts the frames
TIMES = {"temporal_position": 0, "net.temporal_embed": 1}


def start_from(model: Model, path: str) -> list[str]:
    """Copy the weights of the model at `path` into `model`, in place.

    path: as `load_model` takes it, or for an image model what `load_image_weights` takes.
    The classifier is left as it is where the classes differ, in number or in name. Temporal
    positions are interpolated where the number of frames differs. Attention windows have no
    weights, so they may differ too.
    Returns a sentence for each thing that was not simply copied. Raises UserError when any other
    weight has no counterpart of its shape.
    """
    if isinstance(model, ImageModel) and is_image_weights(path):
        try:
            return model.load_image_weights(path)
        except ValueError as error:
            raise UserError(f"run.init: {error}") from error
    source = load_model(path).model
    weights, own, notes = source.state_dict(), model.state_dict(), []
    heads = [name for name in own if name.removeprefix("net.").startswith("head")]
    there, here = source.config, model.config
    named = there.class_names and here.class_names and there.class_names != here.class_names
    if there.num_classes != here.num_classes or named:
        weights |= {name: own[name] for name in heads}
        notes.append(
            f"the classifier starts anew: {here.num_classes} classes here, "
            f"{there.num_classes} there"
        )
    for name, dim in TIMES.items():
        if name in own and name in weights and own[name].shape[dim] != weights[name].shape[dim]:
            frames = own[name].shape[dim]
            notes.append(f"{weights[name].shape[dim]} temporal positions are stretched to {frames}")
            weights[name] = _stretch(weights[name], dim, frames)
    wrong = sorted(own.keys() ^ weights.keys()) or [
        name for name in own if own[name].shape != weights[name].shape
    ]
    if wrong:
        shapes = [
            str(tuple(w[wrong[0]].shape)) if wrong[0] in w else "missing" for w in (weights, own)
        ]
        raise UserError(
            f"training cannot start from {path}: {wrong[0]} is {shapes[0]} there and "
            f"{shapes[1]} here"
        )
    model.load_state_dict(weights)
    return notes


def _stretch(positions: Tensor, dim: int, frames: int) -> Tensor:
    """Resize one dimension, linearly."""
    moved = positions.movedim(dim, -1)
    rows = moved.reshape(1, -1, moved.shape[-1])
    stretched = F.interpolate(rows, frames, mode="linear", align_corners=False)
    return stretched.reshape(*moved.shape[:-1], frames).movedim(-1, dim)

"""Finding a trained model: a saved model's folder, a run's folder, or a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from stat_video.checkpoint import STATE, load_tensors, read_state
from stat_video.data.preprocess import Preprocess
from stat_video.errors import UserError, named
from stat_video.model.building import Model, build_model, config_of, model_class


@dataclass(frozen=True)
class LoadedModel:
    """model: on the CPU, in eval mode; folder: where it lies; preprocess: how to feed it."""

    model: Model
    folder: Path
    preprocess: Preprocess

    def class_name(self, label: int) -> str:
        """The name of a class, or its number where the model knows no names."""
        names = self.model.config.class_names
        return names[label] if names else f"class {label}"


def load_model(path: str | Path) -> LoadedModel:
    """Load a model from `path`.

    path: a folder that `save_pretrained` wrote, the folder of a run (its best model is taken), or
        one of its checkpoints. In a folder with a config.json nothing but safetensors and JSON is
        read, whatever else it holds. Raises UserError saying what is wrong with it.
    """
    path = Path(*named("MODEL", str(path)))
    if not path.is_dir():
        state = "is not a folder" if path.exists() else "does not exist"
        raise UserError(f"{path} {state}")
    for folder in (path, path / "best"):
        if (folder / "config.json").exists():
            return _from_saved(folder)
    if (path / STATE).exists():
        return _from_checkpoint(path)
    raise UserError(
        f"no model can be loaded from {path}: it has no config.json, no best/config.json and no "
        f"{STATE}; it must be a saved model's folder, a run's, or a checkpoint"
    )


def _from_saved(folder: Path) -> LoadedModel:
    """A model that `save_pretrained` wrote."""
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        saved = None  # from_pretrained says what is wrong with it
    try:
        model = model_class(saved).from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"no model can be loaded from {folder}: {error}") from error
    return LoadedModel(model, folder, Preprocess.load(folder, model.config.image_size))


def _from_checkpoint(path: Path) -> LoadedModel:
    """The weights of a run's checkpoint, averaged ones where the run averages."""
    state = read_state(path)
    try:
        options = state["options"]
        config = config_of(options["model"])
        preprocess = Preprocess(config.image_size, options["data"]["short_side"])
        kind = "average" if options["optim"]["ema"] else "model"
        with torch.device("meta"):
            model = build_model(config)
        weights = {n: torch.empty_like(w, device="cpu") for n, w in model.state_dict().items()}
    # torch raises RuntimeError for sizes that no memory holds
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} does not fit this version of the model: {error!r}") from error
    load_tensors(path, {kind: weights})
    model.load_state_dict(weights, assign=True)
    return LoadedModel(model.eval(), path.parent, preprocess)

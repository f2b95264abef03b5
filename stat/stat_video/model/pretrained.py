"""Saving and loading: safetensors for weights, JSON for the configuration, strict about both."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from safetensors import SafetensorError
from safetensors.torch import load_file

from stat_video.model.config import STATConfig

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

Model = TypeVar("Model", bound="PretrainedMixin")

MODEL_CARD = """---
{{ card_data }}
---

# STAT

A video classifier, a shrinking temporal attention transformer (AAAI 2022) of the sizes in
config.json.

    from stat_video import STAT

    model = STAT.from_pretrained("this directory or repository")
    logits = model(video)  # (B, 3, T, H, W)
"""


class PretrainedMixin(PyTorchModelHubMixin):
    """``save_pretrained`` of huggingface_hub, and a ``from_pretrained`` that is strict.

    The one it replaces ignores unknown fields of config.json, missing weights and missing files. A
    class that uses this has a `config_class` as its only required argument.
    """

    config_class: type = STATConfig

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | Path,
        *,
        map_location: str = "cpu",
        config: Any = None,
        **hub: Any,
    ) -> Model:
        """The model saved in a directory, or in a repository of the Hugging Face hub, in eval mode.

        Args:
            pretrained_model_name_or_path: a directory that ``save_pretrained`` wrote; a string like
                "owner/name" that is no directory here is a repository, and only for that is the
                network used.
            map_location: device of the weights.
            config: instead of the saved one (another backend, another drop path).
            hub: revision, cache_dir, force_download, local_files_only and token of huggingface_hub.

        Weights saved in float16, bfloat16 or float64 become float32, in which the model computes;
        use ``.to`` for another dtype.

        Raises:
            FileNotFoundError: there is no such directory, or no model in it.
            ValueError: the configuration or the weights are another model's, or not one another's.
        """
        config_file, weights_file = _locate(pretrained_model_name_or_path, hub)
        config = _read_config(config_file, cls.config_class) if config is None else config
        weights = _read_weights(weights_file, map_location)
        try:
            with torch.device("meta"):
                model: Any = cls(config)  # a Module as well
        except (RuntimeError, TypeError, OverflowError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{config_file} asks for too large a tensor: {reason}") from None
        _check_weights(weights, model.state_dict(), weights_file)
        model.load_state_dict(weights, assign=True)
        for parameter in model.parameters():  # an assigned tensor does not bring its requires_grad
            parameter.requires_grad_(True)
        return model.eval()


def _locate(source: str | Path, hub: dict[str, Any]) -> tuple[Path, Path]:
    """config.json and model.safetensors of a directory or of a hub repository."""
    names = (CONFIG_NAME, SAFETENSORS_SINGLE_FILE)
    directory = Path(source)
    if directory.is_dir():
        for name in names:
            if not (directory / name).is_file():
                raise FileNotFoundError(
                    f"{directory} has no {name}; a model directory holds {names[0]} and "
                    f"{names[1]}, as save_pretrained writes them"
                )
        return directory / names[0], directory / names[1]
    parts = str(source).split("/")
    if isinstance(source, Path) or len(parts) != 2 or parts[0] in ("", ".", "..", "~"):
        raise FileNotFoundError(
            f"{source} is no directory; from_pretrained takes one that save_pretrained wrote, "
            'or "owner/name" of a hub repository'
        )
    config, weights = (hf_hub_download(repo_id=str(source), filename=n, **hub) for n in names)
    return Path(config), Path(weights)


def _read_config(path: Path, kind: type) -> Any:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} must be a {kind.__name__} in JSON, but is not JSON: {error}"
        ) from None
    if not isinstance(saved, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(saved).__name__}")
    unknown = sorted(saved.keys() - {field.name for field in fields(kind)})
    if unknown:
        names = ", ".join(unknown)
        raise ValueError(f"{path} must have the fields of a {kind.__name__} only, got {names}")
    try:
        return kind(**saved)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a {kind.__name__}: {error}") from None


def _read_weights(path: Path, device: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file in float32."""
    try:
        weights = load_file(path, device=device)
    # KeyError for a dtype that torch has not got
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} must be a safetensors file: {error}") from None
    for name, weight in weights.items():
        if weight.dtype not in DTYPES:
            known = ", ".join(str(dtype) for dtype in DTYPES)
            raise ValueError(f"{path} must hold weights in {known}, got {weight.dtype} for {name}")
    return {name: weight.float() for name, weight in weights.items()}


def _check_weights(
    weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], path: Path
) -> None:
    """Every parameter present, none besides, each of its shape."""
    for what, names in (
        ("lacks", expected.keys() - weights.keys()),
        ("has, besides the configuration's parameters,", weights.keys() - expected.keys()),
    ):
        if names:
            first = ", ".join(sorted(names)[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{path} does not fit its configuration: it {what} {first}{more}")
    wrong = [name for name in expected if weights[name].shape != expected[name].shape]
    if wrong:
        name = wrong[0]
        more = f", and {len(wrong) - 1} more do not" if len(wrong) > 1 else ""
        raise ValueError(
            f"{path} does not fit its configuration: {name} must be "
            f"{tuple(expected[name].shape)}, got {tuple(weights[name].shape)}{more}"
        )

"""From a configuration to its model: STAT, or an image model for clips."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from stat_video.errors import UserError
from stat_video.model.config import STATConfig
from stat_video.model.image import ImageModel
from stat_video.model.image_config import ImageModelConfig
from stat_video.model.stat import STAT

Config: TypeAlias = STATConfig | ImageModelConfig
Model: TypeAlias = STAT | ImageModel


def build_model(config: Config) -> Model:
    """The model of a configuration, with random weights. Raises UserError, naming the field."""
    if isinstance(config, STATConfig):
        return STAT(config)
    try:
        return ImageModel(config)
    except ValueError as error:
        raise UserError(f"model.{error}") from error


def config_of(options: Mapping[str, Any]) -> Config:
    """The configuration that has these fields. Raises ValueError and TypeError."""
    return ImageModelConfig(**options) if "image_model" in options else STATConfig(**options)


def model_class(options: Any) -> type[Model]:
    """Which model a config.json is of."""
    return ImageModel if isinstance(options, Mapping) and "image_model" in options else STAT


def frames_to_share(config: Config) -> int | None:
    """How many frames of tokens processes can divide; None for an image model, which cannot be."""
    return config.token_frames if isinstance(config, STATConfig) else None

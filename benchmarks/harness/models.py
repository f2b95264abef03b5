"""The model and its blocks for the benchmarks of layer and training."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from stat_kernels import dispatch
from stat_video import STAT, STATConfig
from stat_video.model.blocks import STABlock
from stat_video.model.config import Q_POOL
from stat_video.model.flops import count_multiply_adds

__all__ = [
    "PRESETS",
    "STATConfig",
    "check_names",
    "count_multiply_adds",
    "head_dim",
    "make_block",
    "make_clips",
    "make_model",
    "make_mvit",
]

PRESETS = ("stat_tiny", "stat_b16", "stat_b32", "stat_b64")


def check_names(presets: list[str], backends: list[str] | None, dtype: str) -> torch.dtype:
    """Check names of presets and backends, and return the dtype named ``dtype``.

    Raises:
        ValueError: a name is unknown.
    """
    for preset in presets:
        STATConfig.preset(preset)
    for name in backends or ():
        if name not in dispatch.names():
            raise ValueError(f"backend must be one of {', '.join(dispatch.names())}, got {name!r}")
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype must be a torch dtype's name, got {dtype!r}")
    return getattr(torch, dtype)


def stages(preset: str) -> range:
    """A preset's stages, counted from 1."""
    return range(1, len(STATConfig.preset(preset).dims) + 1)


def head_dim(preset: str, stage: int) -> int:
    """D of a preset's stage, counted from 1.

    Raises:
        ValueError: the preset has no such stage.
    """
    config = STATConfig.preset(preset)
    if stage not in stages(preset):
        raise ValueError(f"stage must be 1 to {len(config.dims)} for {preset}, got {stage}")
    return config.dims[stage - 1] // config.num_heads[stage - 1]


def make_model(preset: str, device: str, backend: str | None = None, seed: int = 0) -> STAT:
    """A network in training mode; its weights do not depend on the backend."""
    torch.manual_seed(seed)
    return STAT(replace(STATConfig.preset(preset), backend=backend)).to(device).train()


def make_mvit(preset: str, device: str, seed: int = 0) -> nn.Module:
    """torchvision's mvit_v1_b in training mode, for clips and classes as a preset has them.

    Raises:
        ImportError: torchvision is missing.
    """
    from torchvision.models.video import mvit

    config = STATConfig.preset(preset)
    torch.manual_seed(seed)
    model = mvit.mvit_v1_b(num_classes=config.num_classes)
    # the one part that knows the clip's size; the patches' stride is (2, 4, 4)
    side = config.image_size // 4
    model.pos_encoding = mvit.PositionalEncoding(
        model.pos_encoding.class_token.numel(), (side, side), config.frames // 2, False
    )
    return model.to(device).train()


def make_clips(preset: str, batch: int, device: str, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random clips (B, C, T, H, W) and labels (B,) of a preset's sizes."""
    config = STATConfig.preset(preset)
    generator = torch.Generator().manual_seed(seed)
    size = (batch, config.in_channels, config.frames, config.image_size, config.image_size)
    clips = torch.randn(size, generator=generator)
    labels = torch.randint(config.num_classes, (batch,), generator=generator)
    return clips.to(device), labels.to(device)


def make_block(
    preset: str, stage: int, batch: int, device: str, dtype: torch.dtype, first: bool = False
) -> tuple[nn.Module, tuple[int, int], Tensor]:
    """A block from the middle of a stage (counted from 1), its grid, and tokens for it.

    ``first`` makes it the stage's first block, which pools its queries.
    """
    config = STATConfig.preset(preset)
    torch.manual_seed(0)
    dim = config.dims[stage - 1]
    block = STABlock(config, stage - 1, first=first, dim_out=dim, drop_path=0.0).to(device, dtype)
    halvings = stage - 1 - first
    height, width = (-(-side // Q_POOL**halvings) for side in config.token_grid)
    tokens = height * width + config.class_token
    x = torch.randn(batch, config.token_frames, tokens, dim).to(device, dtype)
    return block, (height, width), x

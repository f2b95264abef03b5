"""Checks that the attention backend requested by a model or the environment is usable."""

from __future__ import annotations

import torch

from stat_kernels import shrinking_temporal_attention
from stat_video.errors import UserError
from stat_video.model.config import STATConfig


def check_backend(config: STATConfig, device: torch.device) -> None:
    """Run attention once with each stage's head dim. Raises UserError if the backend cannot.

    Only a backend requested by model.backend or STAT_BACKEND can fail; the default always works.
    """
    for dim, heads in zip(config.dims, config.num_heads, strict=True):
        tokens = torch.zeros(1, 1, 1, 1, dim // heads, device=device)
        try:
            shrinking_temporal_attention(tokens, tokens, tokens, window=1, backend=config.backend)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"model.{error}" if config.backend else str(error)) from error

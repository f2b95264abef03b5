"""Whether the attention backend that a model or the environment insists on can be used."""

from __future__ import annotations

import torch

from stat_kernels import shrinking_temporal_attention
from stat_video.errors import UserError
from stat_video.model.config import STATConfig


def check_backend(config: STATConfig, device: torch.device) -> None:
    """Attend once with each stage's head dim. Raises UserError where the backend cannot do it.

    A backend is insisted on by model.backend or STAT_BACKEND; whatever is picked by itself works.
    """
    for dim, heads in zip(config.dims, config.num_heads, strict=True):
        tokens = torch.zeros(1, 1, 1, 1, dim // heads, device=device)
        try:
            shrinking_temporal_attention(tokens, tokens, tokens, window=1, backend=config.backend)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"model.{error}" if config.backend else str(error)) from error

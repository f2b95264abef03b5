"""Checks that the attention backend requested by a model or the environment is usable."""

from __future__ import annotations

import torch

from stat_kernels import shrinking_temporal_attention
from stat_video.errors import UserError
from stat_video.model.building import Model


def check_backend(model: Model, device: torch.device) -> None:
    """Run attention once with each head dim. Raises UserError if the backend cannot.

    Only a backend requested by model.backend or STAT_BACKEND can fail; the default always works.
    """
    backend = model.config.backend
    for head_dim in sorted(model.head_dims):
        tokens = torch.zeros(1, 1, 1, 1, head_dim, device=device)
        try:
            shrinking_temporal_attention(tokens, tokens, tokens, window=1, backend=backend)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"model.{error}" if backend else str(error)) from error

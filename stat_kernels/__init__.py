"""Fused kernels for shrinking temporal attention (STAT, AAAI 2022)."""

from stat_kernels.cache import KVCache
from stat_kernels.functional import (
    explain,
    explain_pooling,
    pool_tokens,
    shrinking_temporal_attention,
)
from stat_kernels.mlp import (
    bias_gelu,
    bias_residual,
    explain_mlp,
    linear_gelu,
    linear_residual,
)
from stat_kernels.modules import ShrinkingTemporalAttention

__version__ = "0.1.0"
__all__ = [
    "KVCache",
    "ShrinkingTemporalAttention",
    "__version__",
    "bias_gelu",
    "bias_residual",
    "explain",
    "explain_mlp",
    "explain_pooling",
    "linear_gelu",
    "linear_residual",
    "pool_tokens",
    "shrinking_temporal_attention",
]

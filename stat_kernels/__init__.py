"""Fused kernels for shrinking temporal attention (STAT, AAAI 2022)."""

from stat_kernels.cache import KVCache
from stat_kernels.functional import (
    explain,
    explain_pooling,
    pool_tokens,
    shrinking_temporal_attention,
)
from stat_kernels.modules import ShrinkingTemporalAttention

__version__ = "0.1.0"
__all__ = [
    "KVCache",
    "ShrinkingTemporalAttention",
    "__version__",
    "explain",
    "explain_pooling",
    "pool_tokens",
    "shrinking_temporal_attention",
]

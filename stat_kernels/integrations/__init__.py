"""The fused layer inside the image and video transformers of other libraries.

``stat_kernels.integrations.timm``, ``.transformers`` and ``.torchvision`` each need their library
and are imported by name; what is here needs PyTorch alone.
"""

from stat_kernels.integrations.tokens import (
    TemporalAttentionConfig,
    frame_attention,
    sequence_attention,
)

Joining = TemporalAttentionConfig  # its name before 0.1.0

__all__ = ["Joining", "TemporalAttentionConfig", "frame_attention", "sequence_attention"]

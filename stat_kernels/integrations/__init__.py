"""The fused layer inside the image and video transformers of other libraries.

``stat_kernels.integrations.timm``, ``.transformers`` and ``.torchvision`` each need their library
and are imported by name; what is here needs PyTorch alone.
"""

from stat_kernels.integrations.tokens import Joining, frame_attention, sequence_attention

__all__ = ["Joining", "frame_attention", "sequence_attention"]

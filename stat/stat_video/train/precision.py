"""In which precision a step computes: autocast, and the loss scaling that float16 needs."""

from __future__ import annotations

import torch

from stat_video.errors import UserError

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Autocast of a run and its gradient scaler.

    name: "fp32", "bf16", "fp16", or "auto" for bf16 on a GPU and fp32 elsewhere. Parameters,
        gradients and optimiser state are float32 throughout; only fp16 scales the loss.
    On a CPU bf16 leaves the stem in float32 (see ConvStem). Raises UserError for fp16 on a CPU.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if name == "auto":
            name = "bf16" if device.type == "cuda" else "fp32"
        self.dtype = DTYPES[name]
        self.device = device
        if name == "fp16" and device.type == "cpu":
            raise UserError("run.precision fp16 needs a GPU; on a CPU use bf16 or fp32")
        # of a clip on its way into the model: the stem's own, which is float32 on a CPU
        self.clip_dtype = self.dtype if self.dtype and device.type != "cpu" else torch.float32
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

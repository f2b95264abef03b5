"""An exponential moving average of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class WeightAverage:
    """Follows a model's parameters: average = decay * average + (1 - decay) * parameter.

    decay: in [0, 1); DeiT uses 0.99996. The average begins with the parameters as they are. Where
    a parameter is cut between processes, so is its average.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = dict(model.named_parameters())
        self.average = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters after an optimiser step."""
        averages = [_local(a) for a in self.average.values()]
        parameters = [_local(p) for p in self._parameters.values()]
        torch._foreach_lerp_(averages, parameters, 1 - self.decay)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

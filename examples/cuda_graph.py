"""A training step under CUDA graphs: captured once, then replayed without Python's work per kernel.

    python examples/cuda_graph.py [stat_b16] [clips]

A replay reads and writes the memory of the capture, so clips and labels are copied into fixed
tensors, and the optimiser keeps its step count on the device (``capturable=True``). Dropout works:
PyTorch's generator is part of the graph.
"""

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from stat_video.model.config import STATConfig
from stat_video.model.stat import STAT

WARM_UP, STEPS = 3, 20


def training_step(
    model: torch.nn.Module, optimiser: torch.optim.Optimizer, clips: Tensor, labels: Tensor
) -> Callable[[], Tensor]:
    """A function that makes one update on the tensors' present content and returns the loss."""

    def step() -> Tensor:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(clips.device.type, dtype=torch.bfloat16):
            loss = F.cross_entropy(model(clips), labels)
        loss.backward()
        optimiser.step()
        return loss.detach()

    return step


def captured(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A function that replays ``step``, and the tensor with the loss of the latest replay.

    The first steps run eagerly on a side stream: they compile kernels and fill the optimiser's
    state, neither of which may happen during a capture.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    return graph.replay, loss


def milliseconds(step: Callable[[], object]) -> float:
    """Of one of STEPS steps."""
    step()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / STEPS * 1e3


def main(preset: str = "stat_b16", clips: str = "8") -> None:
    if not torch.cuda.is_available():
        sys.exit("CUDA graphs need an NVIDIA GPU, and this machine has none")
    torch.manual_seed(0)
    config = STATConfig.preset(preset)
    model = STAT(config).cuda()
    optimiser = torch.optim.AdamW(model.parameters(), fused=True, capturable=True)
    size = (int(clips), 3, config.frames, config.image_size, config.image_size)
    video = torch.randn(size, device="cuda")
    labels = torch.randint(config.num_classes, (int(clips),), device="cuda")
    step = training_step(model, optimiser, video, labels)
    eager = milliseconds(step)
    replay, loss = captured(step)
    graph = milliseconds(replay)  # before each one: video.copy_(...), labels.copy_(...)
    print(f"{preset}: {eager:.1f} ms eager, {graph:.1f} ms captured, loss {loss.item():.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""``python -m stat_kernels``: versions, devices, what was built, and each backend's state."""

import platform

import torch

import stat_kernels
from stat_kernels import dispatch, native


def describe() -> str:
    """Several lines of text about this installation and machine."""
    lines = [
        f"stat-kernels {stat_kernels.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"CPU          {torch.get_num_threads()} threads",
    ]
    if native.problem() is None:
        lines += [f"CPU kernel   {', '.join(native.instruction_sets())} (best first)"]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = ", ".join(gpus) or "no device"
    lines += [f"CUDA         {found} (torch built for {torch.version.cuda})"]
    lines += [f"library      {native.problem() or native.PATH.name + ' loaded'}"]
    for device in ("cpu", "cuda"):
        lines += ["", f"backends for float32, head dim 96 on {device}:"]
        lines += [f"  {line}" for line in _report(device).splitlines()]
    return "\n".join(lines)


def _report(device: str) -> str:
    return dispatch.report(device, torch.float32, 96)


if __name__ == "__main__":
    print(describe())

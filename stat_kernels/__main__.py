"""``python -m stat_kernels``: versions, devices, what was built, and each backend's state."""

import platform

import torch

import stat_kernels
from stat_kernels import dispatch, native

# The dtypes that each kind of device is for; every backend of it takes one of them.
SHOWN = (("cpu", torch.float32), ("cuda", torch.bfloat16), ("cuda", torch.float32))
HEAD_DIM = 96  # of STAT
POOLING = ((1, 3, 3), 4)  # kernel and stride of its first stage


def describe() -> str:
    """Several lines of text about this installation and machine."""
    lines = [
        f"stat-kernels {stat_kernels.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"CPU          {torch.get_num_threads()} threads",
    ]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = ", ".join(gpus) or "no device"
    cuda = torch.version.cuda
    lines += [f"CUDA         {found} (torch built {f'for {cuda}' if cuda else 'without CUDA'})"]
    lines += [f"library      {native.problem() or native.PATH.name + ' loaded'}"]
    if native.problem() is None:
        lines += [f"CPU kernel   {_instruction_sets()}"]
        built = native.cuda_architectures()
        lines += [f"CUDA kernels {f'built for {built}' if built else native.cuda_problem()}"]
        lines += _introspection()
    for device, dtype in SHOWN:
        name = str(dtype).removeprefix("torch.")
        for what, pooling in (("attention", None), ("pooling", POOLING)):
            lines += ["", f"{what}: backends for {name}, head dim {HEAD_DIM} on {device}:"]
            report = dispatch.report(device, dtype, HEAD_DIM, pooling=pooling)
            lines += [f"  {x}" for x in report.splitlines()]
        lines += ["", f"mlp: backends for bias with GELU or residual, {name} on {device}:"]
        lines += [f"  {x}" for x in dispatch.mlp_report(device, dtype, dtype).splitlines()]
    return "\n".join(lines)


def _instruction_sets() -> str:
    """What the CPU kernel uses for each dtype, and what STAT_CPU_ISA may name."""
    used: dict[str, list[str]] = {}
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        used.setdefault(native.instruction_set_of(dtype), []).append(str(dtype).split(".")[1])
    chosen = "; ".join(f"{name} for {', '.join(dtypes)}" for name, dtypes in used.items())
    return f"{chosen} (STAT_CPU_ISA can be {', '.join(native.instruction_sets())})"


def _introspection() -> list[str]:
    """How the library was built, and its CUDA kernels where there is a device to ask."""
    module = native.introspection()
    if module is None:
        return ["build        not known: built without pybind11, so without the module that tells"]
    lines = [f"  {k:<18} {v or 'none'}" for k, v in module.build_information().items()]
    lines = ["build", *lines]
    if native.cuda_problem() is None:
        lines += kernel_table(module.cuda_kernels()) if torch.cuda.is_available() else []
    return lines


def kernel_table(kernels: list[dict[str, str | int]]) -> list[str]:
    """One line a CUDA kernel: registers and spills a thread, bytes and threads a block."""
    columns = {
        "registers": "registers",
        "spilled_bytes": "spilled",
        "static_shared_bytes": "static",
        "dynamic_shared_bytes": "dynamic",
        "threads": "threads",
        "blocks_resident": "blocks",
    }
    lines = [f"  {'CUDA kernel':<48} {' '.join(f'{c:>9}' for c in columns.values())}"]
    for kernel in kernels:
        numbers = " ".join(f"{kernel[key]:>9}" for key in columns)
        name = f"{kernel['name']}, {kernel['dtype']}, D={kernel['head_dim']}"
        lines.append(f"  {name:<48} {numbers}")
    return lines


if __name__ == "__main__":
    print(describe())

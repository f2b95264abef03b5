"""What the fused layer costs and saves inside other people's models, as a table.

    python examples/integration_costs.py                       # every row: half an hour on one core
    python examples/integration_costs.py --models mvit_v1_b    # one model
    python examples/integration_costs.py --sizes 64 128        # small frames, a few minutes
    python examples/integration_costs.py --counts              # no times: some minutes

Each measurement is a process of its own with a limit on its memory, on one clip in float32.
Multiply-adds are counted on the meta device (products and convolutions). Times are CPU seconds of
the process, on one thread, the best of up to three runs where they are short. Memory is what the
pass adds to the process at its peak.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

WIDTH = (
    384  # of timm's and transformers' models here, as in their small variants: 6 heads, 12 blocks
)


class FrameByFrame(nn.Module):
    """An image model on every frame of clips (B, C, T, H, W), logits averaged."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, clips: Tensor) -> Tensor:
        return self.vit(clips.transpose(1, 2).flatten(0, 1)).mean(0, keepdim=True)


def timm_vit(frames: int, size: int, converted: bool) -> nn.Module:
    import timm

    from stat_kernels.integrations.timm import to_video

    vit = timm.create_model("vit_small_patch16_224", num_classes=400, img_size=size)
    return to_video(vit, frames=frames) if converted else FrameByFrame(vit)


def hugging_face(family: str, frames: int, size: int, converted: bool) -> nn.Module:
    import transformers

    from stat_kernels.integrations.transformers import convert

    config = getattr(transformers, f"{family}Config")(
        hidden_size=WIDTH,
        num_attention_heads=6,
        intermediate_size=4 * WIDTH,
        num_frames=frames,
        image_size=size,
        num_labels=400,
    )
    model = getattr(transformers, f"{family}ForVideoClassification")(config)
    return convert(model) if converted else model


def mvit(name: str, frames: int, size: int, converted: bool) -> nn.Module:
    from torchvision.models import video

    from stat_kernels.integrations.torchvision import convert

    model = getattr(video, name)()
    encoding = model.pos_encoding  # torchvision fixes 16 frames of 224 pixels; its stem has strides
    frames, size = frames // 2, size // 4
    encoding.temporal_size, encoding.spatial_size = frames, (size, size)
    if encoding.temporal_pos is not None:  # mvit_v2_s interpolates its own
        channels = model.conv_proj.out_channels
        encoding.temporal_pos = nn.Parameter(torch.zeros(frames, channels))
        encoding.spatial_pos = nn.Parameter(torch.zeros(size * size, channels))
    return convert(model) if converted else model


MODELS = {
    "timm vit_small_patch16_224": timm_vit,
    "transformers TimeSformer": lambda *a: hugging_face("Timesformer", *a),
    "transformers ViViT": lambda *a: hugging_face("Vivit", *a),
    "transformers VideoMAE": lambda *a: hugging_face("VideoMAE", *a),
    "torchvision mvit_v1_b": lambda *a: mvit("mvit_v1_b", *a),
    "torchvision mvit_v2_s": lambda *a: mvit("mvit_v2_s", *a),
}


def measure(name: str, frames: int, size: int, converted: bool, counts: bool) -> dict:
    """In a process of its own: counts, seconds and MiB of one model; prints what it has so far."""
    with torch.device("meta"):
        model = MODELS[name](frames, size, converted).eval()
        clip = example(name, frames, size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(clip)
    found = {
        "gmac": counter.get_total_flops() / 2e9,
        "mparams": sum(p.numel() for p in model.parameters()) / 1e6,
    }
    print(json.dumps(found), flush=True)
    if counts:
        return found
    model, clip = MODELS[name](frames, size, converted).eval(), example(name, frames, size)
    for kind in ("forward", "both"):
        before = memory_mib("VmRSS")
        try:
            found[f"{kind}_s"] = seconds(lambda k=kind: one_pass(model, clip, k))
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            break
        found[f"{kind}_mib"] = memory_mib("VmHWM") - before
        print(json.dumps(found), flush=True)
    return found


def example(name: str, frames: int, size: int) -> Tensor:
    """A clip; transformers' models take the frames before the channels."""
    axes = (frames, 3) if name.startswith("transformers") else (3, frames)
    return torch.randn(1, *axes, size, size)


def one_pass(model: nn.Module, clip: Tensor, kind: str) -> None:
    with torch.set_grad_enabled(kind == "both"):
        out = model(clip)
        out = out if isinstance(out, Tensor) else out.logits
        if kind == "both":
            out.square().mean().backward()
            model.zero_grad(set_to_none=True)


def seconds(run, most: int = 3, budget_s: float = 6.0) -> float:
    """The best of up to ``most`` runs, fewer where they take long."""
    times = []
    while len(times) < most and sum(times) < budget_s:
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def memory_mib(field: str) -> float:
    """Resident memory now (VmRSS) or at its peak (VmHWM). getrusage's peak may be the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def in_a_process(
    name: str, frames: int, size: int, converted: bool, limit_gib: float, counts: bool = False
) -> dict:
    """The measurement's last line; empty passes are those that did not fit."""
    arguments = [name, *map(str, (frames, size, int(converted), int(counts), limit_gib))]
    done = subprocess.run(
        [sys.executable, __file__, "--measure", *arguments], capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"{name} could not be measured: {done.stderr[-2000:]}")
    return json.loads(lines[-1])


COLUMNS = {
    "G multiply-adds": ("gmac", 1),
    "M parameters": ("mparams", 1),
    "forward, s": ("forward_s", 2),
    "forward+backward, s": ("both_s", 2),
    "forward, MiB": ("forward_mib", 0),
    "forward+backward, MiB": ("both_mib", 0),
}


def row(first: list, before: dict, after: dict, columns: list[str], limit_gib: float) -> str:
    """One line of the table, before and after in each cell."""

    def cell(key: str, digits: int) -> str:
        none = f"over {limit_gib:g} GiB"
        return " / ".join(f"{f[key]:,.{digits}f}" if key in f else none for f in (before, after))

    return "| " + " | ".join([*map(str, first), *(cell(*COLUMNS[c]) for c in columns)]) + " |"


def table(
    names: list[str], frames: list[int], sizes: list[int], limit_gib: float, counts: bool
) -> None:
    """Prints the table, row by row, each cell before / after."""
    columns = list(COLUMNS)[: 1 if counts else None]
    head = ["model", "pixels", "frames", *columns]
    print("| " + " | ".join(head) + " |\n| :-- |" + " --: |" * (len(head) - 1))
    for name, size, count in itertools.product(names, sizes, frames):
        before, after = (
            in_a_process(name, count, size, c, limit_gib, counts) for c in (False, True)
        )
        print(row([name, size, count], before, after, columns, limit_gib), flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        name, frames, size, converted, counts, limit_gib = sys.argv[2:]
        limit = int(float(limit_gib) * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        torch.set_num_threads(1)
        measure(name, int(frames), int(size), bool(int(converted)), bool(int(counts)))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[""], help="parts of the models' names")
    parser.add_argument("--frames", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224], help="of a frame, pixels")
    parser.add_argument("--limit-gib", type=float, default=8.0, help="memory of a measurement")
    parser.add_argument("--counts", action="store_true", help="multiply-adds only, no times")
    options = parser.parse_args()
    names = [name for name in MODELS if any(part in name for part in options.models)]
    if not names:
        parser.error(f"--models must be parts of {', '.join(MODELS)}")
    table(names, options.frames, options.sizes, options.limit_gib, options.counts)


if __name__ == "__main__":
    main()

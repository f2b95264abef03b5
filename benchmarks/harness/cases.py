"""Named cases: the sizes at which kernels are timed, generated from the model's presets."""

import fnmatch
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from stat_kernels.testing import Case
from stat_video.model.config import Q_POOL, STATConfig

PRESETS = ("stat_b16", "stat_b32", "stat_b64")
BATCHES = {"cpu": (2,), "cuda": (8, 32)}
GROWTH_FRAMES = (8, 16, 32, 64, 128, 256)
# The three stages at 64 frames: what the summary's geometric means are taken over.
SUMMARY = ("b64-stage1", "b64-stage2", "b64-stage3")


@dataclass(frozen=True)
class NamedCase:
    """A case and its name on the command line, in tables and in result files."""

    name: str
    case: Case
    about: str


def stage_cases(preset: str, **changes: object) -> list[Case]:
    """Sizes of the attention call in each stage of a preset, B = 1.

    Args:
        preset: a name that ``STATConfig.preset`` takes.
        changes: fields of the configuration to replace, e.g. ``frames=128``.
    """
    config = replace(STATConfig.preset(preset), **changes)
    cases = []
    height, width = config.token_grid
    for stage, (dim, heads) in enumerate(zip(config.dims, config.num_heads, strict=True)):
        if stage > 0:
            height, width = -(-height // Q_POOL), -(-width // Q_POOL)
        stride = config.kv_strides[stage]
        kv = [-(-height // stride), -(-width // stride)]
        short = [-(-side // config.short_stride) for side in kv]
        cases.append(
            Case(
                B=1,
                T=config.token_frames,
                Nq=height * width + config.class_token,
                H=heads,
                D=dim // heads,
                Nc=math.prod(kv),
                Ns=math.prod(short) if config.short else 0,
                L=config.token_frames if config.long != "none" else 0,
                window=config.window,
            )
        )
    return cases


def all_cases(device: str = "cpu") -> dict[str, NamedCase]:
    """Every named case, in a stable order.

    Args:
        device: "cpu" or "cuda"; decides the batch sizes.
    """
    found = []
    for preset in PRESETS:
        short_name = preset.removeprefix("stat_")
        for stage, case in enumerate(stage_cases(preset), 1):
            about = f"stage {stage} of {preset}"
            found.append(NamedCase(f"{short_name}-stage{stage}", case, about))
            for batch in BATCHES[device]:
                name = f"{short_name}-stage{stage}-batch{batch}"
                found.append(NamedCase(name, replace(case, B=batch), f"{about}, {batch} clips"))
    for stage, case in enumerate(stage_cases("stat_b64"), 1):
        large = replace(case, Nc=196, Ns=49)
        about = f"stage {stage} of stat_b64 with keys on a 14 x 14 grid"
        found.append(NamedCase(f"b64-stage{stage}-large", large, about))
    for frames in (8, 16):
        # ViT-B/16 frames: 14 x 14 tokens and a class token, 12 heads of 64, keys not pooled
        case = Case(T=frames, Nq=197, H=12, D=64, Nc=196, Ns=49, L=frames, window=3)
        found.append(NamedCase(f"vit-frames{frames}", case, f"{frames} frames of ViT-B/16 tokens"))
    for stage, case in enumerate(stage_cases("stat_tiny"), 1):
        found.append(NamedCase(f"tiny-stage{stage}", case, f"stage {stage} of stat_tiny"))
    for frames in GROWTH_FRAMES:
        case = stage_cases("stat_b64", frames=frames)[1]
        about = f"stage 2 of stat_b64 with clips of {frames} frames"
        found.append(NamedCase(f"growth-{frames:03d}", case, about))
    return {case.name: case for case in found}


def select(patterns: Iterable[str], device: str = "cpu") -> list[NamedCase]:
    """The cases whose names match any of the patterns, each once, in their stable order.

    Args:
        patterns: names, globs such as "b64-*", or "quick" for the three of the summary.
        device: as in `all_cases`.

    Raises:
        ValueError: a pattern matches nothing.
    """
    cases = all_cases(device)
    chosen: set[str] = set()
    for pattern in patterns:
        names = SUMMARY if pattern == "quick" else fnmatch.filter(cases, pattern)
        if not names:
            raise ValueError(f"no case matches {pattern!r}; there are quick, {', '.join(cases)}")
        chosen.update(names)
    return [case for name, case in cases.items() if name in chosen]

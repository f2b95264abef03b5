"""A textual description of a configuration: grids, keys, parameters, multiply-adds."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from stat_video.model.building import Config, build_model
from stat_video.model.config import STATConfig, ceil_div
from stat_video.model.flops import STAGE_PARTS, count_multiply_adds, count_training_flops
from stat_video.model.image_config import ImageModelConfig
from stat_video.model.stat import STAT


def describe(config: Config) -> str:
    """Token grids, key counts, parameters and multiply-adds as text, of a STAT part by part."""
    if isinstance(config, ImageModelConfig):
        return _describe_image(config)
    counts = count_multiply_adds(config)
    computed = sum(count_multiply_adds(config, full_window=False).values())
    parameters = count_parameters(config)
    size = config.image_size
    return "\n".join(
        [
            f"STAT for {config.frames} frames of {size} x {size}, {config.num_classes} classes",
            f"parameters     {_amount(sum(parameters.values()))}",
            f"multiply-adds  {_amount(sum(counts.values()))} a clip",
            "",
            *_table(_shape_rows(config)),
            "",
            *_table(_cost_rows(counts, parameters)),
            "",
            "Multiply-adds as fvcore counts them, all frames with a full window, as in the paper;",
            f"without the neighbours that the clip's ends do not have: {_amount(computed)}.",
        ]
    )


def _describe_image(config: ImageModelConfig) -> str:
    with torch.device("meta"):
        model: Any = build_model(config)
    net, size = model.net, config.image_size
    height, width = net.patch_embed.grid_size
    keys = (height // config.kv_stride, width // config.kv_stride)
    own = net.num_prefix_tokens - (config.long == "class")
    kinds = [f"{own} + {keys[0]} x {keys[1]}" if own else f"{keys[0]} x {keys[1]}"]
    if config.window > 1:
        short = [ceil_div(n, config.short_stride) for n in keys]
        kinds.append(f"{config.window - 1} x ({short[0]} x {short[1]})")
    if config.long != "none":
        kinds.append(str(config.frames))
    macs = count_training_flops(config) // 6  # forward and backward, two FLOPs each
    return "\n".join(
        [
            f"{config.image_model} for {config.frames} frames of {size} x {size}, "
            f"{config.num_classes} classes",
            f"parameters       {_amount(sum(p.numel() for p in model.parameters()))}",
            f"multiply-adds    {_amount(macs)} a clip",
            f"tokens           {config.frames} x ({net.num_prefix_tokens} + {height} x {width})",
            f"keys of a query  {' + '.join(kinds)}",
        ]
    )


def count_parameters(config: STATConfig) -> dict[str, int]:
    """Parameters by place; "stem" has the class token and the positions, "head" the last norm."""
    with torch.device("meta"):
        model = STAT(config)
    stages = [f"stage {i + 1}" for i in range(len(config.depths))]
    counts = dict.fromkeys(["stem", *stages, "aggregation", "head"], 0)
    for name, parameter in model.named_parameters():
        first, second = [*name.split("."), ""][:2]
        if first == "stages":
            place = f"stage {int(second) + 1}"
        elif first in ("aggregation", "video_token"):
            place = "aggregation"
        else:
            place = "head" if first in ("norm", "head") else "stem"
        counts[place] += parameter.numel()
    return counts


def _shape_rows(config: STATConfig) -> list[list[str]]:
    """A header and one row per stage: blocks, widths, tokens, keys."""
    rows = [["", "blocks", "channels", "heads", "tokens", "keys of a query"]]
    for i, (height, width) in enumerate(config.stage_grids):
        class_token = "1 + " if config.class_token else ""
        rows.append(
            [
                f"stage {i + 1}",
                str(config.depths[i]),
                str(config.dims[i]),
                str(config.num_heads[i]),
                f"{config.token_frames} x ({class_token}{height} x {width})",
                _keys(config, i),
            ]
        )
    return rows


def _keys(config: STATConfig, stage: int) -> str:
    """Keys of a query in the middle of the clip: current, short-term and long-term."""
    grid = [ceil_div(size, config.kv_strides[stage]) for size in config.stage_grids[stage]]
    parts = [f"{grid[0]} x {grid[1]}"]
    total = grid[0] * grid[1]
    if config.short and config.window > 1:
        short = [ceil_div(size, config.short_stride) for size in grid]
        parts.append(f"{config.window - 1} x ({short[0]} x {short[1]})")
        total += (config.window - 1) * short[0] * short[1]
    if config.long != "none":
        parts.append(str(config.token_frames))
        total += config.token_frames
    return f"{' + '.join(parts)} = {total}"


def _cost_rows(counts: dict[tuple[str, str], int], parameters: dict[str, int]) -> list[list[str]]:
    """A header, one row per place and their sum: parameters, multiply-adds by part, their share."""
    total = sum(counts.values())
    unit, name = (1e9, "G") if total > 1e9 else (1e6, "M")

    def row(title: str, places: Sequence[str]) -> list[str]:
        parts: Counter[str] = Counter()
        for (place, part), count in counts.items():
            parts[part] += count if place in places else 0
        macs = parts.total()
        return [
            title,
            f"{sum(parameters[place] for place in places) / 1e6:.2f}",
            *(f"{parts[part] / unit:.2f}" if parts[part] else "" for part in STAGE_PARTS),
            f"{macs / unit:.2f}",
            f"{100 * macs / total:.1f}",
        ]

    header = ["", "parameters, M", *STAGE_PARTS, f"all, {name}", "%"]
    return [header, *(row(place, [place]) for place in parameters), row("network", [*parameters])]


def _amount(count: int) -> str:
    return f"{count / 1e9:.2f} G" if count > 1e9 else f"{count / 1e6:.2f} M"


def _table(rows: list[list[str]]) -> list[str]:
    """Columns padded to their widest cell, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "   ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]

"""Multiply-adds of one clip's forward pass, counted on the meta device: no weights, no arithmetic.

Counted as fvcore counts: one per multiply-add of a convolution, linear layer or attention product,
five per element of a norm; nothing for activations, softmax, sums and average or max pooling.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from stat_kernels import ShrinkingTemporalAttention
from stat_kernels.ops import query_key_pairs
from stat_video.model.building import Config, build_model
from stat_video.model.config import STATConfig
from stat_video.model.stat import STAT

NORM_PER_ELEMENT = 5
STAGE_PARTS = ("projections", "pooling", "attention", "MLP", "norms")

_PART_OF_MODULE = {
    "attn.qkv": "projections",
    "attn.proj": "projections",
    "attn.pool_q": "pooling",
    "attn.pool_k": "pooling",
    "attn.pool_v": "pooling",
    "mlp": "MLP",
    "skip": "MLP",
    "norm1": "norms",
    "norm2": "norms",
}


def count_multiply_adds(
    config: STATConfig, *, full_window: bool = True
) -> dict[tuple[str, str], int]:
    """Multiply-adds by (place, part), in the order of the forward pass.

    The places "stem", "aggregation" and "head" have one part, "all"; "stage 1", "stage 2", ... have
    `STAGE_PARTS`: "pooling" with its own norms, "MLP" with the linear skip at a stage's end.

    Args:
        config: of the network.
        full_window: count ``window - 1`` neighbours for every frame, as the paper's figures do.
            False leaves out the neighbours that frames at the clip's ends do not have, as the
            kernels do.
    """
    # Insisting on a fused backend keeps the operation one operator, whatever this machine can run.
    with torch.device("meta"):
        model = _part_by_part(STAT(replace(config, backend="cpu")))
        clip = torch.empty(_clip_shape(config))
    sta = torch.ops.stat_kernels.sta_forward
    formulas: dict[Any, Any] = {torch.ops.aten.native_layer_norm: _norm_flops}
    if full_window:
        formulas[sta] = _full_window_flops
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        model(clip)
    flops = counter.get_flop_counts()

    def of(module: str) -> int:
        return sum(flops.get(f"STAT.{module}", {}).values()) // 2

    counts = {("stem", "all"): of("stem")}
    for i, stage in enumerate(model.stages):
        place = f"stage {i + 1}"
        counts |= {(place, part): 0 for part in STAGE_PARTS}
        for j in range(len(stage)):
            for module, part in _PART_OF_MODULE.items():
                counts[place, part] += of(f"stages.{i}.{j}.{module}")
            counts[place, "attention"] += flops[f"STAT.stages.{i}.{j}.attn"][sta] // 2
    layers = range(len(model.aggregation))
    counts["aggregation", "all"] = sum(of(f"aggregation.{k}") for k in layers)
    counts["head", "all"] = of("norm") + of("head")
    if sum(counts.values()) != counter.get_total_flops() // 2:
        raise RuntimeError("a module of the network is missing from the parts of its multiply-adds")
    return counts


def count_training_flops(config: Config) -> int:
    """FLOPs of one clip's forward and backward pass: three times those of the matrix products and
    convolutions of a forward pass, as a model FLOPs utilisation is defined."""
    with torch.device("meta"):
        model = build_model(replace(config, backend="cpu")).to("meta").eval()
        clip = torch.empty(_clip_shape(config))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(clip)
    return 3 * counter.get_total_flops()


def _part_by_part(model: STAT) -> STAT:
    """The model in evaluation mode, with pooling and attention as separate operators."""
    for module in model.modules():
        if isinstance(module, ShrinkingTemporalAttention):
            module.fused = False
    return model.eval()


def _clip_shape(config: Config) -> tuple[int, ...]:
    return (1, config.in_channels, config.frames, config.image_size, config.image_size)


def _full_window_flops(
    q, k_cur, v_cur, k_short, v_short, k_long, v_long, left, right, *args: Any, **kwargs: Any
) -> int:
    """FLOPs of the two products, two per multiply-add as in torch's counter, from shapes."""
    b, t, nq, h, d = q
    pairs = query_key_pairs(q, k_cur, None, k_long, left, right)
    if k_short is not None:
        pairs += b * t * h * nq * (min(left, t - 1) + min(right, t - 1)) * k_short[2]
    return 2 * 2 * d * pairs


def _norm_flops(x: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * NORM_PER_ELEMENT * math.prod(x)  # twice, for it is halved with all the others

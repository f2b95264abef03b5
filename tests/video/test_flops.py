"""The paper's own figures, from the meta device; fvcore as the second opinion; the description."""

import math
from dataclasses import replace

import pytest
import torch
from fvcore.nn import FlopCountAnalysis

from stat_video import STAT, STATConfig
from stat_video.model.flops import count_multiply_adds
from stat_video.model.info import count_parameters, describe

B16, B32, B64 = (STATConfig.preset(f"stat_b{frames}") for frames in (16, 32, 64))
TINY = STATConfig.preset("stat_tiny")

# (configuration, GFLOPs) of the paper's Table 1 (16 frames) and Table 2 (32 frames)
PAPER = {
    "CA": (replace(B16, short=False, long="none"), 58.2),
    "CA + SA": (replace(B16, long="none"), 59.0),
    "CA + LA": (replace(B16, short=False), 58.4),
    "CA + SA + LA": (B16, 59.1),
    "SA_3": (replace(B32, window=3), 118.6),
    "SA_5": (replace(B32, window=5), 120.1),
    "SA_7": (replace(B32, window=7), 121.5),
    "SA_9": (replace(B32, window=9), 123.0),
}


def giga(config, **options):
    return sum(count_multiply_adds(config, **options).values()) / 1e9


@pytest.mark.parametrize(("config", "paper"), PAPER.values(), ids=PAPER)
def test_figures_of_tables_1_and_2(config, paper):
    assert giga(config) == pytest.approx(paper, abs=0.35)
    assert giga(replace(config, pool_kernel=(3, 3, 3))) == pytest.approx(paper, abs=0.15)


def test_figure_of_table_6():
    """2172 G for 9 views of 64 frames: a window of 5 fits, the 7 of the paper's text does not."""
    assert giga(replace(B64, window=5)) == pytest.approx(2172 / 9, abs=0.6)
    assert giga(B64) == pytest.approx(244.3, abs=0.1)


def test_neighbours_beyond_the_clip():
    """Frames at the ends lack r (r + 1) neighbours together: products of query, key and value."""
    missing = 3 * 4 * 16  # of 16 short-term keys each, radius 3
    queries = {192: 6 * 785, 384: 197 * 5, 768: 50 * 4}  # channels: queries a frame, all blocks
    expected = sum(2 * missing * channels * number for channels, number in queries.items())
    assert giga(B64) - giga(B64, full_window=False) == pytest.approx(expected / 1e9)


def test_parts():
    """Figures that a pencil gives: 8 frames of 785 tokens, 192 channels, six blocks."""
    counts = count_multiply_adds(B16)
    assert counts["stage 1", "projections"] == 6 * 8 * 785 * 4 * 192 * 192
    assert counts["stage 1", "attention"] == 6 * 8 * 785 * 2 * 192 * (49 + 2 * 16 + 8)
    assert counts["stage 1", "MLP"] == 8 * 785 * 192 * 192 * (6 * 8 + 4 + 2)  # 2x wide at the end
    # K and V: nine taps and a norm over the head dim, for 49 tokens; the norm for class tokens too
    assert counts["stage 1", "pooling"] == 6 * 2 * 8 * 192 * (49 * 9 + 50 * 5)
    stem = 27 * (3 * 64 * 112**2 + 64 * 96 * 56**2 + 96 * 192 * 28**2)
    assert counts["stem", "all"] == 8 * (stem + 5 * (64 * 112**2 + 96 * 56**2))
    assert counts["head", "all"] == 768 * 400 + 5 * 768


@pytest.mark.parametrize(
    "changes",
    [{"window": 7, "aggregation_layers": 2}, {"long": "mean", "pool_kernel": (3, 3, 3)}],
)
def test_fvcore_agrees(changes):
    """On the reference's own products, which it finds in a trace of a real forward pass."""
    small = {"frames": 8, "image_size": 32, "depths": (1, 1), "backend": "reference"}
    config = replace(TINY, **small, **changes)
    model = STAT(config).eval()
    for block in model.blocks:
        block.attn.fused = False

    def sdpa(inputs, outputs):
        q, k = (value.type().sizes() for value in inputs[:2])
        return 2 * math.prod(q) * k[-2]

    with torch.no_grad():
        found = FlopCountAnalysis(model, torch.zeros(1, 3, 8, 32, 32))
        found.set_op_handle("aten::scaled_dot_product_attention", sdpa)
        found.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        ours = sum(count_multiply_adds(config).values())
        assert found.total() == pytest.approx(ours, rel=1e-5)  # einsum's estimate has few digits


def test_parameters_by_place():
    counts = count_parameters(B16)
    assert list(counts) == ["stem", "stage 1", "stage 2", "stage 3", "aggregation", "head"]
    assert counts["head"] == 768 * 400 + 400 + 2 * 768
    assert sum(counts.values()) == 49_254_064


def test_description():
    text = describe(B64)
    assert "7 x 7 + 6 x (4 x 4) + 32 = 177" in text
    assert "32 x (1 + 28 x 28)" in text
    assert "244.26 G" in text
    assert "49.26 M" in text
    assert all(len(line) <= 110 for line in text.splitlines())
    without = describe(replace(TINY, short=False, long="mean", class_token=False))
    assert "4 x 4 + 8 = 24" in without
    assert "8 x (8 x 8)" in without

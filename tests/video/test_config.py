"""STATConfig: presets, what follows from the fields, what it refuses."""

import dataclasses
import json
import math

import pytest

from stat_video import STATConfig
from stat_video.model.config import PRESETS


@pytest.mark.parametrize(
    ("name", "frames", "window", "token_frames"),
    [("stat_b16", 16, 3, 8), ("stat_b32", 32, 5, 16), ("stat_b64", 64, 7, 32)],
)
def test_presets_of_the_paper(name, frames, window, token_frames):
    config = STATConfig.preset(name)
    assert (config.frames, config.window) == (frames, window)
    assert sum(config.depths) == 15
    assert config.token_frames == token_frames
    assert config.stage_grids == ((28, 28), (14, 14), (7, 7))
    assert [dim // heads for dim, heads in zip(config.dims, config.num_heads, strict=True)] == [
        96,
        96,
        96,
    ]


def test_tiny_preset():
    config = STATConfig.preset("stat_tiny")
    assert (config.frames, config.image_size) == (16, 64)
    assert config.token_grid == (8, 8)


def test_grids_round_up():
    config = dataclasses.replace(STATConfig(), frames=9, image_size=100)
    assert config.token_frames == 5
    assert config.stage_grids == ((13, 13), (7, 7), (4, 4))


@pytest.mark.parametrize("name", PRESETS)
def test_json_gives_the_same_configuration(name):
    names = tuple("abcdefghij"[:10])
    config = dataclasses.replace(STATConfig.preset(name), num_classes=10, class_names=names)
    again = STATConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config
    assert hash(again) == hash(config)  # a list left inside would not hash
    assert isinstance(again.stem_strides[0], tuple)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        STATConfig().window = 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 0}, "frames must be an int of at least 1, got 0"),
        ({"image_size": 224.0}, "image_size must be an int of at least 1, got 224.0"),
        ({"window": 2**63 + 1}, "window must be at most 2147483647, got 9223372036854775809"),
        ({"depths": (10**8, 1, 1)}, "depths must be 256 in all at most, got (100000000, 1, 1)"),
        ({"aggregation_layers": 10**8}, "aggregation_layers must be 256 at most, got 100000000"),
        ({"mlp_ratio": math.inf}, "mlp_ratio must be a number above 0, got inf"),
        ({"num_classes": True}, "num_classes must be an int of at least 1, got True"),
        ({"window": 4}, "window must be an odd int of at least 1, got 4"),
        (
            {"stem_temporal_kernel": 2},
            "stem_temporal_kernel must be an odd int of at least 1, got 2",
        ),
        ({"short": 1}, "short must be a bool, got 1"),
        ({"drop_path": 1}, "drop_path must be a number in [0, 1), got 1"),
        ({"dropout": "0.5"}, "dropout must be a number in [0, 1), got '0.5'"),
        (
            {"stem_strides": ((2, 2), (1, 2))},
            "stem_strides must be one (time, height, width) of ints of at least 1 a convolution, "
            "got ((2, 2), (1, 2))",
        ),
        (
            {"stem_strides": ()},
            "stem_strides must be one (time, height, width) of ints of at least 1 a convolution, "
            "got ()",
        ),
        (
            {"stem_channels": (64,)},
            "stem_channels must be 2 ints of at least 1, one less than stem_strides has entries, "
            "got (64,)",
        ),
        ({"depths": ()}, "depths must be an int of at least 1 a stage, got ()"),
        (
            {"dims": (192, 384)},
            "dims must be an int of at least 1 a stage, 3 as in depths, got (192, 384)",
        ),
        (
            {"kv_strides": 4},
            "kv_strides must be an int of at least 1 a stage, 3 as in depths, got 4",
        ),
        (
            {"num_heads": (2, 5, 8)},
            "dims must be divisible by num_heads (2, 5, 8), stage by stage, got (192, 384, 768)",
        ),
        (
            {"pool_kernel": (1, 2, 3)},
            "pool_kernel must be three odd ints (time, height, width), got (1, 2, 3)",
        ),
        ({"long": "max"}, "long must be one of 'class', 'mean', 'none', got 'max'"),
        (
            {"class_token": False},
            "long must be 'mean' or 'none' where class_token is False, got 'class'",
        ),
        ({"mlp_ratio": 0}, "mlp_ratio must be a number above 0, got 0"),
        ({"aggregation_layers": -1}, "aggregation_layers must be an int of at least 0, got -1"),
        (
            {"num_classes": 3, "class_names": ("up", "down")},
            "class_names must be empty or num_classes (3) strings, got ('up', 'down')",
        ),
        ({"backend": 3}, "backend must be the name of an attention backend or None, got 3"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        dataclasses.replace(STATConfig.preset("stat_b16"), **changes)
    assert str(error.value) == message


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"preset must be one of stat_b16, .*, got 'stat_huge'"):
        STATConfig.preset("stat_huge")

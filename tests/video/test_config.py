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
    assert {dim / heads for dim, heads in zip(config.dims, config.num_heads, strict=True)} == {96}


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


LARGEST = 2**31 - 1
STRIDES = "one (time, height, width) of ints of at least 1 a convolution"
CHANNELS = "2 ints of at least 1, one less than stem_strides has entries"
STAGES = "an int of at least 1 a stage, 3 as in depths"


@pytest.mark.parametrize(
    ("name", "value", "wanted", "others"),
    [
        ("frames", 0, "an int of at least 1", {}),
        ("image_size", 224.0, "an int of at least 1", {}),
        ("num_classes", True, "an int of at least 1", {}),
        ("window", 4, "an odd int of at least 1", {}),
        ("window", LARGEST + 2, f"at most {LARGEST}", {}),
        ("stem_temporal_kernel", 2, "an odd int of at least 1", {}),
        ("short", 1, "a bool", {}),
        ("drop_path", 1, "a number in [0, 1)", {}),
        ("dropout", "0.5", "a number in [0, 1)", {}),
        ("stem_strides", ((2, 2), (1, 2, 2)), STRIDES, {}),
        ("stem_strides", (), STRIDES, {}),
        (
            "stem_channels",
            (64,),
            "2 ints of at least 1, one less than stem_strides has entries",
            {},
        ),
        ("depths", (), "an int of at least 1 a stage", {}),
        ("depths", (10**8, 1, 1), "256 in all at most", {}),
        ("dims", (192, 384), STAGES, {}),
        ("kv_strides", 4, STAGES, {}),
        (
            *("dims", (192, 384, 768), "divisible by num_heads (2, 5, 8), stage by stage"),
            {"num_heads": (2, 5, 8)},
        ),
        ("pool_kernel", (1, 2, 3), "three odd ints (time, height, width)", {}),
        ("long", "max", "one of 'class', 'mean', 'none'", {}),
        ("long", "class", "'mean' or 'none' where class_token is False", {"class_token": False}),
        ("mlp_ratio", 0, "a number above 0", {}),
        ("mlp_ratio", math.inf, "a number above 0", {}),
        ("aggregation_layers", -1, "an int of at least 0", {}),
        ("aggregation_layers", 10**8, "256 at most", {}),
        ("class_names", ("up", "down"), "empty or num_classes (3) strings", {"num_classes": 3}),
        ("backend", 3, "the name of an attention backend or None", {}),
    ],
)
def test_refusals(name, value, wanted, others):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        dataclasses.replace(STATConfig.preset("stat_b16"), **{name: value}, **others)
    assert str(error.value) == f"{name} must be {wanted}, got {value!r}"


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"preset must be one of stat_b16, .*, got 'stat_huge'"):
        STATConfig.preset("stat_huge")

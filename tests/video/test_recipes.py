"""Each recipe file against the numbers of MViT's recipe, and what they amount to in a model."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from stat_video.data.options import DataOptions
from stat_video.errors import UserError
from stat_video.model.config import STATConfig
from stat_video.settings import model_options, read_options, recipe_names, recipe_path
from stat_video.train.optim import build_optimizer, for_batch
from stat_video.train.options import OptimOptions, RunOptions

GROUPS = {"data": DataOptions, "model": STATConfig, "optim": OptimOptions, "run": RunOptions}
FRAMES = {"b16": 16, "b32": 32, "b64": 64}

# MViT-B on Kinetics-400 as PySlowFast has it; STAT says "augmentation as MViT".
COMMON = {
    "data.crop_area": (0.08, 1.0),
    "data.crop_ratio": (3 / 4, 4 / 3),
    "data.randaugment_ops": 4,
    "data.randaugment_magnitude": 7.0,
    "data.randaugment_std": 0.5,
    "data.erasing": 0.25,
    "data.mixup": 0.8,
    "data.cutmix": 1.0,
    "data.mix_prob": 1.0,
    "data.mix_switch": 0.5,
    "data.short_side": 256,
    "model.image_size": 224,
    "model.dropout": 0.5,
    "optim.name": "adamw",
    "optim.lr": 1.6e-3,
    "optim.lr_clips": 512,
    "optim.lr_start": 0.01,  # 1.6e-5
    "optim.lr_end": 0.01,
    "optim.warmup_epochs": 30.0,
    "optim.weight_decay": 0.05,
    "optim.betas": (0.9, 0.999),
    "optim.clip_grad": 1.0,
    "optim.ema": 0.0,  # DeiT's; an option here
    "optim.label_smoothing": 0.1,
    "optim.init_gain": 0.0,  # standard deviation 0.02
}
KINETICS = {
    "data.flip": 0.5,
    "data.repeats": 2,
    "model.drop_path": 0.2,
    "optim.epochs": 200,
    "run.init": "",
}
SOMETHING = {
    "data.flip": 0.0,
    "data.repeats": 1,
    "data.views": (1, 3),
    "model.drop_path": 0.4,
    "optim.epochs": 100,
}
SGD = {"optim.name": "sgd", "optim.lr": 0.02, "optim.lr_clips": 512, "optim.weight_decay": 1e-4}


def load(*names):
    argv = [word for name in names for word in ("--config", name)]
    return read_options("train", "", GROUPS | {"model": model_options(argv)}, argv)


def check(options, table):
    for name, wanted in table.items():
        group, field = name.split(".")
        found = getattr(getattr(options, group), field)
        assert found == pytest.approx(wanted), f"{name} is {found}, the table says {wanted}"


@pytest.mark.parametrize(("size", "views"), [("b16", (5, 1)), ("b32", (5, 1)), ("b64", (3, 3))])
def test_kinetics(size, views):
    options = load(f"k400_{size}")
    check(options, COMMON | KINETICS | {"data.views": views, "model.frames": FRAMES[size]})
    assert options.model.window == STATConfig.preset(f"stat_{size}").window


@pytest.mark.parametrize("size", FRAMES)
def test_something_something(size):
    options = load(f"ssv2_{size}")
    init = {"model.frames": FRAMES[size], "run.init": f"runs/k400_{size}"}
    check(options, COMMON | SOMETHING | init)
    assert load(f"k400_{size}").run.dir == options.run.init


@pytest.mark.parametrize("size", FRAMES)
def test_the_other_optimiser_changes_nothing_else(size):
    options, plain = load(f"ssv2_{size}", "ssv2_sgd"), load(f"ssv2_{size}")
    check(options, SGD)
    assert (options.data, options.model, options.run) == (plain.data, plain.model, plain.run)
    optimizer = build_optimizer(nn.Linear(2, 2), for_batch(options.optim, 512))
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["momentum"] == 0.9
    assert optimizer.defaults["nesterov"]


def test_small_data_fine_tunes_an_image_model():
    options = load("small_data")
    assert options.model.image_model == "vit_small_patch16_224"
    assert (options.run.init, options.optim.temporal_lr) == ("pretrained", 100)
    assert options.model.kv_stride == 1  # the guide says why
    over = load("k400_b16", "small_data")  # a preset is STAT's and left aside
    assert over.model == replace(options.model, dropout=0.5)


def test_all_that_come_along_are_held_here():
    expected = {f"{data}_{size}" for data in ("k400", "ssv2") for size in FRAMES}
    assert set(recipe_names()) >= expected | {"ssv2_sgd", "clips_tiny"}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_read_and_divided(name):
    options = load(name)
    data, run = options.data, options.run
    for world in (1, 8) if name != "clips_tiny" else (1,):
        assert (data.batch_size // data.repeats) % (world * run.accumulate) == 0
    text = recipe_path(name).read_text()
    assert text.startswith("#")


@pytest.mark.parametrize("groups", [GROUPS, {"data": DataOptions}])
def test_the_retired_decoder_option_is_passed_over_where_it_asks_for_pyav(tmp_path, groups):
    recipe = tmp_path / "old.yaml"
    recipe.write_text("data: {decoder: pyav, batch_size: 3, crop_area: [0.5, 1]}\n")
    assert read_options("train", "", groups, ["--config", str(recipe)]).data.batch_size == 3
    recipe.write_text("data: {decoder: torchcodec}\n")
    with pytest.raises(UserError, match="decoder"):
        read_options("train", "", groups, ["--config", str(recipe)])


# -- what the numbers do ---------------------------------------------------------------------------


def test_the_learning_rate_follows_the_batch():
    recipe = load("k400_b16").optim
    for clips, lr in ((512, 1.6e-3), (64, 2e-4), (1024, 3.2e-3)):
        optimizer = build_optimizer(nn.Linear(2, 2), for_batch(recipe, clips))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr)
        assert optimizer.defaults["eps"] == 1e-8
    assert for_batch(OptimOptions(lr=0.3), 64).lr == 0.3

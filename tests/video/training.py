"""A tiny training run for the tests, and what they compare of two runs."""

import json
from dataclasses import asdict, replace

import torch

from stat_video.data.options import DataOptions
from stat_video.evaluate.loading import load_model
from stat_video.model.config import STATConfig
from stat_video.train.journal import read_journal
from stat_video.train.options import OptimOptions, RunOptions
from stat_video.train.trainer import Trainer
from tests.video.clip_samples import clips

CALM = STATConfig(
    frames=4,
    image_size=32,
    stem_channels=(8, 8),
    depths=(1, 1),
    dims=(16, 32),
    num_heads=(1, 2),
    kv_strides=(2, 1),
)
TINY = replace(CALM, drop_path=0.2, dropout=0.1)
OPTIM = OptimOptions(epochs=2, lr=2e-3, warmup_epochs=0.5, ema=0.9)
ONE = replace(OPTIM, epochs=1, ema=0.0)


def model_arguments(config):
    """The options that give this configuration."""
    fields = asdict(config).items()
    return [f"--model.{n}={json.dumps(v)}" for n, v in fields if v != getattr(STATConfig, n)]


def make(folder, optim=OPTIM, model=TINY, data=None, world=None, **run):
    options = {"batch_size": 3, "crop_area": (0.5, 1.0), **(data or {})}
    if "root" not in options:  # processes of a run are given their parent's, and render none
        options["root"] = str(clips())
    run = {"dir": str(folder), "threads": 1, "log_every": 1, "device": "cpu", **run}
    return Trainer(DataOptions(**options), model, optim, RunOptions(**run), world)


def trained(folder, optim=OPTIM, model=TINY, data=None, **run):
    torch.use_deterministic_algorithms(True)  # fixtures of a module come before a test's own
    runner = make(folder, optim, model, data, **run)
    runner.fit()
    return runner


def without_sums(path):
    """A checkpoint as they were before they had checksums."""
    state = json.loads((path / "state.json").read_text())
    del state["crc32"]
    state["format"] = 2
    (path / "state.json").write_text(json.dumps(state))
    return path


def weights(runner):
    return {name: value.clone() for name, value in runner.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def steps_of(folder):
    """The records of steps in a run's log."""
    return [r for r in read_journal(folder / "log.jsonl") if r["kind"] == "step"]


def log_without_times(runner):
    records = read_journal(runner.folder / "log.jsonl")
    times = ("clips_per_s", "mfu", "data_wait_s")
    return [{k: v for k, v in r.items() if k not in times} for r in records]


def assert_same_run(whole, resumed):
    """Bit by bit: weights, their average, the optimiser, the best model, and the log."""
    assert same(weights(whole), weights(resumed))
    assert same(whole.updater.average.average, resumed.updater.average.average)
    assert log_without_times(whole) == log_without_times(resumed)
    a, b = whole.optimizer.state_dict()["state"], resumed.optimizer.state_dict()["state"]
    assert all(torch.equal(a[i]["exp_avg_sq"], b[i]["exp_avg_sq"]) for i in a)
    assert same(*(load_model(runner.folder).model.state_dict() for runner in (whole, resumed)))

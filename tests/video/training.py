"""A tiny training run for the tests, and what they compare of two runs."""

import torch

from stat_video.data.options import DataOptions
from stat_video.model.config import STATConfig
from stat_video.train.journal import read_journal
from stat_video.train.options import OptimOptions, RunOptions
from stat_video.train.trainer import Trainer
from tests.video.clip_samples import clips

TINY = STATConfig(
    frames=4,
    image_size=32,
    stem_channels=(8, 8),
    depths=(1, 1),
    dims=(16, 32),
    num_heads=(1, 2),
    kv_strides=(2, 1),
    drop_path=0.2,
    dropout=0.1,
)
OPTIM = OptimOptions(epochs=2, lr=2e-3, warmup_epochs=0.5, ema=0.9)


def make(folder, optim=OPTIM, model=TINY, data=None, **run):
    options = {"root": str(clips()), "batch_size": 3, "crop_area": (0.5, 1.0), **(data or {})}
    run = {"dir": str(folder), "threads": 1, "log_every": 1, "device": "cpu", **run}
    return Trainer(DataOptions(**options), model, optim, RunOptions(**run))


def weights(runner):
    return {name: value.clone() for name, value in runner.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log_without_times(runner):
    records = read_journal(runner.folder / "log.jsonl")
    return [
        {k: v for k, v in r.items() if k not in ("clips_per_s", "mfu", "data_wait_s")}
        for r in records
    ]

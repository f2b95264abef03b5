"""Recipes in the trainer: mixing, repeats, starting weights, and what is reported."""

import shutil
from dataclasses import replace

import torch

from stat_video.evaluate.loading import load_model
from stat_video.train.optim import build_optimizer
from stat_video.train.options import OptimOptions
from tests.video.clip_samples import clips
from tests.video.training import ONE, make, same, steps_of, trained, weights

EVERYTHING = {
    "batch_size": 4,
    "repeats": 2,
    "randaugment_ops": 4,
    "erasing": 0.25,
    "mixup": 0.8,
    "cutmix": 1.0,
}


def losses(folder):
    return [r["loss"] for r in steps_of(folder)]


def test_a_run_with_everything_on(tmp_path):
    optim = replace(ONE, name="sgd", lr=0.01, lr_clips=8, ema=0.9)
    runner = make(tmp_path, optim, data=EVERYTHING)
    assert isinstance(runner.optimizer, torch.optim.SGD)
    assert runner.fit().videos == 6
    assert runner.progress.clips == 0
    steps = steps_of(tmp_path)
    assert len(steps) == 6  # 12 videos, two of them a batch of four clips
    assert steps[0]["lr"] <= 0.005  # half of the batch that 0.01 is for


def test_training_mixes(tmp_path):
    trained(tmp_path / "plain", ONE)
    trained(tmp_path / "mixed", ONE, data={"mixup": 0.8})
    trained(tmp_path / "never", ONE, data={"mixup": 0.8, "mix_prob": 0.0})
    assert losses(tmp_path / "plain") == losses(tmp_path / "never")
    assert losses(tmp_path / "plain")[0] != losses(tmp_path / "mixed")[0]


def test_mixed_targets_reach_the_loss(tmp_path, monkeypatch):
    """A mixer that swaps the two classes without touching a clip turns the gradient around."""

    def gradient(mixer):
        runner = make(tmp_path, replace(ONE, label_smoothing=0.0, clip_grad=0.0))
        runner.updater.mixer = mixer
        monkeypatch.setattr(runner.updater.optimizer, "step", lambda: None)
        batch = next(iter(runner.train_source.loader))
        runner.model.eval()
        runner.updater.update([batch], 0)
        return runner.model.head.bias.grad.clone(), batch

    def targets(labels):
        return torch.nn.functional.one_hot(labels, 2).float()

    plain, batch = gradient(None)
    kept, _ = gradient(lambda clips, labels: (clips, targets(labels)))
    swapped, _ = gradient(lambda clips, labels: (clips, targets(1 - labels)))
    torch.testing.assert_close(kept, plain)
    shares = torch.bincount(batch.labels, minlength=2) / len(batch.labels)
    torch.testing.assert_close(swapped - plain, 2 * shares - 1, atol=1e-5, rtol=0)


def test_training_starts_from_another_model(tmp_path, capsys):
    trained(tmp_path / "first", ONE)
    started = make(tmp_path / "second", ONE, init=str(tmp_path / "first"))
    assert same(weights(started), weights(load_model(tmp_path / "first")))

    root = tmp_path / "data"
    shutil.copytree(clips(), root)
    (root / "labels.txt").write_text("left\nright\nup\n")
    capsys.readouterr()
    options = {"optim": ONE, "init": str(tmp_path / "first"), "data": {"root": str(root)}}
    runner = make(tmp_path / "third", **options)
    assert "the classifier starts anew: 3 classes here, 2 there" in capsys.readouterr().out
    assert runner.model.head.weight.shape == (3, 32)
    runner.fit()
    again = make(tmp_path / "third", **options)  # a finished run goes on from its own weights
    assert "the classifier starts anew" not in capsys.readouterr().out
    again.fit()
    assert same(weights(again), weights(runner))


def test_unusable_videos_are_reported_in_the_run_s_folder(tmp_path):
    root = tmp_path / "data"
    shutil.copytree(clips(), root)
    bad = {split: sorted((root / split).glob("*.mp4"))[0] for split in ("train", "val")}
    for path in bad.values():
        path.write_bytes(b"")
    run = tmp_path / "run"
    run.mkdir()
    for name in (".stat-run", "unusable_train.txt", "unusable_train.1.txt"):
        (run / name).write_text("of a run before\n")
    trained(run, ONE, data={"root": str(root), "max_bad_share": 0.5})
    for split, path in bad.items():
        report = (run / f"unusable_{split}.txt").read_text()
        assert report == f"{path} is empty (0 bytes)\n"
    assert not (run / "unusable_train.1.txt").exists()


def test_sgd_without_momentum():
    optimizer = build_optimizer(torch.nn.Linear(2, 2), OptimOptions(name="sgd", momentum=0.0))
    assert not optimizer.defaults["nesterov"]

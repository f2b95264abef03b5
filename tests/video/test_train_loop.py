"""Training: it learns, logs what it does, resumes exactly, and stops in an orderly way."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from stat_video.checkpoint import checkpoints_in, read_state
from stat_video.data.loader import Batch
from stat_video.data.transforms import MEAN, STD
from stat_video.devices import peak_flops
from stat_video.errors import UserError
from stat_video.evaluate import loading
from stat_video.evaluate.loading import load_model
from stat_video.evaluate.predict import predict
from stat_video.evaluate.tally import Tally
from stat_video.model.flops import count_training_flops
from stat_video.model.stat import STAT
from stat_video.train.journal import read_journal
from stat_video.train.optim import build_optimizer, build_scheduler, decay_groups, initialise
from stat_video.train.options import OptimOptions
from stat_video.train.run_state import check_same_options
from stat_video.train.signals import Interrupted
from stat_video.train.trainer import Trainer
from tests.video.clip_samples import clips
from tests.video.training import (
    ONE,
    OPTIM,
    TINY,
    assert_same_run,
    make,
    same,
    steps_of,
    trained,
    weights,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The trainer of a run of two epochs without a break."""
    return trained(tmp_path_factory.mktemp("finished"))


def test_a_run_leaves_what_it_promises(finished):
    folder = finished.folder
    for name in ("config.yaml", "best/preprocess.json"):
        assert (folder / name).is_file()
    names = [path.name for path in checkpoints_in(folder / "checkpoints")]
    assert names == ["epoch_0001_step_00000004", "epoch_0002_step_00000008"]
    assert any((folder / "tensorboard").iterdir())
    assert not list(folder.rglob("*.part"))
    loaded = load_model(folder).model
    assert isinstance(loaded, STAT)
    assert loaded.config.class_names == ("left", "right")


def test_the_log_tells_each_step_and_epoch(finished):
    steps = steps_of(finished.folder)
    assert [r["step"] for r in steps] == list(range(1, 9))
    keys = {"loss", "lr", "grad_norm", "clips_per_s", "data_wait_s", "epoch"}
    assert all(keys <= r.keys() for r in steps)
    epochs = read_journal(finished.folder / "log.jsonl")[4::5]
    assert [r["kind"] for r in epochs] == ["epoch"] * 2
    assert [r["epoch"] for r in epochs] == [1, 2]
    assert all(0 <= r["val_top1"] <= 1 for r in epochs)


def test_the_log_tells_the_utilisation_of_a_known_device(tmp_path, monkeypatch):
    monkeypatch.setattr("stat_video.train.trainer.peak_flops", lambda device, dtype: 1e9)
    runner = trained(tmp_path, ONE)
    step = steps_of(tmp_path)[0]
    clip = count_training_flops(runner.config) / 1e9
    assert step["mfu"] == pytest.approx(step["clips_per_s"] * clip, rel=0.01, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40", None),  # is no L40S, nor an L4
        ("Tesla T4", None),
    ],
)
def test_the_peak_of_a_device_is_known_by_its_name(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = peak_flops(torch.device("cuda"), torch.bfloat16)
    assert peak == (tflops and tflops * 1e12)
    if tflops:
        assert peak_flops(torch.device("cuda"), torch.float32) < peak / 4
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_training_validation_and_prediction_show_normalised_clips(finished, monkeypatch):
    seen, features = [], STAT.forward_features

    def noted(model, video, **rest):
        seen.append(video.clone())
        return features(model, video, **rest)

    monkeypatch.setattr(STAT, "forward_features", noted)
    runner = make(finished.folder, resume="none")
    batch = next(iter(runner.train_source.loader))
    runner.updater.update([batch], 0)
    torch.testing.assert_close(seen.pop(), (batch.clips / 255 - MEAN) / STD)
    runner._validate(runner.snapshot())
    first = seen[0][:1]
    pixels = runner.val_source.dataset[0, 0].clips
    torch.testing.assert_close(first, (pixels / 255 - MEAN) / STD)
    list(predict(runner.val_source.dataset.videos[:1], load_model(runner.folder)))
    assert torch.equal(seen[-1], first)


def test_batches_are_pinned_as_a_whole(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    batch = Batch(torch.zeros(2, 3, 1, 4, 4), torch.zeros(2), (0, 1), (0, 0), ())
    pinned = batch.pin_memory()
    assert pinned.clips.eq(1).all()
    assert pinned.labels.eq(1).all()
    assert pinned.indices == (0, 1)


@pytest.mark.parametrize("stop_at", [1, 3, 4, 6])
def test_resumed_equals_uninterrupted(finished, tmp_path, interrupt, stop_at):
    """Wherever in an epoch it was stopped."""
    interrupt(stop_at - 1)
    with pytest.raises(Interrupted) as stopped:
        make(tmp_path).fit()
    assert stopped.value.path.name.endswith(f"_step_{stop_at:08d}")
    torch.rand(100)  # whatever else a process draws
    assert_same_run(finished, trained(tmp_path))


def end_in_validation(patch):
    """SIGTERM in the first validation batch of the first epoch. Returns the batches that it saw."""
    add, seen = Tally.add, []

    def add_and_signal(self, batch, logits):
        seen.append(batch.indices)
        if len(seen) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        add(self, batch, logits)

    patch.setattr(Tally, "add", add_and_signal)
    return seen


def test_a_signal_ends_the_validation_which_is_repeated(finished, tmp_path, monkeypatch):
    """The run's state is saved before; from there the run is the uninterrupted one to the bit."""
    with monkeypatch.context() as patch:
        seen = end_in_validation(patch)
        with pytest.raises(Interrupted) as stopped:
            make(tmp_path).fit()
    assert len(seen) == 1  # of two
    assert stopped.value.signum == signal.SIGTERM
    assert stopped.value.path.name == "epoch_0000_step_00000004"
    assert [r["kind"] for r in read_journal(tmp_path / "log.jsonl")] == ["step"] * 4
    assert_same_run(finished, trained(tmp_path))


def fail(*arguments):
    raise MemoryError


def step_no_further(trainer, pieces, step=Trainer._step):
    return fail() if trainer.progress.step == 6 else step(trainer, pieces)


def rename_no_checkpoint(source, target, rename=os.rename):
    return fail() if source.is_dir() and source.suffix != ".part" else rename(source, target)


@pytest.mark.parametrize(
    ("place", "function"),
    [
        ("stat_video.train.trainer.Trainer._step", step_no_further),  # after steps were logged
        ("stat_video.evaluate.tally.Tally.add", fail),  # in validation
        ("stat_video.train.run_state.amend", fail),  # between the log's line and the checkpoint
        ("os.rename", rename_no_checkpoint),  # between the checkpoint's state and its name
    ],
)
def test_a_killed_run_goes_on(finished, tmp_path, monkeypatch, place, function):
    """Steps and epochs are logged once and everything is as without the kill."""
    with monkeypatch.context() as patch:
        patch.setattr(place, function)
        with pytest.raises(MemoryError):
            make(tmp_path).fit()
    assert_same_run(finished, trained(tmp_path))


def test_a_finished_run_is_not_trained_again(finished, capsys):
    again = make(finished.folder)
    scores = again.fit()
    assert scores.confusion.sum() == scores.videos == 6
    assert scores.top1 == read_journal(finished.folder / "log.jsonl")[-1]["val_top1"]
    assert same(weights(finished), weights(again))
    assert "nothing left to train" in capsys.readouterr().out


def test_a_checkpoint_that_names_the_retired_decoder_still_loads(finished, monkeypatch):
    path = checkpoints_in(finished.folder / "checkpoints")[-1]
    state = read_state(path)
    options = state["options"]
    before = {**options, "data": {**options["data"], "decoder": "pyav"}}
    monkeypatch.setattr(loading, "read_state", lambda _: {**state, "options": before})
    assert load_model(path).preprocess == load_model(finished.folder).preprocess
    check_same_options(path, before, options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim": replace(OPTIM, lr=1e-3)}, r"optim\.lr was 0\.002 and is 0\.001 now"),
        ({"model": replace(TINY, window=5)}, r"model\.window was 3 and is 5 now"),
        ({"data": {"batch_size": 4}}, r"data\.batch_size was 3 and is 4 now"),
        ({"seed": 1}, r"run\.seed was 0 and is 1 now"),
    ],
)
def test_a_resumed_run_keeps_its_options(finished, change, message):
    with pytest.raises(UserError, match=message):
        make(finished.folder, **change).fit()


def test_speed_options_may_change_on_resume(finished):
    make(finished.folder, data={"cache_gib": 0.5}).fit()


def test_bad_videos_are_counted_and_reported(tmp_path):
    listed = (clips() / "train.txt").read_text().replace("train/", f"{clips()}/train/")
    (tmp_path / "train.txt").write_text(listed + "gone.mp4 0\n")
    (tmp_path / "val.txt").write_text(f"{next((clips() / 'val').iterdir())} 0\ngone.mp4 1\n")
    (tmp_path / "labels.txt").write_text("left\nright\n")
    data = {"root": str(tmp_path), "max_bad_share": 0.5}
    runner = make(tmp_path / "run", data=data, optim=ONE)
    scores = runner.fit()
    assert scores.videos == 1
    assert len(scores.skipped) == 1
    record = read_journal(tmp_path / "run" / "log.jsonl")[-1]
    assert record["unusable_val"] == 1
    with pytest.raises(UserError, match=r"are unusable, more than data\.max_bad_share"):
        make(tmp_path / "run2", data={**data, "max_bad_share": 0.01}, optim=OPTIM).fit()


# -- the recipe ------------------------------------------------------------------------------


def test_biases_and_norms_do_not_decay():
    """Tokens and positions do, although a token has one dimension."""
    model = STAT(TINY)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = decay_groups(model, 0.05)
    assert [group["weight_decay"] for group in groups] == [0.05, 0]
    decayed, free = ({names[id(p)] for p in group["params"]} for group in groups)
    assert {"class_token", "video_token", "spatial_position", "temporal_position"} <= decayed
    assert all(name.endswith((".weight", "_token", "_position")) for name in decayed)
    assert all(name.endswith(".bias") or "norm" in name for name in free)
    assert len(decayed) + len(free) == len(names)


@pytest.mark.parametrize(("gain", "stem_gain"), [(0.0, 0.0), (0.7, 0.0), (0.0, 1.4)])
def test_gains_scale_the_initial_weights_by_the_inputs(gain, stem_gain):
    model = STAT(TINY)
    before = {name: p.clone() for name, p in model.named_parameters()}
    initialise(model, gain, stem_gain)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    touched = set()
    for layers, deviation in ((linear, gain), (model.stem.convs, stem_gain)):
        if deviation:
            drawn = [m.weight.flatten() * m.weight[0].numel() ** 0.5 for m in layers]
            assert torch.cat(drawn).std().item() == pytest.approx(deviation, rel=0.05)
            touched |= {id(m.weight) for m in layers}
    if stem_gain:
        assert not any(conv.bias.any() for conv in model.stem.convs)
        touched |= {id(conv.bias) for conv in model.stem.convs}
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (id(p) not in touched)


def test_the_learning_rate_warms_up_and_follows_half_a_cosine():
    options = OptimOptions(epochs=10, lr=1e-2, warmup_epochs=2, lr_start=0.01, lr_end=0.1)
    optimizer = build_optimizer(torch.nn.Linear(2, 2), options)
    scheduler = build_scheduler(optimizer, options, steps=5)
    rates = []
    for step in range(51):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    warm = np.linspace(1e-4, 1e-2, 11)
    cosine = 1e-3 + (1e-2 - 1e-3) * (1 + np.cos(np.pi * np.arange(1, 41) / 40)) / 2
    assert rates[:11] == pytest.approx(warm.tolist())
    assert rates[11:] == pytest.approx(cosine.tolist())


def test_the_loss_curve_is_the_stored_one():
    """Model, optimiser and schedule together, on fixed clips: any change of them shows here."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = STAT(replace(TINY, num_classes=3, drop_path=0.0, dropout=0.0))
    rng = np.random.default_rng(0)
    clip = torch.from_numpy(rng.standard_normal((6, 3, 4, 32, 32)).astype(np.float32))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    options = OptimOptions(epochs=12, lr=5e-3, warmup_epochs=2)
    optimizer = build_optimizer(model, options)
    scheduler = build_scheduler(optimizer, options, steps=1)
    stored = [1.09774, 1.09318, 1.12381, 1.09106, 0.99535, 0.82731]
    stored += [0.77551, 0.72943, 0.6918, 0.65859, 0.63123, 0.61488]
    losses = []
    for step in range(12):
        scheduler.step_update(step)
        loss = torch.nn.functional.cross_entropy(model(clip), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert losses == pytest.approx(stored, rel=2e-3)

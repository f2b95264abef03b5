"""Switches that change how a step is computed, not what it computes, and steps that go wrong."""

import copy
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from stat_video.checkpoint import checkpoints_in
from stat_video.errors import UserError
from stat_video.evaluate.loading import load_model
from stat_video.model.stat import STAT
from stat_video.train import parallel
from stat_video.train import step as step_module
from stat_video.train.averaging import WeightAverage
from stat_video.train.optim import build_optimizer, weigh_classes
from stat_video.train.options import OptimOptions, RunOptions
from stat_video.train.precision import Precision
from stat_video.train.signals import Interrupted
from tests.video.training import CALM, ONE, TINY, make, same, steps_of, trained, weights


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Weights after an epoch without any switch, with dropout and stochastic depth."""
    return weights(trained(tmp_path_factory.mktemp("plain"), ONE))


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The same without dropout and stochastic depth."""
    return weights(trained(tmp_path_factory.mktemp("calm"), ONE, CALM))


def assert_close(a, b, rtol=1e-4, atol=2e-5):
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=rtol, atol=atol)


# -- switches --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "class_weights", "mixup"), [(3, (), 0.0), (2, (0.5, 3.0), 0.0), (2, (0.5, 3.0), 0.8)]
)
def test_pieces_add_up_to_the_batch(tmp_path, pieces, class_weights, mixup):
    gradients, reports = [], []
    optim = replace(ONE, clip_grad=0, class_weights=class_weights)
    data = {"batch_size": 6, "mixup": mixup, "mix_prob": float(mixup > 0)}
    for accumulate in (1, pieces):
        runner = make(tmp_path, optim, CALM, data, accumulate=accumulate)
        if runner.updater.mixer:
            runner.updater.mixer = lambda clips, labels: (clips, F.one_hot(labels, 2).float())
        batch = list(itertools.islice(runner.train_source.loader, accumulate))
        reports.append(runner.updater.update(batch, 0))
        gradients.append({n: p.grad for n, p in runner.model.named_parameters()})
    assert reports[0].loss == pytest.approx(reports[1].loss)
    assert (reports[0].correct, reports[0].clips) == (reports[1].correct, 6)
    assert_close(*gradients, atol=1e-6)


def test_classes_are_weighed_by_how_rare_they_are():
    labels, names = [0, 0, 0, 1], ["a", "b", "never"]
    assert weigh_classes((), labels, names) is None
    assert weigh_classes("balanced", labels, names).tolist() == pytest.approx([2 / 3, 2, 0])
    assert weigh_classes((1, 5, 1), labels, names).tolist() == pytest.approx([0.5, 2.5, 0.5])
    with pytest.raises(UserError, match=r"one weight per class \(3\), got 2"):
        weigh_classes((1, 2), labels, names)
    with pytest.raises(UserError, match="every class of the training videos weight 0"):
        weigh_classes((0, 0, 1), labels, names)
    with pytest.raises(ValueError, match=r"optim\.class_weights must be 'balanced' or"):
        OptimOptions(class_weights=(-1.0, 1.0))


def test_class_weights_reach_the_loss(tmp_path):
    """With weight on one class alone, clips of the other one give no gradient."""
    runner = make(tmp_path, replace(ONE, class_weights=(0.0, 1.0), label_smoothing=0.0), CALM)
    batch = next(iter(runner.train_source.loader))
    one = replace(batch, labels=torch.zeros_like(batch.labels))
    assert runner.updater.update([one], 0).loss == 0
    other = replace(batch, labels=torch.ones_like(batch.labels))
    assert runner.updater.update([other], 0).loss > 0


def test_recomputed_activations_give_the_same_bits(plain, tmp_path, monkeypatch):
    """With dropout: the second forward draws what the first one drew."""
    calls = []
    checkpoint = torch.utils.checkpoint.checkpoint

    def counting(*args, **kwargs):
        calls.append(args)
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr("stat_video.model.stat.checkpoint", counting)
    assert same(plain, weights(trained(tmp_path, ONE, checkpointing=True)))
    assert len(calls) == 4 * 2  # steps, blocks


def test_the_stem_s_layout_does_not_matter(calm, tmp_path):
    runner = trained(tmp_path, ONE, CALM, channels_last=False)
    assert runner.model.stem.memory_format == torch.contiguous_format
    assert_close(calm, weights(runner))


def test_compiled_blocks(calm, tmp_path, monkeypatch):
    """Traced without a break; the names in a checkpoint stay those of the blocks."""
    compile_blocks = parallel.compile_blocks
    monkeypatch.setattr(parallel, "compile_blocks", lambda m: compile_blocks(m, "aot_eager"))
    torch._dynamo.utils.counters.clear()
    runner = trained(tmp_path, ONE, CALM, compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    # Compiled MLPs round differently, and Adam makes steps of gradients that are rounding alone.
    assert_close(calm, weights(runner), atol=1e-4)
    newest = checkpoints_in(tmp_path / "checkpoints")[-1]
    assert same(weights(runner), load_model(newest).model.state_dict())


@pytest.mark.parametrize(
    ("choice", "device", "triton", "expected"),
    [
        ("auto", "cuda", True, True),
        ("auto", "cuda", False, False),
        ("auto", "cpu", True, False),
        (True, "cpu", False, True),
        (False, "cuda", True, False),
    ],
)
def test_blocks_are_compiled_where_it_pays_or_as_told(
    monkeypatch, choice, device, triton, expected
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if triton else None)
    assert parallel.compiles(RunOptions(compile=choice), torch.device(device)) == expected


def test_compiling_without_triton_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"run\.compile true needs Triton"):
        parallel.compiles(RunOptions(compile=True), torch.device("cuda"))


@torch._dynamo.config.patch(recompile_limit=1)  # monkeypatch would end by deleting the option
def test_every_block_may_be_compiled_anew():
    """Blocks differ in their rates, so one forward has more versions than torch would allow."""
    model = STAT(replace(TINY, depths=(2, 1), drop_path=0.2))
    parallel.compile_blocks(model, "eager")
    torch._dynamo.utils.counters.clear()
    model(torch.randn(1, 3, 4, 32, 32))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


def test_gradients_are_clipped_to_their_norm(tmp_path):
    runner = make(tmp_path, optim=replace(ONE, clip_grad=1e-3))
    batch = next(iter(runner.train_source.loader))
    report = runner.updater.update([batch], 0)
    grads = [p.grad for p in runner.model.parameters()]
    assert report.grad_norm > 0.01
    assert torch.nn.utils.get_total_norm(grads).item() == pytest.approx(1e-3, rel=1e-3)
    free = make(tmp_path, optim=replace(ONE, clip_grad=0))
    assert free.updater.update([batch], 0).grad_norm == report.grad_norm
    grads = [p.grad for p in free.model.parameters()]
    assert torch.nn.utils.get_total_norm(grads).item() == pytest.approx(report.grad_norm)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_moments_that_exist_from_the_start_change_no_step(tmp_path, name):
    """The checkpoints' tensors are always the same; the first steps are those of the optimiser."""
    runner = make(tmp_path, optim=replace(ONE, name=name))
    assert runner.optimizer.param_groups[0]["fused"] == (True if name == "adamw" else None)
    model = copy.deepcopy(runner.model)
    optimizer = build_optimizer(model, runner.optim)
    torch.manual_seed(1)
    for _ in range(2):
        for mine, plain in zip(runner.model.parameters(), model.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            plain.grad = mine.grad.clone()
        runner.optimizer.param_groups[0]["lr"] = runner.optimizer.param_groups[1]["lr"] = ONE.lr
        runner.optimizer.step()
        optimizer.step()
    assert same(dict(model.state_dict()), weights(runner))


def test_the_average_follows_the_weights():
    model = torch.nn.Linear(2, 1)
    start = model.weight.detach().clone()
    average = WeightAverage(model, 0.75)
    with torch.no_grad():
        model.weight += 1
        average.update()
        model.weight += 1
        average.update()
    expected = 0.75 * (0.75 * start + 0.25 * (start + 1)) + 0.25 * (start + 2)
    torch.testing.assert_close(average.average["weight"], expected)


def test_the_average_is_what_is_validated_and_kept(tmp_path):
    runner = trained(tmp_path, replace(ONE, ema=0.9))
    average = runner.updater.average.average
    assert not same(average, weights(runner))
    for path in (tmp_path, checkpoints_in(tmp_path / "checkpoints")[-1]):
        assert same(average, weights(load_model(path)))
    assert same(average, runner.snapshot().state_dict())


# -- precision -------------------------------------------------------------------------------


def test_the_precision_follows_the_device():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert Precision("auto", cpu).dtype is None
    assert Precision("auto", cuda).dtype == torch.bfloat16
    assert Precision("fp32", cuda).dtype is None
    assert not Precision("bf16", cuda).scaler.is_enabled()
    assert Precision("bf16", cuda).clip_dtype == torch.bfloat16
    assert Precision("bf16", cpu).clip_dtype == torch.float32  # as the stem


def test_fp16_is_refused_on_a_cpu(tmp_path):
    with pytest.raises(UserError, match=r"run\.precision fp16 needs a GPU"):
        make(tmp_path, precision="fp16")


def test_bf16_trains_on_a_cpu_with_the_stem_in_float32(plain, tmp_path, monkeypatch):
    """torch 2.11's 16-bit conv3d on a CPU reads memory that it has not written, backwards."""
    inputs, convolve = [], torch.nn.Conv3d.forward

    def noted(conv, x):
        inputs.append((x.dtype, torch.is_autocast_enabled("cpu")))
        return convolve(conv, x)

    monkeypatch.setattr(torch.nn.Conv3d, "forward", noted)
    found = weights(trained(tmp_path, ONE, precision="bf16"))
    assert set(inputs) == {(torch.float32, False)}
    assert not same(plain, found)  # the rest was not float32 after all
    for name, weight in plain.items():
        torch.testing.assert_close(found[name], weight, rtol=0.1, atol=0.02, msg=name)


@pytest.fixture
def scaled(monkeypatch):
    """The gradient scaler of fp16 in a run on a CPU."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp,
        "GradScaler",
        lambda device, enabled: scaler("cpu", init_scale=1024.0, growth_interval=3),
    )


def test_a_scaled_loss_changes_nothing(plain, tmp_path, scaled):
    """Powers of two: the same bits."""
    runner = trained(tmp_path, ONE)
    assert runner.updater.precision.scaler.get_scale() == 2048
    assert same(plain, weights(runner))


def test_the_scaler_is_resumed(tmp_path, scaled, interrupt):
    interrupt(4)
    with pytest.raises(Interrupted):
        make(tmp_path).fit()
    resumed = make(tmp_path)
    resumed._resume()
    saved = resumed.updater.precision.scaler.state_dict()
    assert (saved["scale"], saved["_growth_tracker"]) == (2048, 2)


# -- steps that are not finite ---------------------------------------------------------------


@pytest.fixture
def spoil(monkeypatch):
    """Makes the training loss NaN in the given calls, counted from 0."""
    calls = itertools.count()

    def spoiled(at):
        def cross_entropy(*args, **kwargs):
            factor = float("nan") if next(calls) in at else 1.0
            return torch.nn.functional.cross_entropy(*args, **kwargs) * factor

        monkeypatch.setattr(step_module, "F", SimpleNamespace(cross_entropy=cross_entropy))

    return spoiled


def test_a_bad_step_is_passed_over_and_counted(tmp_path, spoil):
    runner = make(tmp_path)
    batches = list(runner.train_source.loader)
    spoil([1])
    runner._prepare_folder()
    assert runner._step([batches[0]]).applied
    before, moments = weights(runner), runner.optimizer.state_dict()["state"]
    moments = {i: s["exp_avg"].clone() for i, s in moments.items()}
    assert not runner._step([batches[1]]).applied
    assert same(before, weights(runner))
    after = runner.optimizer.state_dict()["state"]
    assert all(torch.equal(moments[i], after[i]["exp_avg"]) for i in moments)
    assert runner._step([batches[2]]).applied
    assert not same(before, weights(runner))
    assert (runner.state.bad_steps.total, runner.state.bad_steps.in_a_row) == (1, 0)
    assert (runner.progress.step, runner.progress.clips) == (3, 6)


def test_a_run_of_bad_steps_stops_and_leaves_its_batch(tmp_path, spoil):
    spoil([0, 2, 3, 4])
    message = r"step 5 is the last of 3 in a row .* is not finite .* clips are in (\S+);"
    with pytest.raises(UserError, match=message):
        make(tmp_path, max_bad_steps=2).fit()
    left = torch.load(tmp_path / "bad_step_5_rank_0.pt")
    assert left["step"] == 5
    assert left["pieces"][0]["clips"].shape == (3, 3, 4, 32, 32)
    steps = steps_of(tmp_path)
    assert [r["bad_steps"] for r in steps] == [1, 1, 2, 3]
    assert [r["loss"] is None for r in steps] == [True, False, True, True]


def test_the_count_of_bad_steps_is_resumed(tmp_path, spoil, interrupt):
    """Two bad steps before the interruption and one after it are three in a row."""
    spoil([0, 1, 2])
    interrupt(1)
    with pytest.raises(Interrupted):
        make(tmp_path, max_bad_steps=2).fit()
    with pytest.raises(UserError, match="step 3 is the last of 3 in a row"):
        make(tmp_path, max_bad_steps=2).fit()


def test_an_overflow_halves_the_scale(tmp_path, scaled, spoil):
    spoil([0])
    runner = make(tmp_path)
    runner._prepare_folder()
    assert not runner._step([next(iter(runner.train_source.loader))]).applied
    assert runner.updater.precision.scaler.get_scale() == 512


def test_options_are_checked():
    for wrong in ({"accumulate": 0}, {"keep": 0}, {"save_every": -1}, {"max_bad_steps": -1}):
        with pytest.raises(ValueError, match=f"run.{next(iter(wrong))} must be at least"):
            RunOptions(**wrong)
    with pytest.raises(ValueError, match=r"optim\.ema must be in \[0, 1\), got 1"):
        OptimOptions(ema=1)

"""Two processes (gloo, under torchrun) against one: gradients, weights, checkpoints, a kill."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stat_video import distributed
from stat_video.checkpoint import checkpoints_in
from stat_video.distributed import alone
from stat_video.errors import UserError
from stat_video.evaluate.loading import load_model
from stat_video.train.journal import read_journal
from stat_video.train.run_folder import occupied
from tests.video import distributed_cases as cases
from tests.video.clip_samples import clips

MIDDLE = "epoch_0001_step_00000004"  # one step into the second of two epochs of three


def torchrun(*arguments, restarts=0, script=cases.__file__, processes=2, **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
    environment |= {**os.environ, "CLIPS": str(clips()), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [*command, script, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def one_process(folder, *args, **run):
    """The same run in this process alone."""
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    try:
        runner = cases.trainer(folder, str(clips()), *args, **run)
        gradients = []
        cases.record_gradients(runner, gradients)
        runner.fit()
    finally:
        torch.set_num_threads(threads)
    return cases.result(runner, gradients)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Folder and result of the run that every other one is to equal."""
    folder = tmp_path_factory.mktemp("single") / "run"
    return folder, one_process(folder, save_every=2, keep=9)


@pytest.fixture(scope="module")
def shared(tmp_path_factory, single):
    """Results of two processes by name, and their folder."""
    folder = tmp_path_factory.mktemp("shared")
    with occupied(folder / "in-use", alone("cpu")):
        told = torchrun("compare", str(folder), ONE_PROCESS=str(single[0] / "checkpoints" / MIDDLE))
    assert "is damaged: its checksum" in told
    return folder, {p.stem: torch.load(p) for p in folder.glob("*.pt")}


def assert_close(a, b, rtol, atol):
    assert a.keys() == b.keys()
    for name, value in a.items():
        other = b[name]
        torch.testing.assert_close(value, other, rtol=rtol, atol=atol, msg=lambda m, n=name: n + m)


def assert_same_run(a, b, atol=2e-6):
    """Gradients of each step, weights and their average; equal but for the order of sums."""
    for before, now in zip(a["gradients"][-len(b["gradients"]) :], b["gradients"], strict=True):
        assert_close(before, now, rtol=1e-4, atol=atol)
    for part in ("weights", "average"):
        assert_close(a[part], b[part], rtol=1e-4, atol=10 * atol)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_equal_one_with_the_doubled_batch(single, shared, name):
    assert len(shared[1][name]["gradients"]) == 6
    assert_same_run(single[1], shared[1][name])


def test_pieces_of_a_batch_draw_the_same_whoever_takes_them(shared, tmp_path):
    """Dropout and stochastic depth on: two processes equal one that takes two pieces."""
    alone = one_process(tmp_path / "run", cases.RANDOM, accumulate=2)
    assert_same_run(alone, shared[1]["random"])
    whole_batch = one_process(tmp_path / "other", cases.RANDOM)
    with pytest.raises(AssertionError):
        assert_same_run(whole_batch, shared[1]["random"])


def test_two_pieces_in_each_of_two_processes(single, shared):
    assert_same_run(single[1], shared[1]["pieces"])


@pytest.mark.parametrize("name", ["one-to-ddp", "one-to-fsdp"])
def test_one_process_s_checkpoint_goes_on_in_two(single, shared, name):
    assert len(shared[1][name]["gradients"]) == 2
    assert_same_run(single[1], shared[1][name])


def test_two_processes_go_back_to_a_whole_checkpoint(single, shared):
    assert 0 < len(shared[1]["spoilt-ddp"]["gradients"]) < 6
    assert_same_run(single[1], shared[1]["spoilt-ddp"])


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_checkpoint_goes_on_in_one(single, shared, tmp_path, name):
    middle = shared[0] / name / "checkpoints" / MIDDLE
    resumed = one_process(tmp_path / "run", resume=str(middle))
    assert len(resumed["gradients"]) == 2
    assert_same_run(single[1], resumed)


def test_the_main_process_writes_once(single, shared):
    """Logs as one process writes them, and validation counts each video once."""
    one, two = (read_journal(f / "log.jsonl") for f in (single[0], shared[0] / "fsdp"))
    assert [(r["kind"], r["step"]) for r in one] == [(r["kind"], r["step"]) for r in two]
    for a, b in zip(one, two, strict=True):
        for key in {"loss", "train_loss", "val_loss", "val_top1"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-4)


def test_a_checkpoint_of_two_processes_is_a_model(shared):
    """load_model takes the averaged weights, whole, from shards."""
    newest = checkpoints_in(shared[0] / "fsdp" / "checkpoints")[-1]
    assert len(list(newest.glob("*.distcp"))) == 2
    sums = json.loads((newest / "state.json").read_text())["crc32"]
    assert sums.keys() == {path.name for path in newest.iterdir()}
    weights = load_model(newest).model.state_dict()
    assert_close(weights, shared[1]["fsdp"]["average"], rtol=0, atol=0)


def test_a_signal_to_one_process_stops_both_at_the_same_step(shared):
    for rank in (0, 1):
        assert (shared[0] / f"stopped_{rank}.txt").read_text() == f"{MIDDLE} 2"
    assert [p.name for p in checkpoints_in(shared[0] / "stopped" / "checkpoints")][-1] == MIDDLE


def test_a_signal_to_one_process_ends_the_validation_of_both(shared):
    """At the same batch, with the state saved before; what follows is the uninterrupted run."""
    for rank in (0, 1):
        told = (shared[0] / f"validating_{rank}.txt").read_text()
        assert told == "1 epoch_0000_step_00000003 15"
    for part in ("weights", "average"):
        assert_close(shared[1]["ddp"][part], shared[1]["validating"][part], rtol=0, atol=0)
    epochs = [r for r in read_journal(shared[0] / "validating" / "log.jsonl") if "val_loss" in r]
    assert [r["epoch"] for r in epochs] == [1, 2]


def test_both_processes_are_refused_a_folder_in_use(shared):
    for rank in (0, 1):
        text = (shared[0] / f"refused_{rank}.txt").read_text()
        assert f"is in use by process {os.getpid()} on {socket.gethostname()}, started at" in text


def test_no_reducer_is_left_when_the_group_is_destroyed(shared):
    """Its destructor would then wait for gloo's threads with the GIL held, which they need."""
    for rank in (0, 1):
        made, left = (shared[0] / f"reducers_{rank}.txt").read_text().split()
        assert int(made) >= 3
        assert left == "0"


def test_what_is_not_finite_in_one_process_is_passed_over_by_both(shared):
    for rank in (0, 1):
        assert (shared[0] / f"spoiled_{rank}.txt").read_text() == "1 6 True"


def test_a_killed_worker_s_run_goes_on_from_the_last_checkpoint(single, tmp_path):
    """SIGKILL in mid-epoch: torchrun starts both again, and the clips come in the same order."""
    output = torchrun("kill", str(tmp_path), restarts=1)
    assert "resuming from" in output
    assert "at step 4, epoch 2" in output
    assert_same_run(single[1], torch.load(tmp_path / "killed.pt"))
    orders = []
    for rank in (0, 1):
        lines = (tmp_path / f"seen_{rank}.jsonl").read_text().splitlines()
        seen = [json.loads(line) for line in lines]
        assert [s["step"] for s in seen] == [0, 1, 2, 3, 4, 4, 5]
        assert seen[4] == seen[5]
        orders.append({s["step"]: s["clips"][0] for s in seen})
    for epoch in (range(3), range(3, 6)):
        order = [index for step in epoch for part in orders for index in part[step]]
        assert sorted(order) == list(range(12))
    log = read_journal(tmp_path / "killed" / "log.jsonl")
    assert [r["step"] for r in log if r["kind"] == "step"] == [1, 2, 3, 4, 5, 6]


def test_a_batch_must_fit_the_pieces(tmp_path):
    with pytest.raises(UserError, match=r"multiple of 1 processes x run\.accumulate 3, got 4"):
        cases.trainer(tmp_path, str(clips()), accumulate=3)


def test_each_process_of_a_machine_gets_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(distributed, "prepare_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for local, name, device in ((1, "cuda", "cuda:1"), (1, "cuda:0", "cuda:0"), (1, "cpu", "cpu")):
        monkeypatch.setenv("LOCAL_RANK", str(local))
        assert distributed._own_device(name) == torch.device(device)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="machine finds 2: lower --nproc-per-node"):
        distributed._own_device("cuda")


def test_only_one_machine_can_tell_restarts_apart_by_their_number(monkeypatch):
    """Agents of several machines count on their own: there torch finds the others by itself."""
    for name, value in (("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert distributed._store() is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert distributed._store() is None

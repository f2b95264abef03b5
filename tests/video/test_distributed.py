"""Two processes (gloo, under torchrun) against one: gradients, weights, checkpoints, a kill."""

import json
import os
import signal
import socket

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
from tests.video.processes import (
    MIDDLE,
    assert_close,
    assert_same_losses,
    assert_same_results,
    one_process,
    torchrun,
)
from tests.video.training import TINY


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Folder and result of the run that every other one is to equal."""
    folder = tmp_path_factory.mktemp("single") / "run"
    return folder, one_process(folder, save_every=2, keep=9)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A data set of five videos: two processes cannot divide them evenly."""
    root = tmp_path_factory.mktemp("odd")
    (root / "labels.txt").write_text("left\nright\n")
    lines = [f"{clips() / line}\n" for line in (clips() / "val.txt").read_text().splitlines()]
    (root / "val.txt").write_text("".join(lines[:5]))
    return str(root)


@pytest.fixture(scope="module")
def shared(tmp_path_factory, single, odd):
    """Folder of two processes' runs, their results by name, and what each process told."""
    folder = tmp_path_factory.mktemp("shared")
    given = {"ONE_PROCESS": str(single[0] / "checkpoints" / MIDDLE), "ODD": odd}
    with occupied(folder / "in-use", alone("cpu")):
        output = torchrun("compare", folder, **given)
    assert "is damaged: its checksum" in output
    results = {path.stem: torch.load(path) for path in folder.glob("*.pt")}
    return folder, results, [json.loads(p.read_text()) for p in sorted(folder.glob("told_*.json"))]


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_equal_one_with_the_doubled_batch(single, shared, name):
    assert len(shared[1][name]["gradients"]) == 6
    assert_same_results(single[1], shared[1][name])


def test_pieces_of_a_batch_draw_the_same_whoever_takes_them(shared, tmp_path):
    """Dropout and stochastic depth on: two processes equal one that takes two pieces."""
    alone = one_process(tmp_path / "run", TINY, accumulate=2)
    assert_same_results(alone, shared[1]["random"])
    whole_batch = one_process(tmp_path / "other", TINY)
    with pytest.raises(AssertionError):
        assert_same_results(whole_batch, shared[1]["random"])


def test_two_pieces_in_each_of_two_processes(single, shared):
    assert_same_results(single[1], shared[1]["pieces"])


@pytest.mark.parametrize("name", ["one-to-ddp", "one-to-fsdp"])
def test_one_process_s_checkpoint_goes_on_in_two(single, shared, name):
    assert len(shared[1][name]["gradients"]) == 2
    assert_same_results(single[1], shared[1][name])


def test_two_processes_go_back_to_a_whole_checkpoint(single, shared):
    assert 0 < len(shared[1]["spoilt-ddp"]["gradients"]) < 6
    assert_same_results(single[1], shared[1]["spoilt-ddp"])


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_checkpoint_goes_on_in_one(single, shared, tmp_path, name):
    middle = shared[0] / name / "checkpoints" / MIDDLE
    resumed = one_process(tmp_path / "run", resume=str(middle))
    assert len(resumed["gradients"]) == 2
    assert_same_results(single[1], resumed)


def test_the_main_process_writes_once(single, shared):
    """Logs as one process writes them, and validation counts each video once."""
    assert_same_losses(single[0], shared[0] / "fsdp")


def test_a_checkpoint_of_two_processes_is_a_model(shared):
    """load_model takes the averaged weights, whole, from shards."""
    newest = checkpoints_in(shared[0] / "fsdp" / "checkpoints")[-1]
    assert len(list(newest.glob("*.distcp"))) == 2
    sums = json.loads((newest / "state.json").read_text())["crc32"]
    assert sums.keys() == {path.name for path in newest.iterdir()}
    weights = load_model(newest).model.state_dict()
    assert_close(weights, shared[1]["fsdp"]["average"], rtol=0, atol=0)


def test_an_evaluation_in_two_processes_is_that_of_one(single, shared, odd, tmp_path, monkeypatch):
    """Nothing is there to pad the odd video's place, and nothing counts twice."""
    monkeypatch.setenv("ONE_PROCESS", str(single[0] / "checkpoints" / MIDDLE))
    loss, confusion, _ = cases.answers(tmp_path, alone("cpu"), odd)
    assert sum(map(sum, confusion)) == 5
    same = [pytest.approx(loss, rel=1e-5), confusion]
    assert [told["scores"] for told in shared[2]] == [same, same]


def test_a_signal_to_one_process_stops_both_at_the_same_step(shared):
    assert [told["stopped"] for told in shared[2]] == 2 * [[MIDDLE, signal.SIGINT]]
    assert [p.name for p in checkpoints_in(shared[0] / "stopped" / "checkpoints")][-1] == MIDDLE


def test_a_signal_to_one_process_ends_the_validation_of_both(shared):
    """At the same batch, with the state saved before; what follows is the uninterrupted run."""
    stopped = [1, "epoch_0000_step_00000003", signal.SIGTERM]
    assert [told["validating"] for told in shared[2]] == 2 * [stopped]
    for part in ("weights", "average"):
        assert_close(shared[1]["ddp"][part], shared[1]["validating"][part], rtol=0, atol=0)
    epochs = [r for r in read_journal(shared[0] / "validating" / "log.jsonl") if "val_loss" in r]
    assert [r["epoch"] for r in epochs] == [1, 2]


def test_both_processes_are_refused_a_folder_in_use(shared):
    text = f"is in use by process {os.getpid()} on {socket.gethostname()}, started at"
    assert all(text in told["refused"] for told in shared[2])


def test_no_reducer_is_left_when_the_group_is_destroyed(shared):
    """Its destructor would then wait for gloo's threads with the GIL held, which they need."""
    for rank in (0, 1):
        made, left = json.loads((shared[0] / f"reducers_{rank}.json").read_text())
        assert made >= 3
        assert left == 0


def test_what_is_not_finite_in_one_process_is_passed_over_by_both(shared):
    assert [told["spoiled"] for told in shared[2]] == 2 * [[1, 6, True]]


def test_a_killed_worker_s_run_goes_on_from_the_last_checkpoint(single, tmp_path):
    """SIGKILL in mid-epoch: torchrun starts both again, and the clips come in the same order."""
    output = torchrun("kill", tmp_path, restarts=1)
    assert "resuming from" in output
    assert "at step 4, epoch 2" in output
    assert_same_results(single[1], torch.load(tmp_path / "killed.pt"))
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
        cases.trainer(tmp_path, None, accumulate=3)


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

"""Resuming where files of the run were damaged or edited since."""

import json
import shutil

import pytest

from stat_video.analysis.plots import plot_curves
from stat_video.checkpoint import DamagedCheckpoint, checkpoints_in
from stat_video.errors import UserError
from stat_video.train.journal import Journal, read_journal
from tests.video.training import assert_same_run, make, trained


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs of four steps with a checkpoint every two steps and every epoch."""
    return trained(tmp_path_factory.mktemp("finished"), save_every=2, keep=9)


@pytest.fixture
def checkpoints(finished, tmp_path):
    """Its checkpoints, in a copy of its folder, oldest first."""
    shutil.copytree(finished.folder, tmp_path / "run")
    return checkpoints_in(tmp_path / "run" / "checkpoints")


def flip_a_bit(path):
    file = path / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_a_run_goes_back_to_the_newest_whole_checkpoint(finished, checkpoints, tmp_path, capsys):
    flip_a_bit(checkpoints[-1])
    (checkpoints[-2] / "state.json").unlink()
    runner = trained(tmp_path / "run", save_every=2, keep=9)
    told = capsys.readouterr().out.splitlines()
    for line, damage in zip(told, ("is damaged: its checksum", "has no state.json"), strict=False):
        assert damage in line
        assert line.endswith(f"; going back to {checkpoints[-3]}")
    assert told[2].startswith(f"resuming from {checkpoints[-3]} at step ")
    assert_same_run(finished, runner)


def test_without_a_whole_checkpoint_nothing_is_trained(checkpoints, tmp_path):
    flip_a_bit(checkpoints[-1])
    with pytest.raises(DamagedCheckpoint, match="is damaged: its checksum is not the one"):
        make(tmp_path / "other", resume=str(checkpoints[-1])).fit()
    for path in checkpoints[:-1]:
        flip_a_bit(path)
    with pytest.raises(UserError, match=rf"no checkpoint in .* is whole: {checkpoints[-1]}"):
        make(tmp_path / "run").fit()
    assert checkpoints_in(tmp_path / "run" / "checkpoints") == checkpoints


@pytest.mark.parametrize(
    "edit",
    [
        {"options": None},
        {"options": {}},
        {"options": {"model": [], "data": {}, "optim": {}, "run": {}}},
        {"progress": {"epoch": -1}},
        {"progress": {"step": "4"}},
        {"progress": {"batch": 1.5}},
        {"progress": {"loss_sum": float("nan")}},
        {"progress": {"colour": 1}},
        {"progress": 3},
        {"skipped": {"bad": [3], "seen": []}},
        {"skipped": None},
        {"bad_steps": [1]},
        {"bad_steps": "no"},
    ],
)
def test_an_edited_state_is_refused(checkpoints, tmp_path, edit):
    file = checkpoints[0] / "state.json"
    state = json.loads(file.read_text())
    del state["crc32"]
    file.write_text(json.dumps({**state, **edit, "format": 2}))
    with pytest.raises(DamagedCheckpoint, match=r"state\.json is damaged: "):
        make(tmp_path / "other", resume=str(checkpoints[0])).fit()


STEP, EPOCH = ({"kind": kind, "step": 2, "epoch": 1} for kind in ("step", "epoch"))


def test_the_journal_reads_what_is_left(tmp_path, capsys):
    """Lines that are no records are left out when it is read, and dropped when it goes on."""
    log = tmp_path / "log.jsonl"
    lines = [json.dumps(STEP).encode(), b'{"kind": "st', b"\xff\xfe", b"[" * 100_000, b"[]", b"3"]
    lines += [b'{"kind": "step"}', b'{"kind": "step", "step": "1"}', b'{"step": 1}', b"1" * 5000]
    lines += [b'{"kind": "step", "step": 1, "loss": "low"}', b'{"kind": "step", "step": 1e400}']
    lines += [
        b'{"kind": "step", "step": 1, "loss": 1' + b"0" * 400 + b"}",
        json.dumps(EPOCH).encode(),
    ]
    log.write_bytes(b"\n".join(lines))
    assert read_journal(log) == [STEP, EPOCH]
    Journal(tmp_path, step=2, epoch=1).close()
    assert capsys.readouterr().err == f"{log}: 12 unreadable lines are dropped\n"
    assert log.read_text() == f"{json.dumps(STEP)}\n{json.dumps(EPOCH)}\n"
    plot_curves(read_journal(log), tmp_path / "curves.png")  # of records that have no losses


def test_an_epoch_is_logged_once(tmp_path):
    """A run that is killed between the log's line and the checkpoint writes the line again."""
    (tmp_path / "log.jsonl").write_text(f"{json.dumps(STEP)}\n{json.dumps(EPOCH)}\n")
    Journal(tmp_path, step=2, epoch=0).close()
    assert read_journal(tmp_path / "log.jsonl") == [STEP]


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot write to .*log\.jsonl: Is a directory"):
        Journal(tmp_path)

"""The folder of a run: nobody else's files are replaced, and one run at a time is at work in it."""

import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress

import pytest

from stat_video.checkpoint import checkpoints_in
from stat_video.distributed import alone
from stat_video.errors import UserError
from stat_video.evaluate.loading import load_model
from stat_video.train.journal import read_journal
from stat_video.train.options import RunOptions
from stat_video.train.run_folder import occupied
from tests.video.training import ONE, make, same, trained, weights


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of one epoch."""
    return trained(tmp_path_factory.mktemp("finished"), ONE).folder


def write(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")


def files(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


# -- whose files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["best/mine", "tensorboard/mine", "checkpoints/README", "log.jsonl", "config.yaml"]
)
@pytest.mark.parametrize("resume", ["auto", "none"])
def test_a_folder_that_no_run_wrote_is_refused(tmp_path, name, resume):
    write(tmp_path, ["notes.txt", name])
    taken = name.partition("/")[0]
    message = rf"{tmp_path} holds {taken}, and no \.stat-run that shows that stat-video train wrote"
    with pytest.raises(UserError, match=message):
        make(tmp_path, resume=resume).fit()
    assert files(tmp_path) == {"notes.txt", name}
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("resume", ["auto", "none"])
def test_a_run_replaces_its_own_files_only(tmp_path, resume):
    """Also where others lie between them: .DS_Store, a backup of a checkpoint, an edited card."""
    others = ["notes.txt", "unusable_notes.txt", "best/README.md", "best/eval/eval.json"]
    others += ["checkpoints/README", "checkpoints/.DS_Store", "checkpoints/backup/state.json"]
    others += ["checkpoints/epoch_0001_step_00000004.copy/state.json", "tensorboard/other/events"]
    write(tmp_path, ["notes.txt"])
    before = trained(tmp_path)
    write(tmp_path, others)
    former = {path.name for path in (tmp_path / "tensorboard").iterdir() if path.is_file()}
    runner = trained(tmp_path, resume=resume, seed=0 if resume == "auto" else 5)
    assert {(tmp_path / name).read_text() for name in others} == {"mine"}
    names = [path.name for path in checkpoints_in(tmp_path / "checkpoints")]
    assert names == ["epoch_0001_step_00000004", "epoch_0002_step_00000008"]
    if resume == "none":
        assert not former & {path.name for path in (tmp_path / "tensorboard").iterdir()}
        assert len(read_journal(tmp_path / "log.jsonl")) == 10
        assert not same(weights(before), weights(runner))
    assert load_model(tmp_path).folder == tmp_path / "best"
    assert not list(tmp_path.glob("*.part"))


def test_the_folder_must_have_a_name():
    with pytest.raises(ValueError, match=r"run\.dir must name a folder, got ''"):
        RunOptions(dir="")


# -- the best model ------------------------------------------------------------------------------


def test_a_run_that_goes_on_elsewhere_has_a_best_model_there(finished, tmp_path, monkeypatch):
    """Even if the run before had a better one; its checkpoint stays as it is.

    A model of the folder's former run goes first, so that a kill leaves no mixture of the two.
    """
    former = make(tmp_path / "former", optim=ONE)
    former.progress.best_top1 = 2.0
    former.progress.step = former.progress.batch = 4  # before the validation
    start = former.state.save(keep=1)
    shutil.copytree(finished, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("stat_video.train.trainer.evaluate", None)
        with pytest.raises(TypeError):
            make(tmp_path / "run", optim=ONE, resume=str(start)).fit()
    assert {p.name for p in (tmp_path / "run" / "best").iterdir()} == {"README.md"}
    runner = make(tmp_path / "run", optim=ONE, resume=str(start))
    scores = runner.fit()
    assert load_model(tmp_path / "run").folder == tmp_path / "run" / "best"
    assert scores.top1 == runner.progress.best_top1
    assert start.exists()


def test_a_best_model_that_is_gone_is_written_again(finished, tmp_path):
    """By a finished run, too."""
    folder = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(folder / "best")
    make(folder, optim=ONE).fit()
    assert load_model(folder).folder == folder / "best"


# -- the lock ------------------------------------------------------------------------------------

HOLD = """
import os, sys, time
from pathlib import Path
from stat_video.distributed import alone
from stat_video.train.run_folder import occupied
with occupied(Path(sys.argv[1]), alone("cpu")):
    child = os.fork()  # like a loader's worker, it outlives its parent
    if child:
        print(child, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder():
    """Starts a process that is at work in a folder."""
    started = []

    def start(folder):
        command = [sys.executable, "-c", HOLD, str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append((process, int(process.stdout.readline())))
        return process

    yield start
    for process, child in started:
        os.kill(child, signal.SIGKILL)
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_folder_in_use_is_refused_until_its_process_is_gone(tmp_path, holder, monkeypatch):
    process, machine = holder(tmp_path), socket.gethostname()
    for here in (machine, "node7"):
        monkeypatch.setattr(socket, "gethostname", lambda here=here: here)
        with pytest.raises(UserError) as refused:
            make(tmp_path, optim=ONE).fit()
        text = str(refused.value)
        assert f"{tmp_path} is in use by process {process.pid} on {machine}, started at 20" in text
        assert (f"deleting {tmp_path / 'run.lock'}" in text) == (here == "node7")
        assert files(tmp_path) == {".stat-run", "run.lock"}
    process.kill()
    process.wait()
    make(tmp_path, optim=ONE).fit()  # the killed one's child still lives


def test_a_run_gives_its_folder_back(tmp_path):
    """However it ends."""
    code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", code, str(tmp_path / "run.lock")]
    with suppress(MemoryError), occupied(tmp_path, alone("cpu")):
        assert subprocess.run(command, stderr=subprocess.PIPE).returncode == 1
        raise MemoryError
    assert subprocess.run(command).returncode == 0


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EIO])
def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys, number):
    def refuse(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    if number == errno.EIO:
        with pytest.raises(UserError, match=f"cannot write to {tmp_path}: Input/output error"):
            occupied(tmp_path, alone("cpu")).__enter__()
        return
    with occupied(tmp_path, alone("cpu")):
        said = capsys.readouterr().out
    assert f"{tmp_path} cannot be locked on this file system ({os.strerror(number)})" in said

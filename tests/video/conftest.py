"""Shared fixtures of the tests of the video package."""

import os
import signal

import pytest
import torch

from stat_video.cli import main
from stat_video.train.step import Updater


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Models are so small here that threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def same_threads():
    """A run that sets the number of threads does not set it for the tests after it."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def interrupt(monkeypatch):
    """Lets SIGINT come in the step of the given number, counted from 0."""

    def interrupted(at):
        update = Updater.update

        def signal_and_update(self, pieces, step, request):
            if step == at:
                os.kill(os.getpid(), signal.SIGINT)
            return update(self, pieces, step, request)

        monkeypatch.setattr(Updater, "update", signal_and_update)

    return interrupted


@pytest.fixture
def fails(capsys):
    """Runs a command that must fail. Returns the one sentence that it says."""

    def run(*argv):
        capsys.readouterr()
        assert main(list(argv)) == 2
        out, err = capsys.readouterr()
        err = err.rpartition("\r")[2]  # after a progress bar
        assert out == ""
        assert err.startswith("stat-video: error: ")
        assert err.count("\n") == 1
        return err

    return run

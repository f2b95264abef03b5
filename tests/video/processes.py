"""Runs of several processes (gloo), what one process does instead, and comparing the two."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stat_video.train.journal import read_journal
from tests.video import distributed_cases as cases
from tests.video import forked
from tests.video.clip_samples import clips

MIDDLE = "epoch_0001_step_00000004"  # one step into the second of two epochs of three


def torchrun(*arguments, restarts=0, **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", str(restarts)]
    command += [cases.__file__, *map(str, arguments)]
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=_environment(environment), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def fork(processes, module, *arguments, **environment):
    """A module's main(arguments) in processes that are forked after one import, for less CPU time.

    What torchrun adds is tested with it.
    """
    command = [sys.executable, forked.__file__, str(processes), module.__name__]
    command += map(str, arguments)
    environment = _environment(environment | {"OMP_NUM_THREADS": "1"})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def two_processes(command):
    """Exit codes, output and errors of a command in two processes without torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [
        subprocess.Popen(
            command,
            env=_environment({**shared, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}),
            **pipes,
        )
        for rank in "01"
    ]
    told = [process.communicate(timeout=180) for process in both]
    return [(process.returncode, *said) for process, said in zip(both, told, strict=True)]


def _environment(more):
    path = str(Path(__file__).parents[2])
    return {**os.environ, "CLIPS": str(clips()), "PYTHONPATH": path, **more}


def one_process(folder, model=cases.CALM, **run):
    """The same run in this process alone."""
    torch.use_deterministic_algorithms(True)
    runner = cases.trainer(folder, None, model, **run)
    gradients = cases.recorded_gradients(runner)
    runner.fit()
    return cases.result(runner, gradients)


def assert_close(a, b, rtol, atol):
    assert a.keys() == b.keys()
    for name, value in a.items():
        other = b[name]
        torch.testing.assert_close(value, other, rtol=rtol, atol=atol, msg=lambda m, n=name: n + m)


def assert_same_results(a, b, atol=2e-6):
    """Gradients of each step, weights and their average; equal but for the order of sums."""
    for before, now in zip(a["gradients"][-len(b["gradients"]) :], b["gradients"], strict=True):
        assert_close(before, now, rtol=1e-4, atol=atol)
    for part in ("weights", "average"):
        assert_close(a[part], b[part], rtol=1e-4, atol=10 * atol)


def assert_same_losses(one, other):
    """In the logs of these runs' folders."""
    logs = [read_journal(folder / "log.jsonl") for folder in (one, other)]
    for a, b in zip(*logs, strict=True):
        assert (a["kind"], a["step"]) == (b["kind"], b["step"])
        for key in {"loss", "train_loss", "train_top1", "val_loss", "val_top1"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-4), key

"""The runs of an ablation, one after the other or in parallel processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from stat_video.analysis.ablate import Ablation, Run, train
from stat_video.errors import UserError
from stat_video.train.signals import Interrupted, StopRequest

OUTPUT = "output.txt"  # what a process of its own prints, in the run's folder


def train_all(ablation: Ablation, runs: Sequence[Run]) -> None:
    """Train `runs`, so that each has its result.

    Raises Interrupted after SIGINT or SIGTERM and UserError when a run failed; runs in progress are
    saved in both cases.
    """
    if ablation.jobs == 1 or len(runs) == 1:
        for number, run in enumerate(runs, 1):
            print(f"run {number} of {len(runs)}: {run}", flush=True)
            train(ablation, run)
    elif runs:
        _Jobs(ablation, runs).finish()


class _Jobs:
    """One process per run, `ablation.jobs` of them at a time."""

    def __init__(self, ablation: Ablation, runs: Sequence[Run]) -> None:
        self.ablation, self.waiting = ablation, list(reversed(runs))
        self.active: dict[BaseProcess, Run] = {}
        self.failed: list[Run] = []
        self.request = StopRequest()

    def finish(self) -> None:
        """Train all runs. Raises as `train_all` does."""
        from tqdm import tqdm

        told = False
        with (
            self.request.listening(),
            tqdm(total=len(self.waiting), desc="ablate", unit="run") as bar,
        ):
            while self.active or (self.waiting and not told):
                if not told:
                    self._start()
                wait([process.sentinel for process in self.active], timeout=0.5)
                for run in self._over():
                    result = self.ablation.result(run)
                    assert result is not None
                    shares = ", ".join(f"{o} {100 * s:.1f} %" for o, s in result["top1"].items())
                    bar.write(f"{run}: {shares}, {result['seconds']:.0f} s", file=sys.stdout)
                    bar.update()
                if not told and (self.request.signum or self.failed):
                    told = True
                    for process in self.active:
                        process.terminate()
        if self.request.signum:
            raise Interrupted(self.ablation.folder, self.request.signum)
        if self.failed:
            path = self.ablation.folder_of(self.failed[0]) / OUTPUT
            raise UserError(f"{self.failed[0]}: {_last_line(path)} (more in {path})")

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        while self.waiting and len(self.active) < self.ablation.jobs:
            run = self.waiting.pop()
            process = context.Process(target=_train_alone, args=(self.ablation, run))
            process.start()
            self.active[process] = run

    def _over(self) -> list[Run]:
        """The runs whose process has ended with a result; the others are counted as failed."""
        ended = [process for process in self.active if not process.is_alive()]
        done = [(process.exitcode, self.active.pop(process)) for process in ended]
        self.failed += [run for code, run in done if code]
        return [run for code, run in done if not code]


def _train_alone(ablation: Ablation, run: Run) -> None:
    """The main function of a run's process, which saves and ends when its parent has gone."""
    os.setpgrp()  # Ctrl-C reaches the starting process only, which passes it on once
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder = ablation.folder_of(run)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / OUTPUT).open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        try:
            train(ablation, run)
        except Interrupted as stop:
            sys.exit(128 + stop.signum)
        except UserError as error:
            sys.exit(f"error: {error}")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _last_line(path: Path) -> str:
    lines = path.read_text().strip().splitlines() if path.exists() else []
    return lines[-1] if lines else "its process ended without a word"

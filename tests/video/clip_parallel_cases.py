"""What the processes of test_clip_parallel.py run: runs whose clips are shared.

pairs FOLDER    two of four processes share each clip
three FOLDER    three processes share all clips, also to score
die FOLDER      the command, whose second process is killed
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from stat_kernels.distributed import ClipParallel
from stat_video import cli
from stat_video.distributed import World, joined
from stat_video.model.stat import STAT
from stat_video.train.step import Updater
from tests.video.distributed_cases import answers, run_and_keep
from tests.video.training import CALM, TINY, model_arguments

MODEL = replace(CALM, frames=8, window=5)  # four frames of tokens
RANDOM = replace(TINY, frames=8, window=5)


def pairs(folder: Path, world: World) -> None:
    run_and_keep("ddp", folder, world, MODEL, clip_parallel=2)
    run_and_keep("fsdp", folder, world, MODEL, clip_parallel=2, parallel="fsdp", save_every=4)
    run_and_keep("random", folder, world, RANDOM, clip_parallel=2, checkpointing=True)


def three(folder: Path, world: World) -> None:
    """Goes on from what one process wrote, and from what two pairs wrote; frames 2, 1 and 1."""
    shared = {"clip_parallel": 3, "parallel": "fsdp"}
    run_and_keep("from-one", folder, world, MODEL, resume=os.environ["ONE_PROCESS"], **shared)
    run_and_keep("from-pairs", folder, world, MODEL, resume=os.environ["PAIRS"], **shared)
    told = answers(folder / f"answers_{world.rank}", world, os.environ["CLIPS"], 3)
    (folder / f"answers_{world.rank}.json").write_text(json.dumps(told))
    try:
        STAT(MODEL)(torch.zeros(1, 3, 8, 32, 32), clip=ClipParallel(dist.group.WORLD, 5))
    except ValueError as error:
        (folder / "refused.txt").write_text(str(error))


def die(folder: Path) -> int:
    """In the third step the second process is killed; returns the first one's exit code."""
    update = Updater.update

    def update_or_die(self, pieces, step, request):
        if step == 2 and self.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, pieces, step, request)

    Updater.update = update_or_die
    options = ["--data.root", os.environ["CLIPS"], "--data.batch_size", "4", "--run.device", "cpu"]
    options += ["--optim.epochs", "2", "--optim.warmup_epochs", "0.5", "--run.threads", "1"]
    run = ["--run.dir", str(folder / "run"), "--run.clip_parallel", "2"]
    return cli.main(["train", *model_arguments(MODEL), *options, *run])


def main(arguments: list[str]) -> None:
    """One process of a case."""
    case, where = arguments
    if case == "die":
        sys.exit(die(Path(where)))
    torch.use_deterministic_algorithms(True)
    with joined("cpu") as everyone:
        {"pairs": pairs, "three": three}[case](Path(where), everyone)


if __name__ == "__main__":
    main(sys.argv[1:])

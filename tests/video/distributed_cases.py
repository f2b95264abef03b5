"""What the processes of test_distributed.py run, under torchrun.

torchrun ... distributed_cases.py compare FOLDER    every way to train, results into FOLDER
torchrun ... distributed_cases.py kill FOLDER       a run whose second process is killed once
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from stat_video.checkpoint import checkpoints_in
from stat_video.data.options import DataOptions
from stat_video.distributed import World, is_restart, joined
from stat_video.errors import UserError
from stat_video.evaluate.loading import load_model
from stat_video.evaluate.options import EvalOptions
from stat_video.evaluate.predict import find_videos, predict
from stat_video.evaluate.scoring import score
from stat_video.evaluate.tally import Tally
from stat_video.model.config import STATConfig
from stat_video.train.parallel import whole
from stat_video.train.signals import Interrupted
from stat_video.train.step import Updater
from stat_video.train.trainer import Trainer
from tests.video.clip_samples import clips
from tests.video.training import CALM, OPTIM, TINY, make

RUNNERS: list[Trainer] = []  # they outlive the process group, as the command's does


def clips_folder() -> Path:
    """That of the process that started this one, if there is one."""
    return Path(os.environ.get("CLIPS") or clips())


def trainer(folder: Path, world: World | None, model: STATConfig = CALM, **run) -> Trainer:
    """A run of two epochs of three steps of four clips."""
    data = {"root": str(clips_folder()), "batch_size": 4, "max_bad_share": 1.0}
    return make(folder, replace(OPTIM, clip_grad=0.5), model, data, world, **run)


def recorded_gradients(runner: Trainer) -> list[dict[str, torch.Tensor]]:
    """To be filled with the whole gradient of each step, before clipping."""
    clip, gradients = runner.updater._clip, []

    def keep_and_clip() -> float:
        named = runner.model.named_parameters()
        gradients.append({name: whole(p.grad).clone() for name, p in named})
        return clip()

    runner.updater._clip = keep_and_clip
    return gradients


def result(runner: Trainer, gradients: list) -> dict:
    """What two runs are compared by."""
    return {
        "gradients": gradients,
        "weights": {n: whole(w).clone() for n, w in runner.model.state_dict().items()},
        "average": {n: whole(a).clone() for n, a in runner.updater.average.average.items()},
    }


def run_and_keep(name: str, folder: Path, world: World, model: STATConfig = CALM, **run) -> None:
    """Train in folder/NAME, resuming what is there, and write the result to folder/NAME.pt."""
    runner = trainer(folder / name, world, model, **run)
    RUNNERS.append(runner)
    gradients = recorded_gradients(runner)
    runner.fit()
    kept = result(runner, gradients)
    if world.is_main:
        torch.save(kept, folder / f"{name}.pt")


def compare(folder: Path, world: World) -> None:
    """Every case of test_distributed.py."""
    run_and_keep("ddp", folder, world, save_every=2, keep=9)
    run_and_keep("fsdp", folder, world, parallel="fsdp", save_every=2, keep=9)
    run_and_keep("random", folder, world, TINY)
    run_and_keep("pieces", folder, world, parallel="fsdp", accumulate=2, checkpointing=True)
    spoil_last_checkpoint(folder, world)
    run_and_keep("spoilt-ddp", folder, world, save_every=2, keep=9)
    start = os.environ["ONE_PROCESS"]
    run_and_keep("one-to-ddp", folder, world, resume=start)
    run_and_keep("one-to-fsdp", folder, world, resume=start, parallel="fsdp")
    told = {
        "stopped": stop_one(folder, world),
        "validating": stop_one_in_validation(folder, world),
        "refused": refuse(folder, world),
        "spoiled": spoil_one(folder, world),
        "scores": answers(folder / "eval", world, os.environ["ODD"])[:2],
    }
    (folder / f"told_{world.rank}.json").write_text(json.dumps(told))


def answers(folder: Path, world: World, root: str, sharing: int = 1) -> list:
    """Loss and confusion matrix of an evaluation, and the probabilities of a prediction."""
    model = os.environ["ONE_PROCESS"]
    data = DataOptions(root=root, batch_size=4, views=(2, 1))
    options = EvalOptions(dir=str(folder), device="cpu", clip_parallel=sharing)
    scores, _, _ = score(model, data, options, [], world)
    videos = find_videos([str(min(clips_folder().rglob("*.mp4")))])
    [(_, guesses)] = predict(videos, load_model(model), world=world, clip_parallel=sharing)
    return [scores.loss, scores.confusion.tolist(), [[g.label, g.probability] for g in guesses]]


def spoil_last_checkpoint(folder: Path, world: World) -> None:
    """Copy the run ddp and flip a bit there, in a file that the second process alone checks."""
    if world.is_main:
        copy = Path(shutil.copytree(folder / "ddp", folder / "spoilt-ddp"))
        file = checkpoints_in(copy / "checkpoints")[-1] / "__0_0.distcp"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    world.wait()


def stop_one(folder: Path, world: World) -> list:
    """The second process alone gets SIGINT in the fourth step; both must stop after it."""
    runner = trainer(folder / "stopped", world)
    update = runner.updater.update

    def update_and_signal(pieces, step, request):
        if step == 3 and world.rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return update(pieces, step, request)

    runner.updater.update = update_and_signal
    with pytest.raises(Interrupted) as stop:
        runner.fit()
    return [stop.value.path.name, stop.value.signum]


def stop_one_in_validation(folder: Path, world: World) -> list:
    """The second process alone gets SIGTERM in the first batch of two; then both go on."""
    add, seen = Tally.add, []

    def add_and_signal(self, batch, logits):
        seen.append(batch)
        if world.rank == 1 and len(seen) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        add(self, batch, logits)

    Tally.add = add_and_signal
    with pytest.raises(Interrupted) as stop:
        trainer(folder / "validating", world).fit()
    Tally.add = add
    told = [len(seen), stop.value.path.name, stop.value.signum]
    run_and_keep("validating", folder, world)
    return told


def refuse(folder: Path, world: World) -> str:
    """The folder is in use by another process: both processes are told."""
    with pytest.raises(UserError) as error:
        trainer(folder / "in-use", world).fit()
    return str(error.value)


def watch_reducers(folder: Path) -> None:
    """Write how many of DDP's reducers there were, and are left when the group is destroyed."""
    init, destroy, reducers = DistributedDataParallel.__init__, dist.destroy_process_group, []

    def init_and_note(self, *args, **kwargs):
        init(self, *args, **kwargs)
        reducers.append(weakref.ref(self.reducer))

    def count_and_destroy():
        left = sum(reducer() is not None for reducer in reducers)
        (folder / f"reducers_{os.environ['RANK']}.json").write_text(f"[{len(reducers)}, {left}]")
        destroy()

    DistributedDataParallel.__init__, dist.destroy_process_group = init_and_note, count_and_destroy


def spoil_one(folder: Path, world: World) -> list:
    """The second process alone computes NaN in the second step; both must pass it over."""
    runner = trainer(folder / "spoiled", world, parallel="fsdp")
    backward, calls = runner.updater._backward, itertools.count()

    def spoiled(piece, weight):
        bad = next(calls) == 1 and world.rank == 1
        if bad:
            piece = replace(piece, clips=piece.clips * float("nan"))
        return backward(piece, weight)

    runner.updater._backward = spoiled
    runner.fit()
    finite = all(whole(w).isfinite().all() for w in runner.model.state_dict().values())
    return [runner.state.bad_steps.total, runner.progress.step, bool(finite)]


def kill(folder: Path, world: World) -> None:
    """Train with a checkpoint every two steps; at the fourth, the second process is killed."""
    update = Updater.update

    def update_or_die(self, pieces, step, request):
        seen = {"step": step, "clips": [list(p.indices) for p in pieces]}
        with (folder / f"seen_{world.rank}.jsonl").open("a") as file:
            file.write(json.dumps(seen) + "\n")
        if step == 4 and world.rank == 1 and not is_restart():
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, pieces, step, request)

    Updater.update = update_or_die
    run_and_keep("killed", folder, world, save_every=2)


if __name__ == "__main__":
    # as in the single process that the results are compared with
    torch.use_deterministic_algorithms(True)
    watch_reducers(Path(sys.argv[2]))
    with joined("cpu") as everyone:
        {"compare": compare, "kill": kill}[sys.argv[1]](Path(sys.argv[2]), everyone)

"""Training, evaluation and prediction with shared clips (gloo) against one process.

Processes are expensive: four train in pairs, then three go on and score.
"""

import json
import signal
import sys

import pytest
import torch

from stat_video.distributed import World, alone
from stat_video.errors import UserError
from tests.video import clip_parallel_cases as cases
from tests.video import processes as several
from tests.video.clip_samples import clips

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Folder and result of the run that every other one is to equal."""
    folder = tmp_path_factory.mktemp("single") / "run"
    return folder, several.one_process(folder, cases.MODEL, save_every=4)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    several.fork(4, cases, "pairs", folder)
    return folder


@pytest.fixture(scope="module")
def three(tmp_path_factory, single, pairs):
    folder = tmp_path_factory.mktemp("three")
    written = {"ONE_PROCESS": single[0], "PAIRS": pairs / "fsdp"}
    paths = {name: str(run / "checkpoints" / several.MIDDLE) for name, run in written.items()}
    several.fork(3, cases, "three", folder, **paths)
    return folder


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_pairs_that_share_clips_equal_one_process(name, single, pairs):
    """Gradients of each step, weights, their average, and what the log says."""
    found = torch.load(pairs / f"{name}.pt")
    assert len(found["gradients"]) == 6
    several.assert_same_results(single[1], found)
    several.assert_same_losses(single[0], pairs / name)


def test_the_first_step_s_gradients_within_rounding(single, pairs):
    """Of float32: 1e-5 of each parameter's, or of the whole gradient's where one vanishes."""
    before, now = single[1]["gradients"][0], torch.load(pairs / "ddp.pt")["gradients"][0]
    norm = torch.cat([g.flatten() for g in before.values()]).norm()
    for name, grad in before.items():
        assert (now[name] - grad).norm() < 1e-5 * max(grad.norm(), 0.01 * norm), name


def test_processes_of_a_clip_draw_the_same(pairs, tmp_path):
    """Dropout and stochastic depth: two pairs equal one process that takes two pieces."""
    alone = several.one_process(tmp_path / "run", cases.RANDOM, accumulate=2)
    several.assert_same_results(alone, torch.load(pairs / "random.pt"))


@pytest.mark.parametrize("name", ["from-one", "from-pairs"])
def test_three_go_on_from_what_one_and_four_wrote(name, single, three):
    found = torch.load(three / f"{name}.pt")
    assert len(found["gradients"]) == 2
    several.assert_same_results(single[1], found)


def test_one_goes_on_from_what_pairs_wrote(single, pairs, tmp_path):
    middle = pairs / "fsdp" / "checkpoints" / several.MIDDLE
    resumed = several.one_process(tmp_path / "run", cases.MODEL, resume=str(middle))
    several.assert_same_results(single[1], resumed)


def test_evaluation_and_prediction(single, three, tmp_path, monkeypatch):
    monkeypatch.setenv("ONE_PROCESS", str(single[0] / "checkpoints" / several.MIDDLE))
    loss, confusion, guesses = cases.answers(tmp_path, alone("cpu"), str(clips()))
    for rank in range(3):
        told = json.loads((three / f"answers_{rank}.json").read_text())
        assert told[0] == pytest.approx(loss, rel=1e-5)
        assert told[1] == confusion
        assert [label for label, _ in told[2]] == [label for label, _ in guesses]
        assert [p for _, p in told[2]] == pytest.approx([p for _, p in guesses], rel=1e-5)


def test_a_process_that_dies_ends_the_command(tmp_path):
    """With one sentence and without torchrun's help, long before any timeout."""
    command = [sys.executable, cases.__file__, "die", str(tmp_path)]
    (code, _, told), (killed, *_) = several.two_processes(command)
    assert killed == -signal.SIGKILL
    assert code == 2, told
    assert "\nstat-video: error: another process of the " in told


@pytest.mark.parametrize(
    ("size", "sharing", "told"),
    [
        (4, 3, r"run\.clip_parallel must divide the number of processes, which is 4, got 3"),
        (1, 2, r"run\.clip_parallel must divide the number of processes, which is 1, got 2"),
        (8, 8, r"run\.clip_parallel must be at most 4, a clip's frames of tokens, got 8"),
    ],
)
def test_clips_that_cannot_be_shared(size, sharing, told):
    with pytest.raises(UserError, match=told):
        World(0, size, CPU).share_clips(sharing, 4, "run.clip_parallel")


def test_a_division_of_another_clip_is_refused(three):
    told = (three / "refused.txt").read_text()
    assert told.startswith("clip must divide the clip's 4 frames of tokens, got ClipParallel(")


def test_an_image_model_cannot_be_shared():
    with pytest.raises(UserError, match=r"run\.clip_parallel must be 1 for an image model, got 2"):
        World(0, 2, CPU).share_clips(2, None, "run.clip_parallel")

"""Checkpoints: killed at any byte of a write, the last whole one remains; damage is refused."""

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stat_video.checkpoint import (
    PART,
    checkpoints_in,
    keep_only,
    load_tensors,
    read_state,
    save_checkpoint,
)
from stat_video.distributed import alone
from stat_video.errors import UserError
from stat_video.train.run_state import find_checkpoint

SHAPES = {"model": {"a": (200, 10), "b": (7,)}, "average": {"a": (200, 10)}}


def tensors(value):
    return {
        group: {name: torch.full(shape, float(value)) for name, shape in shapes.items()}
        for group, shapes in SHAPES.items()
    }


def save(folder, step):
    return save_checkpoint(folder, f"step_{step:04d}", tensors(step), {"step": step}, alone("cpu"))


def load(path):
    """The step of a checkpoint, all of whose tensors must be that step's."""
    step, found = read_state(path)["step"], tensors(-1)
    load_tensors(path, found)
    for group in found.values():
        for value in group.values():
            assert torch.equal(value, torch.full_like(value, step))
    return step


def die_at_byte(limit):
    """A process that writes more than this into a file is killed by SIGXFSZ."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def die_at_call(number):
    """Kill the process instead of the number-th renaming or flushing."""
    count = itertools.count()

    def killing(function):
        def call(*arguments):
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return call

    os.rename, os.fsync = killing(os.rename), killing(os.fsync)


def killed_while(action, how, where):
    """Run `action` in a process that dies as told. Returns whether it did."""
    child = os.fork()
    if child == 0:
        how(where)
        action()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def kill_writers(folder):
    """Save step 2 again and again, each time killed somewhere else; run in a process of its own."""
    largest = max(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    places = [(die_at_byte, n) for n in (0, 1, 7, 64, *range(500, largest, 2500), largest - 1)]
    places += [(die_at_call, n) for n in range(20)]
    kills = {die_at_byte: 0, die_at_call: 0}
    for how, where in places:
        killed = killed_while(lambda: save(folder, 2), how, where)
        kills[how] += killed
        steps = [load(path) for path in checkpoints_in(folder)]
        # killed before it has its name, or complete
        assert steps == ([1, 2] if (folder / "step_0002").exists() else [1])
        assert killed or steps == [1, 2]
        shutil.rmtree(folder / "step_0002", ignore_errors=True)
    print(json.dumps({how.__name__: count for how, count in kills.items()} | {"bytes": largest}))


def test_a_kill_at_any_byte_leaves_the_former_checkpoint(tmp_path):
    save(tmp_path, 1)
    code = "import sys, pathlib; from tests.video import test_train_checkpoint as t"
    code += "; t.kill_writers(pathlib.Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout)
    assert kills["bytes"] > 10_000
    assert kills["die_at_byte"] >= 10
    assert 5 <= kills["die_at_call"] < 20  # each flush and renaming, and then one that went through
    assert load(save(tmp_path, 2)) == 2  # over what the killed ones left
    assert not list(tmp_path.glob("*" + PART))


def test_a_kill_while_removing_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save(tmp_path, step)

    def half(path):
        next(path.iterdir()).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", half)
    with pytest.raises(KeyboardInterrupt):
        keep_only(tmp_path, {"step_0003"})
    monkeypatch.undo()
    assert 3 in [load(path) for path in checkpoints_in(tmp_path)]
    keep_only(tmp_path, {"step_0003"})
    assert [p.name for p in tmp_path.iterdir()] == ["step_0003"]


def test_which_checkpoint_is_resumed(tmp_path):
    """By its name, not by its age; after a restart of itself a run goes on whatever it was told."""
    assert find_checkpoint("auto", tmp_path / "none", restarted=False) is None
    for step in (2, 10, 1):
        save(tmp_path, step)
    (tmp_path / "step_0011.part").mkdir()
    newest = tmp_path / "step_0010"
    for resume, restarted, found in (
        ("auto", False, newest),
        ("auto", True, newest),
        ("none", False, None),
        ("none", True, newest),
        (str(tmp_path / "step_0002"), False, tmp_path / "step_0002"),
        (str(tmp_path / "step_0002"), True, newest),
        ("elsewhere/step_0099", True, Path("elsewhere/step_0099")),
    ):
        assert find_checkpoint(resume, tmp_path, restarted=restarted) == found


def test_damaged_checkpoints_are_refused(tmp_path):
    with pytest.raises(UserError, match="none does not exist"):
        read_state(tmp_path / "none")
    with pytest.raises(
        UserError, match=r"is not a checkpoint of stat-video: it has no state\.json"
    ):
        read_state(tmp_path)
    path = save(tmp_path, 1)
    for name, size in ((".metadata", 100), ("__0_0.distcp", 3000), ("__0_0.distcp", 0)):
        hurt = Path(shutil.copytree(path, tmp_path / "hurt", dirs_exist_ok=True))
        (hurt / name).write_bytes((hurt / name).read_bytes()[:size])
        with pytest.raises(UserError, match="hurt is not a readable checkpoint: "):
            load_tensors(hurt, tensors(-1))
    with pytest.raises(UserError, match="is not a readable checkpoint: Missing key"):
        load_tensors(path, {"model": {"c": torch.empty(3)}})
    (path / "state.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match="has checkpoint format 1, this version reads 2"):
        read_state(path)
    (path / "state.json").write_text('{"form')
    with pytest.raises(UserError, match=r"state\.json is damaged"):
        read_state(path)

"""Checkpoints: killed at any byte of a write, the last whole one remains; damage is refused."""

import errno
import io
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
    DamagedCheckpoint,
    amend,
    checkpoints_in,
    keep_only,
    load_tensors,
    read_state,
    save_checkpoint,
)
from stat_video.checkpoint.checksums import _SummedFile
from stat_video.distributed import alone
from stat_video.errors import UserError
from stat_video.train.run_state import find_checkpoints
from tests.video.training import without_sums

SHAPES = {"model": {"a": (200, 10), "b": (7,)}, "average": {"a": (200, 10)}}


def tensors(value):
    return {
        group: {name: torch.full(shape, float(value)) for name, shape in shapes.items()}
        for group, shapes in SHAPES.items()
    }


def save(folder, step):
    return save_checkpoint(
        folder, f"epoch_0000_step_{step:08d}", tensors(step), {"step": step}, alone("cpu")
    )


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

    os.rename, os.replace, os.fsync = map(killing, (os.rename, os.replace, os.fsync))


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
        assert steps == ([1, 2] if (folder / "epoch_0000_step_00000002").exists() else [1])
        assert killed or steps == [1, 2]
        shutil.rmtree(folder / "epoch_0000_step_00000002", ignore_errors=True)
    kills = {how.__name__: count for how, count in kills.items()}
    print(json.dumps(kills | {"bytes": largest, "amend": kill_amenders(folder)}))


def kill_amenders(folder):
    """Amend step 1 again and again, killed at each call. Returns the number of kills."""
    for number in range(20):
        path = checkpoints_in(folder)[0]
        state = {"step": 1, "amended": number}
        killed = killed_while(
            lambda p=path, s=state: amend(p, p.name, s, alone("cpu")), die_at_call, number
        )
        assert [load(path) for path in checkpoints_in(folder)] == [1]
        if not killed:
            assert read_state(path)["amended"] == number
            return number
    return 20


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
    assert kills["amend"] == 5  # the state's flush, its renaming, flush, the folder's, flush
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
        keep_only(tmp_path, {"epoch_0000_step_00000003"})
    monkeypatch.undo()
    assert 3 in [load(path) for path in checkpoints_in(tmp_path)]
    keep_only(tmp_path, {"epoch_0000_step_00000003"})
    assert [p.name for p in tmp_path.iterdir()] == ["epoch_0000_step_00000003"]


def test_which_checkpoint_is_resumed(tmp_path):
    """By its name, not by its age; after a restart of itself a run goes on whatever it was told."""
    assert find_checkpoints("auto", tmp_path / "none", restarted=False) == []
    for step in (2, 10, 1):
        save(tmp_path, step)
    (tmp_path / "epoch_0000_step_00000011.part").mkdir()
    one, two, ten = (tmp_path / f"epoch_0000_step_{step:08d}" for step in (1, 2, 10))
    for resume, restarted, found in (
        ("auto", False, [ten, two, one]),
        ("auto", True, [ten, two, one]),
        ("none", False, []),
        ("none", True, [ten, two, one]),
        (str(two), False, [two]),
        (str(two), True, [ten, two]),
        ("elsewhere/epoch_0000_step_00000099", True, [Path("elsewhere/epoch_0000_step_00000099")]),
    ):
        assert find_checkpoints(resume, tmp_path, restarted=restarted) == found


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="none does not exist"):
        read_state(tmp_path / "none")
    with pytest.raises(
        UserError, match=r"is not a checkpoint of stat-video: it has no state\.json"
    ):
        read_state(tmp_path)
    path = save(tmp_path, 1)
    with pytest.raises(UserError, match="is not a readable checkpoint: Missing key"):
        load_tensors(path, {"model": {"c": torch.empty(3)}})
    (path / "state.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match="has checkpoint format 1, this version reads 3"):
        read_state(path)


@pytest.mark.parametrize(
    "text",
    [
        '{"form', "", "[]", "{}", "[" * 100_000, "1" * 5000, "\udcff", '{"format": 3}',
        '{"format": 3, "crc32": []}', '{"format": 3, "crc32": {}}',
        '{"format": 2, "crc32": {"state.json": "1"}}',
    ],
)  # fmt: skip
def test_a_damaged_state_is_refused(tmp_path, text):
    path = save(tmp_path, 1)
    (path / "state.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DamagedCheckpoint, match=r"state\.json is damaged: "):
        read_state(path)


def test_a_checkpoint_without_its_state_is_a_damaged_one(tmp_path):
    """Resuming tells of it; it is not as if it had never been."""
    path = save(tmp_path, 1)
    (path / "state.json").unlink()
    assert checkpoints_in(tmp_path) == [path]
    with pytest.raises(DamagedCheckpoint, match=r"it has no state\.json"):
        read_state(path)


def flip(content, place):
    return content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]


def test_every_damage_is_noticed(tmp_path):
    """One flipped bit, 4 KiB of zeros, a file that is cut, longer or gone; in each of the files."""
    path = save(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    files = {p: p.read_bytes() for p in path.iterdir()}
    assert {p.name for p in files} == state["crc32"].keys() == {
        ".metadata", "__0_0.distcp", "state.json"
    }  # fmt: skip
    for file, whole in files.items():
        places = range(0, len(whole), 1 if file.name == "state.json" else 97)
        damages = [flip(whole, place) for place in places]
        damages += [whole[:1000] + bytes(4096) + whole[5096:], whole[:-1], whole + b"\0", b"", None]
        for damage in damages:
            file.unlink() if damage is None else file.write_bytes(damage)
            with pytest.raises(UserError, match=f"{path}.*(damaged|no file|no state|format)"):
                read_state(path)
        file.write_bytes(whole)
    assert load(path) == 1


def test_an_amended_checkpoint_is_checked_as_before(tmp_path):
    path = amend(save(tmp_path, 1), "epoch_0001_step_00000001", {"new": 3}, alone("cpu"))
    assert read_state(path) == {"format": 3, "step": 1, "new": 3}
    assert load(path) == 1
    (path / "state.json").write_text((path / "state.json").read_text().replace("3", "4"))
    with pytest.raises(UserError, match="format 4"):
        read_state(path)
    path = amend(without_sums(save(tmp_path, 2)), "epoch_0002_step_00000002", {}, alone("cpu"))
    assert load(path) == 2


def test_a_checkpoint_without_checksums_is_read_with_a_notice(tmp_path, capsys):
    path = save(tmp_path, 1)
    assert load(path) == 1
    assert capsys.readouterr().err == ""
    assert load(without_sums(path)) == 1
    assert capsys.readouterr().err == f"{path} has no checksums: damage to it goes unnoticed\n"
    for name, size in ((".metadata", 100), ("__0_0.distcp", 3000), ("__0_0.distcp", 0)):
        hurt = Path(shutil.copytree(path, tmp_path / "hurt", dirs_exist_ok=True))
        (hurt / name).write_bytes((hurt / name).read_bytes()[:size])
        with pytest.raises(DamagedCheckpoint, match="hurt is not a readable checkpoint: "):
            load_tensors(hurt, tensors(-1))


def test_the_checksum_is_of_what_was_meant_to_be_written(tmp_path, monkeypatch):
    """A disk that writes something else is found out, too."""

    class Forgetful(io.FileIO):
        def write(self, data):
            return super().write(bytes(len(data)))

    with monkeypatch.context() as patched:
        patched.setattr(io, "FileIO", Forgetful)
        path = save(tmp_path, 1)
    with pytest.raises(DamagedCheckpoint, match="is damaged: its checksum is not the one"):
        read_state(path)


def save_on_a_small_disk(folder):
    """Where no file grows beyond 5,000 bytes; torch tells of an archive's position instead."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    large = {"a": torch.zeros(100_000)}
    with pytest.raises(
        UserError, match=r"cannot write to .*/epoch_0000_step_00000002: File too large"
    ):
        save_checkpoint(folder, "epoch_0000_step_00000002", large, {}, alone("cpu"))


def test_a_disk_that_takes_no_more_is_named(tmp_path, monkeypatch):
    save(tmp_path, 1)
    child = os.fork()
    if child == 0:
        try:
            save_on_a_small_disk(tmp_path)
            os._exit(7)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

    def full(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_SummedFile, "write", full)
    with pytest.raises(
        UserError, match=r"step_00000002: No space left on device \(the disk mounted at /"
    ):
        save(tmp_path, 2)
    assert [load(path) for path in checkpoints_in(tmp_path)] == [1]

"""The console script: what each command prints, and one sentence with exit code 2 for mistakes."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stat_video
from stat_video.cli import COMMANDS, main
from tests.video.clip_samples import clips

TINY = [
    *("--model.frames", "4", "--model.image_size", "32", "--model.stem_channels", "[8, 8]"),
    *("--model.depths", "[1, 1]", "--model.dims", "[16, 32]", "--model.num_heads", "[1, 2]"),
    *("--model.kv_strides", "[2, 1]", "--optim.epochs", "1", "--optim.warmup_epochs", "0"),
    *("--data.batch_size", "4", "--run.threads", "1"),
]


def train(folder, *more):
    return main(["train", *TINY, "--data.root", str(clips()), "--run.dir", str(folder), *more])


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert train(folder) == 0
    return folder


def video():
    return str(next((clips() / "val").glob("*_left.mp4")))


def fails(capsys, *argv):
    """The one sentence that a mistake is answered with."""
    capsys.readouterr()
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("stat-video: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def test_usage_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)
    assert main([]) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: stat-video {command}" in capsys.readouterr().out


def test_make_clips(tmp_path, capsys):
    argv = ["make-clips", str(tmp_path / "new"), "--size", "32", "--frames=8"]
    assert main([*argv, "--train", "2", "--val", "1", "--task", "order"]) == 0
    assert "2 training and 1 validation clips" in capsys.readouterr().out
    assert (tmp_path / "new" / "labels.txt").read_text() == "zero_then_one\none_then_zero\n"
    assert "is not empty" in fails(capsys, *argv)
    assert main([*argv, "--train", "1", "--val", "1", "--force"]) == 0
    assert len(list((tmp_path / "new" / "train").iterdir())) == 1


def test_train_eval_predict(run_folder, capsys):
    assert main(["eval", "--model", str(run_folder)]) == 0
    assert re.search(r"top-1 [\d.]+ %, top-5 100.0 %", capsys.readouterr().out)
    record = json.loads((run_folder / "best" / "eval" / "eval.json").read_text())
    assert record["videos"] == 6
    assert record["frame_order"] == "forward"
    assert record["class_names"] == ["left", "right"]
    assert sum(map(sum, record["confusion"])) == 6
    assert (run_folder / "best" / "eval" / "confusion.png").is_file()

    assert main(["predict", video(), "--model", str(run_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[1] for line in lines} == {"left", "right"}
    shares = [float(line.split()[0].rstrip("%")) for line in lines]
    assert sum(shares) == pytest.approx(100, abs=0.02)
    assert shares == sorted(shares, reverse=True)
    assert main(["predict", video(), "--model", str(run_folder / "best"), "--top", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == lines[:1]


def test_a_checkpoint_and_its_best_model_agree(run_folder, tmp_path):
    """After one epoch the best model is the last one."""
    results = []
    for name, path in (("a", "best"), ("b", "checkpoints/epoch_0001_step_00000003")):
        argv = ["eval", "--model", str(run_folder / path), "--eval.dir", str(tmp_path / name)]
        assert main(argv) == 0
        results.append(json.loads((tmp_path / name / "eval.json").read_text()))
    assert results[0]["loss"] == results[1]["loss"]
    assert results[0]["confusion"] == results[1]["confusion"]


def test_controls_on_the_frame_order(run_folder, tmp_path):
    losses = {}
    for order in ("forward", "reverse", "shuffle_frames"):
        argv = ["eval", "--model", str(run_folder), "--eval.dir", str(tmp_path)]
        assert main(argv if order == "forward" else [*argv, f"--eval.{order}", "true"]) == 0
        losses[order] = json.loads((tmp_path / "eval.json").read_text())["loss"]
    assert len(set(losses.values())) == 3


def test_a_recipe_by_name_by_path_and_overridden(tmp_path, capsys):
    def printed(*argv):
        with pytest.raises(SystemExit) as stop:
            main(["train", *argv, "--print_config"])
        assert stop.value.code in (0, None)
        return capsys.readouterr().out

    by_name = printed("--config", "clips_tiny")
    path = Path(stat_video.__file__).parent / "recipes" / "clips_tiny.yaml"
    assert printed("--config", str(path)) == by_name
    assert "dims:\n  - 64" in by_name
    mine = tmp_path / "mine.yaml"
    mine.write_text("preset: stat_tiny\noptim:\n  lr: 0.125\nmodel:\n  window: 7\n")
    merged = printed("--config", str(mine), "--optim.epochs", "3", "--optim.warmup_epochs=1")
    assert "lr: 0.125" in merged
    assert "epochs: 3" in merged
    assert "window: 7" in merged
    assert "frames: 16" in merged


def test_info_describes_the_model(capsys):
    assert main(["info", "--preset", "stat_b64", "--model.window", "5"]) == 0
    assert "64 frames of 224 x 224" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nonsense"], "unknown command 'nonsense'"),
        (["train", "--config", "nowhere"], "nowhere is neither a file nor a bundled recipe"),
        (["train", "--data.root", "/nowhere"], "data.root /nowhere is not a folder"),
        (["train", "--optim.lr", "fast"], "--optim.lr must be of type float, got fast"),
        (["train", "--optim.lr", "-1"], "optim.lr must be positive, got -1"),
        (["train", "--model.window", "4"], "window must be an odd int"),
        (["train", "--preset", "stat_huge"], "preset must be one of"),
        (["train", "--data.rot", "x"], "unrecognized arguments: --data.rot"),
        (["train", "--run.dir", ""], "run.dir must name a folder, got ''"),
        (["make-clips", ""], "OUT must name a folder, got ''"),
        (["eval"], "model"),
        (["eval", "--model", "/nowhere"], "/nowhere does not exist"),
        (["predict", "x.mp4"], "model"),
        (["predict", "x.mp4", "--model", "/nowhere"], "/nowhere does not exist"),
        (["predict", "x.mp4", "--model", "/tmp"], "no model can be loaded from /tmp"),
        (["make-clips"], "out"),
        (["make-clips", "x", "--size", "7"], "size must be even"),
        (["make-clips", "x", "--task", "dance"], "--task must be"),
        (["info", "--preset", "x"], "preset must be one of"),
    ],
)
def test_mistakes_are_told_in_one_sentence(argv, message, capsys):
    assert message in fails(capsys, *argv)


def test_mistakes_that_need_a_model(run_folder, tmp_path, capsys):
    (tmp_path / "text.mp4").write_text("words\n" * 100)
    (tmp_path / "zero.mp4").touch()
    (tmp_path / "cut.mp4").write_bytes(Path(video()).read_bytes()[:2000])
    model = ["--model", str(run_folder)]
    for name, message in (
        ("text.mp4", "text.mp4 cannot be decoded"),
        ("zero.mp4", "zero.mp4 is empty"),
        ("cut.mp4", "cut.mp4 cannot be decoded: it is truncated"),
        ("none.mp4", "none.mp4 does not exist"),
        ("", "is not a file"),
    ):
        assert message in fails(capsys, "predict", str(tmp_path / name), *model)
    assert "--top must be" in fails(capsys, "predict", video(), *model, "--top", "0")
    assert "device 'abacus'" in fails(capsys, "predict", video(), *model, "--device", "abacus")
    checkpoint = tmp_path / "cut"
    shutil.copytree(next((run_folder / "checkpoints").iterdir()), checkpoint)
    (checkpoint / ".metadata").unlink()
    assert "cut is damaged: it has no file .metadata" in fails(
        capsys, "eval", "--model", str(checkpoint)
    )
    both = ["--eval.reverse", "true", "--eval.shuffle_frames", "true"]
    assert "exclude each other" in fails(capsys, "eval", *model, *both)
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    (tmp_path / "val.txt").write_text("x.mp4 0\n")
    assert "has 2 classes" in fails(capsys, "eval", *model, "--data.root", str(tmp_path))
    other = ["train", *TINY, "--data.root", str(clips()), "--run.dir", str(run_folder)]
    assert "optim.lr was" in fails(capsys, *other, "--optim.lr", "0.5")


@pytest.mark.parametrize("script", ["-m stat_video eval", "stat/evaluate.py"])
def test_scripts_and_module_are_the_same_command(script):
    root = Path(stat_video.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, *script.split(), "--model", "/nowhere"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "stat-video: error: /nowhere does not exist\n"


def test_ctrl_c_saves_and_tells_how_to_resume(tmp_path):
    """A real process, a real signal, with loader workers alive."""
    argv = ["train", *TINY, "--data.root", str(clips()), "--run.dir", str(tmp_path)]
    argv += ["--optim.epochs", "500", "--data.workers", "1", "--run.log_every", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "stat_video", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if line.startswith("epoch 1:"):
            break
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert "to go on from" in last
    assert last.endswith(shlex.join(["stat-video", *argv]))
    assert list((tmp_path / "checkpoints").glob("epoch_*"))


def test_importing_needs_no_training_libraries():
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in HEAVY: raise ModuleNotFoundError(name, name=name)\n"
        "HEAVY = set('av jsonargparse torchmetrics timm torchvision matplotlib tensorboard "
        "sklearn skimage'.split())\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import stat_video, stat_video.cli, stat_video.train.trainer, stat_video.evaluate.predict\n"
        "import stat_video.evaluate.scoring, stat_video.clips.make, stat_video.data.sources\n"
        "sys.exit(stat_video.cli.main(['make-clips', 'x']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        "stat-video: error: jsonargparse is not installed; pip install 'stat-kernels[train]'\n"
    )

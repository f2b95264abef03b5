"""The console script: what each command prints, and one sentence with exit code 2 for mistakes."""

import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import stat_video
from stat_video.cli import COMMANDS, SPINNING, main
from stat_video.data.decode import read_clip
from stat_video.data.options import DataOptions
from stat_video.errors import UserError
from stat_video.model.config import STATConfig
from stat_video.settings import read_options
from tests.video.clip_samples import clips
from tests.video.training import CALM, model_arguments

TINY = [
    *model_arguments(CALM),
    *("--optim.epochs", "1", "--optim.warmup_epochs", "0"),
    *("--data.batch_size", "4", "--run.threads", "1"),
]


def train(folder, *more):
    return main(["train", *TINY, "--data.root", str(clips()), "--run.dir", str(folder), *more])


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert train(folder) == 0
    return folder


def video():
    return str(next((clips() / "val").glob("*_left.mp4")))


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


def test_make_clips(tmp_path, capsys, fails):
    argv = ["make-clips", str(tmp_path / "new"), "--size", "32", "--frames=8"]
    assert main([*argv, "--train", "2", "--val", "1", "--task", "order"]) == 0
    assert "2 training and 1 validation clips" in capsys.readouterr().out
    assert (tmp_path / "new" / "labels.txt").read_text() == "zero_then_one\none_then_zero\n"
    assert "is not empty" in fails(*argv)
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
        (["predict", "", "--model", "/tmp"], "VIDEO must name a file or a folder, got ''"),
        (["predict", "x", "--model", "y", "--views", "2"], "tuple[int, int] (as [1, 1]), got 2"),
        (["predict", "x.mp4", "--model", ""], "MODEL must name a file or a folder, got ''"),
        (["attend", "x.mp4", "--model", "/tmp", "--out", ""], "--out must name a file or a folder"),
        (["export", "/tmp", ""], "OUT must name a file or a folder, got ''"),
        (["info", "--model.image_model", ""], "image_model must name a VisionTransformer of timm"),
        (["make-clips"], "out"),
        (["make-clips", "x", "--size", "7"], "size must be even"),
        (["make-clips", "x", "--task", "dance"], "--task must be"),
        (["info", "--preset", "x"], "preset must be one of"),
        (["train", "--preset"], "argument --preset: expected one argument"),
        (["train", "--data.ro", "x"], "unrecognized arguments: --data.ro"),
        (["train", "--data.views", "3"], "must be of type tuple[int, int] (as [1, 1]), got 3"),
        (["train", "--optim.lr", "nan"], "optim.lr"),
        (["train", "--data.cache_gib", "-1"], "data.cache_gib must be at least 0"),
        (["train", "--run.threads", "1000000"], "run.threads must be from 0 to 1024, got 1000000"),
        (["train", "--data.workers", "1000000"], "data.workers must be from 0 to 1024"),
        (["train", "--run.seed", "1" * 20], "run.seed must be from 0 to"),
        (["eval", "--model", ".", "--eval.seed", "-1"], "eval.seed must be from 0 to"),
    ],
)
def test_mistakes_are_told_in_one_sentence(argv, message, fails):
    assert message in fails(*argv)


def test_mistakes_that_need_a_model(run_folder, tmp_path, fails):
    (tmp_path / "text.mp4").write_text("words\n" * 100)
    (tmp_path / "zero.mp4").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.mp4").write_bytes(Path(video()).read_bytes()[:2000])
    model = ["--model", str(run_folder)]
    for name, message in (
        ("text.mp4", "text.mp4 cannot be decoded"),
        ("zero.mp4", "zero.mp4 is empty"),
        ("cut.mp4", "cut.mp4 cannot be decoded: it is truncated"),
        ("none.mp4", "none.mp4 does not exist"),
        ("empty", "empty holds neither videos nor the frames of one"),
    ):
        assert message in fails("predict", str(tmp_path / name), *model)
    assert "--views must be at least 1 clip in time and 1 or 3 crops, got 1 and 2" in fails(
        "predict", video(), *model, "--views", "1,2"
    )
    assert "--top must be" in fails("predict", video(), *model, "--top", "0")
    for device, message in (("abacus", ""), ("meta", "cannot be used here: it holds no numbers")):
        for use in (["predict", video()], ["attend", video(), "--out", str(tmp_path / "looks")]):
            said = fails(*use, *model, "--device", device)
            assert f"device {device!r}" in said
            assert message in said
    checkpoint = tmp_path / "cut"
    shutil.copytree(next((run_folder / "checkpoints").iterdir()), checkpoint)
    (checkpoint / ".metadata").unlink()
    assert "cut is damaged: it has no file .metadata" in fails("eval", "--model", str(checkpoint))
    both = ["--eval.reverse", "true", "--eval.shuffle_frames", "true"]
    assert "exclude each other" in fails("eval", *model, *both)
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    (tmp_path / "val.txt").write_text("x.mp4 0\n")
    assert "has 2 classes" in fails("eval", *model, "--data.root", str(tmp_path))
    other = ["train", *TINY, "--data.root", str(clips()), "--run.dir", str(run_folder)]
    said = fails(*other, "--optim.epochs", "12")
    assert "optim.epochs was 1 and is 12 now" in said
    advice = re.search(r"another --run.dir with --run.init (\S+)$", said)
    more = ["--run.init", advice[1], "--optim.epochs", "2", "--run.dir", str(tmp_path / "more")]
    assert main([*other, *more]) == 0


def test_probabilities_that_are_not_finite(run_folder, tmp_path, capsys, fails):
    """A damaged model answers with a sentence, and never with a NaN in a line of JSON."""
    shutil.copytree(run_folder / "best", tmp_path / "nan")
    weights = load_file(tmp_path / "nan" / "model.safetensors")
    weights["head.bias"][0] = float("nan")
    save_file(weights, tmp_path / "nan" / "model.safetensors")
    model = ["--model", str(tmp_path / "nan")]
    assert main(["predict", video(), *model, "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["error"] == f"{video()}: the model's probabilities are not finite"
    out = ["--out", str(tmp_path / "looks")]
    said = "the model's probabilities are not finite; its weights may be damaged"
    assert said in fails("attend", video(), *model, *out)
    said = "the model's logits are not finite; its weights may be damaged"
    assert said in fails("export", model[1], str(tmp_path / "model.pt2"))
    assert {path.name for path in tmp_path.iterdir()} == {"nan"}


def test_predict_takes_files_folders_and_frames(run_folder, tmp_path, capsys):
    """Hidden files are left out, an unusable video does not stop the others."""
    names = sorted(p.name for p in (clips() / "val").iterdir())[:3]
    for place in ("in/a", "in/.hidden", "frames"):
        (tmp_path / place).mkdir(parents=True)
    for name in names[:2]:
        shutil.copy(clips() / "val" / name, tmp_path / "in" / "a" / name.upper())
    shutil.copy(clips() / "val" / names[2], tmp_path / "in" / ".hidden")
    (tmp_path / "in" / "a" / "notes.txt").write_text("no video")
    (tmp_path / "in" / "z.mp4").touch()
    for i, image in enumerate(read_clip(Path(video()), lambda length: np.arange(length))):
        Image.fromarray(image).save(tmp_path / "frames" / f"{i:03}.png")
    model = ["--model", str(run_folder), "--json", "--views", "2,3"]
    paths = [video(), str(tmp_path / "in"), str(tmp_path / "frames")]
    assert main(["predict", *paths, *model]) == 2
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    inside = [tmp_path / "in" / "a" / name.upper() for name in names[:2]]
    bad = tmp_path / "in" / "z.mp4"
    assert [f["video"] for f in found] == [*map(str, [video(), *inside, bad, tmp_path / "frames"])]
    assert found[3]["error"] == f"{bad} is empty (0 bytes)"
    alone, *_, frames = [{c["name"]: c["probability"] for c in f.get("classes", [])} for f in found]
    assert sum(alone.values()) == pytest.approx(1)
    assert frames == pytest.approx(alone, abs=1e-5)  # the same frames, as PNG

    assert main(["predict", *paths[:2], *model[:2], "--top", "1"]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines()[::2] == [video(), *map(str, inside)]
    assert err == f"stat-video: error: {bad} is empty (0 bytes)\n"


def test_views_of_a_prediction_are_those_of_an_evaluation(run_folder, tmp_path, capsys):
    where = ["--eval.dir", str(tmp_path), "--data.views", "2,3"]
    assert main(["eval", "--model", str(run_folder), *where]) == 0
    wide = ["--model", str(run_folder), "--views", "2,3", "--json"]
    capsys.readouterr()
    assert main(["predict", str(clips() / "val"), *wide]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    guesses = [f["classes"][0]["name"] in Path(f["video"]).stem for f in found]
    assert sum(guesses) / len(guesses) == pytest.approx(
        json.loads((tmp_path / "eval.json").read_text())["top1"]
    )


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "9"}])
def test_waiting_threads_do_not_spin_unless_told_to(given):
    code = (
        "import os, sys; from stat_video.cli import main; assert 'torch' not in sys.modules; "
        "main(['--help']); print(os.environ.get('OMP_WAIT_POLICY'))"
    )
    kept = {name: value for name, value in os.environ.items() if name not in SPINNING}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | given, capture_output=True, text=True, check=True
    )
    expected = given.get("OMP_WAIT_POLICY", "None" if given else "PASSIVE")
    assert done.stdout.splitlines()[-1] == expected


@pytest.mark.parametrize("script", ["stat/stat_video/__main__.py", "stat/train.py"])
def test_module_and_scripts_are_the_same_command(script, monkeypatch, capsys):
    command = ["train"] if "__main__" in script else []
    monkeypatch.setattr(sys, "argv", [script, *command, "--data.root", "/nowhere"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(Path(stat_video.__file__).parents[2] / script), run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "stat-video: error: data.root /nowhere is not a folder\n"


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


HOSTILE_RECIPES = {
    "laughs": (b"data: &a [x, x]\noptim: [*a, *a]", "YAML aliases are not supported"),
    "UTF-16": ("optim: {}".encode("utf-16"), "codec can't decode byte"),
    "deep": (b"[" * 5000, "maximum recursion depth"),
    "long": (b"#" * 100_001, "more than 100000 bytes"),
    "syntax": (b"optim: {", "while parsing"),
    "not a date": (b"run: 2001-99-99", "month must be in 1..12"),
    "digits": (b"run: 1" + b"0" * 5000, "limit"),
    "list": (b"- 1", "must hold a YAML mapping, got a list"),
    "scalar group": (b"optim: 3", "optim must be a mapping of options, got 3"),
    "preset": (b"preset: [1]", "preset must be a name, got [1]"),
    "unknown preset": (b"preset: x", "preset must be one of"),
    "base": (b"base: 1", "base must be a name, got 1"),
    "unknown base": (b"base: x", "x is neither a file nor a bundled recipe"),
    "unknown group": (b"config: x", "'config' is not one of base, preset,"),
    "unknown option": (b"data: {rot: 1}", "there is no option data.rot"),
    "type": (b"data: {root: 5}", "--data.root must be of type str, got 5"),
    "set": (b"model: {depths: !!set {1}}", "model.depths"),
    "tag": (b"run: !!python/object:os.system x", "could not determine a constructor"),
}


@pytest.mark.parametrize("name", HOSTILE_RECIPES)
def test_a_recipe_that_is_none(name, tmp_path, fails):
    content, message = HOSTILE_RECIPES[name]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(content)
    assert message in fails("train", "--config", str(recipe))
    (tmp_path / "config.yaml").write_bytes(content)  # as if the folder were a run's
    if name not in ("preset", "unknown preset", "unknown option", "set"):
        fails("eval", "--model", str(tmp_path))


def test_later_beats_earlier(tmp_path):
    """The preset, the recipes in their order, the options, wherever they stand."""
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("preset: stat_b64\nmodel:\n  window: 5\ndata:\n  views: [3, 3]\noptim:\n")
    two.write_text("data: {batch_size: 8}\nmodel: {frames: 8}\noptim: {lr: 5e-4}")
    groups = {"data": DataOptions, "model": STATConfig}

    def read(*argv):
        base = {"data": {"batch_size": 4, "flip": 0.0}}
        return read_options("train", "", groups, argv, base=base)

    found = read("--data.views", "2,1", "--config", str(one), f"--config={two}")
    assert found.preset == "stat_b64"
    assert (found.model.window, found.model.frames) == (5, 8)
    assert found.model.depths == STATConfig.preset("stat_b64").depths
    assert (found.data.views, found.data.batch_size, found.data.flip) == ((2, 1), 8, 0.0)
    found = read("--preset", "stat_tiny", "--config", str(two), "--config", str(one))
    assert found.preset == "stat_tiny"
    assert (found.model.window, found.model.image_size) == (5, 64)
    with pytest.raises(UserError, match=r"--config: expected one argument"):
        read("--config")


def test_a_recipe_changes_its_base(tmp_path):
    """Also through several files; a recipe given later changes what a base said, too."""
    one, two, three = (tmp_path / f"{name}.yaml" for name in ("one", "two", "three"))
    one.write_text("base: k400_b64\ndata: {views: [2, 3]}")
    two.write_text(f"base: {one}\ndata: {{flip: 0.0}}")
    three.write_text("data: {batch_size: 6}\nmodel: {window: 3}")

    def read(*names):
        argv = [word for name in names for word in ("--config", str(name))]
        return read_options("train", "", {"data": DataOptions, "model": STATConfig}, argv)

    found = read(two, three)
    assert found.model == replace(
        STATConfig.preset("stat_b64"), drop_path=0.2, dropout=0.5, window=3
    )
    assert (found.data.views, found.data.flip, found.data.batch_size) == ((2, 3), 0.0, 6)
    assert found.data.erasing == 0.25
    one.write_text(f"base: {two}")
    with pytest.raises(UserError, match=r"two\.yaml is its own base"):
        read(two)


def test_what_cannot_run_here_is_said_before_it_begins(run_folder, tmp_path, fails, monkeypatch):
    argv = ["--data.root", str(clips()), "--run.dir", str(tmp_path / "run")]
    other = fails("train", "--config", "clips_tiny", "--preset", "stat_b16", *argv)
    assert "data.short_side must be at least model.image_size 224, got 64" in other
    model = ["--model", str(run_folder)]
    uses = (["train", *TINY, *argv], ["eval", *model], *(
        [name, video(), *model] for name in ("predict", "attend")
    ))  # fmt: skip
    assert "model.backend='cuda' cannot" in fails(*uses[0], "--model.backend", "cuda")
    assert "must be one of cpu," in fails(*uses[0], "--model.backend", "abacus")
    for backend in ("cuda", "abacus"):
        monkeypatch.setenv("STAT_BACKEND", backend)
        assert all("STAT_BACKEND" in fails(*use) for use in uses)
    monkeypatch.delenv("STAT_BACKEND")
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.setenv(name, {"WORLD_SIZE": "2", "RANK": "first"}[name])
        assert "RANK must be a number, as torchrun sets it" in fails(*uses[1])
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_full_disk_is_named_with_the_file(run_folder, tmp_path, fails):
    argv = ["eval", "--model", str(run_folder), "--eval.dir", str(tmp_path)]
    (tmp_path / "per_class.csv").symlink_to("/dev/full")
    said = fails(*argv)
    assert f"cannot write to {tmp_path / 'per_class.csv'}: No space left on device" in said
    assert "(the disk mounted at /" in said


def test_every_question_has_its_own_folder(run_folder, tmp_path, fails):
    best, argv = run_folder / "best", ["eval", "--model", str(run_folder)]
    losses = set()
    for more, name in (
        ([], "eval"),
        (["--eval.reverse", "true"], "eval_reverse"),
        (["--eval.shuffle_frames", "true"], "eval_shuffle"),
        (["--data.views", "2,1"], "eval_2x1_views"),
        (["--data.val", "train.txt"], f"eval_{clips().name}_train"),
    ):
        assert main([*argv, *more]) == 0
        losses.add(json.loads((best / name / "eval.json").read_text())["loss"])
    assert len(losses) == 5
    others = tmp_path / "others"
    shutil.copytree(clips(), others)
    (others / "labels.txt").write_text("left\nup\n")
    said = fails(*argv, "--data.root", str(others))
    assert f"class 1 is 'right' for the model, but 'up' for the videos of data.val {others}" in said


def test_a_terminal_obeys_no_class_name(run_folder, tmp_path, capsys, fails):
    name = "\x1b[31mleft\u202e"
    shutil.copytree(run_folder / "best", tmp_path / "best")
    config = json.loads((tmp_path / "best" / "config.json").read_text())
    (tmp_path / "best" / "config.json").write_text(
        json.dumps({**config, "class_names": [name, "räts"]})
    )
    assert main(["predict", video(), "--model", str(tmp_path / "best")]) == 0
    printed = capsys.readouterr().out
    assert r"\x1b[31mleft\u202e" in printed
    assert "räts" in printed
    assert name[:2] not in printed
    assert "\x1b" not in fails(name)


def test_a_library_that_is_not_installed_is_named(monkeypatch, fails):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    said = "jsonargparse is not installed; pip install 'stat-kernels[train]'\n"
    assert fails("make-clips", "x") == f"stat-video: error: {said}"

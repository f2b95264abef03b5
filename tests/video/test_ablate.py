"""The ablation: the variants, a miniature run interrupted and resumed, its table and plot."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stat_video.analysis.ablate import VARIANTS
from stat_video.analysis.ablate_report import rows_of, table
from stat_video.cli import main
from stat_video.model.config import STATConfig
from stat_video.model.stat import STAT
from stat_video.train.optim import initialise
from stat_video.train.step import Updater

TRAINED = ["CA", "CA + SA + LA"]
RUNS = [(t, v, s) for s in (0, 1) for t in ("coherence", "return") for v in TRAINED]
MINIATURE = [
    *("--clips.train", "8", "--clips.val", "4", "--clips.frames", "8", "--clips.size", "32"),
    *("--model.frames", "4", "--model.stem_channels", "[4, 8]", "--model.depths", "[1]"),
    *("--model.dims", "[16]", "--model.num_heads", "[1]", "--data.batch_size", "4"),
    *("--optim.epochs", "1", "--optim.warmup_epochs", "0", "--run.threads", "1"),
    *("--ablate.seeds", "2", "--ablate.only", json.dumps(TRAINED)),
]


def arguments(folder, *more, jobs=1):
    return ["ablate", "--run.dir", str(folder), "--ablate.jobs", str(jobs), *MINIATURE, *more]


def ablate(folder, *more, jobs=1):
    return main(arguments(folder, *more, jobs=jobs))


def base(**changes):
    """The recipe's model."""
    import yaml

    from stat_video.settings import recipe_path

    recipe = yaml.safe_load(recipe_path("ablation").read_text())
    return STATConfig(**{**recipe["model"], "num_classes": 2, "backend": "reference", **changes})


def pooled(config, video):
    """What the last norm gets, the mean over the frames, with random weights."""
    torch.manual_seed(0)
    model, seen = STAT(config).double().eval(), []
    initialise(model, 1.0)
    with torch.no_grad():
        if model.temporal_position is not None:
            model.temporal_position.normal_()
        model.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        model(video.double())
    return seen[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_control_takes_frames_in_any_order(variant):
    """Whatever the weights it is at chance where classes have the same sets of frames."""
    config, video = base(**VARIANTS[variant]), torch.randn(1, 3, 16, 32, 32)
    shuffled = video[:, :, torch.randperm(16)]
    same = torch.allclose(pooled(config, video), pooled(config, shuffled), rtol=0, atol=1e-10)
    assert same == (variant == "order-blind")


@pytest.mark.parametrize("variant", VARIANTS)
def test_current_attention_alone_adds_frames_up(variant):
    """Exchange a frame between two clips: their sum stays only where no two frames meet."""
    config, clips = base(**VARIANTS[variant]), torch.randn(2, 3, 16, 32, 32)
    exchanged = clips.clone()
    exchanged[:, :, 3] = clips[:, :, 3].flip(0)
    before, after = pooled(config, clips).sum(0), pooled(config, exchanged).sum(0)
    assert torch.allclose(before, after, rtol=0, atol=1e-10) == (variant == "CA")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A miniature of two tasks, variants and seeds, interrupted in the fourth run, then resumed."""
    folder, steps, update = tmp_path_factory.mktemp("ablation"), [], Updater.update

    def update_and_signal(self, pieces, step, request):
        steps.append(step)
        if len(steps) == 7:  # the first of two steps of the fourth run
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, pieces, step, request)

    Updater.update = update_and_signal
    try:
        assert ablate(folder) == 128 + signal.SIGINT
        assert len(steps) == 7
        assert ablate(folder) == 0
    finally:
        Updater.update = update
    assert len(steps) == 2 * len(RUNS)  # none twice
    return folder


def test_the_results_of_all_runs(finished):
    results = json.loads((finished / "ablation.json").read_text())
    assert [(r["task"], r["variant"], r["seed"]) for r in results] == RUNS
    for result in results:
        options = result["options"]
        assert options["run"]["seed"] == result["seed"]
        assert Path(options["data"]["root"]) == finished / "clips" / result["task"]
        expected = {name: options["model"][name] for name in VARIANTS[result["variant"]]}
        assert expected == VARIANTS[result["variant"]]
        assert result["videos"] == 4
        for share in result["top1"].values():
            assert share * 4 == round(share * 4)
    by_variant = {r["variant"]: r for r in results}
    alone, everything = (by_variant[name] for name in TRAINED)
    assert alone["parameters"] == everything["parameters"]  # other frames' keys need no weights
    assert alone["multiply_adds"] < everything["multiply_adds"]


def test_the_table_and_the_plot(finished, capsys):
    text = (finished / "ablation.md").read_text()
    first, second = text.splitlines()[:6], text.splitlines()[7:13]
    assert first[0] == "**coherence**"
    assert second[0] == "**return**"
    for lines in (first, second):
        assert [line.split(" | ")[0] for line in lines[4:]] == [f"| {v}" for v in TRAINED]
    assert "of 4 clips" in text
    assert "chance is 50" in text
    assert (finished / "ablation.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert ablate(finished) == 0
    assert text.splitlines()[4] in capsys.readouterr().out


ONE_TASK = ["--ablate.tasks", '["return"]', "--ablate.seeds", "1"]
ENDLESS = [*ONE_TASK, "--optim.epochs", "10000", "--ablate.only", '["CA", "CA + SA"]']


@pytest.fixture
def started(monkeypatch):
    """The processes that were started, in order."""
    from multiprocessing.context import SpawnProcess

    processes, start = [], SpawnProcess.start

    def start_and_tell(self):
        start(self)
        processes.append(self)

    monkeypatch.setattr(SpawnProcess, "start", start_and_tell)
    return processes


def test_runs_at_once_give_what_they_give_one_by_one(finished, tmp_path, started, capfd):
    assert ablate(tmp_path, *ONE_TASK, jobs=2) == 0
    assert len(started) == len(TRAINED)
    assert "return, CA, seed 0: forward " in capfd.readouterr().out
    together = json.loads((tmp_path / "ablation.json").read_text())
    alone = json.loads((finished / "ablation.json").read_text())
    expected = {(r["variant"], r["seed"]): r["top1"] for r in alone if r["task"] == "return"}
    assert [r["variant"] for r in together] == TRAINED
    for result in together:
        assert result["top1"] == expected[result["variant"], 0]
    for folder in (tmp_path / "runs").iterdir():
        ours, theirs = (
            load_file(where / "runs" / folder.name / "best" / "model.safetensors")
            for where in (tmp_path, finished)
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_runs_at_once_are_saved_when_the_command_is_stopped(tmp_path, started):
    """Both saved by the signal that only the starting process gets, and gone on with later."""
    runs = [tmp_path / "runs" / f"return_{name}_seed_0" for name in ("CA", "CA___SA")]

    def stop_when_both_train():
        try:
            wait_for(*(run / "log.jsonl" for run in runs))
        finally:  # or the test would never end
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_both_train, daemon=True).start()
    assert ablate(tmp_path, *ENDLESS, jobs=2) == 128 + signal.SIGTERM
    assert [process.exitcode for process in started] == [128 + signal.SIGTERM] * 2
    for run in runs:
        assert list((run / "checkpoints").iterdir())
        assert not (run / "result.json").exists()


def test_runs_end_saved_when_the_command_is_killed(tmp_path):
    """SIGKILL leaves it no time to tell them; they see it themselves."""
    folder = tmp_path / "runs" / "return_CA_seed_0"
    argv = arguments(tmp_path, *ENDLESS, jobs=2)
    command = subprocess.Popen([sys.executable, "-m", "stat_video", *argv])
    wait_for(folder / "log.jsonl")
    runs = [pid for pid in processes_of(command.pid) if b"spawn_main" in of_process(pid, "cmdline")]
    assert len(runs) == 2
    command.kill()
    command.wait()
    deadline = time.monotonic() + 60
    while any(b"spawn_main" in of_process(pid, "cmdline") for pid in runs):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert list((folder / "checkpoints").iterdir())


def processes_of(parent):
    """Numbers of the processes that `parent` started."""
    states = (of_process(path.parent.name, "stat") for path in Path("/proc").glob("[0-9]*/stat"))
    parts = (state.rpartition(b")") for state in states if state)
    return [int(head.split()[0]) for head, _, tail in parts if int(tail.split()[1]) == parent]


def of_process(pid, what):
    """A file of /proc, empty once the process has ended."""
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def wait_for(*paths):
    """Until each file has content."""
    deadline = time.monotonic() + 300
    while not all(path.exists() and path.stat().st_size for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_failed_run_stops_the_others_and_is_named(tmp_path, started, capsys):
    folder = tmp_path / "runs" / "return_CA_seed_0"
    (folder / "config.yaml").mkdir(parents=True)
    (folder / ".stat-run").touch()
    assert ablate(tmp_path, *ENDLESS, jobs=2) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("stat-video: error: return, CA, seed 0: error: cannot write to ")
    assert "output.txt" in message
    assert not any(process.is_alive() for process in started)


def test_the_final_weights_are_scored_in_each_order(tmp_path, monkeypatch):
    """Against a model that knows the frames' order from the clip itself."""
    from stat_video.analysis import ablate as module

    seen = []

    def evaluate(model, loader, *args, title, **kwargs):
        seen.append((title, next(iter(loader)).clips[0]))
        return module_evaluate(model, loader, *args, title=title, **kwargs)

    module_evaluate = module.evaluate
    monkeypatch.setattr(module, "evaluate", evaluate)
    assert ablate(tmp_path, *ONE_TASK, "--ablate.only", '["CA"]') == 0
    clips = dict(seen)
    assert torch.equal(clips["forward"], clips["reverse"].flip(1))
    assert not torch.equal(clips["forward"], clips["shuffle"])
    order = [clips["shuffle"][:, t] for t in range(4)]
    assert all(any(torch.equal(f, clips["forward"][:, t]) for t in range(4)) for f in order)


def test_mean_and_spread():
    def result(variant, top1):
        orders = {"forward": top1, "reverse": 0.0, "shuffle": 0.5}
        costs = {"parameters": 1234, "multiply_adds": 2_500_000}
        return {"task": "return", "variant": variant, "top1": orders, **costs}

    rows = rows_of([result("A", 0.9), result("B", 0.5), result("A", 0.7), result("A", 0.8)])
    lines = table(rows["return"]).splitlines()
    assert lines[2] == "| A | 80.0 ± 10.0 | 0.0 ± 0.0 | 50.0 ± 0.0 | 70.0, 90.0 | 3 | 1,234 | 2.5 |"
    assert lines[3] == "| B | 50.0 | 0.0 | 50.0 | 50.0, 50.0 | 1 | 1,234 | 2.5 |"


def test_the_estimate_trains_nothing(finished, capsys):
    assert ablate(finished, "--ablate.estimate", "true") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:24].strip() for line in lines[-3:-1]] == TRAINED
    assert lines[-1].startswith("all 8 runs, 1 at a time: about ")
    assert len(list((finished / "runs").iterdir())) == len(RUNS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--optim.lr", "0.1"], "optim.lr was 0.001 and is 0.1 now"),
        (["--clips.drift", "0.3"], "were made with clips.drift 0.1, not 0.3"),
        (["--ablate.only", '["SA"]'], "ablate.only must be among 'CA', "),
        (["--ablate.seeds", "0"], "ablate.seeds must be at least 1, got 0"),
        (["--ablate.jobs", "-1"], "ablate.jobs must not be negative, got -1"),
        (["--ablate.tasks", "[]"], "ablate.tasks must name each task once, got []"),
        (["--clips.task", "order"], "clips.task"),
    ],
)
def test_mistakes(finished, argv, message, fails):
    assert message in fails(*arguments(finished, *argv))

"""The command for a GPU machine, as far as a machine without one goes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import attention, gpu, layer, train_step
from benchmarks.harness import ROOT, results

PASSES, FAILS = [sys.executable, "-c", "print(7)"], [sys.executable, "-c", "1 / 0"]


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.startswith("there is no GPU here")


@pytest.mark.parametrize("call", [1, 2])
def test_a_dry_run_lists_the_steps_of_a_call(call, capsys):
    assert gpu.main(["--dry-run", "--call", str(call)]) == 0
    text = capsys.readouterr().out
    for step in gpu.steps(False, results.RESULTS):
        assert (f"{call} {step.name}, " in text) == (step.call == call)


def test_timings_come_before_what_a_first_call_can_do_without():
    steps = gpu.steps(False, results.RESULTS)
    assert [step.call for step in steps] == sorted(step.call for step in steps)
    names = [step.name for step in steps]
    assert names.index("attention") < names.index("layer") < names.index("device tests")
    first = sum(step.seconds for step in steps if step.call == 1 and step.name != "build")
    assert first <= 60 * gpu.MINUTES + 60  # the build, about 2 minutes, takes the rest


def test_results_are_checked_before_anything_is_timed():
    """In a second call, too; and what compiles for minutes is not among the first call's steps."""
    steps = gpu.steps(False, results.RESULTS)
    calls = [[step for step in steps if step.call == call] for call in (1, 2)]
    names = [[step.name for step in call] for call in calls]
    assert names[0].index("oracle") < names[0].index("attention")
    assert names[1][0] == "device tests"
    for step in (calls[0][names[0].index("oracle")], calls[1][0]):
        for kernels in ("", "_pooling", "_mlp"):
            assert f"tests/kernels/test_gpu{kernels}.py" in step.command
    assert not any("compile" in step.command for step in calls[0])
    (layer,) = [step for step in calls[0] if step.name == "layer"]
    assert "--no-compile" in layer.command


def test_every_device_test_is_run_by_a_step():
    files = {f"tests/kernels/{p.name}" for p in (ROOT / "tests" / "kernels").glob("test_gpu*.py")}
    assert files <= {word for step in gpu.steps(False, results.RESULTS) for word in step.command}


def test_a_library_that_a_build_could_only_spoil_is_kept(monkeypatch):
    """With the kernels for this GPU, on a machine without nvcc."""
    monkeypatch.setattr(gpu, "_no_nvcc", lambda: "no nvcc was found")
    reasons = iter([None, "it was built without the CUDA kernels"])
    monkeypatch.setattr(gpu.dispatch, "unsupported_reason", lambda *call: next(reasons))
    assert "the library that is here has kernels" in gpu.steps(False, results.RESULTS)[0].missing
    assert gpu.steps(False, results.RESULTS)[0].missing is None


def test_a_rehearsal_has_steps_wherever_the_project_lies(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/home/gpu/venv/bin/python")
    names = {step.name for step in gpu.steps(True, results.RESULTS)}
    assert {"report", "attention", "profile", "train step", "layer"} <= names
    assert not names & {"oracle", "fragments", "device tests", "counters"}


@pytest.mark.parametrize("rehearsal", [False, True])
def test_every_benchmark_takes_its_options(rehearsal, capsys):
    """A dry run of each step's command; a stage that a preset lacks would end one at once."""
    benchmarks = {"attention": attention, "train_step": train_step, "layer": layer}
    seen = set()
    for step in gpu.steps(rehearsal, results.RESULTS):
        module = step.command[2].removeprefix("benchmarks.") if "-m" in step.command else ""
        if module in benchmarks:
            assert benchmarks[module].main([*step.command[3:], "--dry-run"]) == 0, step
            seen.add(module)
    assert seen == set(benchmarks)


@pytest.mark.parametrize(("command", "status"), [(PASSES, "passed"), (FAILS, "failed")])
def test_a_step_keeps_the_end_of_its_output(command, status):
    outcome = gpu.run_step(gpu.Step("a step", 1, 60, command), 60)
    assert outcome.status == status
    assert ("7" if status == "passed" else "ZeroDivisionError") in outcome.output


STOPPABLE = """
import signal, time
signal.signal(signal.SIGTERM, signal.default_int_handler)
print("begun", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("kept what there was")
"""


def test_a_step_that_takes_too_long_is_asked_to_stop(monkeypatch):
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0)
    outcome = gpu.run_step(gpu.Step("a step", 1, 60, [sys.executable, "-c", STOPPABLE]), 2.0)
    assert outcome.status == "out of time"
    assert outcome.output.splitlines() == ["begun", "kept what there was"]
    assert outcome.seconds < 30


def test_every_outcome_is_saved_and_only_failures_fail(tmp_path, capsys):
    steps = [
        gpu.Step("right", 1, 60, PASSES),
        gpu.Step("wrong", 1, 60, FAILS),
        gpu.Step("absent", 1, 60, PASSES, "it is not there"),
        gpu.Step("late", 1, 0, PASSES),
    ]
    assert gpu.run_call(steps, 5, "cpu", tmp_path) == 1
    (path,) = tmp_path.glob("*/*.json")
    found = results.read(path)
    assert found["complete"]
    status = {check["name"]: check["status"] for check in found["checks"]}
    assert status == {
        "right": "passed", "wrong": "failed", "absent": "skipped", "late": "out of time",
    }  # fmt: skip
    assert capsys.readouterr().err == "failed: wrong\n"


def test_an_interrupted_rehearsal_leaves_valid_results(tmp_path):
    """Killed in the middle: the outcomes so far and the cases measured so far are there."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(tmp_path)]
    command += ["--only", "report", "attention", "profile", "layer"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "stat")])
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.DEVNULL
    )
    end = time.monotonic() + 240
    while time.monotonic() < end and process.poll() is None:
        found = [json.loads(p.read_text()) for p in tmp_path.glob("*/*.json")]
        if any(result["benchmark"] == "attention" and result["cases"] for result in found):
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    found = {r["benchmark"]: r for r in map(results.read, tmp_path.glob("*/*.json"))}
    assert not found["gpu"]["complete"]
    assert found["gpu"]["checks"][0] | {"seconds": 0, "command": "", "output": ""} == {
        "name": "report", "status": "passed", "seconds": 0, "command": "", "output": "",
    }  # fmt: skip
    assert found["attention"]["cases"][0]["rows"]
    assert not list(tmp_path.rglob("*.part"))

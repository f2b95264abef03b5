"""The command for a GPU machine, as far as a machine without one goes."""

import json
import sys

import pytest
import torch

from benchmarks import gpu
from benchmarks.harness import cases as shapes
from benchmarks.harness import results

PASSES, FAILS = [sys.executable, "-c", "print(7)"], [sys.executable, "-c", "1 / 0"]


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_it_says_so(no_gpu, capsys):
    assert gpu.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("there is no GPU here")
    assert said.err.count("\n") == 1


def test_a_dry_run_lists_every_step(no_gpu, capsys):
    assert gpu.main(["--dry-run"]) == 0
    text = capsys.readouterr().out
    for step in gpu.checks():
        assert f"{step.name}: " in text
    for dtype, cases in gpu.TIMINGS:
        assert f"{cases} {dtype}: " in text
    assert "benchmarks.attention --device cuda" in text


def test_a_step_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "buidl"])
    assert "invalid choice: 'buidl'" in capsys.readouterr().err


def test_every_backend_is_checked_before_it_is_timed():
    names = {step.name: step for step in gpu.checks()}
    for backend in gpu.BACKENDS:
        for name in (backend, f"memcheck-{backend}"):
            assert names[name].backend == backend
    assert names["racecheck-cuda"].backend == "cuda"
    assert "not triton" in names["memcheck-cuda"].command[-1]
    assert names["fragments"].backend == "cuda"


def test_the_timed_cases_exist():
    for _, cases in gpu.TIMINGS:
        assert shapes.select([cases], "cuda")


def test_a_missing_tool_is_a_skipped_step(capsys):
    step = gpu.Step("memory checks", ["compute-sanitizer"], missing="it is not there")
    outcome = gpu.run_step(step)
    assert (outcome.status, outcome.output) == ("skipped", "it is not there")
    assert "it is not there" in capsys.readouterr().out


@pytest.mark.parametrize(("command", "status"), [(PASSES, "passed"), (FAILS, "failed")])
def test_a_step_keeps_the_end_of_its_output(command, status):
    outcome = gpu.run_step(gpu.Step("a step", command))
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
    outcome = gpu.run_step(gpu.Step("a step", [sys.executable, "-c", STOPPABLE]), seconds=1.5)
    assert outcome.status == "out of time"
    assert outcome.output.splitlines() == ["begun", "kept what there was"]
    assert outcome.seconds < 30


def test_no_step_begins_when_the_time_is_up():
    assert gpu.run_step(gpu.Step("a step", FAILS), seconds=1).status == "out of time"


# ---- a machine on which a step takes no time


TIMED = """
import pathlib, sys
from benchmarks.harness import results
found = results.new_result("attention", "cpu", {"backends": sys.argv[2:]})
found["cases"] = []
results.write(found, pathlib.Path(sys.argv[1]))
"""


@pytest.fixture
def a_gpu(monkeypatch, tmp_path):
    """Every check passes unless a test says otherwise, and the timings are one file."""
    steps = {name: gpu.Step(name, PASSES, name) for name in gpu.BACKENDS}
    monkeypatch.setattr(gpu, "checks", lambda: list(steps.values()))
    monkeypatch.setattr(gpu, "other_tests", lambda: gpu.Step("tests", PASSES))

    def timings(backends, folder):
        command = [sys.executable, "-c", TIMED, str(folder), *backends]
        return [gpu.Step("timed", command)]

    monkeypatch.setattr(gpu, "timings", timings)
    machine, times = results.machine("cpu"), iter(range(10))
    monkeypatch.setattr(results, "machine", lambda device: machine)
    clock = "2027-01-01T00000{}"
    monkeypatch.setattr(results.time, "strftime", lambda *_: clock.format(next(times)))
    return steps


def files(folder):
    """What was written, by its kind, in the order of the dates."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json"))]
    return {
        kind: [result for result in found if result["benchmark"] == kind]
        for kind in ("checks", "attention")
    }


def test_checks_and_timings_are_written(a_gpu, tmp_path):
    assert gpu.measure(["cuda", "triton", "timings", "tests"], 28, tmp_path) == 0
    found = files(tmp_path)
    checks = [check for result in found["checks"] for check in result["checks"]]
    assert [check["name"] for check in checks] == ["cuda", "triton", "tests"]
    (timed,) = found["attention"]
    assert timed["settings"] == {"backends": ["cuda", "triton"]}


def test_a_wrong_backend_is_not_timed(a_gpu, tmp_path):
    a_gpu["cuda"] = gpu.Step("cuda", FAILS, "cuda")
    assert gpu.measure(["cuda", "triton", "timings"], 28, tmp_path) == 1
    (timed,) = files(tmp_path)["attention"]
    assert timed["settings"] == {"backends": ["triton"]}


def test_no_timings_where_every_backend_is_wrong(a_gpu, tmp_path):
    for name in gpu.BACKENDS:
        a_gpu[name] = gpu.Step(name, FAILS, name)
    assert gpu.measure(["cuda", "triton", "timings"], 28, tmp_path) == 1
    found = files(tmp_path)
    assert not found["attention"]
    assert [check["status"] for check in found["checks"][0]["checks"]] == ["failed", "failed"]


def test_some_steps_only(a_gpu, tmp_path):
    assert gpu.measure(["triton"], 28, tmp_path) == 0
    found = files(tmp_path)
    assert [check["name"] for check in found["checks"][0]["checks"]] == ["triton"]
    assert not found["attention"]

"""The command for a GPU machine, as far as a machine without one goes."""

import json
import sys

import pytest
import torch

from benchmarks import gpu, results


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
    for step in gpu.steps():
        assert f"{step.name}: " in text
    assert "benchmarks.attention --device cuda" in text


def test_a_missing_tool_is_a_skipped_step():
    step = gpu.Step("memory checks", ["compute-sanitizer"], True, "it is not there")
    outcome = gpu.run_step(step)
    assert (outcome.status, outcome.output) == ("skipped", "it is not there")


@pytest.mark.parametrize(("code", "status"), [("print(7)", "passed"), ("1 / 0", "failed")])
def test_a_step_keeps_the_end_of_its_output(code, status):
    outcome = gpu.run_step(gpu.Step("a step", [sys.executable, "-c", code], True))
    assert outcome.status == status
    assert ("7" if status == "passed" else "ZeroDivisionError") in outcome.output


@pytest.fixture
def a_gpu(monkeypatch, tmp_path):
    """A machine on which the timings write a result at once and every check passes."""
    monkeypatch.setattr(gpu, "steps", lambda: [gpu.Step("tests", ["true"], True)])

    def timings(cases, folder):
        code = (
            "import json, pathlib, sys\n"
            "from benchmarks import results\n"
            "found = results.new_result('attention', 'cpu', {})\n"
            "found['cases'] = []\n"
            "results.write(found, pathlib.Path(sys.argv[1]))"
        )
        return [sys.executable, "-c", code, str(folder)]

    monkeypatch.setattr(gpu, "timing_command", timings)
    machine = results.machine("cpu")
    monkeypatch.setattr(results, "machine", lambda device: machine)
    return tmp_path


def test_checks_and_timings_are_one_file(a_gpu):
    assert gpu.measure(["a case"], a_gpu) == 0
    (path,) = a_gpu.glob("*/*.json")
    found = json.loads(path.read_text())
    assert found["benchmark"] == "attention"
    assert [check["status"] for check in found["checks"]] == ["passed"]


def test_a_wrong_kernel_is_not_timed(a_gpu, monkeypatch):
    monkeypatch.setattr(gpu, "steps", lambda: [gpu.Step("tests", ["false"], True)])
    assert gpu.measure(["a case"], a_gpu) == 1
    (path,) = a_gpu.glob("*/*.json")
    found = json.loads(path.read_text())
    assert found["benchmark"] == "checks"
    assert "cases" not in found

"""The commands end to end, at sizes that take a second; what is measured does not matter here."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import attention, floors, layer, timing, train_step
from stat_kernels import dispatch

SMALL = ["--cases", "tiny-stage2", "--rounds", "2", "--peers", "eager", "--no-memory"]
SMALL += ["--dtypes", "float32", "float64"]


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """Measuring the machine takes seconds; the tests of floors do it once."""
    known = floors.Rates(1e10, dict.fromkeys(("float32", "float64"), 100000000000.0))
    monkeypatch.setattr(floors, "measure_rates", lambda *args: known)


def _only_result(folder):
    (path,) = folder.glob("*/*.json")
    return json.loads(path.read_text())


def test_attention_writes_what_it_measured(tmp_path, capsys):
    assert attention.main([*SMALL, "--backends", "reference", "--out", str(tmp_path)]) == 0
    found = _only_result(tmp_path)
    assert found["complete"]
    assert [e["dtype"] for e in found["cases"]] == ["float32", "float64"]
    for entry in found["cases"]:
        assert [r["candidate"] for r in entry["rows"]] == ["reference", "eager"]
        for row in entry["rows"]:
            assert row["forward"]["time"]["samples"] == 2
            assert row["forward+backward"]["time"]["median_ms"] > 0
        assert entry["rows"][0]["same_bits"]["twice"]
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["rates"]["copy_bytes_per_s"] == 1e10
    printed = capsys.readouterr().out
    assert "tiny-stage2, float64" in printed
    assert "Geometric means" in printed


def test_an_interruption_keeps_what_was_measured(tmp_path, monkeypatch):
    """Ctrl-C in the second pass: the first one's samples are in the file, marked incomplete."""
    real, passes = timing.interleave, []

    def interrupted(*args, **options):
        passes.append(args)
        if len(passes) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr("benchmarks.attention.timing.interleave", interrupted)
    assert attention.main([*SMALL, "--out", str(tmp_path)]) == 130
    found = _only_result(tmp_path)
    assert not found["complete"]
    rows = [r for e in found["cases"] for r in e["rows"] if r["status"] == "ok"]
    assert rows
    assert all("forward" in r and "forward+backward" not in r for r in rows)


def test_dry_runs_run_nothing(tmp_path, capsys):
    for command in (attention, layer, train_step):
        assert command.main(["--dry-run", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "b64-stage1" in printed
    assert "SDPA grouped, compiled" in printed
    assert "stat_b64 stage 3 reference" in printed
    assert "stat_tiny reference, compile" in printed
    assert not list(tmp_path.iterdir())


def test_an_unknown_case_is_an_error(capsys):
    assert attention.main(["--cases", "b65"]) == 2
    assert "no case matches 'b65'" in capsys.readouterr().err


def test_layer_accounts_for_a_block(tmp_path, capsys):
    options = ["--presets", "stat_tiny", "--stages", "2", "--rounds", "1"]
    assert layer.main([*options, "--out", str(tmp_path)]) == 0
    (entry,) = _only_result(tmp_path)["cases"]
    names = {r["candidate"] for r in entry["rows"]}
    assert {"norms", "projections", "pooling", "MLP"} <= names
    assert {f"attention, {n}" for n in dispatch.names()} & names
    printed = capsys.readouterr().out
    assert "block with reference" in printed
    assert "None" not in printed


def test_train_step_compares_losses(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_step, "LOSS_STEPS", 2)
    options = ["--presets", "stat_tiny", "--rounds", "1", "--modes", "eager", "--no-memory"]
    assert train_step.main([*options, "--out", str(tmp_path)]) == 0
    (entry,) = _only_result(tmp_path)["cases"]
    for row in (r for r in entry["rows"] if r["status"] == "ok"):
        assert row["same_losses"]
        assert len(row["losses"]) == 2
        assert row["clips_per_s"] > 0
        assert 0 < row["model_flop_utilisation"] < 2
    assert "clips/s" in capsys.readouterr().out


def test_the_kernel_benchmark_needs_no_more_than_torch_and_numpy():
    """On a GPU machine without a network there is nothing else."""
    code = (
        "import sys\n"
        "for name in ('tqdm', 'stat_video', 'huggingface_hub', 'safetensors', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "from benchmarks import attention, compare, memory\n"
        "sys.exit(attention.main(['--dry-run']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""The commands end to end, at sizes that take a second; what is measured does not matter here."""

import json

import pytest
import torch

from benchmarks import attention, layer, train_step
from benchmarks.harness import blocks, floors, memory, timing
from stat_kernels import dispatch

SMALL = ["--cases", "tiny-stage2", "--rounds", "2", "--peers", "eager", "--no-memory"]
SMALL += ["--dtypes", "float32", "float64"]
BLOCK = ["--presets", "stat_tiny", "--stages", "2", "--rounds", "1"]
STEP = ["--presets", "stat_tiny", "--modes", "eager", "--no-memory"]


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


def result_of(command, options, folder, code=0):
    """What a command that ends with this code has left."""
    assert command.main([*options, "--out", str(folder)]) == code
    return only_result(folder)


def only_result(folder):
    (path,) = folder.glob("*/*.json")
    return json.loads(path.read_text())


def rows_of(entry):
    return {row["candidate"]: row for row in entry["rows"]}


def test_attention_writes_what_it_measured(tmp_path, capsys):
    found = result_of(attention, [*SMALL, "--backends", "reference"], tmp_path)
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
    assert "No geometric means" in printed


def test_an_interruption_keeps_what_was_measured(tmp_path, monkeypatch):
    """Ctrl-C in the second pass: the first one's samples are in the file, marked incomplete."""
    real, passes = timing.interleave, []

    def interrupted(*args, **options):
        passes.append(args)
        if len(passes) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr("benchmarks.attention.timing.interleave", interrupted)
    found = result_of(attention, SMALL, tmp_path, 130)
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
    assert "stat_tiny: 20 steps of 2 GFLOP on each path" in printed
    assert "    reference, compile" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "options", "sentence"),
    [
        (attention, ["--cases", "b65"], "no case matches 'b65'"),
        (attention, ["--backends", "cuda9"], "backend must be one of"),
        (layer, ["--presets", "stat_b65"], "preset must be one of"),
        (layer, ["--stages", "4"], "stage must be 1 to 3 for stat_b64, got 4"),
        (train_step, ["--backends", "cuda9"], "backend must be one of"),
        (train_step, ["--dtype", "float33"], "dtype must be a torch dtype's name, got 'float33'"),
    ],
)
def test_unknown_names_are_errors(command, options, sentence, capsys):
    assert command.main([*options, "--dry-run"]) == 2
    assert sentence in capsys.readouterr().err


@pytest.fixture
def broken_backend(monkeypatch):
    """The reference stands for a backend that takes a case and then raises."""
    from stat_kernels import functional

    right = functional.shrinking_temporal_attention_reference

    def broken(q, *others, **options):
        if q.dtype == torch.float64:  # the oracle's own call
            return right(q, *others, **options)
        raise RuntimeError("an illegal memory access\nand its stack")

    monkeypatch.setattr(functional, "shrinking_temporal_attention_reference", broken)


def test_a_backend_that_raises_fails_and_the_others_go_on(broken_backend, tmp_path, capsys):
    options = [*SMALL, "--backends", "reference", "--dtypes", "float32"]
    found = result_of(attention, options, tmp_path, 1)
    assert found["complete"]
    rows = rows_of(found["cases"][0])
    assert rows["reference"]["status"] == "failed"
    assert rows["reference"]["reason"] == "RuntimeError: an illegal memory access"
    assert rows["eager"]["forward"]["time"]["samples"] == 2
    sentence = "failed: tiny-stage2 float32 reference: RuntimeError: an illegal memory access"
    assert sentence in capsys.readouterr().err


def test_a_block_that_raises_fails(broken_backend, tmp_path, capsys):
    options = [*BLOCK, "--no-compile", "--no-memory", "--backends", "cpu", "reference"]
    rows = rows_of(result_of(layer, options, tmp_path, 1)["cases"][0])
    assert rows["block, reference"]["status"] == "failed"
    assert rows["pooling"]["forward"]["time"]["samples"] == 1
    assert "block, reference: RuntimeError: an illegal" in capsys.readouterr().out


def test_an_exception_keeps_what_was_measured(tmp_path, monkeypatch):
    def out_of_memory(*args):
        raise MemoryError("no more")

    monkeypatch.setattr("benchmarks.attention.verify.same_bits", out_of_memory)
    options = [*SMALL, "--backends", "reference", "--out", str(tmp_path)]
    with pytest.raises(MemoryError, match="no more"):
        attention.main(options)
    found = only_result(tmp_path)
    assert not found["complete"]
    assert found["cases"][0]["rows"][0]["forward+backward"]["time"]["samples"] == 2


def test_times_are_kept_where_memory_cannot_be_measured(tmp_path, monkeypatch, capsys):
    def fails(*args):
        raise RuntimeError("measuring memory failed: killed")

    monkeypatch.setattr("benchmarks.attention.memory.can_measure_cpu", lambda: True)
    monkeypatch.setattr("benchmarks.attention.memory.extra_cpu_bytes", fails)
    options = [option for option in SMALL if option != "--no-memory"]
    found = result_of(attention, [*options, "--backends", "reference"], tmp_path)
    assert found["complete"]
    assert "tiny-stage2: no memory figures: measuring memory" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["output", "grad of attn.qkv.weight"])
def test_a_wrong_block_is_not_timed(wrong, monkeypatch, tmp_path):
    """Off by 1 % of the right value, in one of them: far above float32's rounding."""
    both_call, checked = blocks.both_call, []
    place = {"output": 0, "grad of attn.qkv.weight": 4}[wrong]

    def off(*piece, with_outputs=False):
        call = both_call(*piece, with_outputs=with_outputs)

        def called():
            found = list(call())
            if with_outputs and found[0].dtype == torch.float32:
                checked.append(found)
                if len(checked) == 2:  # the first is the reference's, whose error sets the bound
                    found[place] = found[place] * 1.01
            return found

        return called

    monkeypatch.setattr(blocks, "both_call", off)
    options = ["--presets", "stat_tiny", "--stages", "1", "--first", "--rounds", "1"]
    options += ["--backends", "cpu", "reference", "--no-compile", "--no-memory"]
    (entry,) = result_of(layer, options, tmp_path, code=1)["cases"]
    rows = rows_of(entry)
    assert rows["block, cpu"]["status"] == "wrong"
    assert f"WRONG, not timed: {wrong}: RMS error" in rows["block, cpu"]["reason"]
    assert rows["block, reference"]["status"] == "ok"
    assert "layer, cpu" not in rows


def test_layer_accounts_for_a_block(tmp_path, capsys):
    options = [*BLOCK, "--no-compile", "--no-memory", "--autocast"]
    first, entry = result_of(layer, options, tmp_path)["cases"]
    assert first["case"] == "stat_tiny stage 2, first block"
    names = rows_of(entry).keys()
    by_backend = {
        f"{part}, {name}" for part in ("projections", "MLP") for name in ("cpu", "reference")
    }
    assert {"norms", "pooling"} | by_backend <= names
    assert {"layer, cpu", "composite, cpu", "layer, reference"} <= names
    assert {f"attention, {n}" for n in dispatch.names()} & names
    printed = capsys.readouterr().out
    assert "block with reference" in printed
    assert "layer, cpu, over composite" in printed
    assert "None" not in printed


def test_layer_compiles_its_peers_and_measures_memory(tmp_path, monkeypatch, capsys):
    """Memory of one candidate: each is measured in a process of its own, which takes seconds."""
    real = memory.run_fresh

    def one_candidate(module, arguments):
        return real(module, arguments) if arguments[-1] == "layer, cpu" else 1 << 20

    monkeypatch.setattr(memory, "run_fresh", one_candidate)
    options = [*BLOCK, "--first", "--backends", "cpu", "reference"]
    (entry,) = result_of(layer, options, tmp_path)["cases"]
    rows = rows_of(entry)
    for peer in ("composite, cpu, compiled", "layer, reference, compiled"):
        assert rows[peer]["status"] == "ok"
        assert rows[peer]["forward+backward"]["time"]["median_ms"] > 0
    if memory.can_measure_cpu():
        sizes = [rows[n]["extra_memory_bytes"] for n in ("layer, cpu", "composite, cpu")]
        assert min(sizes) > 0  # the preset is too small for more
    printed = capsys.readouterr().out
    assert "layer, cpu, over compiled repeated keys" in printed
    assert "extra memory over composite's" in printed


def test_train_step_compares_losses(tmp_path, capsys):
    (entry,) = result_of(train_step, [*STEP, "--rounds", "1", "--mvit"], tmp_path)["cases"]
    mvit = entry["rows"].pop()
    assert (mvit["candidate"], mvit["status"]) == ("mvit_v1_b, eager", "ok")
    assert mvit["clips_per_s"] > 0
    assert "same_losses" not in mvit
    for row in (r for r in entry["rows"] if r["status"] == "ok"):
        assert row["same_losses"]
        assert row["loss_steps"] == len(row["losses"]) == 1 + train_step.STEPS_BEFORE_ROUNDS
        assert row["losses"][0] > row["losses"][-1]
        assert row["clips_per_s"] > 0
        assert 0 < row["model_flop_utilisation"] < 2
    assert "clips/s" in capsys.readouterr().out


def test_train_step_tells_other_losses_and_a_backend_that_raises(tmp_path, monkeypatch, capsys):
    """One path learns from other clips; another cannot make its first step."""
    real = train_step.models.make_clips

    class Odd(train_step.Trainer):
        def __init__(self, preset, backend, mode, options):
            super().__init__(preset, backend, mode, options)
            if backend == "cpu":
                self.clips = real(preset, options.batch, "cpu", seed=9)[0]
            if backend == "triton":
                raise NotImplementedError("a line\nfile.cpp:1: error: 'x' was not declared")

    monkeypatch.setattr(train_step, "Trainer", Odd)
    monkeypatch.setattr(dispatch, "unsupported_reason", lambda *args: None)
    options = [*STEP, "--rounds", "1", "--backends", "cpu", "triton", "reference"]
    rows = rows_of(result_of(train_step, options, tmp_path, 1)["cases"][0])
    assert rows["cpu, eager"]["same_losses"] is False
    assert rows["reference, eager"]["same_losses"] is True
    reason = "NotImplementedError: a line: 'x' was not declared"
    assert (rows["triton, eager"]["status"], rows["triton, eager"]["reason"]) == ("failed", reason)
    assert "cpu, eager: its losses are not the reference's" in capsys.readouterr().err


def test_an_interrupted_training_keeps_its_steps(tmp_path, monkeypatch):
    real = timing.time_wall
    steps = []

    def interrupted(call):
        steps.append(call)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return real(call)

    monkeypatch.setattr(timing, "time_wall", interrupted)
    found = result_of(train_step, [*STEP, "--backends", "reference"], tmp_path, 130)
    assert not found["complete"]
    (row,) = found["cases"][0]["rows"]
    assert row["step"]["wall"]["samples"] == 2  # the first of the four was the estimate
    assert row["clips_per_s"] > 0

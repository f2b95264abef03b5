"""What counts as a regression, and what the command says of it."""

import json
from copy import deepcopy

import pytest

from benchmarks import compare
from tests.benchmarks.sample_results import attention_cases, quantiles, result


@pytest.fixture
def old():
    return result(attention_cases())


def _change(new, case, candidate, **fields):
    (entry,) = [e for e in new["cases"] if (e["case"], e["dtype"]) == (case, "float32")]
    (row,) = [r for r in entry["rows"] if r["candidate"] == candidate]
    row |= fields


def _run(tmp_path, old, new, *options):
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, content in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps(content))
    return compare.main([*map(str, paths), *options])


def test_the_same_result_has_no_regression(tmp_path, old, capsys):
    assert _run(tmp_path, old, deepcopy(old)) == 0
    assert "no regression beyond the noise" in capsys.readouterr().out


def test_a_slower_backend_is_named(tmp_path, old, capsys):
    new = deepcopy(old)
    _change(new, "b64-stage2", "cpu", forward={"time": quantiles(22.0)})
    assert _run(tmp_path, old, new) == 1
    printed = capsys.readouterr().out
    assert "regression: b64-stage2 float32 cpu: forward time, 1.10x the old time" in printed
    assert printed.count("regression:") == 1


def test_a_change_within_the_spread_is_noise(tmp_path, old):
    new = deepcopy(old)
    _change(new, "b64-stage2", "cpu", forward={"time": quantiles(22.0, spread=0.1)})
    assert _run(tmp_path, old, new) == 0


def test_the_tolerance_is_the_callers(tmp_path, old):
    new = deepcopy(old)
    _change(new, "b64-stage2", "cpu", forward={"time": quantiles(22.0)})
    assert _run(tmp_path, old, new, "--tolerance", "0.2") == 0


def test_a_slower_peer_is_shown_and_forgiven(tmp_path, old, capsys):
    new = deepcopy(old)
    for case in ("b64-stage1", "b64-stage2", "b64-stage3"):
        for peer in ("eager", "SDPA masked"):
            _change(new, case, peer, forward={"time": quantiles(400.0)})
    assert _run(tmp_path, old, new) == 0
    printed = capsys.readouterr().out
    assert "slower" in printed
    assert "peers, which tell of the machine" in printed


def test_a_backend_that_became_wrong_or_hungry_is_a_regression(tmp_path, old, capsys):
    new = deepcopy(old)
    _change(new, "b64-stage1", "cpu", status="wrong", reason="out: error")
    memory = {"forward": 1 << 20, "forward+backward": 9 << 20}
    _change(new, "b64-stage2", "cpu", extra_memory_bytes=memory)
    assert _run(tmp_path, old, new) == 1
    printed = capsys.readouterr().out
    assert "b64-stage1 float32 cpu: wrong, out: error" in printed
    assert "b64-stage2 float32 cpu: forward+backward needs 9.0 MiB, was 2.0" in printed


def test_a_broken_promise_is_a_regression(tmp_path, old, capsys):
    _change(old, "b64-stage1", "cpu", same_bits={"twice": True, "4 threads": True})
    new = deepcopy(old)
    _change(new, "b64-stage1", "cpu", same_bits={"twice": True, "4 threads": False})
    assert _run(tmp_path, old, new) == 1
    assert "b64-stage1 float32 cpu: no longer the same bits (4 threads)" in capsys.readouterr().out


def test_losses_that_part_are_a_regression(old):
    _change(old, "b64-stage1", "cpu", same_losses=True)
    new = deepcopy(old)
    _change(new, "b64-stage1", "cpu", same_losses=False)
    sentence = "b64-stage1 float32 cpu: its losses are no longer the reference's"
    assert compare.faults(old, new) == [sentence]


def test_a_backend_that_is_gone_is_a_warning(tmp_path, old, capsys):
    new = deepcopy(old)
    for entry in new["cases"]:
        entry["rows"] = [r for r in entry["rows"] if r["candidate"] != "cpu"]
    assert _run(tmp_path, old, new) == 0
    assert "warning: b64-stage1 float32 cpu is in the old result only" in capsys.readouterr().out


def test_nothing_in_common_is_no_comparison(tmp_path, old, capsys):
    assert _run(tmp_path, old, result([])) == 2
    assert "no case with a candidate in common" in capsys.readouterr().err


def test_ratio_and_spread(old):
    new = deepcopy(old)
    _change(new, "b64-stage1", "cpu", forward={"time": quantiles(5.0, spread=0.1)})
    (change,) = [c for c in compare.changes(old, new) if c.ratio != 1]
    assert change.ratio == pytest.approx(0.5)
    assert (change.low, change.high) == pytest.approx((4.5 / 10.2, 5.5 / 9.8))
    assert change.improved()
    assert not change.regressed()


def test_files_that_cannot_be_compared(tmp_path, old, capsys):
    assert _run(tmp_path, old, result([], benchmark="layer")) == 2
    assert _run(tmp_path, old, {"schema": 99}) == 2
    assert "must be a result file of schema" in capsys.readouterr().err
    assert compare.main([str(tmp_path / "none.json"), str(tmp_path / "new.json")]) == 2


def test_another_machine_is_a_warning(old):
    new = deepcopy(old)
    new["machine"]["threads"] = 8
    assert "warning: threads was 2, is 8" in compare.report(old, new, 0.03)[0]

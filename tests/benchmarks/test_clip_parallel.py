"""The benchmark of shared clips: what is measured agrees with the formulas of the plan."""

from dataclasses import replace

from benchmarks import clip_parallel
from stat_video.model.config import STATConfig


def test_two_processes_receive_what_the_formula_says():
    result = {"cases": []}
    clip_parallel.measure(result, [2], [6])
    [entry] = result["cases"]
    token = 2 * clip_parallel.DIM * 4  # key and value in float32
    for row in entry["rows"]:
        assert row["status"] == "ok", row
        # three frames of 16 short keys and one long key each; the window reaches all three
        assert row["forward_bytes"] == row["backward_bytes"] == 3 * (16 + 1) * token
        assert row["peak_bytes"] > 0
    assert [row["candidate"] for row in entry["rows"]] == ["shared", "all keys"]
    assert "6, 2" in clip_parallel.table(result)


def test_a_wrong_result_is_a_failure():
    row = {"candidate": "shared", "kind": "ours", "status": "wrong", "reason": "differs by 1"}
    result = {"cases": [{"case": "T6-P2", "dtype": "float32", "rows": [row]}]}
    assert clip_parallel.results.failures(result) == ["T6-P2 float32 shared: differs by 1"]


def test_the_plan_s_bytes_by_hand():
    config = replace(STATConfig.preset("stat_b64"), frames=256, window=7)  # 128 frames of tokens
    found = clip_parallel.received_bytes(config, 4)
    channels = 6 * 192 + 5 * 384 + 4 * 768
    assert found["long"] == 96 * channels * 2 * 2
    assert found["halo"] == 6 * 16 * channels * 2 * 2
    assert found["all short keys"] == 96 * 16 * channels * 2 * 2
    assert found["all tokens"] > 10 * found["all short keys"]
    assert "arithmetic, not a measurement" in clip_parallel.plan(256, 1, clip_parallel.Rates())

"""The benchmarks' named cases are the contract's sizes, and floors count what they must."""

import pytest
import torch

from benchmarks.harness import floors
from benchmarks.harness.cases import SUMMARY, all_cases, select
from stat_kernels.testing import Case


def test_the_summary_is_of_the_stages_at_64_frames():
    expected = [Case(1, 32, nq, h, 96, 49, 16, 32, 7) for nq, h in ((785, 2), (197, 4), (50, 8))]
    assert [named.case for named in select(["quick"])] == expected


def test_presets_batches_variants_and_growth_are_there():
    names = all_cases("cuda")
    assert {"b16-stage1", "b32-stage2", "b64-stage3-large", "vit-frames8", "tiny-stage2"} <= {
        *names
    }
    assert names["b64-stage1-batch8"].case.B == 8
    assert names["b64-stage1-large"].case.Nc == 196
    assert names["vit-frames8"].case.Nq == 197
    assert [names[f"growth-{f:03d}"].case.T for f in (8, 64, 256)] == [4, 32, 128]


def test_select_takes_globs_once_each_in_order():
    names = [named.name for named in select(["b64-stage3", "b64-stage?", "quick"])]
    assert names == list(SUMMARY)
    with pytest.raises(ValueError, match="no case matches 'b65"):
        select(["b65-*"])


def test_work_by_hand():
    case = Case(B=2, T=3, Nq=5, H=2, D=8, Nc=4, Ns=3, L=3, window=3)
    q, cur, short, long = (
        2 * 3 * 5 * 2 * 8, 2 * 3 * 4 * 2 * 8, 2 * 3 * 3 * 2 * 8, 2 * 3 * 2 * 8,
    )  # fmt: skip
    keys = 3 * 4 + (1 + 2 + 1) * 3 + 3 * 3  # of one clip: own frame, neighbours, class tokens
    forward = floors.forward_work(case, torch.bfloat16)
    assert forward.read_bytes == 2 * (q + 2 * (cur + short + long))
    assert forward.written_bytes == 2 * q
    assert forward.flops == 2 * 2 * 8 * (2 * 2 * 5 * keys)
    backward = floors.backward_work(case, torch.bfloat16)
    assert backward.read_bytes == forward.read_bytes + 2 * 2 * q + 4 * 2 * 3 * 2 * 5
    assert backward.written_bytes == forward.read_bytes
    assert backward.flops == forward.flops * 5 // 2


def test_the_floor_is_the_larger_of_bytes_and_flops():
    work = floors.Work(read_bytes=600, written_bytes=400, flops=5000)
    slow_copy = floors.Rates(1e3, {"float32": 1e6})
    assert floors.floor_ms(work, slow_copy, torch.float32) == pytest.approx(1e3)
    slow_matmul = floors.Rates(1e9, {"float32": 1e3})
    assert floors.floor_ms(work, slow_matmul, torch.float32) == pytest.approx(5e3)
    case = Case()
    both = floors.floors_ms(case, slow_matmul, torch.float32)
    assert both["forward+backward"] == pytest.approx(3.5 * both["forward"])


def test_rates_come_from_the_timer():
    rates = floors.measure_rates("cpu", [torch.float32], lambda call: 1e3, rounds=1)
    assert rates.copy_bytes_per_s == 2 * (256 << 20)
    assert rates.matmul_flops_per_s == {"float32": 2 * 2048**3}


def test_the_better_of_two_measurements_counts():
    one = floors.Rates(1e10, {"float32": 2e11, "bfloat16": 1e11})
    other = floors.Rates(2e10, {"float32": 1e11, "bfloat16": 4e11})
    assert floors.better(one, other) == floors.Rates(2e10, {"float32": 2e11, "bfloat16": 4e11})

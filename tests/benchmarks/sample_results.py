"""Made-up benchmark results for the tests of what reads them."""

from copy import deepcopy

from benchmarks.harness.cases import SUMMARY
from benchmarks.harness.results import SCHEMA

PASSES = ("forward", "forward+backward")


def quantiles(median_ms, spread=0.02):
    """A sample set around a median."""
    low, high = median_ms * (1 - spread), median_ms * (1 + spread)
    found = {"min_ms": low, "q1_ms": low, "median_ms": median_ms, "q3_ms": high, "max_ms": high}
    return {"samples": 9, **found}


def row(candidate, kind, forward_ms, both_ms, extra=(0, 0)):
    """A candidate that ran."""
    times = {p: {"time": quantiles(t)} for p, t in zip(PASSES, (forward_ms, both_ms), strict=True)}
    memory = dict(zip(PASSES, extra, strict=True))
    found = {"candidate": candidate, "kind": kind, "status": "ok", "extra_memory_bytes": memory}
    return found | times | {"relative_errors": {"out": 1e-7}}


def entry(case, dtype, rows, floor_ms=8.0):
    """A case in one dtype."""
    work = {"read_bytes": 10**6, "written_bytes": 10**6, "flops": 10**9}
    return {
        "case": case,
        "about": "made up",
        "sizes_text": "B1",
        "dtype": dtype,
        "work": {"forward": work, "backward": work},
        "floors_ms": {"forward": floor_ms, "forward+backward": 3 * floor_ms},
        "rows": rows,
    }


def result(cases, date="2026-01-02T030405", benchmark="attention", device="cpu"):
    """A complete result."""
    machine = {"device": device, "name": "A CPU", "cores": 2, "threads": 2, "torch": "2.11"}
    machine |= {"cpu_capability": "AVX2", "native_library": {"instruction_set": "avx2"}}
    return {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "date": date,
        "commit": "0123abc",
        "machine": machine,
        "settings": {"dtypes": ["float32", "bfloat16"], "peers": ["*"]},
        "rates": {"copy_bytes_per_s": 4e10, "matmul_flops_per_s": {"float32": 1e11}},
        "complete": True,
        "cases": deepcopy(cases),
    }


def attention_cases():
    """The three cases of the summary in two dtypes: 2x the best peer, 4x eager."""
    cases = []
    for i, case in enumerate(SUMMARY, 1):
        rows = [
            row("cpu", "backend", 10.0 * i, 30.0 * i, (1 << 20, i << 20)),
            row("eager", "peer", 40.0 * i, 120.0 * i),
            row("SDPA masked", "peer", 20.0 * i, 90.0 * i),
            {"candidate": "odd", "kind": "peer", "status": "wrong", "reason": "WRONG"},
        ]
        cases.append(entry(case, "float32", rows, floor_ms=8.0 * i))
        rows = [row("cpu", "backend", 5.0 * i, 33.0 * i), row("eager", "peer", 40.0 * i, 99.0 * i)]
        cases.append(entry(case, "bfloat16", rows, floor_ms=2.0 * i))
    return cases


def growth_cases(exponent=1.0):
    """Frames 8 to 256 with times and memory that follow power laws exactly."""
    cases = []
    for frames in (8, 16, 32, 64, 128, 256):
        ours = frames**exponent
        rows = [
            row("cpu", "backend", ours, 3 * ours, (1, frames << 20)),
            row("eager", "peer", frames**1.5, 3 * frames**1.5, (1, frames**2 << 20)),
        ]
        cases.append(entry(f"growth-{frames:03d}", "float32", rows))
    return cases

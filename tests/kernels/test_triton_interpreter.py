"""The Triton kernels in Triton's interpreter: against the oracle, and with bugs planted in them."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("triton_interpreted.py")
PACKAGE = ROOT / "stat_kernels" / "backends" / "triton"
GROUPS = [
    "float32",
    "float16",
    "bfloat16",
    "parts_and_tails",
    "windows",
    "one_buffer",
    "counted",
    "strides",
    "numbers",
    "reach",
    "traced",
    "pooling",
    "pooling_16_bits",
    "core",
    "mlp",
]


def interpret(*arguments, code=None):
    """A process in which Triton interprets; its kernels may crash it."""
    command = [
        sys.executable,
        *(["-c", code] if code else ["-m", "tests.kernels.triton_interpreted"]),
        *arguments,
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "STAT_BACKEND": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.mark.parametrize("group", GROUPS)
def test_matches_the_oracle(group):
    done = interpret(group)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reached the end" in done.stdout


def test_every_group_is_run():
    text = "".join(SCRIPT.read_text().split())
    assert f"forgroupin({','.join(GROUPS)}" in text


BUGS = {
    "a mask off by one at the keys' tail": (
        "forward_kernel.py",
        "valid = row < keys",
        "valid = row <= keys",
    ),
    "the hole at frame i forgotten": (
        "primitives.py",
        "frame += tl.where(frame >= own, 1, 0)",
        "frame += tl.where(frame >= own, 0, 0)",
    ),
    "the hole forgotten in the keys' gradients": (
        "short_key_gradients.py",
        "attends = near & ((ahead < 0) | (ahead >= NQ))",
        "attends = near",
    ),
    "a chunk of queries that ends one too early": (
        "short_key_gradients.py",
        "last = tl.minimum(first + span, last)",
        "last = tl.minimum(first + span - 1, last)",
    ),
    "a span of queries that ends one too late": (
        "own_key_gradients.py",
        "last = tl.minimum(first + SPAN, T * NQ)",
        "last = tl.minimum(first + SPAN + 1, T * NQ)",
    ),
    "a chunk left out of the sum": (
        "key_gradients.py",
        "for _ in range(CHUNKS):",
        "for _ in range(CHUNKS - 1):",
    ),
    "a missing rescale of the sums": (
        "forward_kernel.py",
        "acc0 *= rescale[:, None]",
        "acc0 *= 1.0",
    ),
    "cells cut by the edge averaged as whole ones": (
        "pool_rows.py",
        "return 1.0 / tl.maximum(held, 1).to(tl.float32)",
        "return 1.0 / (0 * held + SIDE * SIDE).to(tl.float32)",
    ),
    "gradients of tokens beyond the grid": (
        "pool_gradients.py",
        "valid & (y * STRIDE + token_y < GRID_H) &",
        "valid &",
    ),
    "groups of sums that overlap": (
        "pool_gradients.py",
        "tl.minimum(group * GROUP + GROUP, SLABS)",
        "SLABS",
    ),
    "a column too many": ("mlp_kernels.py", "column < COLUMNS", "column <= COLUMNS"),
    "sums of an MLP's rows that overlap": (
        "mlp_kernels.py",
        "sums + part.to(tl.int64) * COLUMNS",
        "sums + part.to(tl.int64) * 0",
    ),
}
RUN_COPY = """
import runpy, sys
import stat_kernels.backends
stat_kernels.backends.__path__.insert(0, sys.argv[1])
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug, tmp_path):
    """In a copy of the package; the suite must fail on a check or at a guard page, nothing else."""
    file, right, wrong = BUGS[bug]
    copy = tmp_path / "triton"
    shutil.copytree(PACKAGE, copy)
    text = (copy / file).read_text()
    assert text.count(right) == 1
    (copy / file).write_text(text.replace(right, wrong))
    group = {"pool": "pooling", "mlp_": "mlp"}.get(file[:4], "float32")
    if file.endswith("key_gradients.py"):
        group = "windows"  # in which queries are many enough for several chunks
    done = interpret(str(tmp_path), str(SCRIPT), group, code=RUN_COPY)
    assert done.returncode != 0, f"{bug} was not caught"
    crashed = done.returncode == -signal.SIGSEGV
    assert crashed or "AssertionError: triton in torch.float32" in done.stderr, done.stderr


def test_an_unplanted_copy_passes(tmp_path):
    """The planted bugs are what fails, not the way they are planted."""
    shutil.copytree(PACKAGE, tmp_path / "triton")
    code = f"{RUN_COPY}\nfrom stat_kernels.backends import triton\nprint(triton.__file__)"
    done = interpret(str(tmp_path), str(SCRIPT), "numbers", code=code)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout

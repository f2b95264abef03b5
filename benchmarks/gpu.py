"""One command for a machine with a GPU and no network: build, test on the device, time.

    python -m benchmarks.gpu             everything, one JSON under results/<device>/
    python -m benchmarks.gpu --dry-run   what would run; needs no GPU
    python -m benchmarks.gpu --quick     one case instead of all

Steps that need what the machine lacks are recorded as skipped, with the reason. A failed check
keeps the timings from being taken: a wrong kernel is not timed.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.shapes import ROOT

NO_GPU = "there is no GPU here: torch.cuda.is_available() is false; --dry-run lists what would run"
CASES = ["b64-*-batch8", "b32-*-batch8", "b64-*-large"]
QUICK_CASES = ["b64-stage3-batch8"]
OUTPUT_LINES = 40  # of a step's output, kept in the result


@dataclass(frozen=True)
class Step:
    """One command, whether a failure stops the timings, and what may keep it from running."""

    name: str
    command: list[str]
    must_pass: bool
    missing: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a step ended: "passed", "failed" or "skipped", and the end of what it printed."""

    name: str
    command: str
    status: str
    seconds: float
    output: str


def steps() -> list[Step]:
    """Everything before the timings, in order."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    no_compiler = None if shutil.which("c++") or shutil.which("g++") else "no C++ compiler"
    sanitizer = shutil.which("compute-sanitizer")
    no_sanitizer = None if sanitizer else "compute-sanitizer is not on the PATH"
    return [
        Step(
            "build",
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            must_pass=False,
            missing=no_compiler,
        ),
        Step("tests on the device", [*pytest, "tests/test_gpu.py"], must_pass=True),
        Step("every other test", [*pytest, "tests", "--ignore=tests/test_gpu.py"], must_pass=False),
        Step(
            "memory checks",
            [
                *(sanitizer or "compute-sanitizer", "--tool=memcheck", "--error-exitcode=3"),
                *(*pytest, "tests/test_gpu.py", "-k", "smallest"),
            ],
            must_pass=True,
            missing=no_sanitizer,
        ),
    ]


def timing_command(cases: list[str], folder: Path | str) -> list[str]:
    """The benchmark against PyTorch's own ways, with its result in ``folder``."""
    command = [sys.executable, "-m", "benchmarks.attention", "--device", "cuda", "--full"]
    return [*command, "--cases", *cases, "--out", str(folder)]


def environment() -> dict[str, str]:
    """The sources are found where nothing could be installed."""
    paths = [str(ROOT), str(ROOT / "stat"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run_step(step: Step) -> Outcome:
    """Runs a step, or says why not; never raises for a command that fails."""
    command = shlex.join(step.command)
    if step.missing:
        return Outcome(step.name, command, "skipped", 0.0, step.missing)
    start = time.perf_counter()
    done = subprocess.run(
        step.command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = "\n".join(done.stdout.splitlines()[-OUTPUT_LINES:])
    status = "passed" if done.returncode == 0 else "failed"
    return Outcome(step.name, command, status, round(time.perf_counter() - start, 1), output)


def main(arguments: list[str] | None = None) -> int:
    """The command; 2 without a GPU, 1 where a check that must pass failed, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dry-run", action="store_true", help="list what would run")
    parser.add_argument("--quick", action="store_true", help="time one case only")
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder for the result")
    options = parser.parse_args(arguments)
    cases = QUICK_CASES if options.quick else CASES
    if options.dry_run:
        for step in steps():
            print(f"{step.name}: {shlex.join(step.command)}")
            if step.missing:
                print(f"    would be skipped: {step.missing}")
        print(f"timings: {shlex.join(timing_command(cases, 'a temporary folder'))}")
        return 0
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    return measure(cases, options.out)


def measure(cases: list[str], folder: Path) -> int:
    """Runs every step, then the timings, and writes one result file."""
    outcomes = []
    for step in steps():
        outcomes.append(run_step(step))
        print(f"{outcomes[-1].status:<8} {step.name} ({outcomes[-1].seconds} s)", flush=True)
        if outcomes[-1].status == "failed":
            print(outcomes[-1].output)
    required = {step.name for step in steps() if step.must_pass}
    wrong = any(o.status == "failed" and o.name in required for o in outcomes)
    result = results.new_result("checks", "cuda", {"cases": cases})
    if not wrong:
        with tempfile.TemporaryDirectory() as scratch:
            timed = subprocess.run(timing_command(cases, scratch), cwd=ROOT, env=environment())
            written = sorted(Path(scratch).glob("*/*.json"))
            if written:
                result = results.read(written[0])
            wrong = timed.returncode != 0
    result["checks"] = [asdict(outcome) for outcome in outcomes]
    print(f"written: {results.write(result, folder)}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())

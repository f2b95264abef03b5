"""One command for a machine with a GPU and no network: build, test on the device, time.

    python -m benchmarks.gpu                    everything, within --minutes
    python -m benchmarks.gpu --only build cuda  some steps, see --dry-run
    python -m benchmarks.gpu --dry-run          what would run; needs no GPU

Steps that need what the machine lacks are recorded as skipped, with the reason. A backend of which
a check failed is not timed. Results are files under results/<device>/, written as soon as they are
there: the checks before the timings, the timings one group of cases at a time.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.harness import ROOT, results

NO_GPU = "there is no GPU here: torch.cuda.is_available() is false; --dry-run lists what would run"
BACKENDS = ("cuda", "triton")
# Most wanted first: what the time does not suffice for is left out.
TIMINGS = (
    ("bfloat16", "b64-*-batch8"),
    ("bfloat16", "b64-*-large"),
    ("bfloat16", "vit-*"),
    ("float16", "b64-*-batch8"),
    ("float32", "b64-*-batch8"),
    ("bfloat16", "b32-*-batch8"),
)
SANITIZED = (("memcheck", "cuda"), ("racecheck", "cuda"), ("memcheck", "triton"))
OUTPUT_LINES = 80  # of a step's output, kept in the result
LEAST_SECONDS = 45.0  # in which a group of timings or the tests give something
GRACE_SECONDS = 30.0  # for a command that was told to stop to write what it has


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: for --only and in results.
        command: what is run in the project's folder.
        backend: not timed where the command fails; None where it says nothing of one.
        missing: what keeps it from running, one sentence.
        variables: of the environment, besides those that are there.
        shown: its output goes to the terminal as it comes, and is not kept.
    """

    name: str
    command: list[str]
    backend: str | None = None
    missing: str | None = None
    variables: dict[str, str] = field(default_factory=dict)
    shown: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a step ended, and the end of what it printed.

    ``status`` is "passed", "failed", "skipped" or "out of time".
    """

    name: str
    command: str
    status: str
    seconds: float
    output: str


def checks() -> list[Step]:
    """Everything before the timings, in order."""
    no_nvcc = _no_nvcc()
    without = {"cuda": no_nvcc, "triton": None}
    selected = {"cuda": "not triton", "triton": "triton"}
    device = [*_pytest(), "tests/kernels/test_gpu.py", "-k"]
    no_compiler = None if shutil.which("c++") or shutil.which("g++") else "no C++ compiler"
    found = [
        Step(
            "build",
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            missing=no_compiler,
        ),
        Step("report", [sys.executable, "-m", "stat_kernels"]),
        Step("fragments", [*_pytest(), "tests/kernels/test_gpu_fragments.py"], "cuda", no_nvcc),
    ]
    found += [Step(b, [*device, selected[b]], b, without[b]) for b in BACKENDS]
    sanitizer = shutil.which("compute-sanitizer")
    no_sanitizer = None if sanitizer else "compute-sanitizer is not on the PATH"
    for tool, backend in SANITIZED:
        # Of PyTorch's own kernels, which the tests compare with, racecheck reports hazards.
        only = ["--kernel-name", "kns=_ZN3sta"] if backend == "cuda" else []
        watched = [sanitizer or "compute-sanitizer", f"--tool={tool}", "--error-exitcode=3", *only]
        found.append(
            Step(
                f"{tool}-{backend}",
                [*watched, *device, f"smallest and {selected[backend]}"],
                backend,
                without[backend] or no_sanitizer,
                # Every tensor an allocation of its own: a step past its end is seen.
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
        )
    return found


def other_tests() -> Step:
    """The tests that need no GPU, on this machine's own packages."""
    return Step("tests", [*_pytest(), "tests", "--ignore-glob=tests/kernels/test_gpu*.py"])


def _pytest() -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


def _no_nvcc() -> str | None:
    found = os.environ.get("CUDA_HOME") or shutil.which("nvcc") or Path("/usr/local/cuda").is_dir()
    return None if found else "no nvcc was found (set CUDA_HOME to a CUDA toolkit)"


def timings(backends: Iterable[str], folder: Path) -> list[Step]:
    """The benchmark against PyTorch's own ways, one command for each group of TIMINGS."""
    return [
        Step(
            f"{cases} {dtype}",
            [
                *(sys.executable, "-m", "benchmarks.attention", "--device", "cuda"),
                *("--cases", cases, "--dtypes", dtype, "--backends", *backends),
                *("--seconds", "4", "--out", str(folder.resolve())),
            ],
            shown=True,
        )
        for dtype, cases in TIMINGS
    ]


def environment(step: Step) -> dict[str, str]:
    """The sources are found where nothing could be installed."""
    paths = [str(ROOT), str(ROOT / "stat"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        **step.variables,
    }


def run_step(step: Step, seconds: float = float("inf")) -> Outcome:
    """Runs a step for so many seconds at most, or says why not; prints how it ended.

    A command that runs out of time is asked to stop and keeps what it has, then it is ended.
    """
    outcome = _run(step, seconds)
    print(f"{outcome.status:<12} {step.name} ({outcome.seconds:.0f} s)", flush=True)
    if outcome.status in ("failed", "skipped"):
        print(outcome.output, flush=True)
    return outcome


def _run(step: Step, seconds: float) -> Outcome:
    command = shlex.join(step.command)
    if step.missing:
        return Outcome(step.name, command, "skipped", 0.0, step.missing)
    if seconds < LEAST_SECONDS:
        return Outcome(step.name, command, "out of time", 0.0, "")
    start, status = time.perf_counter(), "out of time"
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=environment(step),
        stdout=None if step.shown else subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        text, _ = process.communicate(timeout=min(seconds, 1e6))
        status = "passed" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        process.terminate()  # a benchmark takes it as Ctrl-C, which a shell may have switched off
        try:
            text, _ = process.communicate(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
    output = "\n".join((text or "").splitlines()[-OUTPUT_LINES:])
    return Outcome(step.name, command, status, round(time.perf_counter() - start, 1), output)


def main(arguments: list[str] | None = None) -> int:
    """The command; 2 without a GPU, 1 where something failed, else 0."""
    everything = [*(step.name for step in checks()), "timings", other_tests().name]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dry-run", action="store_true", help="list what would run")
    parser.add_argument("--only", nargs="+", choices=everything, default=everything, metavar="STEP")
    parser.add_argument("--minutes", type=float, default=28.0, help="for all; default: 28")
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder for results")
    options = parser.parse_args(arguments)
    if options.dry_run:
        for step in [*checks(), *timings(BACKENDS, options.out), other_tests()]:
            print(f"{step.name}: {shlex.join(step.command)}")
            if step.missing:
                print(f"    would be skipped: {step.missing}")
        return 0
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    return measure(options.only, options.minutes, options.out)


def measure(only: list[str], minutes: float, folder: Path) -> int:
    """Runs what was asked for, within the time; 1 where something failed."""
    end = time.monotonic() + minutes * 60

    def left() -> float:
        return end - time.monotonic()

    outcomes, sound = [], list(BACKENDS)
    for step in checks():
        if step.name in only:
            outcomes.append(run_step(step, left()))
            if outcomes[-1].status in ("failed", "out of time") and step.backend in sound:
                sound.remove(step.backend)
    write_checks(outcomes, folder)
    if "timings" in only and not sound:
        print("no timings: every backend failed a check", flush=True)
    elif "timings" in only:
        outcomes += [run_step(step, left()) for step in timings(sound, folder)]
    if other_tests().name in only:
        last = run_step(other_tests(), left())
        write_checks([last], folder)
        outcomes.append(last)
    return int(any(outcome.status == "failed" for outcome in outcomes))


def write_checks(outcomes: list[Outcome], folder: Path) -> None:
    """A result file of its own, where there is anything to write."""
    if outcomes:
        result = results.new_result("checks", "cuda", {})
        result["checks"] = [asdict(outcome) for outcome in outcomes]
        print(f"written: {results.write(result, folder)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

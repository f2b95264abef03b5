"""One command for a machine with a GPU and no network: build, check, time.

    python -m benchmarks.gpu --call 1      the most important steps, within ten minutes
    python -m benchmarks.gpu --call 2      sweeps, compiled peers, all tests, sanitizers
    python -m benchmarks.gpu --only build attention
    python -m benchmarks.gpu --dry-run     lists the steps; needs no GPU
    python -m benchmarks.gpu --rehearse    the same steps on the CPU, at sizes that take seconds

Each call takes at most --minutes. The most valuable steps run first, each under its own time limit.
The outcome of a step is saved as soon as it ends, and the benchmarks save each case as soon as it
is measured, so an interrupted call loses at most one case. A step that runs out of time does not
count as failed. A failed test does not exclude a backend: the benchmarks check every result that
they time and leave out only the cases in which a backend is wrong. "profile" has the time of every
kernel, those of pooling and of the MLP included.
"""

import argparse
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from benchmarks.harness import ROOT, results
from stat_kernels import dispatch

NO_GPU = "there is no GPU here: torch.cuda.is_available() is false; try --dry-run or --rehearse"
MINUTES = 9.5  # of a call: a machine that is lent for ten minutes at a time has some left
OUTPUT_LINES = 60  # of a step's output, kept in the result
GRACE_SECONDS = 15.0  # for a step that was told to stop, to save what it has
LEAST_SECONDS = 10.0  # in which a step can do something
SANITIZED = (("memcheck", "cuda"), ("racecheck", "cuda"), ("memcheck", "triton"))


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: for --only and in results.
        call: 1 or 2.
        seconds: time limit.
        command: run in the project's folder.
        missing: the reason why it cannot run on this machine, in one sentence, or None.
        variables: additional environment variables.
    """

    name: str
    call: int
    seconds: float
    command: list[str]
    missing: str | None = None
    variables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a step ended: "passed", "failed", "out of time" or "skipped"."""

    name: str
    command: str
    status: str
    seconds: float
    output: str


def steps(rehearsal: bool, out: Path) -> list[Step]:
    """Every step of both calls, the most valuable first.

    Args:
        rehearsal: on the CPU, with cases that take a second.
        out: folder for result files.
    """
    device = "cpu" if rehearsal else "cuda"
    cases, preset, batch = ("tiny-stage2", "stat_tiny", "1") if rehearsal else (
        "b64-*-batch8", "stat_b64", "8"
    )  # fmt: skip
    to = ["--device", device, "--out", str(out.resolve())]
    short = ["--rounds", "2"] if rehearsal else []
    float16 = "float32" if rehearsal else "float16"  # of which a CPU's products take minutes
    last = "2" if rehearsal else "3"  # stage of the preset

    def attention(
        *more: str, dtype: str = "bfloat16", peers: tuple[str, ...] = ("*",)
    ) -> list[str]:
        command = [*_module("attention"), *to, "--cases", cases, "--dtypes", dtype]
        return [*command, "--peers", *peers, "--seconds", "3", *short, *more]

    def train_step(*modes: str) -> list[str]:
        command = [*_module("train_step"), *to, "--presets", preset, "--batch", batch]
        return [*command, "--modes", *modes, "--rounds", "2" if rehearsal else "10"]

    eager_peers = ("eager", "SDPA grouped", "SDPA masked", "SDPA grouped [[]cudnn]")
    profile = [*_module("profile"), *to, "--preset", preset, "--batch", batch, "--what"]
    layer = [*_module("layer"), *to, "--presets", preset, "--batch", batch, *short]
    device_tests = _pytest(
        *(f"tests/kernels/test_gpu{what}.py" for what in ("", "_pooling", "_mlp"))
    )
    fragments = _pytest("tests/kernels/test_gpu_fragments.py", parallel=False)  # compiles once
    no_ncu = None if shutil.which("ncu") else "ncu is not on the PATH"
    counters = "sm__throughput.avg.pct_of_peak_sustained_elapsed,gpu__time_duration.sum"
    counters += ",dram__throughput.avg.pct_of_peak_sustained_elapsed"
    counters += ",l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed"
    ncu = [
        "ncu",
        "--clock-control",
        "none",
        "--metrics",
        counters,
        "--launch-count",
        "40",
        "--kernel-name",
        "regex:sta|kernel",
    ]
    found = [
        _build(rehearsal),
        Step("report", 1, 60, [sys.executable, "-m", "stat_kernels"]),
        Step("fragments", 1, 60, fragments, _no_nvcc()),
        Step("oracle", 1, 120, [*device_tests, "-k", "smallest or bfloat16"]),
        Step("attention", 1, 120, attention("--no-memory", peers=eager_peers)),
        Step("profile", 1, 90, [*profile, "attention", "layer", "step"]),
        Step("train step", 1, 90, train_step("eager")),
        Step("layer", 1, 60, [*layer, "--no-compile"]),
        Step("device tests", 2, 150, device_tests),
        Step("tile sweep", 2, 150, attention(peers=()), None, {"STAT_AUTOTUNE": "1"}),
        Step("counters", 2, 60, [*ncu, *profile, "attention"], no_ncu),
        Step("float16", 2, 60, attention(dtype=float16, peers=eager_peers)),
        Step("compiled train step", 2, 120, train_step("eager", "compile")),
        Step("compiled layer", 2, 120, [*layer, "--stages", "1", last, "--first"]),
        Step("compiled peers", 2, 120, attention("--full", peers=("*compiled*",))),
        *_sanitizers(device_tests),
        Step("other tests", 2, 300, _other_tests()),
    ]
    if rehearsal:  # what has no CPU counterpart is left out, the rest of the list is the same
        found = [s for s in found if "test_gpu" not in " ".join(s.command) and not s.missing]
        found = [
            replace(step, seconds=4 * step.seconds) for step in found if step.name != "other tests"
        ]
    return found


def _module(name: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.{name}"]


def _pytest(*paths: str, parallel: bool = True) -> list[str]:
    """pytest, on one process per core if it may and pytest-xdist is installed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
    cores = str(min(8, os.cpu_count() or 1))
    parallel = parallel and importlib.util.find_spec("xdist") is not None
    return [*command, "-n", cores] if parallel else command


def _other_tests() -> list[str]:
    """All but the device tests, as far as the packages that are installed go.

    Not Triton's interpreter, either, which breaks on new versions of NumPy: here its kernels run.
    """
    left_out = ("test_gpu*.py", "test_triton_interpreter.py")
    ignored = [f"--ignore-glob=tests/kernels/{name}" for name in left_out]
    return [*_pytest("tests"), "--continue-on-collection-errors", *ignored]


def _build(rehearsal: bool) -> Step:
    """Build the native library for this machine's GPU only: one architecture compiles fastest.

    A library that was built elsewhere is kept where it could only lose its CUDA kernels.
    """
    variables = {}
    if not rehearsal and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        variables = {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}{'a' if major >= 9 else ''}"}
    compilers = (os.environ.get("CXX"), "c++", "g++", "clang++")
    missing = None if any(c and shutil.which(c) for c in compilers) else "no C++ compiler was found"
    if not rehearsal and _no_nvcc():
        reason = dispatch.unsupported_reason("cuda", "cuda", torch.bfloat16, 96)
        if reason is None:
            missing = "no nvcc was found, and the library that is here has kernels for this GPU"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return Step("build", 1, 240, command, missing, variables)


def _no_nvcc() -> str | None:
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = named or shutil.which("nvcc") or any(Path("/usr/local").glob("cuda*"))
    return None if found else "no nvcc was found (set CUDA_HOME to a CUDA toolkit)"


def _sanitizers(device_tests: list[str]) -> list[Step]:
    tool = shutil.which("compute-sanitizer")
    missing = None if tool else "compute-sanitizer is not on the PATH"
    found = []
    for check, backend in SANITIZED:
        # Of PyTorch's own kernels, which the tests compare with, racecheck reports hazards.
        only = ["--kernel-name", "kns=_ZN3sta"] if backend == "cuda" else []
        level = ["--racecheck-detect-level", "error"] if check == "racecheck" else []
        command = [tool or "compute-sanitizer", f"--tool={check}", "--error-exitcode=3", *level]
        command += ["--target-processes=all"]  # pytest-xdist's, too
        other = {"cuda": "triton", "triton": "cuda"}[backend]
        command += [*only, *device_tests, "-k", f"smallest and not {other}"]
        # Every tensor an allocation of its own: an access past its end is seen.
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        found.append(Step(f"{check} {backend}", 2, 90, command, missing, variables))
    return found


def run_step(step: Step, seconds: float) -> Outcome:
    """Run a step for at most ``seconds`` and print its outcome.

    A step that runs out of time gets SIGTERM, on which a benchmark saves what it has, and
    GRACE_SECONDS later SIGKILL, for it and whatever it started.
    """
    command, start = shlex.join(step.command), time.perf_counter()
    if step.missing:
        return _ended(Outcome(step.name, command, "skipped", 0.0, step.missing))
    if seconds < LEAST_SECONDS:
        return _ended(Outcome(step.name, command, "out of time", 0.0, ""))
    # Sources are found without an installation, which needs a network.
    paths = [str(ROOT), str(ROOT / "stat"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=environment | step.variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=seconds)
        status = "passed" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        status = "out of time"
        process.terminate()
        try:
            text, _ = process.communicate(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, _ = process.communicate()
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=GRACE_SECONDS)
        raise
    output = "\n".join((text or "").splitlines()[-OUTPUT_LINES:])
    return _ended(
        Outcome(step.name, command, status, round(time.perf_counter() - start, 1), output)
    )


def _ended(outcome: Outcome) -> Outcome:
    print(f"{outcome.status:<12} {outcome.name} ({outcome.seconds:.0f} s)", flush=True)
    if outcome.output:
        print(outcome.output, flush=True)
    return outcome


def run_call(chosen: list[Step], minutes: float, device: str, out: Path) -> int:
    """Run the steps within the time; returns 1 if one failed, 130 on Ctrl-C, else 0.

    The result file lists the outcomes and grows with every step.
    """
    end = time.monotonic() + 60 * minutes
    result = results.new_result("gpu", device, {"steps": [step.name for step in chosen]})
    result["checks"] = []
    code = 0
    try:
        for step in chosen:
            seconds = min(step.seconds, end - time.monotonic() - GRACE_SECONDS)
            result["checks"].append(asdict(run_step(step, seconds)))
            results.save(result, out)
        result["complete"] = True
    except KeyboardInterrupt:
        code = 130
    failed = [check["name"] for check in result["checks"] if check["status"] == "failed"]
    print(f"written: {results.save(result, out)}", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return code or int(bool(failed))


def main(arguments: list[str] | None = None) -> int:
    """The command; 2 without a GPU, 1 where something failed, 130 on Ctrl-C, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [step.name for step in steps(False, results.RESULTS)]
    add = parser.add_argument
    add("--call", type=int, choices=[1, 2], help="default: both, one after the other")
    add("--only", nargs="+", choices=names, metavar="STEP", help=", ".join(names))
    add("--minutes", type=float, default=MINUTES, help="for a call; default: %(default)s")
    add("--rehearse", action="store_true", help="on the CPU")
    add("--dry-run", action="store_true", help="list what would run")
    add("--out", type=Path, default=results.RESULTS, help="folder for results")
    options = parser.parse_args(arguments)
    chosen = [
        step
        for step in steps(options.rehearse, options.out)
        if options.call in (None, step.call) and (not options.only or step.name in options.only)
    ]
    if options.dry_run:
        for step in chosen:
            print(f"{step.call} {step.name}, {step.seconds:.0f} s: {shlex.join(step.command)}")
            if step.missing:
                print(f"    would be skipped: {step.missing}")
        return 0
    if not options.rehearse and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # saved as on Ctrl-C
    calls = 1 if options.call or options.only else 2
    device = "cpu" if options.rehearse else "cuda"
    return run_call(chosen, options.minutes * calls, device, options.out)


if __name__ == "__main__":
    sys.exit(main())

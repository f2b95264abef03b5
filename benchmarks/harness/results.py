"""Result files: one JSON per run, results/<device>/<date>-<commit>.json, never rewritten."""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy
import torch

from benchmarks.harness import ROOT
from benchmarks.harness.load import LoadWatch
from stat_kernels import native

RESULTS = ROOT / "benchmarks" / "results"
SCHEMA = 1  # of the result files; raised when an old reader would misread a new file
MEASURED_CODE = ("benchmarks", "csrc", "stat", "stat_kernels", "setup.py")


def new_result(benchmark: str, device: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The header of a result: benchmark, commit, machine and settings; the caller adds the rest.

    Args:
        benchmark: "attention", "layer" or "train_step".
        device: "cpu" or "cuda".
        settings: what was asked for, as JSON.
    """
    return {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "date": time.strftime("%Y-%m-%dT%H%M%S", time.gmtime()),
        **commit(),
        "machine": machine(device),
        "settings": settings,
        "complete": False,
    }


def machine(device: str) -> dict[str, Any]:
    """Device, versions and threads; nothing that identifies the host or its owner."""
    found = {
        "device": device,
        "name": _cpu_name() if device == "cpu" else torch.cuda.get_device_name(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "native_library": _library(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "cuda": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
        }
    return found


def slug(found: dict[str, Any]) -> str:
    """A folder's name for a machine: "amd-epyc-avx512-2-cores", "nvidia-h100-80gb-hbm3"."""
    parts = [found["name"]]
    if found["device"] == "cpu":
        parts += [found["cpu_capability"], str(found["cores"]), "cores"]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def commit() -> dict[str, Any]:
    """The measured commit, and the files with uncommitted changes."""
    try:
        revision = _git("rev-parse", "--short=10", "HEAD").strip()
        changed = [line[3:] for line in _git("status", "--porcelain").splitlines()]
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "changed_files": []}
    measured = [f for f in changed if f.split("/")[0] in MEASURED_CODE and "results/" not in f]
    return {"commit": revision, "changed_files": measured}


def record(result: dict[str, Any], measure: Callable[[], None], folder: Path = RESULTS) -> int:
    """Run ``measure``, which fills the result, and save the result even if it is interrupted.

    Returns:
        the exit code: 130 on Ctrl-C, else 1 where something of ours failed, else 0. Other
        exceptions are raised again after the result is saved.

    Raises:
        FileExistsError: another run has this run's file; results are never overwritten.
    """
    if path_of(result, folder).exists():
        raise FileExistsError(f"{path_of(result, folder)} is the result of another run")
    watch = LoadWatch()
    code = 0
    try:
        measure()
        result["complete"] = True
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept", file=sys.stderr)
        code = 130
    finally:
        result["others_cores"] = watch.others_cores()
        print(watch.note(result["machine"]["cores"]))
        print(f"written: {save(result, folder).name}")
    failed = failures(result)
    for sentence in failed:
        print(f"failed: {sentence}", file=sys.stderr)
    return code or int(bool(failed))


def failures(result: dict[str, Any]) -> list[str]:
    """A sentence for each of our own rows that is wrong, raised, or breaks a promise."""
    found = []
    for entry in result["cases"]:
        for row in entry["rows"]:
            where = f"{entry['case']} {entry['dtype']} {row['candidate']}"
            if row["kind"] == "peer":
                continue
            if row["status"] in ("wrong", "failed"):
                found.append(f"{where}: {row['reason']}")
            if row.get("same_losses") is False:
                found.append(f"{where}: its losses are not the reference's")
            found += [
                f"{where}: not the same bits ({how})"
                for how, same in row.get("same_bits", {}).items()
                if not same
            ]
    return found


def raised(kind: str, error: Exception) -> dict[str, str]:
    """The row for an exception: "cannot run" for a peer, "failed" for one of ours.

    A compiler's message begins with a command line; the error follows the word "error".
    """
    lines = str(error).strip().splitlines() or [""]
    found = next((line.split(" error: ", 1)[1] for line in lines if " error: " in line), None)
    text = lines[0] if found is None else f"{lines[0]}: {found}"
    status = "cannot run" if kind == "peer" else "failed"
    return {"status": status, "reason": f"{type(error).__name__}: {' '.join(text.split())[:200]}"}


def path_of(result: dict[str, Any], folder: Path) -> Path:
    """The path of a result's file, in the folder of its machine."""
    return folder / slug(result["machine"]) / f"{result['date']}-{result['commit']}.json"


def save(result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write the measurements so far into the run's file, completely or not at all."""
    path = path_of(result, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return part.replace(path)


def read(path: Path) -> dict[str, Any]:
    """A result file's content.

    Raises:
        ValueError: it is not a result file of this schema.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    found = result.get("schema") if isinstance(result, dict) else None
    if found != SCHEMA:
        raise ValueError(f"{path} must be a result file of schema {SCHEMA}, got {found!r}")
    return result


def newest(
    machine_folder: Path, benchmark: str, cases: Iterable[str], settings: dict[str, Any]
) -> dict[str, Any] | None:
    """The newest complete result of a benchmark on one machine; None if there is none.

    Args:
        machine_folder: where the machine's results are.
        benchmark: as in `new_result`.
        cases: names that the result must contain.
        settings: settings that the run must have used.
    """
    found = []
    for path in machine_folder.glob("*.json"):
        result = read(path)
        if result["benchmark"] != benchmark or not result["complete"]:
            continue
        if any(result["settings"].get(k) != v for k, v in settings.items()):
            continue
        if set(cases) <= {entry["case"] for entry in result["cases"]}:
            found.append(result)
    return max(found, key=lambda result: result["date"], default=None)


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    found: dict[str, str] = {}
    for line in info.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    name = found.get("model name") or platform.machine()
    if any(c.isdigit() for c in name) or "cpu family" not in found:
        return name
    # virtual machines hide the number that tells one generation from another
    return f"{name} (family {found['cpu family']}, model {found['model']})"


def _library() -> dict[str, Any]:
    """The build of the native library that was measured, and its instruction set."""
    if native.problem() is not None:
        return {"problem": native.problem()}
    digest = hashlib.sha256(native.PATH.read_bytes()).hexdigest()[:12]
    return {"sha256": digest, "instruction_set": native.instruction_set()}

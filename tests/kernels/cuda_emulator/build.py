"""Compiles CUDA C++ sources with the host's C++ compiler over the emulator, and loads the result.

Objects and libraries are kept in a folder of temporary files under the hash of all that went into
them: a change of one unit compiles that unit, a change of a header every unit.
"""

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
CACHE = Path(tempfile.gettempdir()) / f"stat-kernels-emulated-{os.getuid()}"
KEPT_DAYS = 3  # without use

# The emulator's own units spend their time in the matrix product and in switches between fibers.
RUNTIME_FLAGS = ("-O3", "-march=native")
# Variables that nobody initialised hold a pattern (of huge floats), as registers hold anything.
KERNEL_FLAGS = ("-O2", "-ftrivial-auto-var-init=pattern")
FLAGS = ("-std=c++17", "-DSTA_EMULATE", "-fPIC", "-pthread")


class EmulatorError(RuntimeError):
    """A kernel did what a device cannot do; the message is the emulator's sentence."""


@dataclass(frozen=True)
class Counters:
    """What the launches did, summed; the fields of ``Counters`` in warp.h."""

    blocks: int
    barriers: int
    shuffles: int
    multiply_adds: int
    load_phases: int
    bank_conflicts: int
    copies: int
    copied_bytes: int


@dataclass(frozen=True)
class RuntimeCalls:
    """Calls of the fake CUDA runtime; the fields of ``RuntimeCalls`` in fake_runtime.cpp."""

    device_queries: int
    attributes_set: int
    launches: int
    launches_without_carveout: int


class Emulated:
    """A library of kernels on the emulator.

    Attributes:
        library: the ctypes library, with the sources' own C functions in it.
    """

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.emulator_sentence.restype = ctypes.c_char_p
        self.configure()

    def configure(
        self,
        seed: int = 0,
        shared_limit: int = 227 * 1024,
        watch_races: bool = True,
        workers: int = 2,
    ) -> None:
        """How the next launches run.

        Args:
            seed: decides the order of blocks, warps and lanes, and when copies land.
            shared_limit: shared memory that a block may ask for, bytes; each value is that of
                another device of the same machine.
            watch_races: report races of copies and matrix loads; False leaves only wrong values.
            workers: OS threads that run blocks.
        """
        self.library.emulator_configure(
            ctypes.c_uint64(seed), shared_limit, int(watch_races), workers
        )

    def take_counters(self) -> Counters:
        """The counters since they were last taken."""
        values = (ctypes.c_int64 * len(fields(Counters)))()
        self.library.emulator_take_counters(values)
        return Counters(*values)

    def take_runtime_calls(self) -> RuntimeCalls:
        """The calls of the runtime since they were last taken."""
        values = (ctypes.c_int64 * len(fields(RuntimeCalls)))()
        self.library.emulator_take_runtime_calls(values)
        return RuntimeCalls(*values)

    def sentence(self) -> str:
        """Why the last launch failed; empty where it did not."""
        return self.library.emulator_sentence().decode()

    def check(self, code: int) -> None:
        """Raises EmulatorError where a launch's code is not 0."""
        if code != 0:
            raise EmulatorError(self.sentence() or f"code {code}")


def build(
    units: Iterable[Path],
    headers: Path = CSRC,
    replaced: Mapping[str, str] | None = None,
    replaced_in: Iterable[str] | None = None,
    defines: Iterable[str] = (),
) -> Emulated:
    """Compiles ``units`` and the emulator, in parallel, unless that was done before.

    Args:
        units: the .cu files.
        headers: the folder that #include starts from; any file below it may be included.
        replaced: text to compile instead of a file's own, by its path relative to ``headers``.
        replaced_in: stems of the units that see the replaced text; None for all. To save time.
        defines: further options for every unit, such as ``"-DX=1"``.
    """
    compiler = _compiler()
    machine = _run([compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull])
    CACHE.mkdir(mode=0o700, exist_ok=True)
    _forget_the_unused()

    def compiled(unit: Path, flags: tuple[str, ...]) -> Path:
        seen = {} if replaced_in is not None and unit.stem not in replaced_in else replaced or {}
        name = unit.relative_to(headers).as_posix() if unit.is_relative_to(headers) else ""
        text = seen.get(name) or unit.read_text()
        # What is replaced runs once: the compiler's time counts, not the kernel's.
        flags = (*flags, "-O0") if seen else flags
        made = CACHE / f"{unit.stem}-{_hash(machine, *_texts(headers, seen), text, *flags)}.o"
        if not made.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                include = _patched(headers, seen, Path(folder))
                source = Path(folder) / unit.name
                source.write_text(f'#line 1 "{unit}"\n' + text)
                output = Path(folder) / "unit.o"
                _run(
                    [compiler, *flags, f"-I{include}", f"-I{HERE}", "-x", "c++", "-c",
                     str(source), "-o", str(output)]
                )  # fmt: skip
                output.rename(made)
        made.touch()
        return made

    flags = (*FLAGS, *_unique_flag(machine), *defines)
    jobs = [(unit, (*flags, *KERNEL_FLAGS)) for unit in units]
    jobs += [(unit, (*flags, *RUNTIME_FLAGS)) for unit in sorted(HERE.glob("*.cpp"))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: compiled(*job), jobs))
    library = CACHE / f"lib-{_hash(*(o.name for o in objects))}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            output = Path(folder) / "lib.so"
            _run([compiler, "-shared", "-pthread", "-Wl,-Bsymbolic", *map(str, objects), "-o",
                  str(output)])  # fmt: skip
            output.rename(library)
    library.touch()
    return Emulated(library)


def _forget_the_unused() -> None:
    oldest = time.time() - KEPT_DAYS * 24 * 3600
    for path in CACHE.glob("*.*o"):
        with contextlib.suppress(FileNotFoundError):  # another process forgets, too
            if path.stat().st_mtime < oldest:
                path.unlink()


def _compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not found:
        raise FileNotFoundError("the emulator needs a C++ compiler: g++, clang++, or CXX")
    return found


def _unique_flag(machine: str) -> tuple[str, ...]:
    """g++ would otherwise share inline functions' statics among all libraries of the process."""
    return () if "__clang__" in machine else ("-fno-gnu-unique",)


def _texts(headers: Path, replaced: Mapping[str, str]) -> list[str]:
    """Every header's name and text, as a unit may include them."""
    unknown = [name for name in replaced if not (headers / name).exists()]
    if unknown:
        raise FileNotFoundError(f"no {', '.join(unknown)} under {headers}")
    found = {p.relative_to(headers).as_posix(): p.read_text() for p in headers.rglob("*.h")}
    found |= {p.name: p.read_text() for p in HERE.glob("*.h")}
    found |= {name: text for name, text in replaced.items() if name.endswith(".h")}
    return [part for name in sorted(found) for part in (name, found[name])]


def _patched(headers: Path, replaced: Mapping[str, str], folder: Path) -> Path:
    """The headers' folder, or a copy of it in ``folder`` where some are replaced."""
    if not replaced:
        return headers
    copy = folder / "headers"
    shutil.copytree(headers, copy)
    for name, text in replaced.items():
        (copy / name).write_text(text)
    return copy


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:20]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[:4000]}")
    return done.stdout

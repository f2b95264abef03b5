"""CUDA's compiler: where it is, what GPUs it is asked to compile for, and with which flags.

Loaded by path, by setup.py and by ``tools.cuda_compile``: it is no part of any package and
needs nothing but Python.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
SOURCES = tuple(sorted(CSRC.glob("cuda/*.cu")))
ARCHITECTURES = "8.0 9.0a 10.0+PTX"  # Ampere and newer, Hopper's own instructions, and the future
OLDEST = (8, 0)  # mma.sync on bfloat16 and cp.async
NAMED = {
    "Kepler+Tesla": "3.7",
    "Kepler": "3.5",
    "Maxwell+Tegra": "5.3",
    "Maxwell": "5.2",
    "Pascal": "6.1",
    "Volta+Tegra": "7.2",
    "Volta": "7.0",
    "Turing": "7.5",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}
# Spilled registers are said while compiling; a test keeps them at none.
FLAGS = "-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden,-Wall -Xptxas -warn-spills"


class ToolkitError(Exception):
    """One sentence about what cannot be compiled, and what would be right."""


@dataclass(frozen=True)
class Architecture:
    """One GPU family as TORCH_CUDA_ARCH_LIST writes it: "8.0", "9.0a", "10.0+PTX"."""

    major: int
    minor: int
    suffix: str = ""
    ptx: bool = False

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}{self.suffix}{'+PTX' if self.ptx else ''}"

    @property
    def number(self) -> str:
        """As nvcc writes it: "90a"."""
        return f"{self.major}{self.minor}{self.suffix}"

    def flags(self) -> list[str]:
        """Machine code for it and, with +PTX, text that a driver compiles for newer ones."""
        number = self.number
        found = [f"-gencode=arch=compute_{number},code=sm_{number}"]
        if self.ptx:
            found.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return found


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its nvcc, version ("13.0.88"), and the folder of its static run time."""

    nvcc: Path
    version: str
    libraries: Path

    def known(self) -> set[str]:
        """The numbers that ``-arch=compute_...`` takes: {"80", "90", "100", ...}."""
        return set(re.findall(r"compute_(\w+)", _run(self.nvcc, "--list-gpu-arch")))

    def compile_command(
        self, architectures: Iterable[Architecture], host_compiler: str | None, threads: int = 1
    ) -> str:
        """nvcc and its flags, all but the file: a line for a shell."""
        chosen = [flag for one in architectures for flag in one.flags()]
        host = ["-ccbin", host_compiler] if host_compiler else []
        words = [str(self.nvcc), *host, *chosen, f"--threads={threads}", "-I", str(CSRC)]
        return f"{shlex.join(words)} {FLAGS}"


def source_hash() -> str:
    """Of all that decides the machine code: the kernels' sources and the compiler's flags."""
    files = sorted([*CSRC.glob("cuda/*.h"), *SOURCES, *CSRC.glob("*_params.h")])
    texts = [FLAGS, *(text for file in files for text in (file.name, file.read_text()))]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def find(environment: dict[str, str] | None = None) -> Toolkit:
    """CUDA_HOME's or CUDA_PATH's nvcc, else that on the PATH, else the newest /usr/local/cuda-*.

    Raises:
        ToolkitError: there is none, or it lacks the static run time.
    """
    environment = dict(os.environ if environment is None else environment)
    nvcc = _nvcc(environment)
    # The nvcc on the PATH may be a script that calls the true one, so the folder above it says
    # nothing. Only nvcc itself knows where its toolkit is.
    plan = _run(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull, both=True)
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    version = re.search(r"\bV(\d+(?:\.\d+)+)", _run(nvcc, "--version"))
    if top is None or version is None:
        raise ToolkitError(f"{nvcc} does not answer as CUDA's nvcc does")
    root = Path(top[1].strip()).resolve()
    for folder in (root / "lib64", root / "lib", *sorted(root.glob("targets/*/lib"))):
        if (folder / "libcudart_static.a").is_file():
            return Toolkit(nvcc, version[1], folder)
    raise ToolkitError(f"there is no libcudart_static.a below {root}, the toolkit of {nvcc}")


def _nvcc(environment: dict[str, str]) -> Path:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environment.get(variable):
            nvcc = Path(environment[variable]) / "bin" / "nvcc"
            if not nvcc.is_file():
                raise ToolkitError(f"{variable} must be a CUDA toolkit, but {nvcc} does not exist")
            return nvcc
    on_path = shutil.which("nvcc", path=environment.get("PATH", ""))
    if on_path:
        return Path(on_path)
    toolkits = [p for p in Path("/usr/local").glob("cuda*") if (p / "bin" / "nvcc").is_file()]
    if not toolkits:
        raise ToolkitError("no nvcc was found (set CUDA_HOME to a CUDA toolkit)")
    newest = max(toolkits, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])
    return newest / "bin" / "nvcc"


def architectures(text: str | None, known: set[str]) -> tuple[list[Architecture], list[str]]:
    """The architectures to compile for, and a sentence about each one that is left out.

    Args:
        text: TORCH_CUDA_ARCH_LIST; None or "" stands for ARCHITECTURES.
        known: as ``Toolkit.known`` gives them. Of the default list, what this nvcc does not know is
            left out; what was asked for by name must be known.

    Raises:
        ToolkitError: a name is unknown, or nothing is left.
    """
    asked = (text or "").strip()
    listed = asked or ARCHITECTURES
    for name, meaning in NAMED.items():
        listed = re.sub(rf"(?<![\w+]){re.escape(name)}(?![\w+])", meaning, listed)
    found: dict[str, Architecture] = {}
    notes = []
    for word in re.split(r"[;,\s]+", listed.strip(";, ")):
        one = _architecture(word)
        if (one.major, one.minor) < OLDEST:
            notes.append(f"{one} is left out: the CUDA kernels need 8.0 or newer")
        elif one.number.rstrip("af") not in known:
            if asked:
                raise ToolkitError(
                    f"TORCH_CUDA_ARCH_LIST asks for {one}, which this nvcc does not know"
                )
            notes.append(f"{one} is left out: this nvcc does not know it")
        else:
            twice = found.get(one.number)
            found[one.number] = Architecture(
                one.major, one.minor, one.suffix, one.ptx or (twice is not None and twice.ptx)
            )
    if not found:
        raise ToolkitError(f"{listed!r} names no GPU to compile for; the kernels need 8.0 or newer")
    return list(found.values()), notes


def _architecture(word: str) -> Architecture:
    parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
    if parts is None:
        raise ToolkitError(
            "TORCH_CUDA_ARCH_LIST must hold compute capabilities such as 8.0, 9.0a, 10.0+PTX or "
            f"names such as Ampere and Hopper, got {word!r}"
        )
    return Architecture(int(parts[1]), int(parts[2]), parts[3], parts[4] is not None)


def _run(*command: object, both: bool = False) -> str:
    """What a command prints, on both streams where asked for."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ToolkitError(f"{words[0]} does not run: {error}") from error
    return done.stdout + done.stderr if both else done.stdout

"""The native library: where it lies, whether it loads, what it offers."""

import functools
import importlib.util
import os
import warnings
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import torch

from stat_kernels.schemas import SCHEMAS

NAME = "libstat_kernels.so"


def _installed() -> Path | None:
    """The library of an installed stat-kernels that lies elsewhere than this file."""
    for distribution in metadata.distributions(name="stat-kernels"):
        path = Path(str(distribution.locate_file(f"stat_kernels/{NAME}")))
        if path.is_file():
            return path
    return None


def _sources(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.py")}


def _find() -> Path:
    """This package's library, or that of an installed package with the very same sources.

    Python started in a clone imports the clone's sources, which have no library after
    ``pip install .``.
    """
    own = Path(__file__).resolve().with_name(NAME)
    installed = None if own.is_file() else _installed()
    same = installed is not None and _sources(own.parent) == _sources(installed.parent)
    return installed if installed and same else own


PATH = _find()


@functools.cache
def problem() -> str | None:
    """Why the native library cannot be used, in one sentence; None once it is loaded.

    Warns where an installed one could be used and this source tree stands before it.
    """
    if not PATH.is_file():
        if installed := _installed():
            reason = (
                f"Python imports stat_kernels from {PATH.parent}, a source tree without the native "
                f"library that differs from the installed {installed.parent}; start Python in "
                "another folder, or run `pip install --no-build-isolation -e .` in the source tree"
            )
            warnings.warn(reason, RuntimeWarning, stacklevel=2)
            return reason
        return (
            f"the native library {PATH.name} was not built; install a C++17 compiler, then run "
            "`pip install --no-build-isolation -e .` and read what it prints"
        )
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        return f"the native library does not load: {error}"
    if not all(_is_defined(name, schema) for name, schema in SCHEMAS.items()):
        return (
            f"{PATH.name} was built from other sources, whose operators differ; run "
            "`pip install --no-build-isolation -e .` again"
        )
    return None


def _is_defined(name: str, schema: str) -> bool:
    operator = getattr(torch.ops.stat_kernels, name, None)
    text = f"stat_kernels::{name}{schema}"
    return operator is not None and operator.default._schema == torch._C.parse_schema(text)


def load() -> None:
    """Loads the library, once; raises RuntimeError with the reason where it cannot be used."""
    reason = problem()
    if reason is not None:
        raise RuntimeError(reason)


@functools.cache
def define_operators() -> None:
    """Loads the library, which defines the operators, or defines them where it cannot be used."""
    problem()
    for name, schema in SCHEMAS.items():
        if not hasattr(torch.ops.stat_kernels, name):
            torch.library.define(f"stat_kernels::{name}", schema)
        operator = getattr(torch.ops.stat_kernels, name).default
        operator.tags.append(torch.Tag.pt2_compliant_tag)  # a tag that the stable ABI cannot set


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """The CPU kernel's instruction sets usable here: the best, then the others.

    The last is "amx-emulated", the AMX kernels over emulated tiles, which is meant for tests.
    """
    load()
    names: list[str] = []
    while name := torch.ops.stat_kernels.cpu_isa(len(names)):
        names.append(name)
    return tuple(names)


def instruction_set() -> str:
    """The CPU kernel's instruction set: the one that STAT_CPU_ISA names, else the best.

    Raises:
        ValueError: STAT_CPU_ISA names none that is usable here.
    """
    usable = instruction_sets()
    asked = os.environ.get("STAT_CPU_ISA") or usable[0]
    if asked not in usable:
        raise ValueError(
            f"STAT_CPU_ISA must be one of {', '.join(usable)} on this machine, got {asked!r}"
        )
    return asked


def instruction_set_of(dtype: torch.dtype, name: str | None = None) -> str:
    """The set whose kernel computes a call in ``dtype``.

    "amx" and "avx512-bf16" have kernels for bfloat16 and leave other dtypes to a lower set.

    Args:
        dtype: of the call.
        name: the set that is asked for; that of `instruction_set` by default.
    """
    return torch.ops.stat_kernels.cpu_isa_of(name or instruction_set(), torch.empty(0, dtype=dtype))


@functools.cache
def cuda_architectures() -> str:
    """The GPUs that the CUDA kernels were compiled for: "8.0 9.0a 10.0+PTX"; "" without them."""
    load()
    return torch.ops.stat_kernels.cuda_architectures()


def cuda_problem() -> str | None:
    """Why the library has no CUDA kernels, in one sentence; None where it has."""
    reason = problem()
    if reason is None and not cuda_architectures():
        return (
            f"{PATH.name} was built without the CUDA kernels; install a CUDA toolkit with nvcc, "
            "then run `pip install --no-build-isolation -e .` and read what it prints"
        )
    return reason


@functools.cache
def introspection() -> ModuleType | None:
    """The pybind11 module that reports on the library; None where it was not built."""
    load()  # first: the module is linked to the library, and that to what torch has loaded
    spec = PathFinder.find_spec("stat_kernels._introspection", [str(PATH.parent)])
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

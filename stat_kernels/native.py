"""The native library: where it lies, whether it loads, what it offers."""

import functools
from pathlib import Path

import torch

PATH = Path(__file__).with_name("libstat_kernels.so")


@functools.cache
def problem() -> str | None:
    """Why the native library cannot be used, in one sentence; None once it is loaded."""
    if not PATH.is_file():
        return (
            f"the native library {PATH.name} was not built; install a C++17 compiler, then run "
            "`pip install --no-build-isolation -e .` and read what it prints"
        )
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        return f"the native library does not load: {error}"
    return None


def load() -> None:
    """Loads the library, once; raises RuntimeError with the reason where it cannot be used."""
    reason = problem()
    if reason is not None:
        raise RuntimeError(reason)


def instruction_sets() -> list[str]:
    """The CPU kernel's instruction sets that this processor has, best first."""
    load()
    names = []
    while name := torch.ops.stat_kernels.cpu_isa(len(names)):
        names.append(name)
    return names

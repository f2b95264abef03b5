"""The build backend: setuptools', after a check of what a build without isolation needs.

Loaded by pip (pyproject.toml names it) and by setup.py. It may import setuptools only where that
is known to be there, because a fresh environment has none or an old one.
"""

import os
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

NEEDED = {"setuptools": "setuptools>=77,<82", "torch": "torch>=2.11", "ninja": "ninja"}


def ninja() -> str | None:
    """The ninja on the PATH, or beside this Python, where pip puts it; None without one."""
    beside = Path(sys.executable).with_name("ninja")
    return shutil.which("ninja") or (str(beside) if beside.is_file() else None)


def require(*names: str) -> None:
    """Exits with one sentence that names what of ``names`` is to be installed."""
    missing = [NEEDED[name] for name in names if not _is_there(name)]
    if missing:
        hint = "" if names == ("setuptools",) else "; STAT_NATIVE=0 needs setuptools only"
        sys.exit(
            "stat-kernels: a build without isolation needs what is missing here, "
            f"`pip install {' '.join(repr(one) for one in missing)}`, or leave "
            f"--no-build-isolation out{hint}"
        )


def _is_there(name: str) -> bool:
    if name == "ninja":
        return ninja() is not None
    oldest = NEEDED[name].partition(">=")[2].partition(",")[0]
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return _numbers(version) >= _numbers(oldest)


def _numbers(version: str) -> list[int]:
    """[2, 11] of "2.11.0+cpu": enough to compare with the oldest that serves."""
    return [int(part) for part in version.split(".")[:2] if part.isdigit()]


require("setuptools")

from setuptools import build_meta  # noqa: E402
from setuptools.build_meta import *  # noqa: E402, F403


def _checked(name: str) -> Any:
    def hook(*args: Any, **options: Any) -> Any:
        require("setuptools", *(() if os.environ.get("STAT_NATIVE") == "0" else ("torch", "ninja")))
        return getattr(build_meta, name)(*args, **options)

    return hook


build_wheel = _checked("build_wheel")
build_editable = _checked("build_editable")
# pip asks for these first, and would fetch every dependency before it comes to the build.
prepare_metadata_for_build_wheel = _checked("prepare_metadata_for_build_wheel")
prepare_metadata_for_build_editable = _checked("prepare_metadata_for_build_editable")

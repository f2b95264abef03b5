"""What an import may need and what it must not do, each in a fresh process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(*arguments, env=None):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
    )


def test_the_folder_stat_never_becomes_a_package():
    """With stat/__init__.py Python's own module ``stat`` would be shadowed and nothing starts."""
    assert not (ROOT / "stat/__init__.py").exists()
    done = python(
        "-X", "frozen_modules=off",
        "-c", "import stat, os; print(stat.S_ISDIR(os.stat('.').st_mode))",
        env={"PYTHONPATH": "."},
    )  # fmt: skip
    assert done.stdout.strip() == "True", done.stderr


def test_the_packages_are_listed_by_hand():
    text = (ROOT / "setup.py").read_text()
    assert "find_packages" not in text
    assert 'package_dir={"stat_video": "stat/stat_video"}' in text


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
"""
OPTIONAL = [
    *("av", "jsonargparse", "torchmetrics", "timm", "torchvision", "matplotlib", "tensorboard"),
    *("sklearn", "skimage", "fvcore", "triton", "pybind11", "hypothesis", "pytest", "scipy"),
]


@pytest.mark.parametrize("module", ["stat_kernels", "stat_video"])
def test_import_needs_little(module):
    code = BLOCK.format(blocked=OPTIONAL) + f"import {module}; print('imported')"
    done = python("-c", code)
    assert "imported" in done.stdout, done.stderr


def test_import_loads_no_kernel_and_no_optional_library():
    code = (
        "import sys, stat_kernels\n"
        "from stat_kernels import native\n"
        "assert native.problem.cache_info().currsize == 0\n"
        "loaded = [m for m in sys.modules if m.startswith('stat_kernels.backends.')]\n"
        "assert not loaded, loaded\n"
        "assert 'stat_video' not in sys.modules\n"
        "assert 'torch._dynamo' not in sys.modules  # half a second\n"
        "print(open('/proc/self/maps').read().count('libstat_kernels'))"
    )
    done = python("-c", code)
    assert done.stdout.strip() == "0", done.stderr


def test_arrows_point_one_way():
    """Imports go from the layer down to the backends, never up, and backends stay apart."""
    allowed = {
        "checks": set(),
        "reference": set(),
        "native": set(),
        "backends": {"native"},
        "ops": {"backends"},
        "order": set(),
        "dispatch": {"backends", "order"},
        "functional": {"dispatch", "ops", "checks", "reference"},
        "modules": {"functional"},
        "testing": {"functional"},
        "integrations": {"functional"},
        "__init__": {"functional", "modules"},
        "__main__": {"dispatch", "native"},
    }
    for path in sorted((ROOT / "stat_kernels").rglob("*.py")):
        own = path.relative_to(ROOT / "stat_kernels").parts[0].removesuffix(".py")
        found = imported_names(path) - {own}
        assert found <= allowed[own], f"{path.name} imports {found - allowed[own]}"


def imported_names(path):
    """The parts of stat_kernels that a file imports."""
    import ast

    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stat_kernels"):
            below = node.module.split(".")[1:]
            found |= {below[0]} if below else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {
                a.name.split(".")[1] for a in node.names if a.name.startswith("stat_kernels.")
            }
    return found


def test_the_report_runs():
    done = python("-m", "stat_kernels")
    assert done.returncode == 0, done.stderr
    for word in ("torch", "CPU kernel", "libstat_kernels.so loaded", "cpu        usable"):
        assert word in done.stdout

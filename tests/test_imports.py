"""What an import may need and what it must not do, each in a fresh process."""

import ast
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
    *("av", "jsonargparse", "timm", "torchvision", "matplotlib", "tensorboard"),
    *("sklearn", "skimage", "fvcore", "triton", "pybind11", "hypothesis", "pytest", "scipy"),
    *("onnx", "onnxscript", "onnxruntime"),
]


LOADED_BY_COMMANDS = (
    "stat_video, stat_video.cli, stat_video.train.trainer, stat_video.evaluate.predict, "
    "stat_video.evaluate.scoring, stat_video.clips.make, stat_video.data.sources"
)


@pytest.mark.parametrize("modules", ["stat_kernels", LOADED_BY_COMMANDS])
def test_import_needs_little(modules):
    code = BLOCK.format(blocked=OPTIONAL) + f"import {modules}; print('imported')"
    done = python("-c", code)
    assert "imported" in done.stdout, done.stderr


def test_import_loads_no_backend_and_no_optional_library():
    """The native library is loaded, which defines the operators: a millisecond."""
    code = (
        "import sys, stat_kernels\n"
        "loaded = [m for m in sys.modules if m.startswith('stat_kernels.backends.')]\n"
        "assert not loaded, loaded\n"
        "assert 'stat_video' not in sys.modules\n"
        "assert 'torch._dynamo' not in sys.modules  # half a second\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


# What each room may import of the project's rooms and of libraries. A module belongs to the room
# with the longest matching name. The standard library, torch and numpy are open to all.
ROOMS = {
    "stat_kernels": (
        "stat_kernels.cache stat_kernels.functional stat_kernels.mlp stat_kernels.modules"
    ),
    "stat_kernels.__main__": "stat_kernels stat_kernels.dispatch stat_kernels.native",
    "stat_kernels.checks": "",
    "stat_kernels.reference": "",
    "stat_kernels.schemas": "",
    "stat_kernels.native": "stat_kernels.schemas",
    "stat_kernels.pool_layout": "",
    "stat_kernels.backends": "stat_kernels.pool_layout",
    "stat_kernels.backends.cpu": "stat_kernels.native stat_kernels.backends",
    "stat_kernels.backends.cuda": "stat_kernels.native stat_kernels.backends",
    "stat_kernels.backends.triton": "stat_kernels.backends stat_kernels.pool_layout triton",
    "stat_kernels.autograd": "",
    "stat_kernels.ops": "stat_kernels.autograd stat_kernels.backends stat_kernels.native",
    "stat_kernels.core_ops": (
        "stat_kernels.autograd stat_kernels.backends stat_kernels.native stat_kernels.ops "
        "stat_kernels.pool_layout stat_kernels.pool_ops"
    ),
    "stat_kernels.core": (
        "stat_kernels.checks stat_kernels.core_ops stat_kernels.dispatch stat_kernels.pool_layout "
        "stat_kernels.pool_ops"
    ),
    "stat_kernels.distributed": "stat_kernels.checks",
    "stat_kernels.memory": "",
    "stat_kernels.mlp": (
        "stat_kernels.checks stat_kernels.dispatch stat_kernels.functional stat_kernels.mlp_ops "
        "stat_kernels.products stat_kernels.reference"
    ),
    "stat_kernels.mlp_ops": "stat_kernels.autograd stat_kernels.backends stat_kernels.native",
    "stat_kernels.pool_ops": (
        "stat_kernels.autograd stat_kernels.backends stat_kernels.native stat_kernels.pool_layout"
    ),
    "stat_kernels.dispatch": "stat_kernels.backends",
    "stat_kernels.functional": (
        "stat_kernels.checks stat_kernels.dispatch stat_kernels.ops stat_kernels.pool_ops "
        "stat_kernels.pool_layout stat_kernels.reference"
    ),
    "stat_kernels.cache": "stat_kernels.checks stat_kernels.functional",
    "stat_kernels.modules": (
        "stat_kernels.cache stat_kernels.checks stat_kernels.core stat_kernels.functional "
        "stat_kernels.mlp stat_kernels.pool_layout stat_kernels.products stat_kernels.distributed"
    ),
    "stat_kernels.products": "",
    "stat_kernels.testing": "stat_kernels.backends stat_kernels.checks stat_kernels.functional",
    "stat_kernels.integrations": "stat_kernels.functional timm torchvision transformers",
    "stat_video": "stat_video.model",
    "stat_video.__main__": "stat_video.cli",
    "stat_video.cli": (
        "stat_video.errors stat_video.files stat_video.option_checks stat_video.settings "
        "stat_video.distributed stat_video.model stat_video.data stat_video.train "
        "stat_video.evaluate stat_video.analysis stat_video.clips stat_video.export"
    ),
    "stat_video.settings": (
        "stat_video.errors stat_video.files stat_video.model jsonargparse yaml"
    ),
    "stat_video.errors": "",
    "stat_video.files": "stat_video.errors yaml",
    "stat_video.option_checks": "stat_video.errors",
    "stat_video.ownership": "stat_video.errors",
    "stat_video.devices": "stat_video.errors stat_kernels.memory",
    "stat_video.distributed": ("stat_video.errors stat_video.devices stat_kernels.distributed"),
    "stat_video.checkpoint": "stat_video.errors stat_video.files stat_video.distributed",
    "stat_video.model": (
        "stat_kernels stat_kernels.distributed stat_kernels.ops stat_kernels.integrations "
        "stat_video stat_video.errors huggingface_hub safetensors"
    ),
    "stat_video.data": (
        "stat_video.errors stat_video.files stat_video.option_checks av torchvision PIL tqdm"
    ),
    "stat_video.evaluate": (
        "stat_video.errors stat_video.files stat_video.option_checks stat_video.devices "
        "stat_video.distributed stat_video.checkpoint stat_video.model stat_video.data "
        "stat_kernels stat_kernels.distributed tqdm"
    ),
    "stat_video.train": (
        "stat_video.errors stat_video.files stat_video.option_checks stat_video.devices "
        "stat_video.distributed stat_video.checkpoint stat_video.ownership stat_video.model "
        "stat_video.data stat_video.evaluate stat_kernels.distributed timm torchvision tqdm yaml"
    ),
    "stat_video.analysis": (
        "stat_kernels stat_kernels.modules stat_kernels.integrations stat_video.errors "
        "stat_video.files stat_video.devices stat_video.model "
        "stat_video.data stat_video.train stat_video.evaluate stat_video.clips matplotlib tqdm"
    ),
    "stat_video.export": (
        "stat_kernels stat_video.errors stat_video.files stat_video.devices stat_video.evaluate "
        "onnxruntime"
    ),
    "stat_video.clips": (
        "stat_video.errors stat_video.files stat_video.ownership av matplotlib skimage sklearn tqdm"
    ),
    "stat_video.recipes": "",
    "benchmarks": (
        "benchmarks.harness stat_kernels stat_kernels.dispatch stat_kernels.distributed "
        "stat_kernels.testing stat_video.model pytest tqdm"
    ),
    "benchmarks.harness": (
        "stat_kernels stat_kernels.dispatch stat_kernels.memory stat_kernels.native "
        "stat_kernels.ops stat_kernels.products stat_kernels.testing "
        "stat_video stat_video.model matplotlib torchvision"
    ),
    "tools": (
        "stat_kernels.native stat_kernels.testing stat_kernels.backends.triton stat_kernels "
        "stat_kernels.ops setuptools tests triton"
    ),
}
FREE = {*sys.stdlib_module_names, "torch", "numpy"}
TOP = {"stat_kernels": "stat_kernels", "stat_video": "stat/stat_video"} | {
    name: name for name in ("benchmarks", "tools", "tests")
}


def path_of(module):
    """The file or folder of a module of the project."""
    top, *below = module.split(".")
    path = ROOT.joinpath(TOP[top], *below)
    return path if path.is_dir() else path.with_suffix(".py")


def room_of(module):
    """The project's room, or the library, that a module belongs to."""
    while module not in ROOMS and "." in module:
        module = module.rpartition(".")[0]
    return module


def imported_modules(path):
    """What a file imports; ``from a import b`` counts as a.b where that is a module of ours."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                ours = node.module.split(".")[0] in TOP and path_of(inner).exists()
                yield inner if ours else node.module


def modules_of(top):
    for path in sorted((ROOT / TOP[top]).rglob("*.py")):
        relative = path.relative_to(ROOT / TOP[top]).with_suffix("")
        yield ".".join((top, *(part for part in relative.parts if part != "__init__"))), path


@pytest.mark.parametrize("top", ["stat_kernels", "stat_video", "benchmarks", "tools"])
def test_rooms_import_only_what_they_may(top):
    """The table of DESIGN.md, for every file."""
    for module, path in modules_of(top):
        own = room_of(module)
        found = {room_of(name) for name in imported_modules(path)} - FREE - {own}
        forbidden = found - set(ROOMS[own].split())
        assert not forbidden, f"{module} (room {own}) imports {', '.join(sorted(forbidden))}"


def test_the_report_runs():
    done = python("-m", "stat_kernels")
    assert done.returncode == 0, done.stderr
    for word in (
        "torch",
        "CPU kernel",
        "libstat_kernels.so loaded",
        "cpu        usable",
        "pooling",
    ):
        assert word in done.stdout

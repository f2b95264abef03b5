"""Installing: what a build lacks, what a source archive holds, and Python started in a clone."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest

from stat_kernels import native
from tools import build_backend

ROOT = Path(__file__).parents[1]


def python(*command, cwd, **environment):
    words = [sys.executable, *map(str, command)]
    env = {**os.environ, **environment}
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=env)


# ---- building without isolation


@pytest.mark.parametrize(
    ("installed", "named"),
    [
        ({}, "'setuptools>=77,<82' 'torch>=2.11' 'ninja'"),
        ({"setuptools": "65.5.0", "torch": "2.10.1+cpu"}, "'setuptools>=77,<82' 'torch>=2.11'"),
        ({"setuptools": "77.0.3", "torch": "2.11.0"}, "'ninja'"),
    ],
)
def test_a_build_names_what_it_lacks(installed, named, monkeypatch):
    def version(name):
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(build_backend, "ninja", lambda: None if "ninja" in named else "/bin/ninja")
    for hook in (build_backend.prepare_metadata_for_build_wheel, build_backend.build_wheel):
        with pytest.raises(SystemExit, match=re.escape(f"`pip install {named}`, or leave")):
            hook("nowhere")


def test_pip_says_so_in_a_fresh_environment(tmp_path):
    """Of Python 3.12 and newer, which has no setuptools, or of a venv that is as bare."""
    python("-m", "venv", "--without-pip", tmp_path / "bare", cwd=tmp_path)
    options = ("--python", tmp_path / "bare/bin/python", "install", "--no-build-isolation")
    done = python("-m", "pip", *options, "--no-index", ROOT, cwd=tmp_path)
    assert done.returncode == 1
    text = done.stdout + done.stderr
    assert "stat-kernels: a build without isolation needs what is missing here" in text
    assert "`pip install 'setuptools>=77,<82'`" in text
    assert "Traceback" not in text


def test_a_source_archive_holds_its_tests_with_their_helpers(tmp_path):
    sdist = ("egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path)
    done = python("setup.py", "-q", *sdist, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        packed = {name.partition("/")[2] for name in opened.getnames()}
    folders = ("tests", "tools", "benchmarks", "examples", "csrc", "docs", "stat", "stat_kernels")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file()]
    wanted = {str(p.relative_to(ROOT)) for p in files if p.suffix not in (".pyc", ".so")}
    wanted |= {"Makefile", "constraints.txt", "mkdocs.yml", "CONTRIBUTING.md", "pyproject.toml"}
    assert wanted - packed == set()


# ---- Python started in a clone


@pytest.fixture
def clone_and_site(tmp_path):
    """A clone's sources without a library, and the same installed elsewhere, with one."""
    clone, site = tmp_path / "clone", tmp_path / "site"
    source = ROOT / "stat_kernels"
    shutil.copytree(source, clone / "stat_kernels", ignore=shutil.ignore_patterns("*.so"))
    shutil.copytree(source, site / "stat_kernels")
    info = site / "stat_kernels-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stat-kernels\nVersion: 0.1.0\n")
    return clone, site


REPORT = "from stat_kernels import native; print(native.PATH); print(native.problem())"


def report(clone, site):
    """In the clone: the library's path, the problem, and what Python warns of."""
    done = python("-c", REPORT, cwd=clone, PYTHONPATH=str(site), PYTHONWARNINGS="default")
    assert done.returncode == 0, done.stderr
    return *done.stdout.splitlines(), done.stderr


@pytest.mark.skipif(native.problem() is not None, reason="there is no library to install")
def test_the_clone_uses_the_library_that_is_installed_from_it(clone_and_site):
    clone, site = clone_and_site
    path, problem, warned = report(clone, site)
    assert (path, problem) == (str(site / "stat_kernels/libstat_kernels.so"), "None")
    assert "Warning" not in warned
    code = "from stat_kernels import native; print(native.introspection().__file__)"
    assert str(site) in python("-c", code, cwd=clone, PYTHONPATH=str(site)).stdout


def test_a_clone_that_differs_says_so(clone_and_site):
    """An edited clone: other sources than the library was built for."""
    clone, site = clone_and_site
    (clone / "stat_kernels/ops.py").open("a").write("\n# edited\n")
    path, problem, warned = report(clone, site)
    assert path == str(clone / "stat_kernels/libstat_kernels.so")
    assert f"a source tree without the native library that differs from the installed {site}" in (
        problem
    )
    assert "start Python in another folder, or run `pip install" in problem
    assert f"RuntimeWarning: {problem}" in warned


def test_a_clone_alone_asks_for_a_build(clone_and_site):
    clone, site = clone_and_site
    (site / "stat_kernels/libstat_kernels.so").unlink()
    _, problem, warned = report(clone, site)
    assert problem.startswith("the native library libstat_kernels.so was not built; install a C++")
    assert "Warning" not in warned

"""How the CUDA kernels are built: the toolkit, the GPUs, what is forced, and what comes out."""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from setuptools import Distribution

from stat_kernels import native
from stat_kernels.__main__ import describe, kernel_table
from tools import toolkit
from tools.cuda_compile import nvcc_command

ROOT = Path(__file__).parents[2]
KNOWN = {"75", "80", "86", "87", "89", "90", "100", "103", "110", "120", "121"}


def run(*command, **options):
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def setup_file(monkeypatch):
    """setup.py as a module; it builds nothing when it is imported."""
    monkeypatch.delenv("STAT_CUDA", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "_setup", module)
    spec.loader.exec_module(module)
    return module


# ---- which GPUs


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (None, "8.0 9.0a 10.0+PTX"),
        ("", "8.0 9.0a 10.0+PTX"),
        ("8.0;9.0+PTX", "8.0 9.0+PTX"),
        (" 8.0 8.6, 9.0a ; ", "8.0 8.6 9.0a"),
        ("9.0 9.0+PTX 9.0", "9.0+PTX"),
        ("Ampere;Hopper", "8.0 8.6+PTX 9.0+PTX"),
        ("Ampere+Tegra", "8.7"),
        ("Blackwell", "10.0 10.3 12.0 12.1+PTX"),
        ("7.5 8.0+PTX", "8.0+PTX"),
        ("Turing;Ada", "8.9+PTX"),
    ],
)
def test_the_list_of_gpus_is_read_as_torch_reads_it(text, wanted):
    assert " ".join(map(str, toolkit.architectures(text, KNOWN)[0])) == wanted


def test_what_is_too_old_is_left_out_and_said():
    _, notes = toolkit.architectures("7.5 8.0", KNOWN)
    assert notes == ["7.5 is left out: the CUDA kernels need 8.0 or newer"]


def test_an_older_nvcc_builds_what_it_knows_of_the_default():
    found, notes = toolkit.architectures(None, {"80", "86", "90"})
    assert [str(one) for one in found] == ["8.0", "9.0a"]
    assert notes == ["10.0+PTX is left out: this nvcc does not know it"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sm_90", "must hold compute capabilities such as 8.0, 9.0a, .* got 'sm_90'"),
        ("8.0 Fermi", "got 'Fermi'"),
        ("15.0", "asks for 15.0, which this nvcc does not know"),
        ("7.0 7.5", "names no GPU to compile for; the kernels need 8.0 or newer"),
    ],
)
def test_a_wrong_list_is_one_sentence(text, sentence):
    with pytest.raises(toolkit.ToolkitError, match=sentence):
        toolkit.architectures(text, KNOWN)


def test_flags_of_machine_code_and_of_text():
    plain, exact, ptx = toolkit.architectures(None, KNOWN)[0]
    assert plain.flags() == ["-gencode=arch=compute_80,code=sm_80"]
    assert exact.flags() == ["-gencode=arch=compute_90a,code=sm_90a"]
    assert ptx.flags()[1] == "-gencode=arch=compute_100,code=compute_100"


# ---- which toolkit


@pytest.fixture
def make_toolkit(tmp_path):
    """Makes a toolkit whose nvcc answers as the true one does, and returns its folder."""

    def make(name, version="13.0.88", static=True):
        root = tmp_path / name
        (root / "bin").mkdir(parents=True)
        (root / "targets/x86_64-linux/lib").mkdir(parents=True)
        if static:
            (root / "targets/x86_64-linux/lib/libcudart_static.a").touch()
        nvcc = root / "bin/nvcc"
        nvcc.write_text(
            f'#!/bin/sh\n[ "$1" = --dryrun ] && echo "#$ TOP={root}/bin/.." >&2\n'
            f'echo "release {version[:4]}, V{version}"\n'
        )
        nvcc.chmod(0o755)
        return root

    return make


def test_cuda_home_comes_first(make_toolkit):
    home, other = make_toolkit("home"), make_toolkit("other")
    found = toolkit.find({"CUDA_HOME": str(home), "PATH": str(other / "bin")})
    assert found.nvcc == home / "bin/nvcc"
    assert found.libraries == home / "targets/x86_64-linux/lib"


def test_a_script_on_the_path_may_stand_for_nvcc(make_toolkit, tmp_path):
    """The toolkit is where the true nvcc is, not beside the script."""
    true, folder = make_toolkit("true", "12.4.1"), tmp_path / "scripts"
    folder.mkdir()
    (folder / "nvcc").write_text(f'#!/bin/sh\nexec {true}/bin/nvcc "$@"\n')
    (folder / "nvcc").chmod(0o755)
    found = toolkit.find({"PATH": str(folder)})
    assert found == toolkit.Toolkit(folder / "nvcc", "12.4.1", true / "targets/x86_64-linux/lib")


def test_what_is_no_toolkit_is_one_sentence(make_toolkit, tmp_path):
    with pytest.raises(toolkit.ToolkitError, match=r"CUDA_HOME must be a CUDA toolkit, but .*nvcc"):
        toolkit.find({"CUDA_HOME": str(tmp_path), "PATH": ""})
    dynamic = make_toolkit("dynamic", static=False)
    with pytest.raises(toolkit.ToolkitError, match=r"no libcudart_static\.a below"):
        toolkit.find({"CUDA_HOME": str(dynamic)})


# ---- what is forced


@pytest.fixture
def no_nvcc(setup_file, monkeypatch):
    def find():
        raise setup_file.toolkit.ToolkitError("no nvcc was found")

    monkeypatch.setattr(setup_file.toolkit, "find", find)


def test_without_nvcc_the_reason_is_told(setup_file, no_nvcc):
    assert setup_file.cuda().reason == "no nvcc was found"


def test_a_torch_without_cuda_needs_no_kernels(setup_file, make_toolkit, monkeypatch):
    """Unless they are asked for, as for a wheel that serves every torch."""
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit("home")))
    assert re.fullmatch(
        r"torch 2\S+ was built without CUDA; .*STAT_CUDA=1.*", setup_file.cuda().reason
    )
    assert "torch built without CUDA" in describe()
    setup_file.cuda.cache_clear()
    monkeypatch.setenv("STAT_CUDA", "1")
    with pytest.raises(SystemExit, match="STAT_CUDA=1 cannot be met"):  # this nvcc knows no GPU
        setup_file.cuda()


def test_insisting_without_nvcc_is_an_error(setup_file, no_nvcc, monkeypatch):
    monkeypatch.setenv("STAT_CUDA", "1")
    with pytest.raises(SystemExit, match="STAT_CUDA=1 cannot be met: no nvcc was found"):
        setup_file.cuda()


def test_kernels_can_be_left_out(setup_file, monkeypatch):
    monkeypatch.setenv("STAT_CUDA", "0")
    assert setup_file.cuda().reason == "STAT_CUDA=0"
    text = setup_file.ninja_file({setup_file.LIBRARY: ROOT / "x.so"}, ROOT / "build")
    assert ".cu" not in text
    assert "cudart" not in text
    assert 'STA_CUDA_ARCHITECTURES ""' in setup_file.build_info()


def test_anything_else_is_an_error(setup_file, monkeypatch):
    monkeypatch.setenv("STAT_CUDA", "yes")
    with pytest.raises(SystemExit, match="STAT_CUDA must be 0, 1 or unset, got 'yes'"):
        setup_file.cuda()


def test_a_wheel_without_the_module_serves_every_python(setup_file, monkeypatch, capsys):
    """pybind11's module is of one Python; the library alone has no Python symbols."""
    names = (setup_file.LIBRARY, setup_file.INTROSPECTION)
    extensions = [setup_file.Extension(name, []) for name in names]
    package = Distribution({"name": "x", "ext_modules": extensions})
    build, wheel = setup_file.NativeCode(package), setup_file.PlatformWheel(package)
    build.extensions, wheel.plat_name = package.ext_modules, "linux_x86_64"
    wheel.finalize_options()
    assert wheel.get_tag()[0] == f"cp{sys.version_info.major}{sys.version_info.minor}"
    monkeypatch.setattr(setup_file.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(setup_file.build_ext, "run", lambda self: None)
    build.run()
    assert "the introspection module is not built: pybind11" in capsys.readouterr().err
    assert wheel.get_tag()[:2] == ("py3", "none")


# ---- what comes out


def nvcc_is_here():
    try:
        toolkit.find()
    except toolkit.ToolkitError:
        return False
    return os.environ.get("STAT_CUDA") != "0" and torch.version.cuda is not None


def test_the_library_has_the_kernels_where_nvcc_is():
    """Otherwise every later test would only say that they are not built."""
    assert (native.cuda_problem() is None) == nvcc_is_here()


def test_the_library_needs_neither_cuda_nor_python():
    """It loads in a PyTorch without CUDA, and in every Python."""
    needed = re.findall(r"NEEDED.*\[(.+)\]", run("readelf", "-d", native.PATH))
    assert "libtorch.so" in needed
    assert not [name for name in needed if re.search("cuda|nvidia|python", name)], needed
    undefined = run("nm", "-D", "--undefined-only", native.PATH)
    assert not re.search(r"\bPy|U cu[A-Z]|U cuda", undefined)
    if native.cuda_problem() is None:
        assert re.search(r"^\s+w aoti_torch_get_current_cuda_stream$", undefined, re.MULTILINE)


def test_only_one_function_is_exported():
    """In particular nothing of CUDA's static run time, which another library may have too."""
    exported = run("nm", "-D", "--defined-only", native.PATH)
    assert re.findall(r" T (\w+)$", exported, re.MULTILINE) == ["stat_kernels_cuda_kernel"]


@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch has no stream to bind")
def test_the_stream_is_torchs_own():
    """A weak symbol that nobody provides is a null pointer, found out with the first GPU."""
    if native.cuda_problem() is not None:
        pytest.skip("the library has no CUDA kernels, so it asks for no stream")
    done = subprocess.run(
        [sys.executable, "-c", "from stat_kernels import native; native.load()"],
        env={**os.environ, "LD_DEBUG": "bindings"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    bound = [x for x in done.stderr.splitlines() if "aoti_torch_get_current_cuda_stream" in x]
    assert any("libstat_kernels.so" in x and "libtorch_cuda.so" in x for x in bound), bound


LOADED = """
import ctypes, sys
libtorch, library = sys.argv[1:]
ctypes.CDLL(libtorch, ctypes.RTLD_GLOBAL)
ctypes.CDLL(library)
loaded = open("/proc/self/maps").read()
print([name for name in ("libtorch_cpu", "libstat_kernels", "libtorch_cuda") if name in loaded])
"""


def test_it_loads_in_a_torch_without_cuda(tmp_path):
    """Such a torch has a libtorch.so that leads to its CPU part alone; here one is made."""
    folder = Path(torch.__file__).parent / "lib"
    (tmp_path / "empty.cpp").touch()
    options = ("-shared", "-Wl,-soname,libtorch.so", "-Wl,--no-as-needed", f"-Wl,-rpath,{folder}")
    libraries = (f"-L{folder}", "-ltorch_cpu", "-o", "libtorch.so")
    run("c++", *options, "empty.cpp", *libraries, cwd=tmp_path)
    found = run(sys.executable, "-c", LOADED, tmp_path / "libtorch.so", native.PATH)
    assert found.strip() == "['libtorch_cpu', 'libstat_kernels']"


def test_headers_of_kernels_are_followed():
    """ninja compiles a kernel again when one of its headers changed."""
    if native.cuda_problem() is not None:
        pytest.skip("no kernel was compiled here")
    ninja = shutil.which("ninja") or Path(sys.executable).with_name("ninja")
    known = run(ninja, "-C", ROOT / "build/native", "-t", "deps", cwd=ROOT)
    for source in toolkit.SOURCES:
        block = re.search(rf"^\S*cuda_{source.name}\.o:.*\n((?:    .+\n)+)", known, re.MULTILINE)
        assert block, source.name
        assert "csrc/cuda/device.h" in block[1]
        assert "csrc/sta_params.h" in block[1]


def test_what_a_gpu_will_be_asked_compiles(tmp_path):
    """The small kernels of test_gpu_fragments.py, which runs where there is a GPU."""
    if not nvcc_is_here():
        pytest.skip("there is no nvcc")
    target = tmp_path / "probes.so"
    run(*nvcc_command(ROOT / "tests/kernels/cuda_emulator/probes.cu", target, "9.0a"))
    library = ctypes.CDLL(str(target))
    assert library.probe(b"no such kernel", *[None] * 3, 0, 0, ctypes.c_int64(1), 32, 0) == -1


def test_the_build_tells_of_itself():
    module = native.introspection()
    assert module is not None, "build with pybind11 installed"
    found = module.build_information()
    assert found["torch"].startswith("2.")
    assert "-O3" in found["flags"]
    assert found["CUDA architectures"] == native.cuda_architectures()
    if native.cuda_problem() is None:
        assert found["nvcc"].count(".") == 2
    if native.cuda_problem() is not None:
        assert module.cuda_kernels() == []
    elif not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            module.cuda_kernels()


def test_the_report_has_a_line_for_each_kernel():
    numbers = {
        "registers": 168,
        "spilled_bytes": 0,
        "static_shared_bytes": 1024,
        "dynamic_shared_bytes": 161792,
        "threads": 384,
        "blocks_resident": 1,
    }
    kernel = {"name": "backward", "dtype": "bfloat16", "head_dim": 96, **numbers}
    header, line = kernel_table([kernel])
    assert header.split() == [
        *("CUDA", "kernel", "registers", "spilled", "static", "dynamic", "threads", "blocks")
    ]
    assert line.split() == ["backward,", "bfloat16,", "D=96", *map(str, numbers.values())]
    assert len(header) == len(line)


def test_the_report_says_what_it_does_not_know(monkeypatch):
    monkeypatch.setattr(native, "introspection", lambda: None)
    assert "build        not known: built without pybind11" in describe()


FRESH = """
import sys, torch, stat_kernels
from stat_kernels import native, shrinking_temporal_attention
from stat_kernels.testing import Case, check_backend, make_inputs
assert stat_kernels.__file__.startswith(sys.prefix), stat_kernels.__file__
assert str(native.PATH).startswith(sys.prefix)
check_backend("cpu", make_inputs(Case(T=2, Nq=3, H=1, D=16, Nc=2, Ns=2, L=2)), 3)
print(repr(native.cuda_architectures()), native.introspection() is not None)
"""


def test_the_wheel_works_in_a_fresh_environment_without_nvcc(tmp_path):
    """Of this checkout, with PyTorch from here but nothing else that could stand in for it."""
    build = ("build", "--build-base", tmp_path / "build")
    wheel = ("bdist_wheel", "--bdist-dir", tmp_path / "bdist", "--dist-dir", tmp_path)
    run(sys.executable, "setup.py", "-q", *build, *wheel, cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{python}-{python}-" in wheel.name  # pybind11's module is of this Python alone
    names = zipfile.ZipFile(wheel).namelist()
    assert {"stat_kernels/libstat_kernels.so", "stat_video/recipes/clips_tiny.yaml"} <= set(names)
    environment = tmp_path / "fresh"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    fresh = environment / "bin/python"
    installed = run(fresh, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])")
    install = ("--python", fresh, "install", "--no-deps", "--no-index", wheel)
    run(sys.executable, "-m", "pip", "-q", *install, cwd=tmp_path)
    # A path alone: the .pth files in that folder, an editable install's for one, are not read.
    here = sysconfig.get_paths()["purelib"]
    (Path(installed.strip()) / "torch_is_there.pth").write_text(here + "\n")
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CUDA_HOME")}
    clean["PATH"] = str(environment / "bin")
    found = run(fresh, "-c", FRESH, cwd=tmp_path, env=clean)
    assert found.split("\n")[0] == f"{native.cuda_architectures()!r} True"

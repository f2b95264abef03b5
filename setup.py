"""Packages listed by hand, and the native code built with ninja.

Two things are built: ``libstat_kernels.so``, which holds every kernel and no Python symbol, and
``_introspection``, a small pybind11 module that reports on it.

STAT_NATIVE=0 builds neither. STAT_CUDA=0 leaves the CUDA kernels out, STAT_CUDA=1 insists on them,
also for a torch without CUDA; TORCH_CUDA_ARCH_LIST says for which GPUs. CXX and CXXFLAGS are
honoured.

The folder ``stat/`` holds the package ``stat_video`` and must never become a package itself:
Python's own module ``stat`` is imported at start-up. So nothing here searches for packages.
"""

import functools
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def _load(path: str):
    """A module by its path: an isolated build does not have this folder on sys.path."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toolkit, schemas = _load("tools/toolkit.py"), _load("stat_kernels/schemas.py")
build_backend = _load("tools/build_backend.py")

ROOMS = (
    "checkpoint",
    "model",
    "data",
    "train",
    "evaluate",
    "analysis",
    "clips",
    "recipes",
)  # of stat_video
LIBRARY = "stat_kernels.libstat_kernels"
INTROSPECTION = "stat_kernels._introspection"
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl"
# One kernel source a file, compiled for each instruction set; the best is chosen at run time.
ISA_FLAGS = {
    "isa_portable.cpp": "-ffp-contract=fast",
    "isa_avx2.cpp": AVX2,
    "isa_avx512.cpp": AVX512,
    "isa_avx512_bf16.cpp": f"{AVX512} -mavx512bf16",
    "isa_amx.cpp": f"{AVX512} -mavx512bf16",
    "isa_amx_emulated.cpp": "-Wno-psabi",
}
BINDINGS = sorted(ROOT.glob("csrc/binding*.cpp"))
CPU_SOURCES = [*BINDINGS, *sorted(ROOT.glob("csrc/cpu/*.cpp"))]
INTROSPECTION_SOURCE = ROOT / "csrc/introspection.cpp"
# The stable ABI: a library built against any newer torch loads in 2.11.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra"


def compiler() -> str | None:
    """The C++ compiler: CXX, or the first of the usual names on the PATH."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return shutil.which(name)
    return None


def reason_to_skip() -> str | None:
    """Why no native code is built, or None."""
    if os.environ.get("STAT_NATIVE") == "0":
        return "STAT_NATIVE=0"
    if compiler() is None:
        return "no C++ compiler found (set CXX to one)"
    try:
        import torch  # noqa: F401
    except ImportError as error:
        return f"torch cannot be imported while building ({error}); add --no-build-isolation"
    return None


@dataclass(frozen=True)
class Cuda:
    """What the CUDA kernels are compiled with and for; ``reason`` says why they are not."""

    tools: toolkit.Toolkit | None = None
    architectures: tuple[toolkit.Architecture, ...] = ()
    reason: str | None = None


@functools.cache
def cuda() -> Cuda:
    """Finds the CUDA toolkit and reads the list of GPUs, as the environment asks.

    Exits with one sentence where STAT_CUDA=1 cannot be met.
    """
    wanted = os.environ.get("STAT_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"stat-kernels: STAT_CUDA must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return Cuda(reason="STAT_CUDA=0")
    if wanted != "1" and (reason := torch_without_cuda()):
        return Cuda(reason=reason)
    try:
        tools = toolkit.find()
        listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
        chosen, notes = toolkit.architectures(listed, tools.known())
    except toolkit.ToolkitError as error:
        if wanted == "1":
            sys.exit(f"stat-kernels: STAT_CUDA=1 cannot be met: {error}")
        return Cuda(reason=str(error))
    for note in notes:
        say(note)
    return Cuda(tools, tuple(chosen))


def torch_without_cuda() -> str | None:
    """Why kernels for GPUs would be of no use to the torch of this build; None where they are."""
    import torch

    if torch.version.cuda is not None:
        return None
    return (
        f"torch {torch.__version__} was built without CUDA; install a torch with CUDA, or set "
        "STAT_CUDA=1 to compile them all the same"
    )


def say(text: str) -> None:
    print(f"stat-kernels: {text}", file=sys.stderr)


class NativeCode(build_ext):
    """Compiles csrc/ with ninja, or says what it leaves out and why."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.split(".")[-1] == LIBRARY.split(".")[-1]:
            return str(Path(*fullname.split("."))) + ".so"
        return super().get_ext_filename(fullname)

    def run(self) -> None:
        reason = reason_to_skip()
        if reason is not None:
            if os.environ.get("STAT_CUDA") == "1":
                sys.exit(f"stat-kernels: STAT_CUDA=1 cannot be met: {reason}")
            self.leave_out(LIBRARY, INTROSPECTION)
            say(f"the native library is not built: {reason}")
            return
        if cuda().reason is not None:
            say(f"the CUDA kernels are not built: {cuda().reason}")
        if importlib.util.find_spec("pybind11") is None:
            self.leave_out(INTROSPECTION)
            say("the introspection module is not built: pybind11 cannot be imported while building")
        super().run()

    def leave_out(self, *names: str) -> None:
        """Else an editable install looks for what was not built, and a wheel gets a wrong tag."""
        self.extensions[:] = [ext for ext in self.extensions if ext.name not in names]

    def build_extensions(self) -> None:
        """One ninja for all, in a folder that any later build finds again."""
        names = [ext.name for ext in self.extensions]
        targets = {name: Path(self.get_ext_fullpath(name)).resolve() for name in names}
        for target in targets.values():
            target.parent.mkdir(parents=True, exist_ok=True)
        folder = ROOT / "build" / "native"
        folder.mkdir(parents=True, exist_ok=True)
        write_if_changed(folder / "build_info.h", build_info())
        write_if_changed(folder / "schemas.h", schemas_header())
        write_if_changed(folder / "build.ninja", ninja_file(targets, folder))
        build_backend.require("ninja")
        done = subprocess.run([build_backend.ninja(), "-C", str(folder)], check=False)
        if done.returncode:
            sys.exit(
                "stat-kernels: the native library did not compile (see above); "
                "STAT_CUDA=0 builds it without the CUDA kernels, STAT_NATIVE=0 installs without it"
            )


def write_if_changed(path: Path, text: str) -> None:
    """Keeps the date of a file that stays as it is, so that nothing is compiled again for it."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def build_info() -> str:
    """build_info.h: how the library was built, for the binding and for reports."""
    import torch

    built = {
        "stat-kernels": version(),
        "torch": torch.__version__,
        "compiler": first_line(compiler(), "--version"),
        "flags": f"{FLAGS} {os.environ.get('CXXFLAGS', '')}".strip(),
    }
    if cuda().tools:
        built |= {"nvcc": cuda().tools.version, "nvcc flags": toolkit.FLAGS}
        built |= {"CUDA sources": toolkit.source_hash()}
    listed = " ".join(map(str, cuda().architectures))
    pairs = "".join(f"    {{{json.dumps(k)}, {json.dumps(v)}}},\n" for k, v in built.items())
    return (
        "// Written by setup.py.\n"
        f"#define STA_CUDA_ARCHITECTURES {json.dumps(listed)}\n"
        f"static const char* const STA_BUILD_INFO[][2] [[maybe_unused]] = {{\n{pairs}}};\n"
    )


def schemas_header() -> str:
    """schemas.h: the operators that the library defines, from stat_kernels/schemas.py."""
    lines = (f"    {json.dumps(name + schema)},\n" for name, schema in schemas.SCHEMAS.items())
    return (
        "// Written by setup.py.\n"
        f"static const char* const STA_SCHEMAS[] = {{\n{''.join(lines)}}};\n"
    )


def first_line(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]


def ninja_file(targets: dict[str, Path], folder: Path) -> str:
    """The text of build.ninja for the extensions named in ``targets``."""
    import torch

    torch_root = Path(torch.__file__).parent
    found, library = cuda(), targets[LIBRARY]
    includes = f"-I{ROOT / 'csrc'} -I{folder}"
    torch_headers = f"{STABLE_ABI} -isystem {torch_root / 'include'}"
    # libtorch.so brings CUDA's stream where torch has CUDA, and only the CPU part where it has not.
    libraries = f"-L{torch_root / 'lib'} -Wl,--no-as-needed -ltorch -Wl,--as-needed -ltorch_cpu"
    lines = [
        f"cxx = {compiler()}",
        f"flags = {FLAGS} {os.environ.get('CXXFLAGS', '')} {includes}",
        "rule compile",
        "  command = $cxx $flags $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule link",
        "  command = $cxx -shared $in -o $out $more",
        "  description = link $out",
    ]
    objects = []
    if found.tools:
        # The slowest compiler comes first, and compiles for several GPUs at once on many cores.
        threads = max(1, (os.cpu_count() or 1) // len(toolkit.SOURCES))
        command = found.tools.compile_command(found.architectures, compiler(), threads)
        lines += [
            "rule cuda",
            f"  command = {command} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
        ]
        for source in toolkit.SOURCES:
            objects.append(folder / f"cuda_{source.name}.o")
            lines.append(f"build {objects[-1]}: cuda {source}")
        # Static, so that the library loads where no CUDA is installed; none of it is exported.
        libraries += f" {found.tools.libraries / 'libcudart_static.a'} -ldl -lpthread -lrt"
        torch_headers += " -DSTA_WITH_CUDA"
    for source in CPU_SOURCES:
        objects.append(folder / f"{source.parent.name}_{source.name}.o")
        isa = ISA_FLAGS.get(source.name, "")
        more = torch_headers if source in BINDINGS else isa if X86 or "-m" not in isa else ""
        lines += [f"build {objects[-1]}: compile {source}", f"  more = {more}"]
    lines += [f"build {library}: link {' '.join(map(str, objects))}"]
    lines += [f"  more = -Wl,-z,defs -Wl,--exclude-libs,ALL -Wl,-soname,{library.name} {libraries}"]
    if INTROSPECTION in targets:
        lines += introspection_lines(targets[INTROSPECTION], library, folder)
    everything = " ".join(map(str, targets.values()))
    return "\n".join(lines).replace("\\", "/") + f"\ndefault {everything}\n"


def introspection_lines(module: Path, library: Path, folder: Path) -> list[str]:
    """Statements of build.ninja for the pybind11 module, which finds the library beside itself."""
    import pybind11

    headers = (pybind11.get_include(), sysconfig.get_paths()["include"])
    compiled = folder / f"introspection.{sysconfig.get_config_var('SOABI')}.o"
    return [
        f"build {compiled}: compile {INTROSPECTION_SOURCE}",
        f"  more = {shlex.join(f'-isystem{path}' for path in headers)}",
        f"build {module}: link {compiled} {library}",
        "  more = -Wl,-rpath,'$$ORIGIN'",
    ]


class PlatformWheel(bdist_wheel):
    """One wheel serves every Python of a platform, unless the introspection module is in it."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        built = [ext.name for ext in self.distribution.ext_modules or []]
        return tag if INTROSPECTION in built else ("py3", "none", tag[2])


def version() -> str:
    text = (ROOT / "stat_kernels/__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"', text, re.MULTILINE).group(1)


def relative(*paths: Path) -> list[str]:
    """As setuptools wants sources: from the folder of this file."""
    return [str(path.relative_to(ROOT)) for path in paths]


if __name__ == "__main__":
    setup(
        version=version(),
        packages=[
            "stat_kernels",
            "stat_kernels.backends",
            "stat_kernels.backends.triton",
            "stat_kernels.integrations",
            "stat_video",
            *(f"stat_video.{room}" for room in ROOMS),
        ],
        package_dir={"stat_video": "stat/stat_video"},
        package_data={
            "stat_kernels": ["py.typed"],
            "stat_video": ["py.typed"],
            "stat_video.recipes": ["*.yaml"],
        },
        ext_modules=[
            Extension(LIBRARY, relative(*CPU_SOURCES, *toolkit.SOURCES)),
            Extension(INTROSPECTION, relative(INTROSPECTION_SOURCE)),
        ],
        cmdclass={"build_ext": NativeCode, "bdist_wheel": PlatformWheel},
    )

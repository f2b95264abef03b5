"""Packages listed by hand, and the native library built with ninja.

The folder ``stat/`` holds the package ``stat_video`` and must never become a package itself:
Python's own module ``stat`` is imported at start-up. So nothing here searches for packages.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
LIBRARY = "stat_kernels.libstat_kernels"
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = "-mavx2 -mfma -mf16c"
# One kernel source a file, compiled for each instruction set; the best is chosen at run time.
ISA_FLAGS = {
    "csrc/cpu/isa_portable.cpp": "-ffp-contract=fast",
    "csrc/cpu/isa_avx2.cpp": AVX2,
    "csrc/cpu/isa_avx512.cpp": f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl",
}
SOURCES = [
    "csrc/binding.cpp",
    *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.cpp")),
]
# The stable ABI: a library built against any newer torch loads in 2.11.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
FLAGS = f"-O3 -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra {STABLE_ABI}"


def compiler() -> str | None:
    """The C++ compiler: CXX, or the first of the usual names on the PATH."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return shutil.which(name)
    return None


def reason_to_skip() -> str | None:
    """Why no native library is built, or None."""
    if os.environ.get("STAT_NATIVE") == "0":
        return "STAT_NATIVE=0"
    if compiler() is None:
        return "no C++ compiler found (set CXX to one)"
    try:
        import torch  # noqa: F401
    except ImportError as error:
        return f"torch cannot be imported while building ({error}); add --no-build-isolation"
    return None


class NativeLibrary(build_ext):
    """Compiles csrc/ to one shared library without Python symbols, or says why it does not."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def run(self) -> None:
        reason = reason_to_skip()
        if reason is None:
            super().run()
            return
        self.extensions.clear()  # else an editable install looks for what was not built
        print(f"stat-kernels: the native library is not built: {reason}", file=sys.stderr)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(ext.sources, target, folder))
        ninja = shutil.which("ninja") or str(Path(sys.executable).with_name("ninja"))
        done = subprocess.run([ninja, "-C", str(folder)], check=False)
        if done.returncode:
            sys.exit(
                "stat-kernels: the native library did not compile (see above); "
                "STAT_NATIVE=0 installs without it"
            )


def ninja_file(sources: list[str], target: Path, folder: Path) -> str:
    """The text of build.ninja."""
    import torch

    torch_root = Path(torch.__file__).parent
    includes = f"-isystem {torch_root / 'include'} -I{ROOT / 'csrc'}"
    lines = [
        f"cxx = {compiler()}",
        f"flags = {FLAGS} {os.environ.get('CXXFLAGS', '')} {includes}",
        "rule compile",
        "  command = $cxx $flags $isa -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule link",
        f"  command = $cxx -shared -Wl,-z,defs $in -o $out -L{torch_root / 'lib'} -ltorch_cpu",
        "  description = link $out",
    ]
    objects = []
    for source in sources:
        objects.append(str(folder / (source.replace("/", "_") + ".o")))
        lines.append(f"build {objects[-1]}: compile {ROOT / source}")
        flags = ISA_FLAGS.get(source, "")
        lines.append(f"  isa = {flags if X86 or '-m' not in flags else ''}")
    lines.append(f"build {target}: link {' '.join(objects)}")
    return "\n".join(lines).replace("\\", "/") + f"\ndefault {target}\n"


class AnyPythonWheel(bdist_wheel):
    """The library has no Python symbols, so one wheel serves every Python of the platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def version() -> str:
    text = (ROOT / "stat_kernels/__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"', text, re.MULTILINE).group(1)


setup(
    version=version(),
    packages=[
        "stat_kernels",
        "stat_kernels.backends",
        "stat_kernels.backends.triton",
        "stat_kernels.integrations",
        "stat_video",
        "stat_video.clips",
        "stat_video.data",
        "stat_video.recipes",
    ],
    package_dir={"stat_video": "stat/stat_video"},
    package_data={"stat_video.recipes": ["*.yaml"]},
    ext_modules=[Extension(LIBRARY, SOURCES)],
    cmdclass={"build_ext": NativeLibrary, "bdist_wheel": AnyPythonWheel},
)

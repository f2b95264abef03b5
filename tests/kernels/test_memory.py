"""keep_freed_memory, in processes of its own: it cannot be undone."""

import json
import os
import platform
import subprocess
import sys

import pytest

from stat_kernels import memory
from stat_kernels.memory import CHOSEN, keep_freed_memory

PROGRAM = """
import json, resource, torch
from stat_kernels.memory import keep_freed_memory
kept = keep_freed_memory() if {keep} else None
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(8 << 20)  # 32 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(json.dumps([kept, faults()]))
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")


def run(keep, **env):
    clean = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(keep=keep)],
        capture_output=True, text=True, check=True, env={**clean, **env},
    )  # fmt: skip
    return json.loads(done.stdout)


@glibc
def test_pages_are_reused():
    (_, without), (kept, with_it) = run(False), run(True)
    assert kept is True
    assert with_it * 5 < without


@glibc
def test_settings_of_the_user_stay():
    assert run(True, MALLOC_TRIM_THRESHOLD_="131072")[0] is False


def test_another_c_library_is_left_alone(monkeypatch):
    for name in CHOSEN:
        monkeypatch.delenv(name, raising=False)
    called = []

    class Musl:  # no gnu_get_libc_version
        def mallopt(self, *setting):
            called.append(setting)

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Musl())
    assert keep_freed_memory() is False
    assert not called

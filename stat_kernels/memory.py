"""What the C library does with freed memory."""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_KEPT = 1 << 30
# With any of these the user has chosen an allocator or its settings.
CHOSEN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Let the whole process reuse freed blocks of up to 1 GiB instead of returning them at once.

    By default glibc gives the memory of a large tensor back to the operating system when it is
    freed, and the next tensor's pages are mapped and cleared again one by one. A training step on a
    CPU can spend a quarter of its time on that. Afterwards the process stays as large as it ever
    was. Call it once, early; it cannot be undone.

    Returns:
        False where nothing was changed: without glibc, or where the environment already says what
        the allocator shall do (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_, GLIBC_TUNABLES,
        LD_PRELOAD).
    """
    if any(os.environ.get(name) for name in CHOSEN):
        return False
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return False
    if not hasattr(library, "gnu_get_libc_version"):  # mallopt's settings are numbered by glibc
        return False
    mallopt = library.mallopt
    return mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT) == mallopt(_M_TRIM_THRESHOLD, -1) == 1

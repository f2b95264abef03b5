"""CRC-32 of files, taken while they are written and again before they are read.

CRC-32 finds every single flipped bit and every damage of up to 32 bits in a row, and any other with
a probability of 1 - 2**-32. It says nothing about who wrote the file. zlib takes 2.4 GB/s on one
core of a Xeon, twice what SHA-256 does there (1.25 GB/s with the CPU's SHA instructions).
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystem

BLOCK_BYTES = 1 << 22


class SummedFiles(FileSystem):
    """The files that a torch FileSystemWriter writes.

    sums: CRC-32 by name, of the bytes passed to the writer.
    """

    def __init__(self) -> None:
        self.sums: dict[str, int] = {}

    @contextmanager
    def create_stream(self, path: Path, mode: str) -> Iterator[io.IOBase]:  # type: ignore[override]
        with _SummedFile(io.FileIO(path, mode)) as file:
            yield file
        self.sums[path.name] = file.sum

    def rename(self, path: Path, new_path: Path) -> None:  # type: ignore[override]
        super().rename(path, new_path)
        self.sums[new_path.name] = self.sums.pop(path.name)


class _SummedFile(io.BufferedWriter):
    sum = 0

    def write(self, data) -> int:
        self.sum = zlib.crc32(data, self.sum)
        return super().write(data)


def sum_of_file(path: Path) -> int:
    """The CRC-32 of a file. Raises OSError."""
    total = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            total = zlib.crc32(block, total)
    return total


def sum_of_text(text: str) -> int:
    """The CRC-32 of a text in UTF-8."""
    return zlib.crc32(text.encode())

"""Reading a checkpoint's tensors with torch.distributed.checkpoint, but without its pickles.

torch unpickles two things without restriction: the index, and values that are not tensors. The
classes here replace both.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from stat_video.checkpoint.index import read_index


class Reader(dcp.FileSystemReader):
    """Provides an index that was read before; torch itself reads tensors with `weights_only`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._index = read_index(folder)

    # Without **kwargs: torch would ask for a process's own index, which nobody writes here.
    def read_metadata(self) -> Metadata:
        return self._index


class Planner(dcp.DefaultLoadPlanner):
    """Accepts tensors, numbers, strings and lists of numbers and strings, and nothing else."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        loaded = torch.load(value, weights_only=True)
        if isinstance(self.state_dict[name], torch.Tensor) or not _is_plain(loaded):
            raise ValueError(f"{name} is a {type(loaded).__name__}")
        plain = io.BytesIO()
        torch.save(loaded, plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))

"""Reading a checkpoint's index without trusting it.

torch.distributed.checkpoint pickles the index, and a pickle can call whatever it can import. Here
it can only build records: inert stand-ins for the classes that torch writes. They are validated and
then converted to torch's classes.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

INDEX = ".metadata"
DATA_FILE = re.compile(r"__\d+_\d+\.distcp")


def is_checkpoint_file(name: str) -> bool:
    """Whether torch.distributed.checkpoint gives this name to a file of a checkpoint."""
    return name == INDEX or DATA_FILE.fullmatch(name) is not None


class _Record:
    """A pickled object as data: the arguments of its constructor and its state."""

    args: tuple = ()
    state: Any = None

    def __new__(cls, *args: Any) -> _Record:
        record = super().__new__(cls)
        record.args = args
        return record

    # Found first by the opcode BUILD, which would else set attributes, even of classes.
    def __setstate__(self, state: Any) -> None:
        self.state = state


_METADATA = "torch.distributed.checkpoint.metadata"
_RECORDS = {
    (module, name): type(name, (_Record,), {})
    for module, name in (
        (_METADATA, "Metadata"),
        (_METADATA, "TensorStorageMetadata"),
        (_METADATA, "BytesStorageMetadata"),
        (_METADATA, "ChunkStorageMetadata"),
        (_METADATA, "TensorProperties"),
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        (_METADATA, "MetadataIndex"),
        (_METADATA, "StorageMeta"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),  # Python 3.13
    )
}
# pickle has not used these since protocol 4, and they grow the memo to any size that a file names.
_GROWING = {"PUT", "BINPUT", "LONG_BINPUT"}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of an admitted class. torch's sizes and dtypes are immutable and kept."""
        if (record := _RECORDS.get((module, name))) is not None:
            return record
        found = vars(torch).get(name) if module == "torch" else None
        if found is torch.Size or isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint contains")


def read_index(folder: Path) -> Metadata:
    """What the checkpoint in `folder` holds: shapes, dtypes, and where each shard lies.

    Raises ValueError for whatever torch.distributed.checkpoint would not have written.
    """
    path = folder / INDEX
    data = path.read_bytes()
    try:
        if growing := _GROWING & {code.name for code, _, _ in pickletools.genops(data)}:
            raise ValueError(f"it has the pickle opcode {min(growing)}")
        return _metadata(_Unpickler(io.BytesIO(data)).load())
    # A pickle out of order raises anything, by the documentation of the module.
    except Exception as error:
        raise ValueError(f"{path} is not the index of a checkpoint: {str(error)[:200]}") from error


def _metadata(root: Any) -> Metadata:
    fields = _state(root, "Metadata")
    entries = {_name(n): _entry(e) for n, e in fields["state_dict_metadata"].items()}
    places = dict(_place(*pair) for pair in fields["storage_data"].items())
    return Metadata(entries, storage_data=places)


def _entry(record: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    """The metadata of one entry of the state dict."""
    if type(record).__name__ == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _state(record, "TensorStorageMetadata")
    dtype = _state(fields["properties"], "TensorProperties")[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{dtype!r} is no dtype")
    chunks = [_state(chunk, "ChunkStorageMetadata") for chunk in fields["chunks"]]
    return TensorStorageMetadata(
        TensorProperties(dtype),
        _size(fields["size"]),
        [ChunkStorageMetadata(_size(c["offsets"]), _size(c["sizes"])) for c in chunks],
    )


def _place(key: Any, value: Any) -> tuple[MetadataIndex, _StorageInfo]:
    """A shard and the range of bytes in a file that holds it."""
    shard, place = _state(key, "MetadataIndex"), _state(value, "_StorageInfo")
    offset = shard.get("offset")
    index = MetadataIndex(
        _name(shard["fqn"]), None if offset is None else _size(offset), shard.get("index")
    )
    name = _name(place["relative_path"])
    if not DATA_FILE.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a checkpoint's file")
    first, length = _size((place["offset"], place["length"]))
    return index, _StorageInfo(name, first, length)


def _state(record: Any, name: str) -> Any:
    if type(record) not in _RECORDS.values() or type(record).__name__ != name:
        raise ValueError(f"it has a {type(record).__name__} for a {name}")
    return record.state


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no name")
    return value


def _size(value: Any) -> torch.Size:
    if not isinstance(value, tuple) or not all(type(v) is int and v >= 0 for v in value):
        raise ValueError(f"{value!r} is no size")
    return torch.Size(value)

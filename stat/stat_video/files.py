"""Reading and writing files; errors are one sentence that names the file."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stat_video.errors import UserError

YAML_LIMIT = 100_000  # bytes; PyYAML reads about as many a second


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Convert a failure to write `path` inside the context into a UserError that names it."""
    try:
        yield
    except Exception as error:
        refusal = os_error(error)
        if refusal is None:
            raise
        raise UserError(f"cannot write to {path}: {reason(refusal, path)}") from error


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, making the folder. The file appears complete or not at all.

    Raises UserError.
    """
    part = path.with_name(path.name + ".part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        os.replace(part, path)


def read_json(path: Path, keys: set[str]) -> dict[str, Any]:
    """A JSON object that `write_json` wrote and that has `keys`. Raises UserError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict) or not keys <= content.keys():
        raise UserError(f"{path} is damaged: it must be an object with {', '.join(sorted(keys))}")
    return content


def os_error(error: BaseException) -> OSError | None:
    """The operating system's error behind `error`, or None.

    torch.distributed.checkpoint and safetensors wrap it; torch.save only says that it failed.
    """
    if isinstance(error, OSError):
        return error
    for failure, _ in getattr(error, "failures", {}).values():
        return os_error(failure)
    if found := re.search(r"os error (\d+)", str(error)):
        return OSError(int(found[1]), os.strerror(int(found[1])))
    if "PytorchStreamWriter failed writing" in str(error):
        return OSError("torch.save cannot write it, the disk may be full")
    return None


def reason(error: OSError, path: str | Path) -> str:
    """The operating system's reason, naming the disk if it is full."""
    text = error.strerror or str(error)
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return text
    place = Path(path).resolve()
    while not place.is_mount():
        place = place.parent
    return f"{text} (the disk mounted at {place})"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a small YAML file, {} for an empty one. Raises UserError.

    Aliases are refused: a file of a few lines can expand to gigabytes with them.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):
                raise ValueError("YAML aliases are not supported")
            return super().compose_node(parent, index)

    try:
        with Path(path).open("rb") as file:
            text = file.read(YAML_LIMIT + 1)
        if len(text) > YAML_LIMIT:
            raise ValueError(f"it has more than {YAML_LIMIT} bytes")
        content = yaml.load(text.decode(), Loader) or {}
    # PyYAML also lets what goes wrong in int(), date() and deep recursion escape as it is.
    except Exception as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a YAML mapping, got a {type(content).__name__}")
    return content

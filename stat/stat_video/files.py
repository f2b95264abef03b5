"""Files on the way in and out: what fails is told in one sentence that names the file."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stat_video.errors import UserError

YAML_LIMIT = 100_000  # bytes; PyYAML reads about as many a second


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns a failure to write `path` inside into a UserError that names it, and a full disk."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {path}: {_reason(error, Path(path))}") from error


def _reason(error: OSError, path: Path) -> str:
    reason = error.strerror or str(error)
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return reason
    path = path.resolve()
    while not path.is_mount():
        path = path.parent
    return f"{reason} (the disk mounted at {path})"


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

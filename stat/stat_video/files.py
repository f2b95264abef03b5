"""Reading and writing files; errors are one sentence that names the file."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterable, Iterator, Set
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
    except BaseException as error:  # torch's CheckpointException is no Exception
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


def write_lines(path: Path, lines: Iterable[str], *, anew: bool = True) -> None:
    """Write or append lines, making the folder; what is no UTF-8 is escaped. Raises UserError."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w" if anew else "a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(f"{line}\n" for line in lines)


def read_text(file: Path) -> str:
    """The text of a UTF-8 file without its byte order mark. Raises UserError."""
    try:
        if file.exists() and not file.is_file():  # a FIFO would be waited for
            raise UserError(f"{file} is not a file")
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist") from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} must be UTF-8 text: {error.reason} at byte {error.start}"
        ) from error
    if "\0" in text:
        raise UserError(f"{file} must be UTF-8 text, but holds NUL bytes")
    return text


def parse_json(file: Path, text: str) -> Any:
    """The content of the JSON file that `text` was read from. Raises UserError."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise UserError(f"{file} is damaged JSON: it is nested too deeply") from error
    except ValueError as error:  # also numbers of thousands of digits
        raise UserError(f"{file} is damaged JSON: {error}") from error


def read_json(path: Path, keys: Set[str] = frozenset()) -> dict[str, Any]:
    """The JSON object in a file, which has at least `keys`. Raises UserError."""
    content = parse_json(path, read_text(path))
    if not isinstance(content, dict) or not keys <= content.keys():
        raise UserError(f"{path} is damaged: it must be an object with the keys {sorted(keys)}")
    return content


def os_error(error: BaseException) -> OSError | None:
    """The operating system's error behind `error`, or None.

    torch.distributed.checkpoint and safetensors wrap it; torch's archive writer complains about
    what failed below it, or only says that it failed.
    """
    if isinstance(error, OSError):
        return error
    for failure, _ in getattr(error, "failures", {}).values():
        return os_error(failure)
    if found := re.search(r"os error (\d+)", str(error)):
        return OSError(int(found[1]), os.strerror(int(found[1])))
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        return error.__context__
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

"""Reading text and JSON written by people and other programs; errors are one sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from string import digits, whitespace
from typing import Any

from stat_video.errors import UserError


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


def to_number(text: str) -> int | None:
    """A number of up to nine digits; None for any other text."""
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else None


def split_number(line: str) -> tuple[str, int] | None:
    """A path, which may be quoted, and the number after it; None for a line of another form.

    Blanks, commas or both separate them. The path may contain blanks and commas, too.
    """
    line = line.strip()
    head = line.rstrip(digits)
    path, number = head.rstrip(whitespace + ","), to_number(line[len(head) :])
    if number is None or path in ("", head):
        return None
    if len(path) > 2 and path[0] == path[-1] and path[0] in "\"'":
        path = path[1:-1]
    return path, number


def quote(text: str) -> str:
    """Text for a message: at most 80 characters, without control characters."""
    return repr(text if len(text) <= 80 else f"{text[:77]}...")

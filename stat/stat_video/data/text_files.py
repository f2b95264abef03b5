"""Pieces of annotation lists: numbers, paths with a number, and quotations for messages."""

from __future__ import annotations

import re
from string import digits, whitespace


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

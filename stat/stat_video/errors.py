"""The two kinds of error that a user can fix, each reported in one sentence."""

from __future__ import annotations

import re

# C0 and C1 controls, among them the start of every ANSI sequence, and what reverses or ends a line.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class UserError(Exception):
    """An error the user can fix, such as a wrong path or option; the CLI exits with code 2."""


class OptionError(UserError, ValueError):
    """An option's value is out of range; the text names the option as on the command line."""


class VideoError(UserError):
    """A video that cannot be used: missing, not a video, corrupt, truncated or too short.

    The text is one sentence that names the file and what is wrong with it.
    """


def named(option: str, *paths: str) -> tuple[str, ...]:
    """The paths; raises UserError for an empty one, which pathlib takes for the current folder."""
    if "" in paths:
        raise UserError(f"{option} must name a file or a folder, got ''")
    return paths


def printable(text: str) -> str:
    """The text with control characters escaped as in Python, so that a terminal obeys none."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)

"""The two kinds of failure that are the user's to mend, told in one sentence each."""

import re

# C0 and C1 controls, among them the start of every ANSI sequence, and what reverses or ends a line.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class UserError(Exception):
    """Something the user can put right, as a path or an option; the CLI exits with code 2."""


class VideoError(UserError):
    """A video that cannot be used: missing, not a video, corrupt, truncated or too short.

    The text is one sentence that names the file and what is wrong with it.
    """


def printable(text: str) -> str:
    """The text with control characters as Python would write them: a terminal obeys none."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)

"""Which files of a folder a command may replace: only those that it wrote itself.

Training runs and generated clips follow the same rule. A command marks the folder that it writes
to. In a marked folder, the files whose names the command uses are its own and may be replaced;
everything else is left alone. A folder without the mark is refused if it holds one of those names.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from stat_video.errors import UserError


def claim(folder: Path, mark: str, patterns: Sequence[str], command: str, advice: str) -> None:
    """Make `folder` if it does not exist, and mark it as the command's.

    mark: name of the marker file; patterns: of the files that the command writes, relative to the
        folder; advice: what a user whose folder is refused can do.
    Raises UserError when the folder belongs to something else, and OSError.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} exists and is not a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / mark).exists():
        return
    tops = dict.fromkeys(pattern.partition("/")[0] for pattern in patterns)
    taken = [found.name for top in tops for found in folder.glob(top)]
    if taken:
        raise UserError(
            f"{folder} holds {taken[0]}, and no {mark} that shows that {command} wrote it: {advice}"
        )
    (folder / mark).write_text(
        f"{command} writes to this folder and may replace {', '.join(patterns)}; it leaves all "
        "other files alone.\n"
    )


def clear(folder: Path, patterns: Sequence[str]) -> None:
    """Remove the matching files, and folders below `folder` that become empty."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            if not path.is_dir():
                path.unlink()
        inner = (folder / pattern).parent
        if inner != folder:
            with suppress(OSError):  # it does not exist, or holds somebody else's files
                inner.rmdir()

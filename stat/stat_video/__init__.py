"""STAT: video classification with shrinking temporal attention."""

from typing import TYPE_CHECKING, Any

from stat_video.model.config import STATConfig

if TYPE_CHECKING:
    from stat_video.model.stat import STAT

__all__ = ["STAT", "STATConfig"]


def __getattr__(name: str) -> Any:
    """Imports the model, and torch with it, when it is first used: the command line starts fast."""
    if name != "STAT":
        raise AttributeError(f"module 'stat_video' has no attribute {name!r}")
    from stat_video.model.stat import STAT

    return STAT

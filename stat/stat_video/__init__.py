"""STAT: video classification with shrinking temporal attention."""

from stat_video.model.config import STATConfig
from stat_video.model.stat import STAT

__all__ = ["STAT", "STATConfig"]

"""STAT: video classification with shrinking temporal attention."""

from stat_video.config import STATConfig
from stat_video.model import STAT

__all__ = ["STAT", "STATConfig"]

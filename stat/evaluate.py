"""Evaluate a STAT: the same as `stat-video eval`."""

import sys

from stat_video.cli import main

sys.exit(main(["eval", *sys.argv[1:]]))

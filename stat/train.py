"""Train a STAT: the same as `stat-video train`."""

import sys

from stat_video.cli import main

sys.exit(main(["train", *sys.argv[1:]]))

"""`python -m stat_video`: the same as the console script `stat-video`."""

import sys

from stat_video.cli import main

sys.exit(main())

"""Letting SIGINT and SIGTERM wait for the end of a training step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Interrupted(Exception):
    """Training was stopped by a signal; its checkpoint is at `path`."""

    def __init__(self, path: Path, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.path, self.signum = path, signum


class StopRequest:
    """signum: the signal that asked this process to stop, or 0."""

    def __init__(self) -> None:
        self.signum = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Remember SIGINT and SIGTERM instead of acting on them; a second one acts at once."""
        former: dict[int, Any] = {}

        def remember(signum: int, frame: object) -> None:
            self.signum = signum
            signal.signal(signum, former[signum])

        for signum in (signal.SIGINT, signal.SIGTERM):
            former[signum] = signal.signal(signum, remember)
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

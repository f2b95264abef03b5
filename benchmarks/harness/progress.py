"""Progress on stderr: tqdm's bar on a terminal, elsewhere now and then a line."""

import sys
import time
from types import TracebackType
from typing import Self

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


SECONDS_A_LINE = 5.0


class Progress:
    """Counts steps to a total and says what is going on.

    Args:
        total: steps.
        what: a word for the bar.
    """

    def __init__(self, total: int, what: str) -> None:
        self.total, self.what, self.done = total, what, 0
        self._start_s = time.perf_counter()
        self._printed_s = 0.0
        self._bar = None
        if tqdm is not None and sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=what, leave=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, label: str) -> None:
        """Says what is being done from now on."""
        if self._bar is not None:
            self._bar.set_postfix_str(label)
            return
        elapsed_s = time.perf_counter() - self._start_s
        if elapsed_s < self._printed_s + SECONDS_A_LINE:
            return
        self._printed_s = elapsed_s
        line = f"{self.what} {self.done}/{self.total} {elapsed_s:.0f} s {label}"
        print(line, file=sys.stderr, flush=True)

    def step(self) -> None:
        """One step is done."""
        self.done += 1
        if self._bar is not None:
            self._bar.update()

    def say(self, text: str) -> None:
        """Prints to stdout without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

"""How much CPU time other processes used while a benchmark ran; reported with the results."""

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")


class LoadWatch:
    """Measures from its creation on; child processes count as this process."""

    def __init__(self) -> None:
        self._start_s, self._busy_s, self._own_s = time.perf_counter(), busy_s(), own_s()

    def others_cores(self) -> float | None:
        """Cores kept busy by other processes on average; None if the system does not report it."""
        if self._busy_s is None:
            return None
        elapsed_s = time.perf_counter() - self._start_s
        others_s = (busy_s() - self._busy_s) - (own_s() - self._own_s)
        return round(max(0.0, others_s / max(elapsed_s, 1e-9)), 2)

    def note(self, cores: int) -> str:
        """A sentence if other processes used enough CPU time to matter, else ""."""
        used = self.others_cores()
        if used is None or used < 0.05 * cores:
            return ""
        return f"\nOther processes used {used:.2f} of {cores} cores meanwhile: times are too long."


def busy_s() -> float | None:
    """CPU time that all processes have used since start-up, s."""
    if not STAT.is_file():
        return None
    # user nice system idle iowait irq softirq steal ...; stolen time is not ours to have either
    fields = [int(x) for x in STAT.read_text().splitlines()[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")


def own_s() -> float:
    """CPU time of this process and of its finished children, s."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system

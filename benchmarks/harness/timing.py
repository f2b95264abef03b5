"""Timing: candidates interleaved in random order, every sample kept, medians and quartiles.

If candidates were timed one after another, a slow minute of the machine would count against one of
them. Here every round times each candidate once, in a new random order, so that drift and the load
of other processes affect all of them. Only times of the same run are compared.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from stat_kernels.memory import keep_freed_memory

FLUSH_BYTES = 256 << 20  # several times any GPU's L2
SHORTEST_SLEEP_CYCLES = 1 << 21  # about 1 ms at 2 GHz
LONGEST_SLEEP_CYCLES = 1 << 25  # a call that waits for the device itself is never enqueued in time
WARM_UP_CALLS = 2
LEAST_ROUNDS = 5  # quartiles of fewer samples say nothing

Timer = Callable[[Callable[[], object]], float]


@dataclass
class Samples:
    """Times of one candidate, ms, in the order they were taken."""

    times_ms: list[float] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        return statistics.median(self.times_ms)

    def quantile_ms(self, fraction: float) -> float:
        """Linear interpolation between order statistics; fraction in [0, 1]."""
        ordered = sorted(self.times_ms)
        position = fraction * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

    def to_json(self) -> dict[str, float | int]:
        """The quantiles, as stored in a result file."""
        named = {"min_ms": 0.0, "p10_ms": 0.1, "q1_ms": 0.25, "median_ms": 0.5, "q3_ms": 0.75}
        named |= {"p90_ms": 0.9, "max_ms": 1.0}
        quantiles = {name: round(self.quantile_ms(f), 5) for name, f in named.items()}
        return {"samples": len(self.times_ms), **quantiles}


def time_wall(call: Callable[[], object]) -> float:
    """Wall time of one call, ms, for CPU work, which is complete when the call returns."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def prepare_process(threads: int | None = None) -> None:
    """Set PyTorch's threads where given, and keep freed memory for the next call.

    Otherwise every call pays for mapping and clearing the pages of its results and temporaries,
    which on a CPU can take longer than the arithmetic and varies from call to call.
    """
    keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)


class CudaTimer:
    """Device time of one call, ms, between two events, with other data in the L2 cache."""

    def __init__(self) -> None:
        self._flush = torch.ones(FLUSH_BYTES // 8, dtype=torch.int64, device="cuda")
        self._sleep_cycles = SHORTEST_SLEEP_CYCLES

    def __call__(self, call: Callable[[], object]) -> float:
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.sum()  # read, not written: dirty lines would be charged to the kernel
            # The device sleeps while the host enqueues: what is timed then is the device's work and
            # not the host's. Where it woke too early, it gets a longer sleep and another try.
            torch.cuda._sleep(self._sleep_cycles)
            start.record()
            call()
            end.record()
            woke_too_early = start.query()
            end.synchronize()
            if not woke_too_early or self._sleep_cycles >= LONGEST_SLEEP_CYCLES:
                return start.elapsed_time(end)
            self._sleep_cycles *= 2


def time_wall_cuda(call: Callable[[], object]) -> float:
    """Wall time of one call, ms, from idle device to idle device, including launch overhead."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def capture_graph(call: Callable[[], object]) -> Callable[[], object]:
    """A function that replays ``call`` as one CUDA graph.

    Raises:
        RuntimeError: the call cannot be captured (it synchronises, or allocates outside the pool).
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def timers(device: str) -> dict[str, Timer]:
    """The timers of a device, by name; tables and summaries show "time"."""
    if device == "cuda":
        return {"time": CudaTimer(), "wall": time_wall_cuda}
    return {"time": time_wall}


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Disable Python's garbage collector, which would hit candidates at random."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def interleave(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    timer: Timer,
    *,
    seed: int = 0,
    min_sample_ms: float = 2.0,
    budget_s: float = float("inf"),
    before: Callable[[str], None] = lambda name: None,
    on_round: Callable[[], None] = lambda: None,
    into: dict[str, Samples] | None = None,
) -> dict[str, Samples]:
    """Time every call once per round, in a new random order each round.

    Args:
        calls: candidates by name.
        rounds: samples of each.
        timer: ms of one call.
        seed: of the orders.
        min_sample_ms: a sample of a shorter call is the mean over enough calls to fill this time.
        budget_s: after this time no more rounds than LEAST_ROUNDS, on a slow or busy machine.
        before: called with a candidate's name before each of its samples, outside what is timed.
        on_round: called after each round, e.g. to move a progress bar.
        into: dictionary for the samples; it keeps those taken so far if the run is interrupted.

    Returns:
        samples by name: ``into``, where it was given.
    """
    samples = {} if into is None else into
    repeats = {}
    for name, call in calls.items():
        before(name)
        for _ in range(WARM_UP_CALLS):
            call()
        repeats[name] = max(1, int(min_sample_ms / max(timer(call), 1e-6)))
    order = random.Random(seed)
    names = list(calls)
    start_s = time.monotonic()
    with no_garbage_collection():
        for done in range(rounds):
            if done >= LEAST_ROUNDS and time.monotonic() - start_s > budget_s:
                break
            order.shuffle(names)
            for name in names:
                before(name)
                taken = [timer(calls[name]) for _ in range(repeats[name])]
                samples.setdefault(name, Samples()).times_ms.append(statistics.fmean(taken))
            on_round()
    return samples


def geometric_mean(values: list[float]) -> float:
    """The geometric mean of positive numbers; NaN if there are none."""
    return statistics.geometric_mean(values) if values else float("nan")

"""Timing on a GPU, with a device whose clock the test winds: what is timed, and what is kept."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

from benchmarks import attention
from benchmarks.harness import candidates, timing, verify
from stat_kernels.testing import Case

CYCLES_A_MS = 2_000_000


class Device:
    """One stream. The host enqueues, the device works; both clocks are in ms."""

    def __init__(self):
        self.host_ms = self.device_ms = 0.0
        self.log = []

    def enqueue(self, name, work_ms, launch_ms=0.0):
        self.host_ms += launch_ms
        self.device_ms = max(self.device_ms, self.host_ms) + work_ms
        self.log.append(name)

    def ones(self, size, dtype, device):
        assert (size * dtype.itemsize, device) == (timing.FLUSH_BYTES, "cuda")
        return SimpleNamespace(sum=lambda: self.enqueue("flush", 0.1))

    def sleep(self, cycles):
        self.enqueue("sleep", cycles / CYCLES_A_MS)

    def event(self, enable_timing):
        return Event(self)


class Event:
    def __init__(self, device):
        self.device, self.at_ms = device, None

    def record(self):
        self.at_ms = max(self.device.device_ms, self.device.host_ms)

    def query(self):
        return self.device.host_ms >= self.at_ms

    def synchronize(self):
        self.device.host_ms = max(self.device.host_ms, self.at_ms)

    def elapsed_time(self, end):
        return end.at_ms - self.at_ms


@pytest.fixture
def device(monkeypatch):
    fake = Device()
    monkeypatch.setattr(torch, "ones", fake.ones)
    monkeypatch.setattr(torch.cuda, "Event", fake.event)
    monkeypatch.setattr(torch.cuda, "_sleep", fake.sleep)
    return fake


def test_device_time_is_not_the_hosts(device):
    """Five kernels of 0.2 ms that take the host 1 ms each to launch are 1 ms of the device."""
    timer = timing.CudaTimer()

    def call():
        for _ in range(5):
            device.enqueue("kernel", 0.2, launch_ms=1.0)

    assert timer(call) == pytest.approx(1.0)
    assert timer(call) == pytest.approx(1.0)
    assert device.log[-7:] == ["flush", "sleep", *5 * ["kernel"]]  # a cold L2, one try


def test_a_call_that_waits_for_the_device_ends(device):
    timer = timing.CudaTimer()

    def call():
        device.enqueue("kernel", 0.5)
        device.host_ms = device.device_ms = device.device_ms + 1.0  # .item()

    assert timer(call) == pytest.approx(1.5)
    assert device.log.count("sleep") == 5  # 1, 2, 4, 8, 16 ms


def test_a_row_keeps_device_wall_and_graph_times(monkeypatch):
    """Each measure has its own quantiles; what cannot be captured says why and keeps the rest."""
    case = Case(T=3, Nq=4, H=1, D=16, Nc=3, Ns=2, L=3, window=3)
    problem = verify.make_problem(case, torch.float32, "cpu")
    ready = []
    for peer in candidates.peers("cpu")[:2]:
        row = {"candidate": peer.name, "kind": "peer", "status": "ok"}
        ready.append(attention.Ready(peer, peer.build(case, "cpu"), problem, row))

    seen = []

    def capture(call):
        seen.append(call)
        if len(seen) == 2:
            raise RuntimeError("operation not permitted when stream is capturing\nCompile with ...")
        return lambda: "replayed"

    def device_time(call):
        return 0.5 if call() == "replayed" else 3.0

    monkeypatch.setattr(timing, "timers", lambda _: {"time": device_time, "wall": lambda call: 4.0})
    monkeypatch.setattr(timing, "capture_graph", capture)
    options = Namespace(device="cuda", seconds=1)
    with tqdm(total=9, desc="timing") as progress:
        attention._time(ready, "forward", 3, options, progress)
        assert progress.n == 3  # a round is a step, whatever is measured in it
    first, second = (r.row["forward"] for r in ready)
    medians = {name: found["median_ms"] for name, found in first.items()}
    assert medians == {"time": 3.0, "wall": 4.0, "graph": 0.5}
    assert second["no_graph"].endswith("operation not permitted when stream is capturing")
    assert set(second) == {"time", "wall", "no_graph"}

"""Host time of the Triton backend: microseconds of Python for one call, without a GPU.

    python -m tools.triton_overhead

The kernels are compiled for a Hopper and "launched" by a stand-in for the driver that does nothing.
What a real driver adds, about 2 us a launch, is not in the figures.
"""

import sys
from time import process_time

import torch
from triton.runtime.driver import driver

from stat_kernels.backends import triton as backend
from stat_kernels.backends.triton import launch
from stat_kernels.testing import Case, make_inputs
from tools.triton_compile import CompileOnly

CASE = Case(T=4, Nq=130, H=2, D=96, Nc=49, Ns=16, L=4, window=3)


class NoLaunch(CompileOnly):
    """A driver that counts launches and does nothing else."""

    launches = 0

    @property
    def utils(self) -> "NoLaunch":
        return self

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, *_: object) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads

    def launcher_cls(self, *_: object):
        def run(*_: object) -> None:
            self.launches += 1

        return run


def measure(calls: int = 5, rounds: int = 200) -> dict[str, tuple[int, float]]:
    """By direction: launches of a call, and the least of ``rounds`` means of its microseconds."""
    fake = NoLaunch(90)
    driver.set_active(fake)
    inputs = make_inputs(CASE, torch.bfloat16)
    out, lse = backend.forward(*inputs, CASE.reach, 1.0)

    def backward() -> None:
        backend.backward(out, None, *inputs, out, lse, CASE.reach, 1.0)

    def forward() -> None:
        backend.forward(*inputs, CASE.reach, 1.0)

    found = {}
    for call in (forward, backward):
        call()
        fake.launches = 0
        call()
        launches, times = fake.launches, []
        for _ in range(rounds):
            begin = process_time()
            for _ in range(calls):
                call()
            times.append((process_time() - begin) / calls * 1e6)
        found[call.__name__] = launches, min(times)
    return found


if __name__ == "__main__":
    if launch.interpreted():
        sys.exit("unset TRITON_INTERPRET: the interpreter launches nothing")
    for name, (launches, microseconds) in measure().items():
        print(f"{name}: {launches} launches, {microseconds:.0f} us")

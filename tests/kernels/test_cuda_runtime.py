"""What the launches ask of the CUDA runtime, counted by a fake one under the emulator."""

import pytest
import torch

from stat_kernels.testing import Case, make_inputs, run
from tests.kernels.cuda_emulated import Kernels

# The second needs less shared memory than the first, forward and backward.
LARGE = Case(T=2, Nq=70, H=1, D=96, Nc=49, Ns=16, L=32)
SMALL = Case(T=2, Nq=9, H=1, D=96, Nc=17, Ns=2, L=2)
LIMITS_KIB = (227, 163)


@pytest.fixture(scope="module")
def kernels():
    """After calls of either size and dtype on each of two devices."""
    built = Kernels()
    with built.registered():
        for limit_kib in LIMITS_KIB:
            for case in (LARGE, SMALL):
                for dtype in (torch.float16, torch.bfloat16):
                    both_passes(built, case, dtype, limit_kib)
        yield built


def both_passes(kernels, case, dtype=torch.bfloat16, limit_kib=227):
    kernels.emulated.configure(shared_limit=limit_kib * 1024)
    inputs = make_inputs(case, dtype)
    run(inputs, case.window, "cuda", torch.ones_like(inputs[0]))


@pytest.mark.parametrize("limit_kib", LIMITS_KIB)
def test_a_device_is_asked_once_and_a_kernel_told_once(kernels, limit_kib):
    """A small call lowers no limit, which a large one of another thread may be about to need."""
    kernels.emulated.take_runtime_calls()
    for case in (LARGE, SMALL, LARGE):
        both_passes(kernels, case, limit_kib=limit_kib)
    calls = kernels.emulated.take_runtime_calls()
    assert (calls.device_queries, calls.attributes_set) == (0, 0)
    assert calls.launches == 3 * 3  # forward, backward, the sum over chunks


def test_another_device_is_asked_and_its_kernels_told(kernels):
    """Each kernel that needs it: how much it may ask for, and how little L1 it wants."""
    kernels.emulated.take_runtime_calls()
    both_passes(kernels, LARGE, limit_kib=199)
    calls = kernels.emulated.take_runtime_calls()
    assert (calls.device_queries, calls.attributes_set) == (1, 2 * 2)


def test_shared_memory_is_preferred_to_l1(kernels):
    kernels.emulated.take_runtime_calls()
    both_passes(kernels, LARGE, limit_kib=198)
    assert kernels.emulated.take_runtime_calls().launches_without_carveout == 0

"""Shared fixtures: poisoned memory, instruction sets, thread counts."""

import os

# Before torch, whose OpenMP reads it: threads that spin while they wait take the cores from other
# processes, of these tests and of others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from stat_kernels import native

collect_ignore_glob = [] if torch.cuda.is_available() else ["kernels/test_gpu*.py"]
for variable in ("STAT_BACKEND", "STAT_CPU_ISA"):
    os.environ.pop(variable, None)  # a tester's own default must not choose what is tested


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN, so a kernel that leaves a value unwritten is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=native.instruction_sets() if native.problem() is None else ["not built"])
def isa(request, monkeypatch):
    """Every instruction set of the CPU kernel that is usable here; fails without a build."""
    native.load()
    monkeypatch.setenv("STAT_CPU_ISA", request.param)
    return request.param


@pytest.fixture
def dtype(isa):
    """A dtype that the instruction set has a kernel of its own for."""
    own = native.instruction_set_of(torch.float32, isa) == isa
    return torch.float32 if own else torch.bfloat16


def pytest_collection_modifyitems(items):
    """A set without a kernel of its own for a dtype uses a lower one's, which is tested anyway."""
    items[:] = [item for item in items if not _is_another_set(item)]


def _is_another_set(item):
    params = getattr(getattr(item, "callspec", None), "params", {})
    if native.problem() is not None or not {"isa", "dtype"} <= params.keys():
        return False
    return native.instruction_set_of(params["dtype"], params["isa"]) != params["isa"]


@pytest.fixture(params=[1, 2, 4])
def threads(request):
    """Thread counts that a result must not depend on."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)

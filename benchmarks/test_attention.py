"""The attention candidates as pytest-benchmark cases, one group a case and pass.

    pytest benchmarks --benchmark-columns=median,iqr,ops
    pytest benchmarks --benchmark-autosave, then --benchmark-compare

A candidate is checked against the oracle before it is timed, as everywhere in this folder. CPU: the
fused kernels and their peers; on a machine with a GPU, device-synchronised wall times there.
"""

from functools import lru_cache

import pytest
import torch

from benchmarks.harness import candidates, verify
from benchmarks.harness.cases import select

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 7
CASES = {named.name: named.case for named in select(["quick", "tiny-*"], DEVICE)}
CANDIDATES = {c.name: c for c in candidates.all_candidates(DEVICE)}


@lru_cache(maxsize=1)
def _problem(case_name: str) -> verify.Problem:
    torch._dynamo.reset()  # what was compiled for the case before
    return verify.make_problem(CASES[case_name], torch.float32, DEVICE)


def _function(candidate: candidates.Candidate, problem: verify.Problem, backward: bool):
    """The candidate's function, checked; skips the test with the reason where it cannot run."""
    reason = candidate.unsupported_reason(problem.case, torch.float32, DEVICE)
    reason = reason or (candidate.no_backward(DEVICE) if backward else None)
    if reason is not None:
        pytest.skip(reason)
    function = candidate.prepare(problem.case, DEVICE)
    if backward:
        tensors = verify.forward_backward(function, problem.leaves(), problem.grad_out)
        results = verify.named_results(problem, tensors)
    else:
        results = {"out": verify.forward(function, problem)}
    errors = verify.peer_faults(torch.float32, verify.relative_errors(problem, results))
    assert not errors
    return function


def _synchronised(call):
    def run():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize("case", CASES)
def test_forward(benchmark, case, name):
    problem = _problem(case)
    function = _function(CANDIDATES[name], problem, backward=False)
    benchmark.group = f"{case} forward"
    call = _synchronised(lambda: verify.forward(function, problem))
    benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=2)


@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize("case", CASES)
def test_forward_backward(benchmark, case, name):
    problem = _problem(case)
    function = _function(CANDIDATES[name], problem, backward=True)
    leaves = problem.leaves()
    benchmark.group = f"{case} forward+backward"
    call = _synchronised(lambda: verify.forward_backward(function, leaves, problem.grad_out))
    benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=2)

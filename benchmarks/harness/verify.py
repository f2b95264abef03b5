"""Checks of each candidate on the inputs it is timed on, so that no wrong kernel is timed.

Backends of this project must satisfy the rule of ``stat_kernels.testing`` (at most twice the error
of the reference in the same dtype). Peers round in their own order and must only be accurate to the
precision of the dtype.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.harness.materialised import Attention
from stat_kernels.testing import INPUTS, Case, Result, error_report, make_inputs, oracle

PEER_RELATIVE_RMS = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}

Inputs = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Problem:
    """One case in one dtype: inputs, an incoming gradient, and the oracle's results."""

    case: Case
    inputs: Inputs
    grad_out: Tensor
    exact: Result  # out, lse and all gradients in float64

    def leaves(self) -> Inputs:
        """Copies of the inputs that require gradients."""
        return tuple(None if x is None else x.clone().requires_grad_() for x in self.inputs)


def make_problem(case: Case, dtype: torch.dtype, device: str) -> Problem:
    """Seeded inputs and the oracle's results on them; one clip at a time, for memory's sake."""
    inputs = make_inputs(case, dtype, device)
    grad_out = make_inputs(case, dtype, device, seed=1)[0]
    clips = [
        oracle(
            tuple(None if x is None else x[b : b + 1] for x in inputs),
            case.window,
            grad_out[b : b + 1],
        ).tensors
        for b in range(case.B)
    ]
    exact = {name: torch.cat([clip[name] for clip in clips]) for name in clips[0]}
    return Problem(case, inputs, grad_out, Result(exact))


def make_inputs_only(case: Case, dtype: torch.dtype, device: str, batch: int) -> Problem:
    """A problem of ``batch`` clips without the oracle's results: to be run, not to be checked."""
    case = replace(case, B=batch)
    grad_out = make_inputs(case, dtype, device, seed=1)[0]
    return Problem(case, make_inputs(case, dtype, device), grad_out, Result({}))


def forward(function: Attention, problem: Problem) -> Tensor:
    """out, without a graph for gradients."""
    with torch.no_grad():
        return function(*problem.inputs)


def forward_backward(function: Attention, leaves: Inputs, grad_out: Tensor) -> list[Tensor]:
    """out, then the gradients of the inputs that are there."""
    out = function(*leaves)
    present = [x for x in leaves if x is not None]
    # zeros for what no query can see: the neighbours' keys in a clip of one frame
    grads = torch.autograd.grad(out, present, grad_out, materialize_grads=True)
    return [out.detach(), *grads]


def named_results(problem: Problem, tensors: list[Tensor]) -> dict[str, Tensor]:
    """The results of `forward_backward` by name."""
    present = [n for n, x in zip(INPUTS, problem.inputs, strict=True) if x is not None]
    return dict(zip(["out", *(f"grad_{n}" for n in present)], tensors, strict=True))


def relative_errors(problem: Problem, results: dict[str, Tensor]) -> dict[str, float]:
    """Relative RMS error against the oracle, by name; infinite where a value is not finite."""
    errors = {}
    for name, value in results.items():
        truth = problem.exact.tensors[name]
        error = (value.double() - truth).square().mean().sqrt()
        relative = error / truth.square().mean().sqrt().clamp_min(1e-300)
        errors[name] = relative.item() if torch.isfinite(value).all() else float("inf")
    return errors


def peer_faults(dtype: torch.dtype, errors: dict[str, float]) -> list[str]:
    """A sentence for each result of a peer that is not right to its dtype's precision."""
    bound = PEER_RELATIVE_RMS[dtype]
    return [
        f"{name}: relative RMS error {error:.3g}, bound {bound:g}"
        for name, error in errors.items()
        if not error <= bound
    ]


def backend_faults(name: str, problem: Problem) -> list[str]:
    """A sentence for each way in which a backend breaks the project's rule on these inputs."""
    window = problem.case.window
    return error_report(name, problem.inputs, window, problem.grad_out, exact=problem.exact)


def same_bits(function: Attention, problem: Problem, threads: list[int]) -> dict[str, bool]:
    """Whether results and gradients are the same bits, twice and on each number of threads."""
    before = torch.get_num_threads()
    leaves = problem.leaves()

    def results() -> list[Tensor]:
        return forward_backward(function, leaves, problem.grad_out)

    first = results()
    same = {"twice": _equal(first, results())}
    if problem.grad_out.device.type == "cpu":
        try:
            for count in threads:
                torch.set_num_threads(count)
                same[f"{count} threads"] = _equal(first, results())
        finally:
            torch.set_num_threads(before)
    return same


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

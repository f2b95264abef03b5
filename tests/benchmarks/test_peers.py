"""Every peer computes the operation, and a wrong candidate is refused before it is timed."""

import pytest
import torch

from benchmarks.harness import candidates, verify
from benchmarks.harness.candidates import Candidate
from benchmarks.harness.materialised import eager, repeated
from stat_kernels.testing import Case

EAGER_PEERS = [c for c in candidates.peers("cpu") if not c.compiled]
SMALL = Case(B=2, T=5, Nq=7, H=2, D=16, Nc=5, Ns=3, L=5, window=3)
CASES = [
    SMALL,
    Case(T=3, Nq=4, H=1, D=16, Nc=3, Ns=2, L=2, window=9),  # a window wider than the clip
    Case(T=3, Nq=4, H=1, D=16, Nc=3, Ns=2, L=3, window=3),  # one interior frame
    Case(T=1, Nq=4, H=1, D=16, Nc=3, Ns=2, L=1, window=5),
    Case(T=4, Nq=4, H=1, D=16, Nc=3, Ns=0, L=4, window=3),
    Case(T=4, Nq=4, H=1, D=16, Nc=3, Ns=2, L=0, window=1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("peer", EAGER_PEERS, ids=lambda peer: peer.name)
def test_peers_are_right(peer, case):
    problem = verify.make_problem(case, torch.float32, "cpu")
    function = peer.prepare(case, "cpu")
    assert verify.forward(function, problem).shape == problem.inputs[0].shape
    both = verify.forward_backward(function, problem.leaves(), problem.grad_out)
    errors = verify.relative_errors(problem, verify.named_results(problem, both))
    present = sum(x is not None for x in problem.inputs)
    assert len(errors) == 1 + present
    assert verify.peer_faults(torch.float32, errors) == []


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_is_right():
    for case in CASES:
        problem = verify.make_problem(case, torch.float32, "cpu")
        (flex,) = [c for c in candidates.peers("cpu") if c.name.startswith("Flex")]
        out = verify.forward(flex.build(case, "cpu"), problem)
        assert (
            verify.peer_faults(torch.float32, verify.relative_errors(problem, {"out": out})) == []
        )
        assert "no backward" in flex.no_backward("cpu")


def test_padding_keys_are_masked():
    """CUDA's masked peer has a few keys more than there are: they must not be seen."""
    from benchmarks.harness.materialised import key_is_there

    there = key_is_there(SMALL, pad=4)
    keys = repeated(SMALL, *(verify.make_problem(SMALL, torch.float32, "cpu").inputs[1::2]), 4)
    assert there.shape == (SMALL.T, keys.shape[2])
    assert not there[:, -4:].any()
    assert there[1:-1, :-4].all()


def _slightly_wrong(case, device):
    right = eager(case, device)
    return lambda *inputs: right(*inputs) * 1.001


def _without_gradient(case, device):
    right = eager(case, device)
    return lambda q, *others: (
        right(q, *(x.detach() for x in others)) + 0 * sum(x.sum() for x in others)
    )


def _not_finite(case, device):
    right = eager(case, device)
    return lambda *inputs: right(*inputs) * float("nan")


def _raising(case, device):
    raise NotImplementedError("no such kernel here")


@pytest.mark.parametrize(
    ("build", "status", "reason"),
    [
        (_slightly_wrong, "wrong", "out: relative RMS error 0.001"),
        (_without_gradient, "wrong", "grad_k_cur"),
        (_not_finite, "wrong", "inf"),
        (_raising, "cannot run", "NotImplementedError: no such kernel here"),
    ],
)
def test_a_wrong_peer_is_not_timed(build, status, reason):
    from benchmarks.attention import _check

    problem = verify.make_problem(SMALL, torch.float32, "cpu")
    row, function = _check(Candidate("planted", build), problem, torch.float32, "cpu")
    assert function is None
    assert row["status"] == status
    assert reason in row["reason"]


def test_a_wrong_backend_is_not_timed(monkeypatch):
    """A backend is held to the project's rule, on what the public function returns."""
    from benchmarks import attention
    from stat_kernels import functional

    right = functional.shrinking_temporal_attention_reference

    def off(q, *others, **options):
        out, lse = right(q, *others, **options)
        return (out, lse) if q.dtype == torch.float64 else (out * (1 + 1e-4), lse)

    def check():
        problem = verify.make_problem(SMALL, torch.float32, "cpu")
        (reference,) = candidates.backends(["reference"])
        return attention._check(reference, problem, torch.float32, "cpu")[0]

    assert check()["status"] == "ok"
    monkeypatch.setattr(functional, "shrinking_temporal_attention_reference", off)
    row = check()
    assert row["status"] == "wrong"
    assert "out: relative RMS error" in row["reason"]


def test_backends_come_from_the_dispatcher():
    from stat_kernels import dispatch

    assert [c.name for c in candidates.backends()] == list(dispatch.names())[:-1]
    with pytest.raises(ValueError, match="backend must be one of"):
        candidates.backends(["cuda9"])


def test_same_bits_tells_a_random_kernel():
    problem = verify.make_problem(SMALL, torch.float32, "cpu")
    right = eager(SMALL, "cpu")
    assert verify.same_bits(right, problem, [1])["twice"]

    def random(*inputs):
        return right(*inputs) + 1e-3 * torch.rand(())

    assert not verify.same_bits(random, problem, [1])["twice"]

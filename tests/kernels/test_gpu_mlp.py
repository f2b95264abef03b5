"""bias_gelu and bias_residual on a GPU: against the oracle, captured, the same bits again.

Not collected where there is no GPU (conftest.py); ``python -m benchmarks.gpu`` runs it with
test_gpu.py. Only Triton has these kernels.
"""

import pytest
import torch

from stat_kernels import dispatch
from tests.kernels.mlp_cases import CASES, MlpCase, make_mlp_inputs, mlp_error_report, run_mlp

BACKENDS = ["triton"]  # in the tests' names, by which benchmarks.gpu selects
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# STAT's rows and columns: both layers of an MLP, a residual in float32 with stochastic depth.
STAT = [
    MlpCase((2, 4, 785, 768)),
    MlpCase((2, 4, 785, 192), "float32", scaled=True),
    MlpCase((2, 4, 50, 3072)),
    MlpCase((2, 4, 50, 768), "same"),
]
SMALLEST = [CASES[1], CASES[5], CASES[7]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SMALLEST, ids=str)
def test_smallest(case, backend):
    """Few programs of every kernel: what compute-sanitizer, which is slow, is run on."""
    assert mlp_error_report(case, torch.bfloat16, backend, "cuda") == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *STAT], ids=str)
def test_matches_the_reference(case, dtype, backend):
    assert mlp_error_report(case, dtype, backend, "cuda") == []


@pytest.mark.parametrize("case", STAT[:2], ids=str)
def test_the_same_bits_twice(case):
    inputs, grad_out = make_mlp_inputs(case, torch.bfloat16, device="cuda")
    first, second = (run_mlp(inputs, grad_out, "triton").tensors for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_captured_call_gives_the_same_bits():
    inputs, grad_out = make_mlp_inputs(STAT[1], torch.bfloat16, device="cuda")
    wanted = run_mlp(inputs, grad_out, "triton").tensors  # compiles before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run_mlp(inputs, grad_out, "triton").tensors
    for name in ("out", "grad_x", "grad_bias"):  # the gradient of the residual is grad_out itself
        found[name].fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_more_elements_than_32_bits_count():
    x = torch.zeros(2**21 + 1, 1024, dtype=torch.bfloat16, device="cuda")
    x[-1] = 1.0
    inputs = [x, torch.zeros(1024, device="cuda"), None, None]
    found = run_mlp(inputs, torch.ones_like(x), "triton").tensors
    assert torch.allclose(found["out"][-1].float(), torch.tensor(0.8413, device="cuda"), atol=4e-3)
    assert not found["out"][:-1].any()
    del x, inputs
    # The slope of GELU is 0.5 at 0 and 1.0833 at 1.
    wanted = torch.full((1024,), 0.5 * 2**21 + 1.0833, device="cuda")
    assert torch.allclose(found["grad_bias"], wanted, rtol=1e-6)


def test_a_gpu_tensor_goes_to_the_kernels():
    for dtype in DTYPES:
        assert dispatch.choose_mlp(None, "cuda", dtype, dtype) == "triton"

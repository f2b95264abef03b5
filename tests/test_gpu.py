"""The Triton kernels on a GPU: every dtype, captured, compiled, the same bits a hundred times.

Where there is no GPU this file is not collected (conftest.py), and test_triton_interpreter.py and
test_triton_compile.py are what the kernels are held to. ``python -m benchmarks.gpu`` runs it.
"""

import os

import pytest
import torch

from stat_kernels import ShrinkingTemporalAttention, dispatch, shrinking_temporal_attention
from stat_kernels.testing import INPUTS, Case, check_backend, make_inputs, run

# Deterministic algorithms, which conftest.py asks for, need this before cuBLAS is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STAGES = [
    Case(T=6, Nq=785, H=2, L=6, window=7),
    Case(T=6, Nq=197, H=4, L=6, window=7),
    Case(T=32, Nq=50, H=8, L=32, window=7),
]
TAILS = [
    Case(T=2, Nq=197, H=1, Nc=196, Ns=49, L=2),
    Case(T=2, Nq=785, H=1, D=64, Nc=1, Ns=16, L=2),
    Case(T=64, Nq=5, H=1, D=16, Nc=4, Ns=2, L=64, window=9),
    Case(T=5, Nq=17, H=3, D=128, Nc=33, Ns=7, L=9, window=5),
    Case(T=3, Nq=18, H=1, D=256, Nc=50, Ns=16, L=3),
    Case(T=2, Nq=33, H=2, D=40, Nc=13, Ns=5, L=3),
    Case(T=2, Nq=20, H=1, D=72, Nc=700, Ns=300, L=40),
]
PARTS = [Case(Ns=0), Case(L=0), Case(Ns=0, L=0), Case(window=1), Case(T=1, window=7, L=1)]


def name(value):
    return str(value).removeprefix("torch.")


def inputs_on_gpu(case, dtype=torch.bfloat16, seed=0):
    return make_inputs(case, dtype, "cuda", seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_smallest(dtype):
    """Few programs of every kernel: what compute-sanitizer, which is slow, is run on."""
    case = Case(T=3, Nq=17, H=1, D=96, Nc=9, Ns=4, L=3)
    check_backend("triton", inputs_on_gpu(case, dtype), case.window)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", STAGES + TAILS + PARTS, ids=str)
def test_matches_the_oracle(case, dtype):
    check_backend("triton", inputs_on_gpu(case, dtype), case.window)


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_every_window(frames):
    for window in range(1, 2 * frames + 2, 2):
        case = Case(T=frames, Nq=9, H=2, D=64, Nc=6, Ns=3, L=frames, window=window)
        check_backend("triton", inputs_on_gpu(case, torch.float32), window)


def test_a_gpu_tensor_goes_to_a_kernel():
    assert dispatch.choose(None, "cuda", torch.bfloat16, 96) != dispatch.REFERENCE


def test_any_strides():
    case = Case(B=2, T=3, Nq=70, D=64, Nc=20, Ns=9, L=6)
    inputs = inputs_on_gpu(case)
    strided = tuple(
        torch.cat([x, x[..., :3]], dim=-1)[..., :64].transpose(1, 2).contiguous().transpose(1, 2)
        for x in inputs
    )
    check_backend("triton", strided, case.window)


def test_more_than_two_to_the_31_elements():
    """Rows beyond 32-bit offsets: the last clip alone must give what it gives in the batch."""
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free GPU memory")
    q = torch.randn(64, 32, 785, 16, 96, device="cuda", dtype=torch.bfloat16)
    assert q.numel() > 2**31
    k, v = inputs_on_gpu(Case(B=64, T=32, Nq=1, H=16, D=96, Nc=1))[1:3]
    out = shrinking_temporal_attention(q, k, v, backend="triton")
    last = shrinking_temporal_attention(q[-1:], k[-1:], v[-1:], backend="triton")
    assert torch.equal(out[-1:], last)


@pytest.mark.parametrize("case", STAGES, ids=str)
def test_the_same_bits_a_hundred_times(case):
    inputs = inputs_on_gpu(case)
    grad = torch.randn_like(inputs[0])
    first = run(inputs, case.window, "triton", grad).tensors
    for _ in range(100):
        again = run(inputs, case.window, "triton", grad).tensors
        assert all(torch.equal(first[n], again[n]) for n in first)


def test_captured_in_a_cuda_graph():
    case = STAGES[2]
    leaves = [x.requires_grad_() for x in inputs_on_gpu(case)]
    grad = torch.randn_like(leaves[0])

    def step():
        out = shrinking_temporal_attention(*leaves, window=case.window, backend="triton")
        return out, torch.autograd.grad(out, leaves, grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, gradients = step()
    with torch.no_grad():
        for leaf, fresh in zip(leaves, inputs_on_gpu(case, seed=7), strict=True):
            leaf.copy_(fresh)
    graph.replay()
    expected_out, expected = step()
    assert torch.equal(out, expected_out)
    for tensor, found, wanted in zip(INPUTS, gradients, expected, strict=True):
        assert torch.equal(found, wanted), tensor


def test_compiled_without_a_graph_break():
    case = STAGES[1]
    leaves = [x.requires_grad_() for x in inputs_on_gpu(case)]

    def attend(*tensors):
        return shrinking_temporal_attention(*tensors, window=case.window, backend="triton") * 2

    compiled = torch.compile(attend, fullgraph=True)
    grad = torch.randn_like(leaves[0])
    out, expected = compiled(*leaves), attend(*leaves)
    assert torch.equal(out, expected)
    for found, wanted in zip(
        torch.autograd.grad(out, leaves, grad),
        torch.autograd.grad(expected, leaves, grad),
        strict=True,
    ):
        assert torch.equal(found, wanted)


def test_the_layer_under_autocast():
    layer = ShrinkingTemporalAttention(192, 2, window=7, kv_stride=4, backend="triton").cuda()
    x = torch.randn(2, 4, 1 + 28 * 28, 192, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y, grid = layer(x, (28, 28))
    y.float().square().mean().backward()
    assert grid == (28, 28)
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())

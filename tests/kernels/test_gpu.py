"""The Triton and the CUDA kernels on a GPU: every dtype, captured, compiled, the same bits again.

Where there is no GPU this file is not collected (conftest.py), and the tests of the interpreter, of
the emulator and of the compilers are what the kernels are held to. ``python -m benchmarks.gpu``
runs it, each backend on its own (``-k triton``, ``-k cuda``).
"""

import os

import pytest
import torch

from stat_kernels import ShrinkingTemporalAttention, dispatch, native, shrinking_temporal_attention
from stat_kernels.backends import cuda
from stat_kernels.testing import INPUTS, Case, check_backend, make_inputs, run
from tests.kernels.shared import REACHES

# Deterministic algorithms, which conftest.py asks for, need this before cuBLAS is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STAGES = [
    Case(T=6, Nq=785, H=2, L=6, window=7),
    Case(T=6, Nq=197, H=4, L=6, window=7),
    Case(T=32, Nq=50, H=8, L=32, window=7),
]
LARGE = [
    Case(B=2, T=32, Nq=785, H=2, Nc=196, Ns=49, L=32, window=7),
    Case(T=6, Nq=197, H=2, D=64, Nc=196, Ns=49, L=6, window=7),
    Case(T=6, Nq=197, H=2, D=128, Nc=196, Ns=49, L=6, window=7),
]
TAILS = [
    Case(T=2, Nq=197, H=1, Nc=196, Ns=49, L=2),
    Case(T=2, Nq=785, H=1, D=64, Nc=1, Ns=16, L=2),
    Case(T=64, Nq=5, H=1, D=16, Nc=4, Ns=2, L=64, window=9),
    Case(T=64, Nq=5, H=1, D=96, Nc=4, Ns=2, L=64, window=9),
    Case(T=5, Nq=17, H=3, D=128, Nc=33, Ns=7, L=9, window=5),
    Case(T=3, Nq=18, H=1, D=256, Nc=50, Ns=16, L=3),
    Case(T=2, Nq=33, H=2, D=40, Nc=13, Ns=5, L=3),
    Case(T=2, Nq=20, H=1, D=72, Nc=700, Ns=300, L=40),
    Case(T=2, Nq=20, H=1, D=96, Nc=700, Ns=300, L=40),
    Case(T=3, Nq=1, H=1, D=96, Nc=49, Ns=16, L=500, window=5),
]
PARTS = [Case(Ns=0), Case(L=0), Case(Ns=0, L=0), Case(window=1), Case(T=1, window=7, L=1)]

NO_CUDA = pytest.mark.skipif(native.cuda_problem() is not None, reason=str(native.cuda_problem()))
BACKENDS = [pytest.param("triton"), pytest.param("cuda", marks=NO_CUDA)]


def name(value):
    return str(value).removeprefix("torch.")


def takes(backend, case, dtype):
    """The CUDA kernels are for two dtypes and three head dims; Triton's for all of DTYPES."""
    return backend == "triton" or (dtype in cuda.DTYPES and case.D in cuda.HEAD_DIMS)


def calls(*cases):
    """What each backend takes of some cases in every dtype, as pytest's parameters."""
    return [
        pytest.param(
            backend, case, dtype,
            marks=[NO_CUDA] if backend == "cuda" else [],
            id=f"{backend}-{case}-{name(dtype)}",
        )
        for backend in ("triton", "cuda")
        for case in cases
        for dtype in DTYPES
        if takes(backend, case, dtype)
    ]  # fmt: skip


def inputs_on_gpu(case, dtype=torch.bfloat16, seed=0):
    return make_inputs(case, dtype, "cuda", seed)


SMALLEST = [
    Case(T=3, Nq=17, H=1, D=96, Nc=9, Ns=4, L=3),
    Case(T=2, Nq=70, H=1, D=64, Nc=9, Ns=4, L=3),
    Case(T=1, Nq=17, H=1, D=128, Nc=400, Ns=4, L=3),  # too many keys to stay in shared memory
]


@pytest.mark.parametrize(("backend", "case", "dtype"), calls(*SMALLEST))
def test_smallest(backend, case, dtype):
    """Few programs of every kernel: what compute-sanitizer, which is slow, is run on."""
    check_backend(backend, inputs_on_gpu(case, dtype), case.window)


@pytest.mark.parametrize(("backend", "case", "dtype"), calls(*STAGES, *LARGE, *TAILS, *PARTS))
def test_matches_the_oracle(backend, case, dtype):
    check_backend(backend, inputs_on_gpu(case, dtype), case.window)


@pytest.mark.parametrize(("backend", "case", "dtype"), calls(*REACHES))
def test_which_frames_are_read(backend, case, dtype):
    check_backend(backend, inputs_on_gpu(case, dtype), case.window, **case.options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_every_window(backend, frames):
    dtype = torch.float32 if backend == "triton" else torch.float16
    for window in range(1, 2 * frames + 2, 2):
        case = Case(T=frames, Nq=9, H=2, D=64, Nc=6, Ns=3, L=frames, window=window)
        check_backend(backend, inputs_on_gpu(case, dtype), window)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
def test_huge_scores_stay_finite(backend, dtype):
    inputs = inputs_on_gpu(Case(T=3, Nq=33, L=3), dtype)
    huge = (inputs[0] * 1e4, *inputs[1:])
    for value in run(huge, 3, backend, torch.ones_like(inputs[0])).tensors.values():
        assert torch.isfinite(value).all()


def test_a_gpu_tensor_goes_to_a_kernel():
    for dtype in DTYPES:
        for head_dim in (64, 80, 96):
            assert dispatch.choose(None, "cuda", dtype, head_dim) in dispatch.GPU


def test_the_cuda_library_tells_of_its_kernels():
    """Registers, memory and occupancy, as compiler and driver give them; none spills."""
    if native.cuda_problem() is not None:
        pytest.skip(native.cuda_problem())
    kernels = native.introspection().cuda_kernels()
    assert {kernel["head_dim"] for kernel in kernels} == set(cuda.HEAD_DIMS)
    for kernel in kernels:
        assert kernel["spilled_bytes"] == 0, kernel
        assert 0 < kernel["registers"] < 256, kernel
        assert kernel["blocks_resident"] >= 1, kernel


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    case = Case(B=2, T=3, Nq=70, D=64, Nc=20, Ns=9, L=6)
    inputs = inputs_on_gpu(case)
    odd = tuple(
        torch.cat([x, x[..., :3]], dim=-1)[..., :64].transpose(1, 2).contiguous().transpose(1, 2)
        for x in inputs
    )
    vectors = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs)
    rows = tuple(torch.cat([x, x[..., :3]], dim=-1)[..., 3:] for x in inputs)
    for strided in (odd, vectors, rows):
        check_backend(backend, strided, case.window)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_and_strided_gradients(backend):
    case = Case(B=2, T=3, Nq=20, D=96, Nc=20, Ns=9, L=6)
    inputs = inputs_on_gpu(case, torch.float16)
    grad = torch.randn(1, 1, 20, 1, 96, device="cuda").half().expand(inputs[0].shape)
    found = run(inputs, case.window, backend, grad).tensors
    plain = run(inputs, case.window, backend, grad.contiguous()).tensors
    assert all(torch.equal(found[n], plain[n]) for n in found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_runs_on_the_current_stream(backend):
    """After the work that was queued there before it, and on no other stream."""
    case = Case(B=2, T=32, Nq=197, H=4, L=32, window=7)
    inputs = inputs_on_gpu(case)
    expected = run(inputs, case.window, backend).tensors["out"]
    late = torch.zeros_like(inputs[0])
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(inputs[0])
        out = run((late, *inputs[1:]), case.window, backend).tensors["out"]
    side.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_two_to_the_31_elements(backend):
    """Rows beyond 32-bit offsets: the last clip alone must give what it gives in the batch."""
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free GPU memory")
    q = torch.randn(64, 32, 785, 16, 96, device="cuda", dtype=torch.bfloat16)
    assert q.numel() > 2**31
    k, v = inputs_on_gpu(Case(B=64, T=32, Nq=1, H=16, D=96, Nc=1))[1:3]
    out = shrinking_temporal_attention(q, k, v, backend=backend)
    last = shrinking_temporal_attention(q[-1:], k[-1:], v[-1:], backend=backend)
    assert torch.equal(out[-1:], last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", STAGES, ids=str)
def test_the_same_bits_a_hundred_times(backend, case):
    inputs = inputs_on_gpu(case)
    grad = torch.randn_like(inputs[0])
    first = run(inputs, case.window, backend, grad).tensors
    for _ in range(100):
        again = run(inputs, case.window, backend, grad).tensors
        assert all(torch.equal(first[n], again[n]) for n in first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_captured_in_a_cuda_graph(backend):
    case = STAGES[2]
    leaves = [x.requires_grad_() for x in inputs_on_gpu(case)]
    grad = torch.randn_like(leaves[0])

    def step():
        out = shrinking_temporal_attention(*leaves, window=case.window, backend=backend)
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_without_a_graph_break(backend):
    case = STAGES[1]
    leaves = [x.requires_grad_() for x in inputs_on_gpu(case)]

    def attend(*tensors):
        return shrinking_temporal_attention(*tensors, window=case.window, backend=backend) * 2

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


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_layer_under_autocast(backend):
    layer = ShrinkingTemporalAttention(192, 2, window=7, kv_stride=4, backend=backend).cuda()
    x = torch.randn(2, 4, 1 + 28 * 28, 192, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y, grid = layer(x, (28, 28))
    y.float().square().mean().backward()
    assert grid == (28, 28)
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())

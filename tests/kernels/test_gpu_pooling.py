"""The pooling kernels on a GPU: against the oracle, captured, compiled, the same bits again.

Not collected where there is no GPU (conftest.py); ``python -m benchmarks.gpu`` runs it with
test_gpu.py. What else a first run on a GPU must look at is in docs/internals/cuda.md.
"""

import dataclasses

import pytest
import torch

from stat_kernels import backends, native, pool_tokens
from stat_kernels.testing import Result
from tests.kernels.pool_cases import (
    EPS,
    PoolCase,
    make_pool_inputs,
    pool_error_report,
    run_pool,
)

NO_CUDA = pytest.mark.skipif(native.cuda_problem() is not None, reason=str(native.cuda_problem()))
BACKENDS = [
    pytest.param(name, marks=[NO_CUDA] if name == "cuda" else [])
    for name in ("triton", "cuda")
    if hasattr(backends.load(name), "pool_forward")
]
# STAT's kinds of layers at 64 frames: keys and values of each stage's blocks and of its first one,
# then queries of the latter.
STAT = [
    PoolCase(B=2, T=4, H=2, grid=(28, 28), stride=4),
    PoolCase(B=2, T=4, H=4, grid=(28, 28), stride=4),
    PoolCase(B=2, T=4, H=4, grid=(14, 14), stride=2),
    PoolCase(B=2, T=4, H=8, grid=(14, 14), stride=2),
    PoolCase(B=2, T=4, H=8, grid=(7, 7), stride=1),
    PoolCase(P=1, B=2, T=4, H=4, grid=(28, 28), stride=2, short_stride=None),
    PoolCase(P=1, B=2, T=4, H=8, grid=(14, 14), stride=2, short_stride=None),
]
OTHERS = [
    *(PoolCase(D=d, grid=(14, 14)) for d in (16, 24, 64, 72, 128, 136, 200, 256)),
    *(PoolCase(grid=(14, 13), stride=s, D=64) for s in range(1, 9)),
    *(PoolCase(kernel=k, T=5, D=64) for k in ((1, 1, 1), (3, 3, 3), (1, 5, 7), (3, 7, 7))),
    PoolCase(grid=(56, 56), stride=1, D=128),  # rows that do not fit in shared memory
    PoolCase(long="mean", grid=(28, 28)),
    PoolCase(long="mean", class_token=False, short_stride=None, kernel=(3, 3, 3)),
    PoolCase(long="none", P=4, packed=False),
    PoolCase(grid=(1, 1), stride=8),
]
SMALLEST = [
    PoolCase(D=96, grid=(5, 4)),
    PoolCase(D=40, grid=(5, 4), long="mean"),
    PoolCase(D=16, grid=(3, 2), kernel=(3, 3, 3), short_stride=None),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SMALLEST, ids=str)
def test_smallest(case, backend):
    """Few programs of every kernel: what compute-sanitizer, which is slow, is run on."""
    assert not pool_error_report(case, torch.bfloat16, backend, "cuda")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", STAT + OTHERS, ids=str)
def test_matches_the_oracle(case, dtype, backend):
    assert not pool_error_report(case, dtype, backend, "cuda")


def equal(found: Result, expected: Result) -> bool:
    return all(torch.equal(value, expected.tensors[key]) for key, value in found.tensors.items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case",
    [
        PoolCase(B=8, T=32, H=2, grid=(28, 28), stride=4),
        PoolCase(B=8, T=32, H=8, grid=(7, 7), stride=1),
        PoolCase(B=2, T=8, H=4, grid=(14, 14), kernel=(3, 3, 3), long="mean"),
    ],
    ids=str,
)
def test_the_same_bits_a_hundred_times(case, backend):
    inputs = make_pool_inputs(case, device="cuda")
    first = run_pool(case, inputs, backend)
    assert all(equal(run_pool(case, inputs, backend), first) for _ in range(100))


def call(case, inputs, backend, grad_tokens):
    """A backend's two functions, and nothing beside them: pooled, statistics, grad_params."""
    module, lists = backends.load(backend), [inputs.weights, inputs.norm_weights]
    pooled, stats = module.pool_forward(
        inputs.tokens, *lists, inputs.norm_biases, *case.options, EPS
    )
    return (
        pooled,
        stats,
        module.pool_backward(
            inputs.grad_pooled, inputs.tokens, *lists, stats, *case.options, grad_tokens
        ),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 3, 3)])
def test_captured_in_a_cuda_graph(kernel, backend):
    case = PoolCase(B=2, T=4, H=4, grid=(14, 14), kernel=kernel)
    inputs = make_pool_inputs(case, device="cuda")
    captured, fresh = torch.empty_like(inputs.tokens), torch.empty_like(inputs.tokens)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(case, inputs, backend, captured)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(case, inputs, backend, captured)
    inputs.tokens.copy_(make_pool_inputs(case, device="cuda", seed=7).tokens)
    graph.replay()
    assert all(map(torch.equal, found, call(case, inputs, backend, fresh)))
    assert torch.equal(captured, fresh)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_runs_on_the_current_stream(backend):
    """After the work that was queued there before it, and on no other stream."""
    case = PoolCase(B=8, T=8, H=4, grid=(14, 14))
    inputs = make_pool_inputs(case, device="cuda")
    expected = run_pool(case, inputs, backend)
    late = dataclasses.replace(inputs, tokens=torch.zeros_like(inputs.tokens))
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.tokens.copy_(inputs.tokens)
        found = run_pool(case, late, backend)
    side.synchronize()
    assert equal(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 3, 3)])
def test_gradients_are_written_into_a_packed_one(kernel, backend):
    """Every element of the slots, zeros too, and nothing beside them."""
    case = PoolCase(B=2, T=4, H=4, grid=(28, 28), stride=4, kernel=kernel)
    inputs = make_pool_inputs(case, device="cuda")
    plain = torch.empty_like(inputs.tokens)
    expected = call(case, inputs, backend, plain)
    packed = inputs.tokens.new_full((2, 4, 785, 3, 4, 96), 7.0)
    slots = packed.movedim(3, 0)[1:]
    assert all(map(torch.equal, call(case, inputs, backend, slots), expected))
    assert torch.equal(slots, plain)
    assert (packed[:, :, :, 0] == 7.0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_two_to_the_31_elements(backend):
    """Rows beyond 32-bit offsets: the last clip alone must give what it gives in the batch."""
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free GPU memory")
    case = PoolCase(P=1, D=96, grid=(28, 28), stride=4)
    parameters = [found[0] for found in make_pool_inputs(case, device="cuda").parameters]
    tokens = torch.randn(64, 32, 785, 16, 96, device="cuda", dtype=torch.bfloat16)
    assert tokens.numel() > 2**31
    options = {"grid": (28, 28), "stride": 4, "backend": backend}
    for found, last in zip(
        pool_tokens(tokens, *parameters, **options),
        pool_tokens(tokens[-1:], *parameters, **options),
        strict=True,
    ):
        assert torch.equal(found[-1:], last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_without_a_graph_break(backend):
    case = PoolCase(B=2, T=4, H=4, grid=(14, 14), P=1)
    inputs = make_pool_inputs(case, device="cuda")
    leaves = [inputs.tokens[0], *(found[0] for found in inputs.parameters)]
    leaves = [x.detach().requires_grad_() for x in leaves]

    def pool(*tensors):
        return pool_tokens(*tensors, grid=(14, 14), stride=2, backend=backend)

    def step(function):
        outputs = function(*leaves)
        grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])
        return *outputs, *grads

    found, expected = step(torch.compile(pool, fullgraph=True)), step(pool)
    assert all(map(torch.equal, found, expected))

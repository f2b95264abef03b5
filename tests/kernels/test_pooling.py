"""The pooling on the CPU against the float64 reference, and the operator inside PyTorch."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stat_kernels import explain_pooling, pool_ops, pool_tokens
from stat_kernels.modules import ShrinkingTemporalAttention
from tests.kernels.pool_cases import (
    PoolCase,
    make_pool_inputs,
    pool_error_report,
    run_pool,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STAGES = (
    PoolCase(H=2, grid=(28, 28), stride=4),
    PoolCase(P=1, H=2, grid=(14, 14), short_stride=None),  # pooled queries
    PoolCase(H=3, grid=(7, 7), stride=1, packed=False),
)
EDGES = (
    PoolCase(D=24, kernel=(3, 3, 3), T=4),
    PoolCase(D=40, kernel=(3, 5, 7), T=3, stride=3, long="mean"),
    PoolCase(D=16, kernel=(5, 1, 3), T=2, long="none", class_token=False),
    PoolCase(D=13, kernel=(1, 1, 1), stride=1, short_stride=1),
    PoolCase(D=64, grid=(1, 1), T=1, kernel=(3, 7, 7), stride=8),
    PoolCase(D=8, grid=(2, 3), stride=9, short_stride=5, long="mean"),
    PoolCase(D=32, grid=(6, 5), long="none"),
    PoolCase(D=128, grid=(4, 9), short_stride=4, long="mean", class_token=False),
    PoolCase(D=200, grid=(3, 3), B=2, T=3, stride=1),
)


def name(value):
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", STAGES + EDGES, ids=str)
def test_matches_the_reference(case, dtype, isa):
    double = dtype == torch.float64
    parameter_dtype = torch.float64 if double else torch.float32
    assert pool_error_report(case, dtype, "cpu", parameter_dtype=parameter_dtype) == []


def test_parameters_of_another_dtype(isa):
    case = PoolCase(D=32)
    assert pool_error_report(case, torch.bfloat16, "cpu", parameter_dtype=torch.bfloat16) == []


@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 5, 3)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_reference_is_a_convolution_a_norm_and_an_average(kernel, stride):
    """The specification against PyTorch's own operations, as the layer composes them."""
    layer = ShrinkingTemporalAttention(32, 2, kv_stride=stride, pool_kernel=kernel).double()
    pool, grid = layer.pool_k, (5, 7)
    x = torch.randn(2, 3, 36, 2, 16, dtype=torch.float64)
    tokens, pooled_grid = pool(x, grid, True)
    options = {"grid": grid, "stride": stride, "backend": "reference"}
    ours = pool_tokens(x, pool.weight, pool.norm.weight, pool.norm.bias, **options)
    for a, b in zip(ours, layer._granularities(tokens, pooled_grid), strict=True):
        torch.testing.assert_close(a, b)


def test_same_bits_on_any_number_of_threads(threads, isa):
    for case in (PoolCase(B=3, T=7), PoolCase(T=9, kernel=(3, 3, 3), D=24)):
        inputs = make_pool_inputs(case, torch.float32)
        many = run_pool(case, inputs, "cpu").tensors
        torch.set_num_threads(1)
        one = run_pool(case, inputs, "cpu").tensors
        torch.set_num_threads(threads)
        assert all(torch.equal(one[key], many[key]) for key in one)


@pytest.mark.parametrize("d", [96, 40])  # the latter's rows are no whole cache lines
def test_large_gradients_go_past_the_caches(d, isa):
    """Clips do not mix, so many of them give the bits of each alone, whose gradient is small."""
    case = PoolCase(B=5, T=4, H=2, D=d, grid=(40, 40), stride=8)
    inputs = make_pool_inputs(case)
    many = run_pool(case, inputs, "cpu").tensors["grad_tokens"]
    for b in (0, 4):
        clip = {k: getattr(inputs, k)[:, b : b + 1] for k in ("tokens", "grad_pooled")}
        one = run_pool(replace(case, B=1), replace(inputs, **clip), "cpu").tensors["grad_tokens"]
        assert torch.equal(many[:, b : b + 1], one)


def test_any_strides(isa):
    x = torch.randn(2, 3, 26, 2, 32)
    weights = torch.randn(32, 1, 1, 3, 3), torch.randn(32), torch.randn(32)

    def gradients(x, weights, layout):
        x = x.detach().requires_grad_()
        results = pool_tokens(x, *weights, grid=(5, 5), backend="cpu")
        found = torch.autograd.grad(results, x, [layout(r) for r in results])
        return [*results, *found]

    plain = gradients(x, weights, torch.sin)
    for order in ((4, 3, 2, 1, 0), (0, 3, 1, 2, 4), (2, 1, 0, 4, 3)):
        back = sorted(range(5), key=lambda axis, order=order: order[axis])
        strided = x.permute(order).contiguous().permute(back)
        every_second = [torch.stack([w, w], -1)[..., 0] for w in weights]

        def layout(grad):
            return torch.stack([torch.sin(grad)] * 2, -1)[..., 0]

        assert all(map(torch.equal, gradients(strided, every_second, layout), plain))


def test_gradcheck(isa):
    case = PoolCase(P=1, D=4, kernel=(3, 1, 3), grid=(2, 3), long="mean")
    x, weight, norm_weight, norm_bias, _ = vars(make_pool_inputs(case, torch.float64)).values()
    leaves = [y[0].double().requires_grad_() for y in (x, weight, norm_weight, norm_bias)]
    options = {"grid": case.grid, "stride": 2, "long": "mean", "backend": "cpu"}
    assert torch.autograd.gradcheck(lambda *y: pool_tokens(*y, **options), leaves)


def test_no_clips(isa):
    case = PoolCase(B=0)
    for found in run_pool(case, make_pool_inputs(case, torch.float32), "cpu").tensors.values():
        assert not found.any()


GUARDED = """
import os
import torch
from dataclasses import replace
from stat_kernels import native
from stat_kernels.testing import guarded
from tests.kernels.pool_cases import PoolCase, make_pool_inputs, run_pool
for isa in native.instruction_sets():
    os.environ["STAT_CPU_ISA"] = isa
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for case in (PoolCase(packed=False), PoolCase(D=24, kernel=(3, 3, 3), packed=False)):
            inputs = make_pool_inputs(case, dtype, parameter_dtype=torch.float64)
            lists = {k: [guarded(x) for x in getattr(inputs, k)]
                     for k in ("weights", "norm_weights", "norm_biases")}
            run_pool(case, replace(inputs, tokens=guarded(inputs.tokens), **lists), "cpu")
print("reached the end")
"""


def test_nothing_is_read_past_a_tensors_end():
    done = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reached the end" in done.stdout


def operands(dtype=torch.float32, **options):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 36, 2, 16, dtype=dtype, requires_grad=True)
    parameters = [torch.randn(16, 1, 1, 3, 3), torch.randn(16), torch.randn(16)]
    return x, *(p.requires_grad_() for p in parameters)


@pytest.mark.parametrize("long", ["class", "mean", "none"])
def test_opcheck(long):
    inputs = operands()
    options = ((5, 7), 2, 2, True, long)
    torch.library.opcheck(pool_ops.pool_forward, (*inputs, *options, 1e-6, "cpu"))
    x, weight, norm_weight, _ = (i.detach() for i in inputs)
    pooled, stats = pool_ops.pool_forward(*inputs, *options, 1e-6, "cpu")
    args = (torch.randn_like(pooled), x, weight, norm_weight, stats, *options, "cpu")
    torch.library.opcheck(pool_ops.pool_backward, args)


def test_results_are_views_of_one_buffer():
    current, short, long = pool_tokens(*operands(), grid=(5, 7), stride=2, backend="cpu")
    storages = {t.untyped_storage().data_ptr() for t in (current, short, long)}
    assert len(storages) == 1
    assert (current.shape[2], short.shape[2], tuple(long.shape)) == (12, 4, (2, 3, 2, 16))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_keeps_float32_parameters(backend):
    inputs = operands()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = pool_tokens(*inputs, grid=(5, 7), backend=backend)
    lower = (inputs[0].bfloat16(), *inputs[1:])
    for a, b in zip(results, pool_tokens(*lower, grid=(5, 7), backend=backend), strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b)
    grads = torch.autograd.grad([r.float().sum() for r in results], inputs)
    assert all(g.dtype == torch.float32 for g in grads)


def test_compile_and_flops():
    torch._dynamo.reset()
    inputs = operands()

    def pool(*inputs):
        return pool_tokens(*inputs, grid=(5, 7), stride=2)[0].square().sum()

    with FlopCounterMode(display=False) as counter:
        loss = pool(*inputs)
    assert counter.get_total_flops() == 2 * 2 * 3 * 12 * 32 * 9
    with FlopCounterMode(display=False) as counter:
        expected = torch.autograd.grad(loss, inputs)
    assert counter.get_total_flops() == 3 * 2 * 2 * 3 * 12 * 32 * 9
    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), expected)


def test_no_second_derivative_is_said():
    inputs = operands()
    pooled = pool_tokens(*inputs, grid=(5, 7), backend="cpu")[0]
    (grad,) = torch.autograd.grad(pooled.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        grad.sum().backward()
    reference = pool_tokens(*inputs, grid=(5, 7), backend="reference")[0]
    (grad,) = torch.autograd.grad(reference.square().sum(), inputs[0], create_graph=True)
    grad.sum().backward()


def test_explain_names_each_backend(monkeypatch):
    x, weight, *_ = operands()
    assert "cpu        usable, chosen" in explain_pooling(x, weight)
    assert "triton     not usable: it" in explain_pooling(x, weight)
    monkeypatch.delattr("stat_kernels.backends.cpu.pool_unsupported_reason")
    assert "cpu        not usable: it has no pooling kernel" in explain_pooling(x, weight)
    with pytest.raises(RuntimeError, match="backend='cpu' cannot take this call: it has no pool"):
        pool_tokens(*operands(), grid=(5, 7), backend="cpu")


zeros = torch.zeros


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"grid": (5, 6)}, ValueError, r"tokens must hold 31 tokens a frame, a class token and the "
         r"5 x 6 grid's, got 36 in \(2, 3, 36, 2, 16\)"),
        ({"class_token": False}, ValueError, "tokens must hold 35 tokens a frame, the 5 x 7"),
        ({"grid": 5}, ValueError, "grid must be .height, width., two ints of at least 1, got 5"),
        ({"tokens": zeros(2, 3, 36, 16)}, ValueError, r"tokens must be \(B, T, N, H, D\), got"),
        ({"tokens": zeros(2, 0, 36, 2, 16)}, ValueError, "tokens must have at least one frame"),
        ({"tokens": zeros(2, 3, 36, 2, 16).int()}, TypeError, "tokens must be one of .*int32"),
        ({"weight": zeros(16, 1, 1, 2, 3)}, ValueError, r"weight must have odd .* \(1, 2, 3\)"),
        ({"weight": zeros(8, 1, 1, 3, 3)}, ValueError, "weight must be .* with D 16 as in tokens"),
        ({"weight": zeros(16, 1, 3, 3)}, ValueError, "weight must be .*, got .16, 1, 3, 3."),
        ({"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
        ({"norm_weight": zeros(8)}, ValueError, r"norm_weight must be \(16,\), got \(8,\)"),
        ({"norm_bias": zeros(16).half()}, TypeError, "norm_bias must have norm_weight's dtype"),
        ({"norm_bias": zeros(16, device="meta")}, ValueError, "norm_bias must be on the tokens' d"),
        ({"stride": 0}, ValueError, "stride must be an int of at least 1, got 0"),
        ({"short_stride": 1.5}, ValueError, "short_stride must be .* or None, got 1.5"),
        ({"long": "max"}, ValueError, "long must be one of 'class', 'mean', 'none', got 'max'"),
        ({"long": "class", "class_token": False}, ValueError, "long must be 'mean' or 'none' with"),
        ({"eps": -1.0}, ValueError, "eps must be a finite number of at least 0, got -1.0"),
        ({"backend": "cudnn"}, ValueError, "backend must be one of cpu, .*reference"),
    ],
)  # fmt: skip
def test_bad_input(changed, error, message):
    names = ("tokens", "weight", "norm_weight", "norm_bias")
    arguments = dict(zip(names, operands(), strict=True)) | {"grid": (5, 7)} | changed
    with pytest.raises(error, match=message):
        pool_tokens(**arguments)

"""Groups of checks of the Triton kernels in Triton's interpreter; one group a process.

    TRITON_INTERPRET=1 python -m tests.kernels.triton_interpreted float32

test_triton_interpreter.py starts these. Every tensor that a kernel sees ends at a page that must
not be touched, and memory that nothing wrote holds NaN.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from stat_kernels import ShrinkingTemporalAttention, pool_tokens, shrinking_temporal_attention
from stat_kernels.backends import empty_mlp_gradients
from stat_kernels.backends import triton as backend
from stat_kernels.testing import (
    Case,
    check_backend,
    check_packed_gradients,
    guarded,
    make_inputs,
    oracle,
    run,
)
from tests.kernels import mlp_cases, pool_cases
from tests.kernels.mlp_cases import make_mlp_inputs
from tests.kernels.pool_cases import PoolCase, make_pool_inputs, pool_error_report, run_pool
from tests.kernels.shared import check_everything
from tools import triton_work

COMMON = [
    Case(T=3, Nq=17, H=1, D=64, Nc=9, Ns=4, L=3),
    Case(T=3, Nq=50, H=1, D=96, Nc=49, Ns=16, L=3),
    Case(T=2, Nq=33, H=2, D=128, Nc=20, Ns=5, L=5),
    Case(B=2, T=3, Nq=18, H=1, D=40, Nc=13, Ns=5, L=9, window=5),
]
PARTS = [
    Case(T=3, Nq=9, H=1, D=32, Nc=7, Ns=0, L=3),
    Case(T=3, Nq=9, H=1, D=32, Nc=7, Ns=3, L=0),
    Case(T=2, Nq=9, H=1, D=32, Nc=7, Ns=0, L=0),
    Case(T=1, Nq=9, H=2, D=32, Nc=7, Ns=3, L=1, window=7),
    Case(T=3, Nq=9, H=1, D=32, Nc=7, Ns=3, L=13, window=1),
]
TAILS = [
    Case(T=2, Nq=1, H=1, D=16, Nc=1, Ns=1, L=1),
    Case(T=1, Nq=65, H=1, D=24, Nc=33, Ns=1, L=1),
    Case(T=5, Nq=5, H=1, D=72, Nc=3, Ns=20, L=5, window=5),
    Case(T=4, Nq=6, H=1, D=112, Nc=4, Ns=7, L=40, window=9),
    Case(T=2, Nq=6, H=1, D=192, Nc=32, Ns=4, L=2),
    Case(T=2, Nq=6, H=1, D=256, Nc=5, Ns=4, L=2),
]

POOLINGS = [
    PoolCase(P=1, D=24, T=1, grid=(5, 3)),  # 3 x 2 positions: cells of four, of two
    PoolCase(D=16, T=3, kernel=(3, 3, 3), grid=(3, 2), stride=1, long="mean"),
    PoolCase(P=1, D=40, T=1, kernel=(1, 5, 7), grid=(7, 5), stride=3, short_stride=None),
    PoolCase(
        P=1, D=16, T=2, kernel=(3, 7, 1), grid=(1, 1), stride=8, class_token=False, long="mean"
    ),
    PoolCase(P=1, D=16, B=2, T=1, grid=(9, 9), stride=1, long="mean"),  # two tiles of cells
    PoolCase(P=1, D=16, T=1, grid=(6, 6), stride=1, short_stride=None),  # three tiles of positions
    PoolCase(P=1, D=200, T=1, grid=(2, 3), short_stride=4, long="none", packed=False),
]
POOLINGS_OF_16_BITS = [
    (PoolCase(T=1, grid=(9, 8), stride=4), torch.float16, torch.float64),
    (PoolCase(P=1, H=2, T=1, grid=(4, 3), stride=1), torch.bfloat16, torch.bfloat16),
]


def float32() -> None:
    for case in COMMON:
        check(case, torch.float32)


def float16() -> None:
    for case in COMMON:
        check(case, torch.float16)
    check(Case(T=1, Nq=100, H=1, D=96, Nc=20, L=1), torch.float16)  # the tile of many queries


def bfloat16() -> None:
    with rounding_bfloat16():
        for case in COMMON[:2]:
            check(case, torch.bfloat16)


def parts_and_tails() -> None:
    for case in PARTS + TAILS:
        check(case, torch.float32)


def windows() -> None:
    """Every window from 1 to 2T + 1; chunks of queries; own and long keys together and apart."""
    from stat_kernels.backends.triton import key_gradients

    for window, together in ((1, True), (3, False), (5, True), (7, False), (9, True)):
        with mock.patch.multiple(
            key_gradients, CHUNK_QUERIES=8, SPAN_QUERIES=8, SPAN_QUERIES_PER_KEY=1,
            FRAME_QUERIES_PER_KEY=1 if together else 9,
        ):  # fmt: skip
            check(Case(T=4, Nq=5, H=1, D=16, Nc=3, Ns=2, L=4, window=window), torch.float32)


def one_buffer() -> None:
    """Keys and values that are views of one buffer each, as the pooling writes it."""
    from stat_kernels.backends.triton.launch import Call

    for case in (
        Case(B=2, T=4, Nq=9, H=2, D=40, Nc=7, Ns=3, L=4, window=5),
        Case(T=5, Nq=6, H=1, D=16, Nc=2, Ns=5, L=5, window=(1, 3), causal_long=True),
        Case(T=3, Nq=9, H=1, D=32, Nc=7, Ns=0, L=3),
        Case(T=3, Nq=9, H=2, D=32, Nc=7, Ns=3, L=0, window=9),
        Case(T=1, Nq=9, H=1, D=32, Nc=7, Ns=3, L=1),
    ):
        plain = make_inputs(case)
        size = (2, case.B, case.T, 1 + case.Nc + case.Ns, case.H, case.D)
        long, cur, short = guarded(torch.empty(size)).split((1, case.Nc, case.Ns), dim=3)
        views = (*cur, *(short if case.Ns else (None, None)))
        views += tuple(long[:, :, :, 0]) if case.L else (None, None)
        for view, x in zip(views, plain[1:], strict=True):
            if x is not None:
                view.copy_(x)
        inputs = (guarded(plain[0]), *views)
        wanted = case.Nc if case.Ns else 0, -1 if case.L else 0
        assert Call(inputs, case.reach, 1.0).pooled == wanted
        check_backend("triton", inputs, case.window, **case.options)
        print(case, flush=True)


def counted() -> None:
    """The kernels multiply what ``tools.triton_work`` counts, and not once more."""
    from stat_kernels.backends.triton import key_gradients

    dot = interpreter.InterpreterBuilder.create_dot
    for case in (
        Case(B=2, T=4, Nq=19, H=2, D=40, Nc=7, Ns=3, L=4, window=5),
        Case(T=7, Nq=9, H=1, D=40, Nc=40, Ns=9, L=40, window=(3, 1)),
        Case(T=3, Nq=9, H=1, D=40, Nc=7, Ns=20, L=0, S=8, frame_offset=4),
        Case(T=3, Nq=9, H=1, D=40, Nc=7, Ns=0, L=3, causal_long=True),
    ):
        executed = 0

        def create_dot(self, a, b, *others):
            nonlocal executed
            executed += a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
            return dot(self, a, b, *others)

        with (
            mock.patch.multiple(key_gradients, CHUNK_QUERIES=40, SPAN_QUERIES=30),
            mock.patch.object(interpreter.InterpreterBuilder, "create_dot", create_dot),
        ):
            inputs = make_inputs(case)
            run(inputs, case.window, "triton", torch.ones_like(inputs[0]), **case.options)
            wanted = sum(launch.executed for launch in triton_work.launches(case, torch.float32))
        assert executed == wanted * (32 + 16), case  # two chunks of channels
        print(case, flush=True)


def strides() -> None:
    """Interleaved, sliced, transposed and expanded inputs; a stride that no vector fits."""
    case = Case(B=2, T=3, Nq=9, H=2, D=32, Nc=7, Ns=3, L=4)
    q, k_cur, v_cur, k_short, v_short, k_long, v_long = make_inputs(case)
    packed = torch.stack([k_cur, v_cur], dim=3)  # (B, T, N, 2, H, D): one projection's output
    strided = (
        q.permute(0, 3, 2, 1, 4).contiguous().permute(0, 3, 2, 1, 4),
        packed[:, :, :, 0],
        packed[:, :, :, 1],
        torch.cat([k_short, k_short], dim=-1)[..., :32],
        torch.cat([v_short, v_short[..., :3]], dim=-1)[..., :32],  # rows of 35 elements
        k_long[:1].expand(2, -1, -1, -1),
        torch.cat([v_long, v_long], dim=1)[:, ::2],
    )
    check_backend("triton", strided, case.window)
    check_packed_gradients("triton", strided, case.window)
    check_packed_gradients("triton", make_inputs(replace(case, D=40, Ns=0)), case.window)
    for gradient in (torch.ones(()).expand(q.shape), torch.randn(*q.shape[:-1], 64)[..., ::2]):
        found = run(strided, case.window, "triton", gradient).tensors
        plain = tuple(x.contiguous() for x in strided)
        same = run(plain, case.window, "triton", gradient.contiguous()).tensors
        for name, value in found.items():
            assert value.is_contiguous(), name
            torch.testing.assert_close(value, same[name])
    tokens = torch.randn(1, 2, 1 + 3 * 2, 2, 24)
    parameters = torch.randn(24, 1, 1, 3, 3), torch.randn(24), torch.randn(24)
    assert all(
        torch.equal(one, other)
        for one, other in zip(
            pool_and_gradient(torch.cat([tokens, tokens[..., :3]], dim=-1)[..., :24], parameters),
            pool_and_gradient(tokens, parameters),
            strict=True,
        )
    )
    print("strides")


def pool_and_gradient(tokens: torch.Tensor, parameters: tuple[torch.Tensor, ...]) -> list:
    """Current and short tokens, the class token, and the gradient of the tokens."""
    tokens = tokens.detach().requires_grad_()
    results = pool_tokens(tokens, *parameters, grid=(3, 2), stride=1, backend="triton")
    return [*results, *torch.autograd.grad([r.sin().sum() for r in results], tokens)]


def numbers() -> None:
    """Huge scores stay finite; a NaN reaches exactly the outputs that depend on it."""
    case = Case(T=3, Nq=5, H=1, D=32, Nc=7, Ns=3, L=3)
    inputs = make_inputs(case)
    huge = run((inputs[0] * 1e4, *inputs[1:]), 3, "triton", torch.ones_like(inputs[0])).tensors
    assert all(torch.isfinite(value).all() for value in huge.values())
    inputs[3][0, 2, 1] = float("nan")  # a short key of the last frame: seen by frame 1 alone
    found = run(inputs, 3, "triton").tensors["out"].isnan()
    assert torch.equal(found, oracle(inputs, 3).tensors["out"].isnan())
    assert found.any()
    for empty in (Case(B=0, D=32), Case(Nq=0, D=32)):
        nothing = make_inputs(empty)
        for value in run(nothing, 3, "triton", torch.ones_like(nothing[0])).tensors.values():
            assert not value.any()
    print("numbers")


def reach() -> None:
    """Windows, frame offsets, causal long keys, pieces of a clip; where NaN and infinities go."""
    check_everything("triton", torch.float32)
    print("reach")


def traced() -> None:
    """The operator in a traced graph, forward and backward, is the operator called at once."""
    case = Case(T=2, Nq=5, H=1, D=32, Nc=4, Ns=2, L=2)
    leaves = [x.requires_grad_() for x in make_inputs(case)]

    def attend(*tensors):
        return shrinking_temporal_attention(*tensors, window=3, backend="triton") * 2

    found = torch.compile(attend, fullgraph=True, backend="aot_eager")(*leaves)
    wanted = attend(*leaves)
    assert torch.equal(found, wanted)
    for one, other in zip(
        torch.autograd.grad(found.sum(), leaves),
        torch.autograd.grad(wanted.sum(), leaves),
        strict=True,
    ):
        assert torch.equal(one, other)
    print("traced")


def pooling() -> None:
    from stat_kernels.backends.triton import pool_gradients

    check_pooling(POOLINGS[0], torch.float32)
    with (
        mock.patch.object(pool_gradients, "SUM_GROUP", 2),  # sums of sums
        mock.patch.object(pool_gradients, "SUM_TILE", (2, 128)),
    ):
        for case in POOLINGS[1:]:
            check_pooling(case, torch.float32)
    nothing = PoolCase(B=0)
    for found in run_pool(nothing, make_pool_inputs(nothing), "triton").tensors.values():
        assert not found.any()


def pooling_16_bits() -> None:
    with rounding_bfloat16():
        for case, dtype, parameter_dtype in POOLINGS_OF_16_BITS:
            check_pooling(case, dtype, parameter_dtype)


def mlp() -> None:
    """Bias and GELU, bias and residual; several programs of rows and parts of sums."""
    from stat_kernels.backends.triton import mlp_kernels

    small = {"ROWS": 16, "BLOCK": 32, "num_warps": 4}
    with (
        rounding_bfloat16(),
        mock.patch.multiple(mlp_kernels, ROWS=16, BLOCK=32, SPAN=32, OPTIONS=small),
    ):
        for case in mlp_cases.CASES[:3] + mlp_cases.CASES[4:8]:
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                guarded_inputs = with_guards(make_mlp_inputs)
                with (
                    guarded_results(),
                    mock.patch.object(mlp_cases, "make_mlp_inputs", guarded_inputs),
                ):
                    found = mlp_cases.mlp_error_report(case, dtype, "triton")
                assert found == [], f"triton in {dtype}: {case}: {found}"
                print(case, dtype, flush=True)
    for skip in (None, "same"):
        nothing = make_mlp_inputs(mlp_cases.MlpCase((0, 5, 8), skip), torch.float32)
        for value in mlp_cases.run_mlp(*nothing, "triton").tensors.values():
            assert not value.any()


def with_guards(make: Callable) -> Callable:
    def guarded_inputs(*arguments, **options):
        inputs, grad_out = make(*arguments, **options)
        return [guarded(x) for x in inputs], guarded(grad_out)

    return guarded_inputs


def core() -> None:
    """The layer's core, pooled queries too: the composite's results and gradients."""
    layer = ShrinkingTemporalAttention(32, 2, window=3, q_stride=2, kv_stride=2, backend="triton")
    x = torch.randn(1, 2, 1 + 5 * 3, 32, requires_grad=True)
    leaves = [x, *layer.parameters()]
    with mock.patch.object(backend, "pool_backward", wraps=backend.pool_backward) as fused:
        y = layer(x, (5, 3))[0]
        found = [y, *torch.autograd.grad(y.sin().sum(), leaves)]
    assert fused.call_count == 2, "keys and values in one call, queries in another"
    layer.fused, layer.backend = False, "reference"
    y = layer(x, (5, 3))[0]
    wanted = [y, *torch.autograd.grad(y.sin().sum(), leaves)]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    print("core")


def check_pooling(
    case: PoolCase, dtype: torch.dtype, parameter_dtype: torch.dtype = torch.float32
) -> None:
    """Forward and all gradients, every tensor with a guard page behind it."""

    def guarded_inputs(*arguments):
        inputs = make_pool_inputs(*arguments)
        projection = guarded(inputs.tokens._base)  # (B, T, N, P + packed, H, D)
        return replace(inputs, tokens=projection.movedim(3, 0)[case.packed :])

    with (
        guarded_results(),
        mock.patch.object(pool_cases, "make_pool_inputs", guarded_inputs),
    ):
        found = pool_error_report(case, dtype, "triton", parameter_dtype=parameter_dtype)
    assert found == [], f"triton in {dtype}: {case}: {found}"
    print(case, dtype, flush=True)


def check(case: Case, dtype: torch.dtype) -> None:
    """Forward and all gradients against the oracle, every tensor with a guard page behind it.

    NumPy's float32 sums differ between CPUs, and one element among hundreds can be off by more than
    the rule for maxima allows. A draw on which that happens is excused by two on which it does not.
    """

    def draw(seed: int) -> None:
        inputs = tuple(guarded(x) for x in make_inputs(case, dtype, seed=seed))
        with guarded_results():
            check_backend("triton", inputs, case.window)

    try:
        draw(0)
    except AssertionError:
        if dtype != torch.float32:
            raise
        draw(1)
        draw(2)
    print(case, dtype, flush=True)


@contextmanager
def guarded_results() -> Iterator[None]:
    """The kernels' own results and scratch memory end at a guard page, too; copies likewise."""
    empty, empty_pooled, empty_grads = torch.empty, backend.empty_pooled, backend.empty_grad_params

    def guarded_empty(*sizes, **options):
        found = empty(*sizes, **options)
        return guarded(found) if found.numel() else found

    def guarded_gradients(inputs, grads):
        assert grads is None
        dtype = inputs[0].dtype
        return tuple(guarded_empty(0 if x is None else x.shape, dtype=dtype) for x in inputs)

    def guarded_mlp_gradients(*arguments):
        return [guarded(x) if x.numel() else x for x in empty_mlp_gradients(*arguments)]

    def guarding(function):
        def guarded_copy(*arguments, **options):
            found = function(*arguments, **options)
            return found if found.requires_grad or found.numel() == 0 else guarded(found)

        return guarded_copy

    with (
        mock.patch.object(torch, "empty", guarded_empty),
        mock.patch.object(torch, "cat", guarding(torch.cat)),
        mock.patch.object(torch.Tensor, "contiguous", guarding(torch.Tensor.contiguous)),
        mock.patch.object(backend, "empty_pooled", lambda *a: map(guarded, empty_pooled(*a))),
        mock.patch.object(backend, "empty_grad_params", lambda *a: guarded(empty_grads(*a))),
        mock.patch.object(backend, "empty_mlp_gradients", guarded_mlp_gradients),
        mock.patch.object(backend, "gradients_to_fill", guarded_gradients),
    ):
        yield


@contextmanager
def rounding_bfloat16() -> Iterator[None]:
    """The interpreter of triton 3.6 multiplies the bits of bfloat16 as integers and cuts casts off.

    With this patch it multiplies in float32 and casts with rounding, as a GPU does.
    """
    dot, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float

    def as_float32(x: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = x.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, *others):
        return dot(self, as_float32(a), as_float32(b), *others)

    def convert_float(data, source, target, rounding):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, rounding)
        rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)

    with (
        mock.patch.object(interpreter.InterpreterBuilder, "create_dot", create_dot),
        mock.patch.object(interpreter, "_convert_float", convert_float),
    ):
        yield


GROUPS: dict[str, Callable[[], None]] = {
    group.__name__: group
    for group in (
        float32,
        float16,
        bfloat16,
        parts_and_tails,
        windows,
        one_buffer,
        counted,
        strides,
        numbers,
        reach,
        traced,
        pooling,
        pooling_16_bits,
        core,
        mlp,
    )
}

if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    torch.set_num_threads(1)
    assert backend.unsupported_reason("cpu", torch.float32, 96) is None
    for name in sys.argv[1:]:
        GROUPS[name]()
    print("reached the end")

"""The CUDA pooling kernels, compiled for the CPU over the emulator: against the oracle."""

import ctypes
import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stat_kernels.backends import cuda
from stat_kernels.testing import Result, tolerance_errors
from tests.kernels.cuda_emulated import SHARED_MEMORY, TOO_LARGE, UNALIGNED, UNSUPPORTED, planted
from tests.kernels.cuda_pool_emulated import PoolKernels, params
from tests.kernels.pool_cases import (
    EPS,
    PoolCase,
    PoolInputs,
    make_pool_inputs,
    pool_error_report,
    run_pool,
)

DTYPES = [torch.bfloat16, torch.float16]
STAT = [  # STAT's strides; grids of 7 are shrunk to 3 and 4
    PoolCase(grid=(9, 8), stride=4),
    PoolCase(grid=(7, 6), stride=2, H=2),
    PoolCase(grid=(4, 4), stride=1),
    PoolCase(P=1, grid=(6, 6), stride=2, short_stride=None, long="class"),  # queries
]
PARTS = [
    PoolCase(short_stride=None, long="none", class_token=False, packed=False),
    PoolCase(long="none"),
    PoolCase(long="mean", B=2),
    PoolCase(long="mean", class_token=False, short_stride=None),
    PoolCase(long="mean", kernel=(1, 1, 3), short_stride=9),
    PoolCase(short_stride=1, P=4),
]
KERNELS = [
    PoolCase(kernel=(1, 1, 1), D=32),
    PoolCase(kernel=(3, 3, 3), T=3),
    PoolCase(kernel=(3, 1, 1), T=1, D=16),
    PoolCase(kernel=(1, 5, 7), stride=3, D=40),
    PoolCase(kernel=(3, 7, 7), T=2, D=16, stride=1, P=1),
]
GRIDS = [
    PoolCase(grid=(1, 1), stride=1),
    PoolCase(grid=(1, 9), stride=3, D=64),
    PoolCase(grid=(9, 1), stride=1, D=64, short_stride=4),
    PoolCase(grid=(2, 3), stride=8, D=64),
    PoolCase(grid=(2, 2), kernel=(3, 7, 7), D=16, stride=1, class_token=False, long="none"),
]
HEAD_DIMS = [PoolCase(D=d, grid=(4, 3), P=1, T=1) for d in (16, 24, 64, 72, 128, 136, 256)]
STRIDES = [PoolCase(grid=(7, 5), stride=s, D=16, T=1) for s in range(1, 9)]
ANY_KERNEL_STRIDES = [dataclasses.replace(c, kernel=(1, 5, 3)) for c in STRIDES[::2]]


@pytest.fixture(scope="module")
def built():
    return PoolKernels()


@pytest.fixture
def kernels(built):
    """As the backend "cuda", with fresh settings and counters."""
    built.emulated.configure()
    built.emulated.take_counters()
    with built.registered():
        yield built


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", STAT, ids=str)
def test_matches_the_oracle(case, dtype, kernels):
    assert not pool_error_report(case, dtype, "cuda")


@pytest.mark.parametrize(
    "case", PARTS + KERNELS + GRIDS + HEAD_DIMS + STRIDES + ANY_KERNEL_STRIDES, ids=str
)
def test_parts_kernels_and_sizes(case, kernels):
    assert not pool_error_report(case, torch.bfloat16, "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_parameters_of_another_dtype(dtype, kernels):
    case = PoolCase(D=16)
    assert not pool_error_report(case, torch.float16, "cuda", parameter_dtype=dtype)


def equal(found: Result, expected: Result) -> bool:
    return all(torch.equal(value, expected.tensors[key]) for key, value in found.tensors.items())


@pytest.mark.parametrize(
    "case",
    [
        PoolCase(grid=(5, 5), H=2, stride=1),
        PoolCase(grid=(5, 5), kernel=(3, 3, 3), long="mean"),
    ],
    ids=str,
)
def test_the_same_bits_in_every_order(case, kernels):
    """Blocks and warps come in another order with every seed; no sum may notice."""
    inputs = make_pool_inputs(case)
    first = run_pool(case, inputs, "cuda")
    for seed in range(1, 5):
        kernels.emulated.configure(seed)
        assert equal(run_pool(case, inputs, "cuda"), first)


@pytest.mark.parametrize("long", ["class", "mean"])
def test_several_units_a_block(long):
    """Frames and heads are independent; sums of parameters' gradients come in another order."""
    case = PoolCase(B=2, T=2, H=3, D=16, long=long)
    inputs = make_pool_inputs(case)
    few = PoolKernels(planted("pool.cu", "kEnoughBlocks = 1024;", "kEnoughBlocks = 4;"))
    with few.registered():
        found = run_pool(case, inputs, "cuda").tensors
        assert few.emulated.take_counters().blocks < 24
    with PoolKernels().registered():
        expected = run_pool(case, inputs, "cuda").tensors
    for key, value in expected.items():
        if value.dtype == torch.float32 and key.startswith("grad"):
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4, msg=key)
        else:
            assert torch.equal(found[key], value), key


def test_one_launch_for_all_tensors(kernels):
    """A block for each frame and head of each of them."""
    case = PoolCase(P=3, B=2, T=2, H=2, D=16)
    run_pool(case, make_pool_inputs(case), "cuda", backward=False)
    assert kernels.emulated.take_counters().blocks == 3 * 2 * 2 * 2


@pytest.mark.parametrize("case", [STAT[0], STAT[2], PARTS[2]], ids=str)
def test_rows_that_do_not_fit_go_through_global_memory(case, kernels):
    """The (1, 3, 3) kernel then takes the passes of any other; forward is the same."""
    inputs = make_pool_inputs(case)
    fits = run_pool(case, inputs, "cuda").tensors
    kernels.emulated.configure(shared_limit=9 * 1024)
    kernels.emulated.take_counters()
    found = run_pool(case, inputs, "cuda").tensors
    assert torch.equal(found["out"], fits["out"])
    assert not pool_error_report(case, torch.bfloat16, "cuda")


def strided_tokens(tokens):
    """The same values: heads before frames, expanded, at an odd address, in odd rows."""
    odd = torch.cat([tokens, tokens[..., :3]], dim=-1)
    return {
        "transposed": tokens.transpose(2, 4).contiguous().transpose(2, 4),
        "expanded": tokens[:, :1].expand(-1, 2, -1, -1, -1, -1),
        "sliced": odd[..., :-3],
        "shifted": torch.cat([tokens[..., :3], tokens], dim=-1)[..., 3:],
    }


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced", "shifted"])
def test_any_strides(layout, kernels):
    case = PoolCase(B=2, D=16, H=3)
    inputs = make_pool_inputs(case)
    tokens = strided_tokens(inputs.tokens)[layout]
    assert not tokens.is_contiguous()
    strided = dataclasses.replace(inputs, tokens=tokens)
    plain = dataclasses.replace(inputs, tokens=tokens.contiguous())
    assert equal(run_pool(case, strided, "cuda"), run_pool(case, plain, "cuda"))


@pytest.mark.parametrize("extra", [0, 3])  # channels after the head dim: 3 break the alignment
@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 3, 3)])
def test_gradients_are_written_into_a_packed_one(kernel, extra, kernels):
    """Every element of the slots, zeros too, and nothing beside them."""
    case = PoolCase(D=16, grid=(9, 5), stride=4, kernel=kernel)
    inputs = make_pool_inputs(case)
    lists = [inputs.weights, inputs.norm_weights]
    _, stats = cuda.pool_forward(inputs.tokens, *lists, inputs.norm_biases, *case.options, EPS)
    arguments = (inputs.grad_pooled, inputs.tokens, *lists, stats, *case.options)
    plain = torch.empty(inputs.tokens.shape, dtype=torch.bfloat16)
    expected = cuda.pool_backward(*arguments, plain)
    packed = torch.full((case.B, case.T, 46, 3, case.H, case.D + extra), 7.0).bfloat16()
    slots = packed.movedim(3, 0)[1:, ..., : case.D]
    assert torch.equal(cuda.pool_backward(*arguments, slots), expected)
    assert torch.equal(slots, plain)
    slots.fill_(7.0)
    assert (packed == 7.0).all()


def test_parameters_may_begin_at_any_float(kernels):
    """As views into a flat parameter do."""
    case = PoolCase(D=16, T=1)
    inputs = make_pool_inputs(case)
    moved = [[torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in found]
             for found in inputs.parameters]  # fmt: skip
    assert all(x.data_ptr() % 16 == 4 for found in moved for x in found)
    again = PoolInputs(inputs.tokens, *moved, inputs.grad_pooled)
    assert equal(run_pool(case, again, "cuda"), run_pool(case, inputs, "cuda"))


@pytest.mark.parametrize("long", ["mean", "none"])
@pytest.mark.parametrize("kernel", [(1, 3, 3), (1, 5, 5)])
def test_a_class_token_that_is_not_asked_for_is_not_read(kernel, long, kernels):
    case = PoolCase(D=16, long=long, kernel=kernel)
    inputs = make_pool_inputs(case)
    inputs.tokens[:, :, :, 0] = float("nan")
    found = run_pool(case, inputs, "cuda").tensors
    assert all(torch.isfinite(value).all() for value in found.values())
    assert not found["grad_tokens"][:, :, :, 0].any()


@pytest.mark.parametrize("where", [(0, 0, 0, 0, 0), (0, 0, 1, 7, 0), (1, 0, 1, 20, 0)])
@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 3, 3)])
def test_nan_is_passed_on(kernel, where, kernels):
    """To what depends on it, and nowhere else; the reference multiplies padding, too."""
    case = PoolCase(D=16, kernel=kernel)
    inputs = make_pool_inputs(case)
    inputs.tokens[where][5] = float("nan")
    found = run_pool(case, inputs, "cuda").tensors
    for key, value in run_pool(case, inputs, "reference").tensors.items():
        if not key.startswith("grad_weight"):
            assert torch.equal(found[key].isnan(), value.isnan()), key
    assert found["out"].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_variance_and_huge_rows(dtype, kernels):
    case = PoolCase(D=16, grid=(4, 4))
    inputs = make_pool_inputs(case, dtype)
    inputs.tokens[:, :, 0] *= 1e3
    inputs.tokens[:, :, 1] = 2.0
    exact = run_pool(case, inputs.double(), "reference")
    same = run_pool(case, inputs, "reference")
    assert not tolerance_errors(run_pool(case, inputs, "cuda"), exact, same)


def test_no_clips(kernels):
    case = PoolCase(B=0)
    found = run_pool(case, make_pool_inputs(case), "cuda").tensors
    assert found["out"].shape == (2, 0, 2, case.layout.rows, 1, 96)
    assert all(not value.any() for value in found.values())
    assert kernels.emulated.take_counters().blocks == 0


def forward_code(kernels, case, **changes):
    """The code of a forward call, with some fields of the struct changed."""
    inputs = make_pool_inputs(case)
    sizes = [*case.grid, *case.kernel, case.stride, case.short_stride or 0]
    p = params(
        inputs.tokens, sizes, case.class_token, case.long,
        pooled=torch.empty_like(inputs.grad_pooled),
        stats=torch.empty(2, case.P, case.B, case.T, case.layout.normed, case.H),
        weight=inputs.weights, norm_weight=inputs.norm_weights, norm_bias=inputs.norm_biases,
    )  # fmt: skip
    for field, value in changes.items():
        owner, _, field = field.rpartition("__")
        setattr(getattr(p, owner) if owner else p, field, value)
    return kernels.library.sta_cuda_pool_forward(ctypes.byref(p), None)


@pytest.mark.parametrize(
    ("code", "case", "changes"),
    [
        (0, PoolCase(), {}),
        (UNSUPPORTED, PoolCase(D=8), {}),
        (UNSUPPORTED, PoolCase(D=264), {}),
        (UNSUPPORTED, PoolCase(D=20), {}),
        (UNSUPPORTED, PoolCase(kernel=(5, 3, 3)), {}),
        (UNSUPPORTED, PoolCase(kernel=(1, 3, 9)), {}),
        (UNSUPPORTED, PoolCase(stride=9), {}),
        (UNSUPPORTED, PoolCase(), {"dtype": 0}),
        (UNALIGNED, PoolCase(), {"tokens__stride_n": 97}),
        (UNALIGNED, PoolCase(), {"pooled": 8}),
        (TOO_LARGE, PoolCase(), {"tokens__stride_b": 2**40}),
        (TOO_LARGE, PoolCase(), {"B": 2**31}),
        (TOO_LARGE, PoolCase(), {"grid_w": 2**16}),
    ],
    ids=str,
)
def test_refusals(code, case, changes, kernels):
    assert forward_code(kernels, case, **changes) == code
    assert kernels.library.sta_cuda_error_string(code).decode().strip()


def test_too_little_shared_memory_is_refused(kernels):
    kernels.emulated.configure(shared_limit=4096)
    assert forward_code(kernels, PoolCase()) == SHARED_MEMORY


def test_guard_pages():
    """In a process of its own: an access past a tensor's end would kill it."""
    command = [sys.executable, "-m", "tests.kernels.cuda_pool_emulated"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode != -signal.SIGSEGV, f"an access past the end after: {done.stdout}"
    assert "reached the end" in done.stdout, done.stderr

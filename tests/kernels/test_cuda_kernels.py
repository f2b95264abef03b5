"""The CUDA kernels, compiled for the CPU over the emulator: against the oracle, in many orders."""

import ctypes
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stat_kernels import ShrinkingTemporalAttention
from stat_kernels.backends import Reach, cuda
from stat_kernels.testing import (
    INPUTS,
    Case,
    Result,
    check_backend,
    check_packed_gradients,
    make_inputs,
    oracle,
    run,
    tolerance_errors,
)
from tests.kernels.cuda_emulated import (
    SHARED_MEMORY,
    TOO_LARGE,
    UNALIGNED,
    UNSUPPORTED,
    Kernels,
    params,
)
from tests.kernels.cuda_pool_emulated import PoolKernels
from tests.kernels.shared import (
    PIECES,
    REACHES,
    check_infinite_scores,
    check_nan_stays_in_the_window,
    check_pieces,
    check_reach,
)

COMMON = [
    Case(T=3, Nq=50, H=1, D=64, L=3),
    Case(B=2, T=3, Nq=50, H=2, D=96, L=3),
    Case(T=3, Nq=50, H=1, D=128, L=3),
]
TAILS = [
    Case(T=2, Nq=1, H=1, D=64, Nc=1, Ns=1, L=1),
    Case(T=2, Nq=197, H=1, D=96, Nc=196, Ns=49, L=2),
    Case(T=1, Nq=785, H=1, D=96, Nc=49, Ns=16, L=1),
    Case(T=5, Nq=17, H=3, D=128, Nc=33, Ns=7, L=9, window=5),
    Case(T=9, Nq=5, H=1, D=64, Nc=4, Ns=2, L=9, window=9),
    Case(T=2, Nq=20, H=1, D=96, Nc=300, Ns=100, L=40),
]
PARTS = [
    Case(T=3, Nq=20, H=1, Nc=9, Ns=0, L=3),
    Case(T=3, Nq=20, H=1, Nc=9, Ns=4, L=0),
    Case(T=3, Nq=20, H=1, Nc=9, Ns=0, L=0),
    Case(T=3, Nq=20, H=1, Nc=9, Ns=4, L=3, window=1),
    Case(T=1, Nq=20, H=1, Nc=9, Ns=4, L=1, window=7),
    Case(T=3, Nq=20, H=1, Nc=9, Ns=4, L=33),
]
# Shared memory in KiB, too little for all keys.
MANY_KEYS = [
    (163, Case(T=2, Nq=50, H=1, D=64, Nc=400, Ns=150, L=40)),
    (99, Case(T=2, Nq=130, H=1, D=64, Nc=300, Ns=49, L=40)),
    (163, Case(T=2, Nq=50, H=1, D=96, Nc=300, Ns=49, L=40)),
    (99, Case(B=2, T=3, Nq=140, H=2, D=96, Nc=196, Ns=30, L=3)),
    (163, Case(T=2, Nq=50, H=1, D=128, Nc=250, Ns=30, L=40)),
    (99, Case(T=3, Nq=70, H=1, D=128, Nc=196, Ns=16, L=3, window=5)),
]
# Strips of one part and neighbour each take no more warps than dense ones. Shared memory with and
# without room for the next frame's keys.
STAT = Case(T=9, Nq=50, H=1, D=96, Nc=49, Ns=16, L=32, window=7)
ALIGNED = [
    (227, STAT),
    (163, STAT),
    (227, Case(T=4, Nq=70, H=1, D=128, Nc=32, Ns=16, L=32, window=5)),
    (99, Case(B=2, T=5, Nq=33, H=2, D=64, Nc=16, Ns=16, L=16, window=(3, 1))),
    (227, Case(T=3, Nq=9, H=1, D=64, Nc=16, Ns=32, L=16, window=5, S=9, frame_offset=4)),
    (227, Case(T=5, Nq=65, H=1, D=64, Nc=30, Ns=16, L=0, window=(2, 0))),
    (227, Case(T=5, Nq=9, H=1, D=96, Nc=30, Ns=14, L=0, window=(0, 2), S=8, frame_offset=1)),
    (227, Case(T=3, Nq=9, H=1, D=64, Nc=32, Ns=0, L=30)),
]
DTYPES = [torch.bfloat16, torch.float16]
SHARED_LIMITS_KIB = [227, 163, 99]  # of sm_90 and sm_100; of sm_80; of sm_86, sm_89, sm_120


def name(value):
    return str(value).removeprefix("torch.")


@pytest.fixture(scope="module")
def built():
    return Kernels()


@pytest.fixture
def kernels(built):
    """As the backend "cuda", with fresh settings and counters."""
    built.emulated.configure()
    built.emulated.take_counters()
    with built.registered():
        yield built


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", COMMON, ids=str)
def test_matches_the_oracle(case, dtype, kernels):
    check_backend("cuda", make_inputs(case, dtype), case.window)


@pytest.mark.parametrize("case", TAILS + PARTS, ids=str)
def test_tails_and_parts(case, kernels):
    check_backend("cuda", make_inputs(case, torch.bfloat16), case.window)


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_every_window(frames, kernels):
    for window in range(1, 2 * frames + 2, 2):
        case = Case(T=frames, Nq=9, H=2, D=64, Nc=6, Ns=3, L=frames, window=window)
        check_backend("cuda", make_inputs(case, torch.float16), window)


@pytest.mark.parametrize(
    ("limit_kib", "case"),
    [*((227, case) for case in COMMON), *MANY_KEYS[1::2], *ALIGNED[:4]],
    ids=str,
)
def test_the_same_bits_in_every_order(limit_kib, case, kernels):
    """Blocks, warps and copies come in another order with every seed; no sum may notice."""
    limit = limit_kib * 1024
    kernels.emulated.configure(shared_limit=limit)
    inputs = make_inputs(case, torch.bfloat16)
    grad = torch.randn_like(inputs[0])
    first = run(inputs, case.window, "cuda", grad).tensors
    for seed in range(1, 5):
        kernels.emulated.configure(seed, shared_limit=limit)
        again = run(inputs, case.window, "cuda", grad).tensors
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(("limit_kib", "case"), MANY_KEYS, ids=str)
def test_keys_that_do_not_fit_are_streamed(limit_kib, case, kernels):
    """Forward; backward they take several passes."""
    kernels.emulated.configure(shared_limit=limit_kib * 1024)
    inputs = make_inputs(case, torch.bfloat16)
    run(inputs, case.window, "cuda")
    counters = kernels.emulated.take_counters()
    assert counters.barriers > counters.blocks  # one a block where all keys are resident
    check_backend("cuda", inputs, case.window)


def test_keys_that_fit_are_resident(kernels):
    run(make_inputs(COMMON[1], torch.bfloat16), 3, "cuda")
    counters = kernels.emulated.take_counters()
    assert counters.barriers == counters.blocks


@pytest.mark.parametrize("frames", [5, 16])
def test_several_frames_a_block(frames, kernels):
    """With enough clips and heads a block takes four or eight frames backward."""
    case = Case(B=2, T=frames, Nq=3, H=64, D=64, Nc=2, Ns=1, L=3, window=5)
    check_backend("cuda", make_inputs(case, torch.bfloat16), case.window)


@pytest.mark.parametrize(("limit_kib", "case"), ALIGNED, ids=str)
def test_aligned_strips(limit_kib, case, kernels):
    kernels.emulated.configure(shared_limit=limit_kib * 1024)
    check_reach("cuda", case, torch.bfloat16)
    check_nan_stays_in_the_window("cuda", case, torch.bfloat16)


def test_room_for_the_next_frames_keys_changes_no_bit(kernels):
    inputs = make_inputs(STAT, torch.bfloat16)
    grad = torch.randn_like(inputs[0])
    found = []
    for limit_kib in (227, 163):
        kernels.emulated.configure(shared_limit=limit_kib * 1024)
        found.append(run(inputs, STAT.window, "cuda", grad).tensors)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("limit_kib", [227, 81])
def test_aligned_strips_stay_from_frame_to_frame(limit_kib, kernels):
    """Of a block's eight frames only the first copies all six strips, the others three of them."""
    case = Case(B=2, T=16, Nq=3, H=64, D=64, Nc=16, Ns=16, L=16, window=5)
    kernels.emulated.configure(shared_limit=limit_kib * 1024)
    inputs = make_inputs(case, torch.bfloat16)
    run(inputs, case.window, "cuda")
    forward = kernels.emulated.take_counters().copies
    run(inputs, case.window, "cuda", torch.ones_like(inputs[0]))
    rows = 2 * (8 * 64 + 16 * (6 + 7 * 3))  # queries and their gradients; keys and values
    blocks = case.B * case.H * case.T // 8
    assert kernels.emulated.take_counters().copies - forward == blocks * rows * case.D // 8
    check_backend("cuda", inputs, case.window)


@pytest.mark.parametrize(("queries", "tiles"), [(50, 1), (81, 1.5)])
def test_matrix_loads_of_a_backward_tile(queries, tiles, kernels):
    """The figures in docs/internals/cuda.md, at STAT's sizes; empty half tiles are skipped."""
    case = Case(T=2, Nq=queries, H=1, Nc=49, Ns=16, L=32, window=7, S=9, frame_offset=3)
    inputs = make_inputs(case, torch.bfloat16)
    run(inputs, case.window, "cuda", **case.options)
    forward = kernels.emulated.take_counters()
    run(inputs, case.window, "cuda", torch.ones_like(inputs[0]), **case.options)
    both = kernels.emulated.take_counters()
    frames_and_tiles = case.T * tiles
    assert (both.load_phases - forward.load_phases) / 4 == 1152 * frames_and_tiles
    assert both.multiply_adds - forward.multiply_adds == 2880 * frames_and_tiles


@pytest.mark.parametrize("dim", [64, 128])
def test_several_bands_a_warp(dim, kernels):
    """With enough clips and heads the queries of a frame are not shared out to several blocks."""
    case = Case(B=2, T=8, Nq=140, H=33, D=dim, Nc=5, Ns=1, L=2)
    check_backend("cuda", make_inputs(case, torch.bfloat16), case.window, backward=False)
    assert kernels.emulated.take_counters().blocks == 2 * 8 * 33


sizes = st.integers(1, 70)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    B=st.integers(1, 2), T=st.integers(1, 5), Nq=sizes, H=st.integers(1, 2),
    D=st.sampled_from([64, 96, 128]), Nc=st.integers(1, 150), Ns=st.integers(0, 20),
    L=st.integers(0, 20), radius=st.integers(0, 6), seed=st.integers(0, 99),
    limit_kib=st.sampled_from([227, 99]),
)  # fmt: skip
def test_random_sizes(kernels, B, T, Nq, H, D, Nc, Ns, L, radius, seed, limit_kib):
    """A wrong index shows as an error of the values' own size, so the bound may be a plain one."""
    kernels.emulated.configure(seed, shared_limit=limit_kib * 1024)
    case = Case(B, T, Nq, H, D, Nc, Ns, L, 2 * radius + 1)
    inputs = make_inputs(case, torch.float16)
    grad = torch.randn_like(inputs[0])
    exact = oracle(inputs, case.window, grad).tensors
    for key, value in run(inputs, case.window, "cuda", grad).tensors.items():
        torch.testing.assert_close(value.double(), exact[key], rtol=2e-2, atol=2e-2, msg=key)


@pytest.mark.parametrize("limit_kib", SHARED_LIMITS_KIB)
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_no_bank_conflict(dim, limit_kib, kernels):
    kernels.emulated.configure(shared_limit=limit_kib * 1024)
    case = Case(T=2, Nq=50, H=1, D=dim, L=2)
    inputs = make_inputs(case, torch.bfloat16)
    run(inputs, case.window, "cuda", torch.randn_like(inputs[0]))
    counters = kernels.emulated.take_counters()
    assert counters.load_phases > 1000
    assert counters.bank_conflicts == 0


def strided(inputs):
    """The same values behind other strides: transposed, interleaved, sliced, expanded."""
    q, k_cur, v_cur, k_short, v_short, k_long, v_long = inputs
    packed = torch.stack([k_cur, v_cur], dim=3)  # (B, T, N, 2, H, D): one projection's output
    return (
        q.permute(0, 3, 2, 1, 4).contiguous().permute(0, 3, 2, 1, 4),
        packed[:, :, :, 0],
        packed[:, :, :, 1],
        torch.cat([k_short, k_short], dim=-1)[..., : k_short.shape[-1]],
        torch.cat([v_short, v_short], dim=2)[:, :, ::2],
        k_long[:1].expand(2, -1, -1, -1),
        v_long.transpose(1, 2).contiguous().transpose(1, 2),
    )


@pytest.mark.parametrize("limit_kib", [227, 99])
def test_any_strides(limit_kib, kernels):
    kernels.emulated.configure(shared_limit=limit_kib * 1024)
    case = Case(B=2, T=3, Nq=21, H=2, D=64, Nc=49, Ns=16, L=6)
    inputs = strided(make_inputs(case, torch.bfloat16))
    assert not any(x.is_contiguous() for x in inputs)
    check_backend("cuda", inputs, case.window)
    same = run(tuple(x.contiguous() for x in inputs), case.window, "cuda").tensors
    for key, value in run(inputs, case.window, "cuda").tensors.items():
        assert torch.equal(value, same[key]), key


@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("limit_kib", [227, 99])
def test_gradients_may_be_packed(dim, limit_kib, kernels):
    kernels.emulated.configure(shared_limit=limit_kib * 1024)
    case = Case(B=2, T=3, Nq=21, H=2, D=dim, Nc=49, Ns=16, L=6)
    check_packed_gradients("cuda", make_inputs(case, torch.bfloat16), case.window)


def test_misaligned_tensors_are_copied(kernels):
    """Contiguous but between two vectors: the kernels would refuse, or read, another address."""
    case = Case(T=2, Nq=5, H=1, D=64, Nc=4, Ns=2, L=2)
    inputs = make_inputs(case, torch.float16)
    shifted = tuple(torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in inputs)
    assert all(x.is_contiguous() and x.data_ptr() % 16 == 2 for x in shifted)
    grad = torch.randn_like(inputs[0])
    found, expected = (run(x, case.window, "cuda", grad).tensors for x in (shifted, inputs))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def sliced(b, t, n, h, d):
    return torch.randn(b, t, n, h, 2 * d, dtype=torch.bfloat16)[..., :d]


def transposed(b, t, n, h, d):
    return torch.randn(b, h, n, t, d, dtype=torch.bfloat16).permute(0, 3, 2, 1, 4)


def expanded(b, t, n, h, d):
    return torch.randn(d, dtype=torch.bfloat16).expand(b, t, n, h, d)


@pytest.mark.parametrize("layout", [sliced, transposed, expanded])
def test_any_strides_of_the_incoming_gradient(layout, kernels):
    case = Case(T=3, Nq=21, H=2, D=64, Nc=9, Ns=4, L=3)
    inputs = make_inputs(case, torch.bfloat16)
    grad = layout(*inputs[0].shape)
    assert not grad.is_contiguous()
    found = run(inputs, case.window, "cuda", grad).tensors
    plain = run(inputs, case.window, "cuda", grad.contiguous()).tensors
    for key, value in found.items():
        assert torch.equal(value, plain[key]), key


@pytest.mark.parametrize("limit_kib", [227, 99])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_huge_scores(dtype, limit_kib, kernels):
    kernels.emulated.configure(shared_limit=limit_kib * 1024)
    case = Case(T=3, Nq=33, H=1, D=64, Nc=49, Ns=5, L=3)
    q, *others = make_inputs(case, dtype)
    inputs = (q * 1e4, *others)
    for value in run(inputs, case.window, "cuda", torch.ones_like(q)).tensors.values():
        assert torch.isfinite(value).all()
    exact = oracle(inputs, case.window).tensors["out"]
    found = run(inputs, case.window, "cuda").tensors["out"].double()
    torch.testing.assert_close(found, exact, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_any_scale(scale, kernels):
    case = Case(T=2, Nq=20, H=1, D=64, Nc=20, Ns=4, L=2)
    inputs = make_inputs(case, torch.float16)
    grad = torch.randn_like(inputs[0])
    found, same = (
        run(inputs, case.window, backend, grad, scale=scale) for backend in ("cuda", "reference")
    )
    assert not tolerance_errors(found, oracle(inputs, case.window, grad, scale=scale), same)


@pytest.mark.parametrize("limit_kib", [227, 99])
@pytest.mark.parametrize("which", INPUTS)
def test_nan_is_passed_on(which, limit_kib, kernels):
    """A NaN reaches exactly the outputs that depend on it, never to vanish in a maximum."""
    kernels.emulated.configure(shared_limit=limit_kib * 1024)
    case = Case(T=4, Nq=33, H=2, D=64, Nc=20, Ns=5, L=5)
    inputs = dict(zip(INPUTS, make_inputs(case, torch.bfloat16), strict=True))
    where = (0, 2, 1) if which.endswith("long") else (0, 2, 3, 1)
    inputs[which][where][7] = float("nan")
    found = run(tuple(inputs.values()), case.window, "cuda").tensors["out"].isnan()
    expected = oracle(tuple(inputs.values()), case.window).tensors["out"].isnan()
    assert expected.any()
    assert not expected.all()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("case", REACHES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_which_frames_are_read(case, dtype, kernels):
    check_reach("cuda", case, dtype)


@pytest.mark.parametrize(("frames", "window", "causal"), PIECES)
def test_a_clip_in_pieces(frames, window, causal, kernels):
    check_pieces("cuda", torch.float16, frames, window, causal)


@pytest.mark.parametrize("case", REACHES, ids=str)
def test_nan_stays_in_the_window(case, kernels):
    check_nan_stays_in_the_window("cuda", case, torch.bfloat16)


def test_infinite_scores(kernels):
    check_infinite_scores("cuda", torch.bfloat16)


def test_no_clips_and_no_queries(kernels):
    for case in (Case(B=0), Case(Nq=0, H=1, T=2, L=2)):
        inputs = make_inputs(case, torch.bfloat16)
        for key, value in run(
            inputs, case.window, "cuda", torch.ones_like(inputs[0])
        ).tensors.items():
            assert not value.any(), key


def forward_code(kernels, dtype=torch.bfloat16, dim=96, **changes):
    """The code of a forward call, with some fields of the struct changed."""
    case = Case(T=2, Nq=5, H=1, D=dim, Nc=4, Ns=2, L=2)
    inputs = make_inputs(case, dtype)
    out, lse = torch.zeros_like(inputs[0]), torch.zeros(1, 2, 1, 5)
    p = params(inputs, case.reach, 1.0, out=out, lse=lse)
    for field, value in changes.items():
        owner, _, field = field.rpartition("__")
        setattr(getattr(p, owner) if owner else p, field, value)
    return kernels.library.sta_cuda_forward(ctypes.byref(p), None)


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        (0, {}),
        (UNSUPPORTED, {"dim": 72}),
        (UNSUPPORTED, {"dim": 256}),
        (UNSUPPORTED, {"dtype": torch.float32}),
        (UNALIGNED, {"q__stride_n": 97}),
        (TOO_LARGE, {"q__stride_b": 2**40}),
        (TOO_LARGE, {"B": 2**31}),
        (TOO_LARGE, {"L": 2**31}),
    ],
    ids=str,
)  # fmt: skip
def test_refusals(code, changes, kernels):
    assert forward_code(kernels, **changes) == code
    assert kernels.library.sta_cuda_error_string(code).decode().strip()


def test_a_pointer_between_two_vectors_is_refused(kernels):
    data = torch.zeros(100, dtype=torch.bfloat16).data_ptr() + 2
    assert forward_code(kernels, k_cur__data=data) == UNALIGNED


def test_too_little_shared_memory_is_refused(kernels):
    kernels.emulated.configure(shared_limit=4096)
    assert forward_code(kernels) == SHARED_MEMORY


def test_lse_may_be_left_out(kernels):
    inputs = make_inputs(Case(T=2, Nq=20, H=1, Nc=9, Ns=4, L=2), torch.bfloat16)
    out = torch.zeros_like(inputs[0])
    p = params(inputs, Reach(1, 1), 96**-0.5, out=out)
    kernels.check(kernels.library.sta_cuda_forward(ctypes.byref(p), None))
    assert torch.equal(out, run(inputs, 3, "cuda").tensors["out"])


@pytest.mark.parametrize("q_stride", [1, 2])
def test_the_layers_core(q_stride, kernels, monkeypatch):
    """With the pooling kernels: views of one pooled buffer in, slots of one packed gradient out."""
    for name in ("pool_forward", "pool_backward"):
        monkeypatch.setattr(kernels, name, getattr(cuda, name), raising=False)
    monkeypatch.setattr(kernels, "pool_unsupported_reason", lambda *_: None, raising=False)
    layer = ShrinkingTemporalAttention(128, 2, window=3, kv_stride=2, q_stride=q_stride)
    x = torch.randn(1, 3, 21, 128).bfloat16()

    def results(backend, dtype):
        leaf, cast = x.to(dtype).requires_grad_(), layer.to(dtype)
        cast.backend = backend
        y = cast(leaf, (5, 4))[0]
        grads = torch.autograd.grad(y.square().sum(), [leaf, *cast.parameters()])
        names = ["out", "grad_x", *dict(cast.named_parameters())]
        return Result(dict(zip(names, [y.detach(), *grads], strict=True)))

    with PoolKernels().registered():
        found = results("cuda", torch.bfloat16)
    same_dtype = results("reference", torch.bfloat16)
    assert not tolerance_errors(found, results("reference", torch.float64), same_dtype)


def test_guard_pages():
    """In a process of its own: an access past a tensor's end would kill it."""
    command = [sys.executable, "-m", "tests.kernels.cuda_emulated"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode != -signal.SIGSEGV, f"an access past the end after: {done.stdout}"
    assert "reached the end" in done.stdout, done.stderr

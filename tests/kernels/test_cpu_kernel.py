"""The CPU kernel against the float64 oracle: sizes, edges, strides, dtypes, determinism."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stat_kernels import shrinking_temporal_attention
from stat_kernels.backends import Reach, cpu
from stat_kernels.testing import (
    INPUTS,
    Case,
    check_backend,
    check_packed_gradients,
    make_inputs,
    oracle,
    run,
)
from tests.kernels.shared import (
    PIECES,
    REACHES,
    check_infinite_scores,
    check_nan_stays_in_the_window,
    check_pieces,
    check_reach,
)

STAGES = [
    Case(T=6, Nq=785, H=1, L=6, window=7),
    Case(T=6, Nq=197, H=2, L=6, window=7),
    Case(T=6, Nq=50, H=4, L=6, window=7),
]
TAILS = [
    Case(B=2, T=3, Nq=1, H=1, D=64, Nc=1, Ns=1, L=1),
    Case(T=2, Nq=197, H=1, Nc=196, Ns=49, L=2),
    Case(T=2, Nq=785, H=1, D=64, Nc=1, Ns=16, L=2),
    Case(T=64, Nq=5, H=1, D=16, Nc=4, Ns=2, L=64, window=9),
    Case(T=5, Nq=17, H=3, D=128, Nc=33, Ns=7, L=9, window=5),
    Case(T=3, Nq=18, H=1, D=256, Nc=50, Ns=16, L=3),
    Case(T=2, Nq=33, H=2, D=40, Nc=13, Ns=5, L=3),
    Case(T=2, Nq=20, H=1, D=24, Nc=700, Ns=300, L=40),
]
PARTS = [
    Case(Ns=0),
    Case(L=0),
    Case(Ns=0, L=0),
    Case(window=1),
    Case(T=1, window=7, L=1),
    Case(T=1, window=1, L=0),
    Case(L=13),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def _name(value):
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("case", STAGES + PARTS, ids=str)
def test_matches_the_oracle(case, dtype, isa):
    check_backend("cpu", make_inputs(case, dtype), case.window)


@pytest.mark.parametrize("case", TAILS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_name)
def test_tail_tiles(case, dtype, isa):
    check_backend("cpu", make_inputs(case, dtype), case.window)


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_every_window(frames, isa, dtype):
    for window in range(1, 2 * frames + 2, 2):
        case = Case(T=frames, Nq=9, H=2, D=32, Nc=6, Ns=3, L=frames, window=window)
        check_backend("cpu", make_inputs(case, dtype), window)


sizes = st.integers(1, 70)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 3), T=st.integers(1, 9), Nq=sizes, H=st.integers(1, 3), D=st.integers(2, 18),
    Nc=sizes, Ns=st.integers(0, 20), L=st.integers(0, 20), radius=st.integers(0, 10),
)  # fmt: skip
def test_random_sizes(B, T, Nq, H, D, Nc, Ns, L, radius):
    """A wrong index shows as an error of the values' own size, so the bound may be a plain one."""
    case = Case(B, T, Nq, H, 8 * D, Nc, Ns, L, 2 * radius + 1)
    inputs = make_inputs(case)
    grad = torch.randn_like(inputs[0])
    exact = oracle(inputs, case.window, grad).tensors
    for name, value in run(inputs, case.window, "cpu", grad).tensors.items():
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-4, atol=1e-5, msg=name)


def _strided(inputs):
    """The same values behind other strides: interleaved, transposed, sliced, last axis not unit."""
    padded = [torch.stack([x, torch.full_like(x, float("nan"))], dim=0)[0] for x in inputs]
    q, k_cur, v_cur, k_short, v_short, k_long, v_long = padded
    packed = torch.stack([k_cur, v_cur], dim=3)  # (B, T, N, 2, H, D): one projection's output
    return (
        q.permute(0, 3, 2, 1, 4).contiguous().permute(0, 3, 2, 1, 4),
        packed[:, :, :, 0],
        packed[:, :, :, 1],
        torch.cat([k_short, k_short], dim=-1)[..., : k_short.shape[-1]],
        v_short.transpose(-1, -2).contiguous().transpose(-1, -2),
        k_long.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([v_long, v_long], dim=1)[:, ::2],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_name)
def test_any_strides_in(dtype, isa):
    case = Case(B=2, T=3, Nq=21, D=32, Nc=9, Ns=4, L=6)
    inputs = _strided(make_inputs(case, dtype))
    assert not any(x.is_contiguous() for x in inputs)
    check_backend("cpu", inputs, case.window)
    same = run(tuple(x.contiguous() for x in inputs), case.window, "cpu").tensors
    for name, value in run(inputs, case.window, "cpu").tensors.items():
        assert torch.equal(value, same[name]), name
        assert value.is_contiguous()


def _expand(shape, dtype):
    return torch.randn(()).to(dtype).expand(shape)


def _transpose(shape, dtype):
    return torch.randn(shape[::-1]).to(dtype).permute(4, 3, 2, 1, 0)


def _slice(shape, dtype):
    return torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]


@pytest.mark.parametrize("layout", [_expand, _transpose, _slice])
def test_any_strides_of_the_incoming_gradient(layout, isa, dtype):
    case = Case(T=3, Nq=21, D=32, Nc=9, Ns=4, L=3)
    inputs = make_inputs(case, dtype)
    grad = layout(inputs[0].shape, dtype)
    assert not grad.is_contiguous()
    strided = run(inputs, case.window, "cpu", grad).tensors
    plain = run(inputs, case.window, "cpu", grad.contiguous()).tensors
    for name in strided:
        assert torch.equal(strided[name], plain[name]), name


def test_expanded_keys_are_read_in_place(isa, dtype):
    """Clips that share one set of long keys (stride 0) need no copy of them."""
    case = Case(B=3, T=3, Nq=10, D=32, Nc=5, Ns=4, L=3)
    *others, k_long, v_long = make_inputs(case, dtype)
    shared = (*others, k_long[:1].expand(3, -1, -1, -1), v_long[:1].expand(3, -1, -1, -1))
    check_backend("cpu", shared, case.window)


@pytest.mark.parametrize(
    "case", [Case(T=5, Nq=33, D=40, Nc=9, Ns=4, L=3), Case(D=32, Ns=0)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
def test_gradients_may_be_packed(case, dtype, isa):
    check_packed_gradients("cpu", make_inputs(case, dtype), case.window)


@pytest.mark.parametrize("change", [lambda x: x[:, :1], lambda x: x.mT.contiguous().mT])
def test_a_gradient_that_does_not_fit_is_refused(change):
    inputs = make_inputs(Case(D=16))
    out, lse = cpu.forward(*inputs, Reach(1, 1), 0.25)
    grads = [change(torch.empty_like(x)) for x in inputs]
    with pytest.raises(ValueError, match="a gradient to fill must have its input's shape"):
        cpu.backward(out, None, *inputs, out, lse, Reach(1, 1), 0.25, grads=grads)


@pytest.mark.parametrize("magnitude", [1e4, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=_name)
def test_huge_and_tiny_scores(magnitude, dtype, isa):
    case = Case(T=3, Nq=33, D=64, Nc=20, Ns=5, L=3)
    q, *others = make_inputs(case, dtype)
    inputs = (q * magnitude, *others)
    result = run(inputs, case.window, "cpu", torch.ones_like(q)).tensors
    for name, value in result.items():
        assert torch.isfinite(value).all(), name
    exact = oracle(inputs, case.window).tensors["out"]
    # Scores of 1e5 carry a rounding error of 1e-2 in float32, and so do the weights.
    tolerance = 1e-9 if dtype == torch.float64 else 5e-2
    torch.testing.assert_close(result["out"].double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("keys", [1000, 20_000])
@pytest.mark.parametrize("part", ["cur", "short", "long"])
def test_many_keys_round_little(part, keys, isa):
    """Nearly equal weights and values of one sign: sums in which all roundings add up."""
    sizes = {"cur": {"Nc": keys}, "short": {"Ns": keys}, "long": {"L": keys}}[part]
    case = replace(Case(T=2, Nq=16, H=1, D=64, Nc=5, Ns=2, L=2), **sizes)
    q, *others = make_inputs(case, magnitude=0.1)
    inputs = (q, *(x + i % 2 for i, x in enumerate(others)))
    check_backend("cpu", inputs, case.window)


@pytest.mark.parametrize("name", INPUTS)
def test_nan_is_passed_on(name, isa, dtype):
    """A NaN reaches exactly the outputs that depend on it, never to vanish in a maximum."""
    case = Case(T=5, Nq=33, D=32, Nc=20, Ns=5, L=5)
    inputs = dict(zip(INPUTS, make_inputs(case, dtype), strict=True))
    where = (0, 2, 3, 1) if name.endswith("long") is False else (0, 2, 1)
    inputs[name][where][7] = float("nan")
    found = run(tuple(inputs.values()), case.window, "cpu").tensors["out"].isnan()
    # In float64: PyTorch's products of bfloat16 may carry a NaN into a neighbouring row.
    expected = oracle(tuple(inputs.values()), case.window).tensors["out"].isnan()
    assert expected.any()
    assert not expected.all()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("case", REACHES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_name)
def test_which_frames_are_read(case, dtype, isa):
    check_reach("cpu", case, dtype)


@pytest.mark.parametrize(("frames", "window", "causal"), PIECES)
def test_a_clip_in_pieces(frames, window, causal, isa, dtype):
    check_pieces("cpu", dtype, frames, window, causal)


@pytest.mark.parametrize("case", REACHES, ids=str)
def test_nan_stays_in_the_window(case, isa, dtype):
    check_nan_stays_in_the_window("cpu", case, dtype)


def test_infinite_scores(isa, dtype):
    check_infinite_scores("cpu", dtype)


def test_same_bits_on_any_number_of_threads(threads, isa, dtype):
    for case in (Case(B=2, T=9, Nq=50, H=3, L=9, window=7), Case(T=5, Nq=785, H=1, L=5)):
        inputs = make_inputs(case, dtype)
        grad = torch.randn_like(inputs[0])
        many = run(inputs, case.window, "cpu", grad).tensors
        torch.set_num_threads(1)
        one = run(inputs, case.window, "cpu", grad).tensors
        torch.set_num_threads(threads)
        for name in one:
            assert torch.equal(one[name], many[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=_name)
def test_same_bits_twice(dtype, isa):
    case = Case(B=2, T=8, Nq=197, H=2, L=8, window=5)
    inputs = make_inputs(case, dtype)
    grad = torch.randn_like(inputs[0])
    first = run(inputs, case.window, "cpu", grad).tensors
    for _ in range(5):
        again = run(inputs, case.window, "cpu", grad).tensors
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float64], ids=_name)
def test_gradcheck(dtype, isa):
    case = Case(T=3, Nq=2, H=1, D=8, Nc=3, Ns=2, L=2)
    inputs = [x.requires_grad_() for x in make_inputs(case, dtype)]

    def both(*tensors):
        return shrinking_temporal_attention(
            *tensors, window=case.window, backend="cpu", return_lse=True
        )

    assert torch.autograd.gradcheck(both, inputs)


@pytest.mark.parametrize("gradient", [torch.ones_like, lambda q: q.new_ones(()).expand(q.shape)])
def test_no_clips_and_no_queries(gradient, isa, dtype):
    for case in (Case(B=0), Case(Nq=0)):
        inputs = make_inputs(case, dtype)
        found = run(inputs, case.window, "cpu", gradient(inputs[0])).tensors
        for name, value in found.items():
            assert not value.any(), name


GUARDED = """
import os
import torch
from stat_kernels.backends import Reach
from stat_kernels import native
from stat_kernels.testing import Case, check_backend, guarded, make_inputs
for isa in native.instruction_sets():
    os.environ["STAT_CPU_ISA"] = isa
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        if native.instruction_set_of(dtype) != isa:  # tested with the other
            continue
        for case in (Case(T=2, Nq=50, H=1, L=2), Case(T=2, Nq=19, D=40, Nc=5, Ns=3, L=1)):
            check_backend("cpu", tuple(guarded(x) for x in make_inputs(case, dtype)), case.window)
print("reached the end")
"""


def test_nothing_is_read_past_a_tensors_end():
    """Every input ends at a page that must not be touched; a fault would kill the process."""
    done = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reached the end" in done.stdout


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("STAT_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match=r"STAT_CPU_ISA must be one of .*portable.*, got 'sse9'"):
        run(make_inputs(Case()), 3, "cpu")

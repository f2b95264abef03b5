"""The operator inside PyTorch: opcheck, compile, export, autocast, checkpointing, FLOP counts."""

import io
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from stat_kernels import ops, shrinking_temporal_attention
from stat_kernels.testing import Case, make_inputs
from tests.kernels.shared import REACHES

CASES = [
    Case(B=2, T=3, Nq=5, H=2, D=16, Nc=4, Ns=2, L=3),
    Case(B=2, T=3, Nq=5, H=2, D=16, Nc=4, Ns=0, L=3),
    Case(B=2, T=3, Nq=5, H=2, D=16, Nc=4, Ns=2, L=0),
    Case(T=2, Nq=5, H=2, D=16, Nc=4, Ns=2, L=5, window=(2, 0), S=5, frame_offset=2,
         causal_long=True),
]  # fmt: skip


def leaves(case, dtype=torch.float32):
    return [None if x is None else x.requires_grad_() for x in make_inputs(case, dtype)]


def gradients(function, inputs):
    present = [x for x in inputs if x is not None]
    return torch.autograd.grad(function(*inputs).sin().sum(), present)


def attend(*inputs):
    return shrinking_temporal_attention(*inputs, window=3, backend="cpu")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(case, dtype):
    inputs = leaves(case, dtype)
    args = (*inputs, *case.reach, 0.25, "cpu")
    torch.library.opcheck(ops.sta_forward, args)
    out, lse = (x.detach() for x in ops.sta_forward(*args))
    detached = tuple(None if x is None else x.detach() for x in inputs)
    for grad_lse in (None, torch.randn_like(lse)):
        args = (torch.randn_like(out), grad_lse, *detached, out, lse, *case.reach, 0.25, "cpu")
        torch.library.opcheck(ops.sta_backward, args)


def test_compile_takes_the_options():
    torch._dynamo.reset()
    case = CASES[3]

    def attend(*inputs):
        return shrinking_temporal_attention(*inputs, window=case.window, **case.options)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    inputs = leaves(case)
    assert torch.equal(compiled(*inputs), attend(*inputs))
    assert (
        torch.export.export(Attention(attend), tuple(inputs))
        .module()(*inputs)
        .equal(attend(*inputs))
    )


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_compile_fullgraph(case, backend):
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    inputs = leaves(case)
    torch.testing.assert_close(compiled(*inputs), attend(*inputs))
    for got, expected in zip(gradients(compiled, inputs), gradients(attend, inputs), strict=True):
        torch.testing.assert_close(got, expected)


def test_compile_chooses_by_itself():
    """The automatic choice is made while tracing and does not break the graph."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def chosen(*inputs):
        return shrinking_temporal_attention(*inputs, window=3)

    inputs = make_inputs(CASES[0])
    assert torch.equal(chosen(*inputs), attend(*inputs))


def test_compile_takes_other_sizes_without_recompiling():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    for frames, batch in ((10, 6), (11, 7), (13, 9)):  # no two sizes alike, L = T excepted
        case = Case(B=batch, T=frames, Nq=5, H=2, D=16, Nc=4, Ns=3, L=frames)
        inputs = make_inputs(case)
        torch.testing.assert_close(compiled(*inputs), attend(*inputs))
    assert counter.frame_count == 1


class Attention(torch.nn.Module):
    def __init__(self, function=attend):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def test_export_and_load():
    inputs = make_inputs(CASES[0])
    program = torch.export.export(Attention(), inputs)
    assert "stat_kernels.sta_forward" in program.graph_module.code
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    assert torch.equal(torch.export.load(buffer).module()(*inputs), attend(*inputs))


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_autocast(name):
    inputs = leaves(CASES[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = shrinking_temporal_attention(*inputs, window=3, backend=name)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in inputs)
    lower = [x.detach().bfloat16() for x in inputs]
    assert torch.equal(out, shrinking_temporal_attention(*lower, window=3, backend=name))


def test_autocast_accepts_what_layer_norm_leaves_in_float32():
    q, *others = make_inputs(CASES[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attend(q.bfloat16(), *others).dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    inputs = leaves(CASES[0])
    plain = gradients(attend, inputs)
    again = gradients_backward(lambda *x: checkpoint(attend, *x, use_reentrant=reentrant), inputs)
    for got, expected in zip(again, plain, strict=True):
        assert torch.equal(got, expected)


def gradients_backward(function, inputs):
    function(*inputs).sin().sum().backward()
    return [x.grad for x in inputs if x is not None]


@pytest.mark.parametrize("kept", [(), ("cpu",)])
def test_results_are_kept_where_they_are_read(kept, monkeypatch):
    """The CPU's backward does not read them, so out may go before it starts."""
    if kept:
        monkeypatch.setattr(ops.backends, "RECOMPUTING", ())
    inputs = leaves(CASES[0])
    out, lse = ops.sta_forward(*inputs, *CASES[0].reach, 0.25, "cpu")
    saved = {x.data_ptr() for x in out.grad_fn.saved_tensors if x is not None}
    assert {x.data_ptr() for x in inputs if x is not None} <= saved
    assert all((x.data_ptr() in saved) == bool(kept) for x in (out, lse))


def test_only_lse_is_used():
    inputs = leaves(CASES[0])

    def lse(backend):
        _, lse = shrinking_temporal_attention(*inputs, window=3, backend=backend, return_lse=True)
        return torch.autograd.grad(lse.sum(), inputs, allow_unused=True)

    for got, expected in zip(lse("cpu"), lse("reference"), strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if expected is None else expected)


def test_no_second_derivative_is_said():
    inputs = leaves(CASES[0])
    (grad,) = torch.autograd.grad(attend(*inputs).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        grad.sum().backward()


def loss(backend, q, *others):
    return shrinking_temporal_attention(q, *others, window=3, backend=backend).sin().sum()


TRANSFORMS = {
    "grad": torch.func.grad,
    "jacrev": torch.func.jacrev,
    "vmap of grad": lambda f: (
        lambda q, *others: torch.func.vmap(torch.func.grad(f), (0,) + (None,) * 6)(
            torch.stack([q, 2 * q]), *others
        )
    ),
    "compiled grad": lambda f: torch.compile(
        torch.func.grad(f), fullgraph=True, backend="aot_eager"
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_torch_func(transform):
    torch._dynamo.reset()
    inputs = make_inputs(CASES[0])
    found, expected = (
        TRANSFORMS[transform](partial(loss, backend))(*inputs) for backend in ("cpu", "reference")
    )
    torch.testing.assert_close(found, expected)


def second_derivative(f, q):
    return torch.func.grad(lambda q: torch.func.grad(f)(q).sum())(q)


def dual(f, q):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(q, q))


FORWARD_MODE = {
    "jvp": lambda f, q: torch.func.jvp(f, (q,), (q,)),
    "jacfwd": lambda f, q: torch.func.jacfwd(f)(q),
    "dual level": dual,
    "dual level without grad mode": torch.no_grad()(dual),
    "hessian": lambda f, q: torch.func.hessian(f)(q),
    "jvp of grad": lambda f, q: torch.func.jvp(torch.func.grad(f), (q,), (q,)),
    "compiled jvp": torch.compile(
        lambda f, q: torch.func.jvp(f, (q,), (q,)), fullgraph=True, backend="aot_eager"
    ),
}


@pytest.mark.parametrize("transform", FORWARD_MODE)
def test_no_forward_mode_is_said(transform):
    """Never a derivative of zero."""
    torch._dynamo.reset()
    q, *others = make_inputs(CASES[0])
    with pytest.raises(
        RuntimeError, match=r"no forward-mode derivative .* use backend=\\*'reference"
    ):
        FORWARD_MODE[transform](lambda q: loss("cpu", q, *others), q)


def test_no_second_derivative_under_torch_func():
    q, *others = make_inputs(CASES[0])
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        second_derivative(lambda q: loss("cpu", q, *others), q)


def test_a_dual_level_without_tangents_changes_nothing():
    inputs = leaves(CASES[0])
    plain = gradients(attend, inputs)
    with forward_ad.dual_level():
        again = gradients(attend, inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


FLOP_CASES = [*CASES, Case(T=3, window=9), Case(T=4, window=1), *REACHES]


@pytest.mark.parametrize("case", FLOP_CASES, ids=str)
def test_flops_are_those_of_the_pairs(case):
    """The formula against a count of the pairs, forward and backward, eager and on meta."""
    keys = 0
    left, right, offset, causal = case.reach
    for i in range(offset, offset + case.T):
        near = [j for j in range(case.S or case.T) if j != i and i - left <= j <= i + right]
        keys += case.Nc + len(near) * case.Ns + (i + 1 if causal else case.L)
    product = 2 * case.B * case.H * case.Nq * keys * case.D
    for device in ("cpu", "meta"):
        inputs = [
            None if x is None else x.to(device).detach().requires_grad_() for x in leaves(case)
        ]
        with FlopCounterMode(display=False) as counter:
            out = shrinking_temporal_attention(
                *inputs, window=case.window, backend="cpu", **case.options
            )
        assert counter.get_total_flops() == 2 * product
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 5 * product

"""bias_gelu and bias_residual on the CPU, and their operators inside PyTorch."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from stat_kernels import (
    bias_gelu,
    bias_residual,
    dispatch,
    explain_mlp,
    linear_gelu,
    linear_residual,
    mlp_ops,
)
from stat_kernels.__main__ import describe
from tests.kernels.mlp_cases import CASES, MlpCase, make_mlp_inputs, mlp_error_report, run_mlp

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(case, dtype, isa):
    assert mlp_error_report(case, dtype, "cpu") == []


def test_gelu_everywhere(isa):
    """Value and slope of every magnitude, and what lies beyond the numbers."""
    z = torch.cat([torch.linspace(-14, 14, 100001), torch.logspace(-30, 30, 601)])
    z = torch.cat([z, -z]).requires_grad_()
    double = z.detach().double().requires_grad_()
    exact, found = F.gelu(double), bias_gelu(z[:, None], torch.zeros(1), backend="cpu")[:, 0]
    slopes = [torch.autograd.grad(y.sum(), x)[0] for y, x in ((exact, double), (found, z))]
    small = z.abs() < 1
    assert ((found - exact).abs() <= 2e-7 * (1 + double.abs())).all()
    assert ((found - exact).abs() <= 1e-6 * exact.abs())[small].all(), "accurate, small ones too"
    assert (slopes[1] - slopes[0]).abs().max() <= 4e-7
    odd = torch.tensor([[float("inf")], [float("-inf")], [float("nan")]])
    high, low, nan = bias_gelu(odd, torch.zeros(1), backend="cpu").flatten().tolist()
    assert high == float("inf")
    assert abs(low) < 1e-14
    assert nan != nan


@pytest.mark.parametrize("case", [MlpCase((9, 31, 24)), MlpCase((9, 31, 24), "same", True)])
def test_same_bits_on_any_number_of_threads(case, threads, isa):
    many = run_mlp(*make_mlp_inputs(case, torch.float32), "cpu").tensors
    torch.set_num_threads(1)
    one = run_mlp(*make_mlp_inputs(case, torch.float32), "cpu").tensors
    torch.set_num_threads(threads)
    assert all(torch.equal(one[key], many[key]) for key in one)


@pytest.mark.parametrize("case", CASES[3:7], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(case, dtype):
    (x, bias, skip, scale), grad_out = make_mlp_inputs(case, dtype)
    leaves = [x.requires_grad_(), bias.requires_grad_()]
    with torch.no_grad():
        plain = [x.clone(), bias.clone()]
    if skip is None:
        torch.library.opcheck(mlp_ops.bias_gelu_forward, (*leaves, "cpu"))
        torch.library.opcheck(mlp_ops.bias_gelu_backward, (grad_out, *plain, "cpu"))
    else:
        skip.requires_grad_()
        torch.library.opcheck(mlp_ops.bias_residual_forward, (skip, *leaves, scale, "cpu"))
        args = (grad_out, scale, dtype, "cpu")
        torch.library.opcheck(mlp_ops.bias_residual_backward, args)


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (2, 3, 0)])
def test_nothing(shape):
    for skip in (None, "same"):
        found = run_mlp(*make_mlp_inputs(MlpCase(shape, skip), torch.float32), "cpu").tensors
        assert not any(value.any() for value in found.values())


def test_any_strides():
    x, skip = torch.randn(4, 6, 32)[..., ::2], torch.randn(16, 6, 4).permute(2, 1, 0)
    bias = torch.randn(32)[::2]
    for gradient in (torch.ones(()).expand(4, 6, 16), torch.randn(4, 16, 6).transpose(1, 2)):
        found = run_mlp([x, bias, skip, None], gradient, "cpu").tensors
        dense = [t.contiguous() for t in (x, bias, skip)]
        wanted = run_mlp([*dense, None], gradient.contiguous(), "cpu").tensors
        assert all(torch.equal(found[key], wanted[key]) for key in found)
        gelu = run_mlp([x, bias, None, None], gradient, "cpu").tensors["grad_x"]
        dense = run_mlp([*dense[:2], None, None], gradient.contiguous(), "cpu").tensors["grad_x"]
        assert gelu.is_contiguous()
        assert torch.equal(gelu, dense)


def test_torch_func():
    (x, bias, skip, _), _ = make_mlp_inputs(CASES[4], torch.float64)
    for function in (
        lambda x, bias, name: bias_gelu(x, bias, backend=name),
        lambda x, bias, name: bias_residual(skip, x, bias, backend=name),
    ):
        found, wanted = (
            torch.func.grad(lambda x, b, n=n: function(x, b, n).sin().sum(), (0, 1))(x, bias)  # noqa: B023
            for n in ("cpu", "reference")
        )
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)
        with pytest.raises(
            RuntimeError, match=r"bias_\w+ has no forward-mode derivative .*backend='reference'"
        ):
            torch.func.jvp(lambda x: function(x, bias, "cpu"), (x,), (x,))  # noqa: B023
        slope = torch.func.grad(lambda b: function(x, b, "cpu").sin().sum())  # noqa: B023
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.func.grad(lambda b: slope(b).sum())(bias)  # noqa: B023


def test_autocast_as_a_linear_layer_and_gelu():
    """16-bit products and results, float32 parameters and residual."""
    layer, x, skip = nn.Linear(24, 40), torch.randn(3, 7, 24), torch.randn(3, 7, 40)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = linear_gelu(layer, x), F.gelu(layer(x))
        assert found.dtype == wanted.dtype == torch.bfloat16
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
        found, wanted = linear_residual(layer, x, skip), skip + layer(x)
        assert found.dtype == wanted.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
        assert bias_gelu(x, torch.zeros(24)).dtype == torch.bfloat16
    grads = torch.autograd.grad(found.sum(), list(layer.parameters()))
    assert [g.dtype for g in grads] == [torch.float32] * 2


class Parts(nn.Module):
    """Both operations, by the best backend or by one that is insisted on."""

    def __init__(self, backend=None):
        super().__init__()
        self.layer, self.backend = nn.Linear(8, 8), backend

    def forward(self, x):
        hidden = linear_gelu(self.layer, x, backend=self.backend)
        return linear_residual(self.layer, hidden, x, backend=self.backend)


FUSED = ["bias_gelu_forward", "bias_residual_forward"]
OPERATOR = re.compile(r"stat_kernels(?:\.|::)(\w+)")


def compiled_operators(module, x):
    torch._dynamo.reset()
    codes = []

    def backend(graph, _):
        codes.append(graph.code)
        return graph

    torch.compile(module, backend=backend, fullgraph=True)(x)
    return OPERATOR.findall("".join(codes))


def exported_operators(module, x, strict=False):
    return OPERATOR.findall(torch.export.export(module, (x,), strict=strict).graph_module.code)


def test_the_compiler_sees_pytorch_operations():
    """It fuses them itself; a backend that is insisted on stays one operator."""
    x, module = torch.randn(3, 8), Parts()
    assert compiled_operators(module, x) == []
    assert compiled_operators(Parts("cpu"), x) == FUSED
    compiled = torch.compile(module, fullgraph=True)
    hidden = F.gelu(module.layer(x))
    torch.testing.assert_close(compiled(x), x + module.layer(hidden))


def test_a_saved_graph_has_the_operators():
    """The native library runs them without Python, on a CPU."""
    x, module = torch.randn(3, 8), Parts()
    for strict in (False, True):
        assert exported_operators(module, x, strict) == FUSED
    traced = torch.jit.trace(module, x)
    assert OPERATOR.findall(str(traced.inlined_graph)) == FUSED
    torch.testing.assert_close(traced(x), module(x))


def test_a_saved_graph_for_a_gpu_has_none(monkeypatch):
    """The kernels there need Python. A backend that is insisted on stays."""

    def mlp_unsupported_reason(name, *call):
        return None if name in ("triton", "reference") else "not on a GPU"

    monkeypatch.setattr(dispatch, "mlp_unsupported_reason", mlp_unsupported_reason)
    with FakeTensorMode():
        x, bias = torch.empty(3, 8, device="cuda"), torch.empty(8, device="cuda")
        assert dispatch.choose_mlp(None, str(x.device), x.dtype, x.dtype) == "triton"

    class Call(nn.Module):
        def __init__(self, backend):
            super().__init__()
            self.backend = backend

        def forward(self, x, bias):
            x = bias_gelu(x, bias, backend=self.backend)
            return bias_residual(x, x, bias, backend=self.backend)

    for backend, operators in ((None, []), ("triton", FUSED)):
        code = torch.export.export(Call(backend), (x, bias)).graph_module.code
        assert OPERATOR.findall(code) == operators


def test_a_layer_that_is_more_than_its_weight_is_called():
    calls, layer, x = [], nn.Linear(8, 8), torch.randn(3, 8)
    layer.register_forward_hook(lambda module, args, out: calls.append(out))
    linear_gelu(layer, x)
    linear_residual(layer, x, x)
    assert len(calls) == 2

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    doubled = Doubled(8, 8)
    torch.testing.assert_close(linear_residual(doubled, x, x), x + doubled(x))
    torch.testing.assert_close(
        linear_gelu(nn.Linear(8, 8, bias=False).requires_grad_(False), x).shape, x.shape
    )


GOOD = {"skip": torch.zeros(2, 3, 8), "x": torch.zeros(2, 3, 8), "bias": torch.zeros(8)}
BAD = {
    "x must be a torch.Tensor, got int": {"x": 3},
    "x must be one of .*, got torch.int64": {"x": torch.zeros(2, 3, 8, dtype=torch.long)},
    r"bias must be \(8,\) as x's last axis, got \(7,\)": {"bias": torch.zeros(7)},
    "bias must be on x's device cpu, got meta": {"bias": torch.zeros(8, device="meta")},
    r"skip must have x's shape \(2, 3, 8\), got \(2, 8\)": {"skip": torch.zeros(2, 8)},
    r"scale must be \(2,\), one a clip, got \(3,\)": {"scale": torch.zeros(3)},
    "scale must not require a gradient": {"scale": torch.zeros(2, requires_grad=True)},
    "backend must be one of": {"backend": "gpu"},
    "backend='cpu' cannot take this call: it adds torch.float32 to a residual": {
        "skip": torch.zeros(2, 3, 8, dtype=torch.bfloat16), "backend": "cpu",
    },
}  # fmt: skip


@pytest.mark.parametrize("sentence", BAD)
def test_bad_arguments(sentence):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=sentence):
        bias_residual(**(GOOD | BAD[sentence]))


def test_explain_names_each_backend(monkeypatch):
    monkeypatch.delenv("STAT_BACKEND", raising=False)
    x = torch.zeros(2, 8)
    lines = explain_mlp(x).splitlines()
    assert lines[:2] == [
        "cpu        usable, chosen",
        "cuda       not usable: it has no kernels for the parts of an MLP",
    ]
    assert lines[-1] == "reference  usable, but cpu comes first"
    assert "cpu        not usable: it adds torch.float32 to" in explain_mlp(x, x.bfloat16())
    assert "reference  usable, chosen" in explain_mlp(x, x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert explain_mlp(x, x).splitlines() == lines
    monkeypatch.setenv("STAT_BACKEND", "reference")
    assert "reference  usable, chosen (STAT_BACKEND)" in explain_mlp(x)
    monkeypatch.setenv("STAT_BACKEND", "cuda")  # where it cannot be followed it is not insisted on
    assert explain_mlp(x).splitlines() == lines


def test_the_command_names_the_backend():
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        name = str(dtype).removeprefix("torch.")
        title = f"mlp: backends for bias with GELU or residual, {name} on {device}:"
        _, _, rest = describe().partition(title)
        report = dispatch.mlp_report(device, dtype, dtype).splitlines()
        assert [line.strip() for line in rest.splitlines()[1:5]] == report


def test_a_residual_that_no_kernel_adds_to():
    (x, bias), skip = make_mlp_inputs(CASES[0], torch.float32)[0][:2], torch.ones(3, 5, 96)
    found = bias_residual(skip.bfloat16(), x, bias)
    assert torch.equal(found, skip + (x + bias))


def test_nothing_waits_for_the_device():
    """What a CUDA graph's capture forbids: sizes that depend on values, and reads of values."""
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            inputs, grad_out = make_mlp_inputs(case, dtype)
            real = run_mlp(inputs, grad_out, None).tensors
            with FakeTensorMode() as mode:  # has no values to read
                fakes = [t if t is None else mode.from_tensor(t) for t in (*inputs, grad_out)]
                fake = run_mlp(fakes[:-1], fakes[-1], None).tensors
            for name, value in real.items():
                found = fake[name]
                assert (found.shape, found.stride(), found.dtype) == (
                    value.shape, value.stride(), value.dtype,
                ), name  # fmt: skip

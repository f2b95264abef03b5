"""Linear layers as convolutions, where PyTorch's float32 products are slow."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from stat_kernels import ShrinkingTemporalAttention, linear_gelu, products


class Recorder(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def convolutions(call):
    with Recorder() as recorder:
        call()
    return recorder.names.count("convolution")


@pytest.fixture
def slow_mkl(monkeypatch):
    torch.use_deterministic_algorithms(False)  # other tests run with them
    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["dense", "expanded", "transposed"])
def test_equals_the_linear_function(bias, layout, slow_mkl):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 24, dtype=torch.float32)
    if layout == "transposed":
        x = x.transpose(0, 2)
    if layout == "expanded":
        x = x[:1].expand(4, -1, -1, -1)
    x, weight = x.detach().requires_grad_(), torch.randn(7, 24, requires_grad=True)
    offset = torch.randn(7, requires_grad=True) if bias else None
    leaves = [leaf for leaf in (x, weight, offset) if leaf is not None]
    doubles = [leaf.double() for leaf in leaves]
    y, exact = products.linear(x, weight, offset), F.linear(*doubles)
    assert y.shape == exact.shape
    assert y.is_contiguous()
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, leaves, grad)
    wanted = torch.autograd.grad(exact, leaves, grad.double())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert convolutions(lambda: products.linear(x, weight, offset)) == 1


def test_the_bias_gradient_is_a_good_sum(slow_mkl):
    """oneDNN's own is off by 2e-6 here."""
    bias, grad = torch.zeros(16, requires_grad=True), torch.randn(25000, 16)
    products.linear(torch.randn(25000, 8), torch.randn(16, 8), bias).backward(grad)
    exact = grad.double().sum(0)
    assert (bias.grad - exact).square().mean() < (5e-7) ** 2 * exact.square().mean()


def test_left_to_pytorch(slow_mkl):
    """Where a convolution would not be faster, would differ, or somebody else must see the call."""
    x, layer = torch.randn(4, 24), nn.Linear(24, 8)

    def count(x=x, weight=layer.weight):
        return convolutions(lambda: products.linear(x, weight))

    assert count() == 1
    assert count(x.bfloat16(), layer.weight.bfloat16()) == 0
    assert count(x[:0]) == 0
    assert count(x.to("meta"), layer.weight.to("meta")) == 0
    with torch.autocast("cpu"):
        assert count() == 0
    torch.use_deterministic_algorithms(True)
    try:
        assert count() == 0
    finally:
        torch.use_deterministic_algorithms(False)
    for precision in ("medium", "high"):
        torch.set_float32_matmul_precision(precision)
        try:
            assert count() == 0
        finally:
            torch.set_float32_matmul_precision("highest")
    graphs = []
    compiled = torch.compile(
        products.linear, backend=lambda graph, _: graphs.append(graph) or graph
    )
    compiled(x, layer.weight)
    assert "linear" in graphs[0].code
    assert "conv" not in graphs[0].code
    layer.register_forward_hook(lambda *_: None)
    assert convolutions(lambda: products.apply_linear(layer, x)) == 0


def test_not_on_other_processors(monkeypatch):
    monkeypatch.setattr(products, "mkl_is_slow", lambda: False)
    x, weight = torch.randn(4, 24), torch.randn(8, 24)
    assert convolutions(lambda: products.linear(x, weight)) == 0


@pytest.mark.parametrize("backend", [None, "reference"])
def test_the_layer_and_the_mlp_use_it(backend, slow_mkl):
    layer = ShrinkingTemporalAttention(32, 2, window=3, kv_stride=2, backend=backend)
    x, fc = torch.randn(1, 2, 17, 32), nn.Linear(32, 64)
    expected = 2 if backend is None else 0  # the reference's poolings are convolutions, too
    poolings = 0 if backend is None else convolutions(lambda: layer(x, (4, 4)))
    assert convolutions(lambda: layer(x, (4, 4))) == expected + poolings
    assert convolutions(lambda: linear_gelu(fc, x, backend=backend)) == expected // 2

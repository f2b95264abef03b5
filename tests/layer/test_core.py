"""The layer's core: one operator from the packed projection to the attention's output."""

import pytest
import torch
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from stat_kernels import ShrinkingTemporalAttention, core_ops
from stat_kernels.backends import cpu

GRID = (5, 7)
LAYERS = {
    "class": {},
    "pooled queries": {"q_stride": 2, "kv_stride": 4},
    "mean": {"long": "mean", "q_stride": 2},
    "none": {"long": "none"},
    "no class tokens": {"long": "mean", "class_token": False, "q_stride": 3},
    "no short": {"short": False},
    "over time": {"pool_kernel": (3, 3, 3), "q_stride": 2},
    "short as fine as current": {"short_stride": 1},
    "one frame": {"frames": 1},
}


def make(frames=3, class_token=True, dtype=torch.float64, **options):
    torch.manual_seed(0)
    options = {"window": 3, "kv_stride": 2} | options
    layer = ShrinkingTemporalAttention(32, 2, **options).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, frames, GRID[0] * GRID[1] + class_token, 32, dtype=dtype)
    return layer, x.requires_grad_()


def gradients(layer, x, **settings):
    for name, value in settings.items():
        setattr(layer, name, value)
    y = layer(x, GRID)[0]
    return [y, *torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()])]


class Operators(TorchDispatchMode):
    """The names of the operators that are called while it is entered, views apart."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and "empty" not in func.__name__:
            self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_gradients_are_those_of_the_composite(options, isa):
    layer, x = make(**options)
    fused = gradients(layer, x, backend="cpu")
    for a, b in zip(fused, gradients(layer, x, fused=False, backend="reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("q_stride", [1, 2])
def test_nothing_but_projections_and_one_operator(q_stride):
    """No copy, no joining of parts, in either direction."""
    layer, x = make(q_stride=q_stride, dtype=torch.float32)
    with Operators() as forward:
        y = layer(x, GRID)[0]
    assert forward.names == ["addmm", "stat_kernels::core_forward", "addmm"]
    grad = torch.ones_like(y)
    with Operators() as backward:
        torch.autograd.grad(y, [x, *layer.parameters()], grad)
    others = [n for n in backward.names if n not in ("mm", "sum", "t")]
    assert others == ["stat_kernels::core_backward"]


def test_autocast_saves_sixteen_bits():
    """Saved: the projection and the pooled buffer in bfloat16; statistics in float32."""
    layer, x = make(dtype=torch.float32)
    qkv = torch.randn(2, 3, 36, 3, 2, 16, dtype=torch.bfloat16, requires_grad=True)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        out = layer._attend_fused(qkv, GRID, True)
    assert out.dtype == torch.bfloat16
    parameters = {p.data_ptr() for p in layer.parameters()}
    large = {t.data_ptr(): t for t in saved if t.numel() and t.data_ptr() not in parameters}
    rows, normed = 1 + 12 + 4, 1 + 12
    sixteen = 2 * (3 * 36 + 2 * rows)  # bytes a clip, frame, head and channel
    statistics = 4 * 2 * 2 * normed  # mean and 1 / deviation: bytes a clip, frame and head
    expected = 2 * 3 * 2 * (16 * sixteen + statistics)
    assert sum(t.numel() * t.element_size() for t in large.values()) == expected
    found = gradients_under_autocast(layer, x)
    assert all(g.dtype == torch.float32 for g in found)


def gradients_under_autocast(layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, GRID)[0]
    return torch.autograd.grad(y.float().sum(), [x, *layer.parameters()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_the_composites(dtype):
    """Rounded once where the composite rounds after each operation."""
    layer, x = make(kv_stride=2, q_stride=2)
    exact = gradients(layer, x, fused=False, backend="reference")
    layer, x = layer.to(dtype), x.detach().to(dtype).requires_grad_()
    fused = gradients(layer, x, fused=True, backend="cpu")
    composite = gradients(layer, x, fused=False, backend="reference")
    for truth, a, b in zip(exact, fused, composite, strict=True):
        mine, theirs = ((y.double() - truth).norm() for y in (a, b))
        assert mine <= 2 * theirs + torch.finfo(dtype).eps * truth.norm()


def operands(q_stride):
    layer, x = make(q_stride=q_stride, dtype=torch.float32)
    qkv = layer.qkv(x).detach().unflatten(-1, (3, 2, 16)).requires_grad_()
    q = [None] * 3
    if q_stride > 1:
        q = layer.pool_q.parameters_of_pooling()
    k, v = layer.pool_k.parameters_of_pooling(), layer.pool_v.parameters_of_pooling()
    weights = (q[0], q[1], k[0], k[1], v[0], v[1])
    options = (GRID, q_stride, 2, 2, True, "class", 1e-6, 1, 1, False, 0.25, "cpu")
    return qkv, weights, (q[2], k[2], v[2]), options


@pytest.mark.parametrize("q_stride", [1, 2])
def test_opcheck(q_stride):
    qkv, weights, biases, options = operands(q_stride)
    torch.library.opcheck(core_ops.core_forward, (qkv, *weights, *biases, *options))
    out, *others = core_ops.core_forward(qkv, *weights, *biases, *options)
    detached = [None if t is None else t.detach() for t in (qkv, *weights, out, *others)]
    torch.library.opcheck(core_ops.core_backward, (torch.randn_like(out), *detached, *options))


def test_any_strides_of_the_projection_and_of_the_gradient():
    qkv, weights, biases, options = operands(2)

    def gradient(qkv, grad_of):
        out = core_ops.core_forward(qkv, *weights, *biases, *options)[0]
        return torch.autograd.grad(out, qkv, grad_of(out))[0]

    plain = gradient(qkv, torch.sin)
    strided = torch.stack([qkv.detach()] * 2, -1)[..., 0].requires_grad_()
    assert torch.equal(gradient(strided, lambda y: torch.stack([y.sin()] * 2, -1)[..., 1]), plain)


def flops(function):
    """(of convolutions, of all others), and the function's value."""
    with FlopCounterMode(display=False) as counter:
        value = function()
    parts = counter.get_flop_counts()["Global"]
    convolutions = sum(n for op, n in parts.items() if "convolution" in str(op))
    return convolutions, counter.get_total_flops() - convolutions, value


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("options", [{}, {"q_stride": 2}, {"pool_kernel": (3, 3, 3)}])
def test_flops_are_those_of_the_parts(options, device):
    """Three convolutions backward; PyTorch's own formula does not see that one is depthwise."""
    layer, x = make(backend="cpu", **options)
    layer, x = layer.to(device), x.detach().to(device).requires_grad_()

    def both_passes(fused):
        layer.fused = fused
        convolutions, others, y = flops(lambda: layer(x, GRID)[0])
        return convolutions, others, flops(lambda: y.sum().backward())[1]

    _, fused, fused_backward = both_passes(True)
    convolutions, others, others_backward = both_passes(False)
    assert fused == convolutions + others
    assert fused_backward == 3 * convolutions + others_backward


def test_the_composite_serves_where_no_kernel_pools(monkeypatch):
    layer, x = make(backend="cpu")
    fused = gradients(layer, x)
    monkeypatch.setattr(cpu, "pool_unsupported_reason", lambda *call: "it does not pool today")
    with Operators() as forward:
        layer(x, GRID)
    assert "stat_kernels::sta_forward" in forward.names
    for a, b in zip(fused, gradients(layer, x), strict=True):
        torch.testing.assert_close(a, b)
    layer.backend = "reference"
    with Operators() as forward:
        layer(x, GRID)
    assert not [n for n in forward.names if n.startswith("stat_kernels")]


def test_same_bits_on_any_number_of_threads(threads):
    layer, x = make(frames=9, dtype=torch.float32, q_stride=2)
    torch.set_num_threads(1)
    one = gradients(layer, x)
    torch.set_num_threads(threads)
    # the projections are PyTorch's, and the same for so few tokens
    assert all(map(torch.equal, one, gradients(layer, x)))


def test_no_second_derivative_is_said():
    layer, x = make(backend="cpu")
    (grad,) = torch.autograd.grad(layer(x, GRID)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        grad.sum().backward()
    layer.backend = "reference"
    (grad,) = torch.autograd.grad(layer(x, GRID)[0].square().sum(), x, create_graph=True)
    grad.sum().backward()


def test_gradients_by_torch_func():
    layer, x = make(q_stride=2)
    parameters = dict(layer.named_parameters())

    def loss(parameters, x):
        return functional_call(layer, parameters, (x, GRID))[0].sin().sum()

    found = torch.func.grad(loss)(parameters, x.detach())
    expected = gradients(layer, x)[2:]
    for a, b in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_parameters_keep_their_names():
    names = set(make(q_stride=2)[0].state_dict())
    pools = {f"pool_{x}.{y}" for x in "qkv" for y in ("weight", "norm.weight", "norm.bias")}
    assert names == {*pools, *(f"{x}.{y}" for x in ("qkv", "proj") for y in ("weight", "bias"))}

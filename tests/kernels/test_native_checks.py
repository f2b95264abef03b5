"""The native operators called without the public function: nothing may read outside a tensor."""

import pytest
import torch

from stat_kernels import native, ops
from stat_kernels.backends import Reach
from stat_kernels.schemas import SCHEMAS
from stat_kernels.testing import INPUTS, Case, make_inputs

CASE = Case(B=2, T=3, Nq=5, H=2, D=16, Nc=4, Ns=2, L=3)
REACH = Reach(1, 1)
NATIVE = torch.ops.stat_kernels


def arguments():
    """Those of a backward call, of which a forward call takes a part."""
    native.load()
    inputs = dict(zip(INPUTS, make_inputs(CASE), strict=True))
    q = inputs["q"]
    others = {"grad_out": torch.randn_like(q), "grad_lse": torch.randn(2, 3, 2, 5)}
    results = {"out": torch.randn_like(q), "lse": torch.randn(2, 3, 2, 5)}
    gradients = {f"grad_{name}": torch.empty_like(x) for name, x in inputs.items()}
    return inputs | others | results | gradients


def forward(a):
    inputs = (a[name] for name in INPUTS)
    NATIVE.cpu_forward(*inputs, *a.get("reach", REACH), 0.25, "portable", a["out"], a["lse"])


def backward(a):
    inputs = (a[name] for name in INPUTS)
    gradients = (a[f"grad_{name}"] for name in INPUTS)
    NATIVE.cpu_backward(
        a["grad_out"],
        a["grad_lse"],
        *inputs,
        *a.get("reach", REACH),
        0.25,
        "portable",
        *gradients,
    )


EVERY = [(call, name) for call in (forward, backward) for name in INPUTS]
EVERY += [(forward, name) for name in ("out", "lse")]
EVERY += [(backward, name) for name in ("grad_out", "grad_lse", *(f"grad_{n}" for n in INPUTS))]


@pytest.mark.parametrize(("call", "name"), EVERY)
def test_every_tensor_is_checked(call, name):
    """One size less on each axis in turn, another rank, dtype and layout."""
    good = arguments()
    call(good)
    x = good[name]
    for axis in range(x.dim()):
        with pytest.raises(
            RuntimeError, match=r"stat_kernels: (\w+ must have the sizes|frame_off)"
        ):
            call(good | {name: x.narrow(axis, 0, x.shape[axis] - 1).contiguous()})
    with pytest.raises(RuntimeError, match=f"stat_kernels: {name} must have the sizes "):
        call(good | {name: x[None]})
    with pytest.raises(RuntimeError, match=r"stat_kernels: \w+ must have the dtype "):
        call(good | {name: x.double()})
    layout = f"{name} must be contiguous" if "lse" in name else f"axis of {name} must have stride 1"
    with pytest.raises(RuntimeError, match=layout):
        call(good | {name: torch.stack([x, x], dim=-1)[..., 0]})


@pytest.mark.parametrize("pair", ["short", "long"])
def test_halves_of_a_pair(pair):
    for name in (f"k_{pair}", f"v_{pair}"):
        with pytest.raises(RuntimeError, match=f"k_{pair} and v_{pair} come together"):
            forward(arguments() | {name: None})


def test_a_library_of_other_sources(monkeypatch):
    """Its operators take other arguments, or one of them is missing."""
    problem = native.problem.__wrapped__
    assert problem() is None
    for changed in (
        {"sta_forward": "(Tensor q) -> Tensor"},
        {"another": "(Tensor q) -> Tensor"},
    ):
        monkeypatch.setattr(native, "SCHEMAS", SCHEMAS | changed)
        assert "was built from other sources, whose operators differ; run" in problem()


def test_no_keys():
    empty = torch.empty(2, 3, 0, 2, 16)
    with pytest.raises(RuntimeError, match="k_cur must hold at least one token a frame"):
        forward(arguments() | {"k_cur": empty, "v_cur": empty})


def test_the_traced_operator_reaches_the_checks():
    inputs = arguments()
    inputs["k_cur"] = torch.randn(2, 1, 4, 2, 16)
    with pytest.raises(RuntimeError, match=r"k_cur must have the sizes \(2, 3, \*, 2, 16\), got"):
        ops.sta_forward(*(inputs[name] for name in INPUTS), *REACH, 0.25, "cpu")


@pytest.mark.parametrize(
    ("reach", "message"),
    [
        (Reach(-1, 1), "left and right must not be negative, got -1 and 1"),
        (Reach(1, 1, 1), "frame_offset must be from 0 to 0, got 1"),
        (Reach(1, 1, -1), "frame_offset must be from 0 to 0, got -1"),
        (
            Reach(1, 1, 0, True),
            "causal long keys must be as many as the 3 frames of k_short, got 4",
        ),
    ],
)
@pytest.mark.parametrize("call", [forward, backward])
def test_a_reach_beyond_the_keys(call, reach, message):
    good = arguments()
    if reach.causal_long:
        good |= {n: torch.randn(2, 4, 2, 16) for n in ("k_long", "v_long")}
    with pytest.raises(RuntimeError, match=message):
        call(good | {"reach": reach})

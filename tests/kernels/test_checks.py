"""Bad input: the message names the argument, what it must be and what it was."""

import pytest
import torch

from stat_kernels import shrinking_temporal_attention
from stat_kernels.testing import INPUTS, Case, make_inputs

CASE = Case(B=2, T=4, Nq=5, H=2, D=16, Nc=3, Ns=2, L=4)


def call(window=3, scale=None, backend="cpu", frame_offset=0, causal_long=False, **changed):
    inputs = dict(zip(INPUTS, make_inputs(CASE), strict=True)) | changed
    return shrinking_temporal_attention(
        *inputs.values(), window=window, scale=scale, backend=backend, frame_offset=frame_offset,
        causal_long=causal_long,
    )  # fmt: skip


def test_the_unchanged_call_is_fine():
    assert call().shape == (2, 4, 5, 2, 16)


zeros = torch.zeros


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"q": zeros(2, 4, 5, 16)}, ValueError, r"q must be \(B, T, Nq, H, D\), got \(2, 4, 5, 1"),
        ({"q": zeros(2, 0, 5, 2, 16)}, ValueError, "q must have at least one frame"),
        ({"q": [1, 2]}, TypeError, "q must be a torch.Tensor, got list"),
        ({"k_short": 3}, TypeError, "k_short must be a torch.Tensor or None, got int"),
        (
            {"k_short": zeros(2, 4, 2, 3, 16), "v_short": zeros(2, 4, 2, 3, 16)},
            ValueError,
            r"k_short must be \(B, S, Ns, H, D\) with B, H, D as in q \(2, ..., 2, 16\), "
            r"got \(2, 4, 2, 3, 16\)",
        ),
        (
            {"k_short": zeros(2, 3, 2, 2, 16), "v_short": zeros(2, 3, 2, 2, 16)},
            ValueError,
            r"frame_offset \+ T must be at most the 3 frames of k_short, got 0 \+ 4",
        ),
        ({"frame_offset": 1}, ValueError, r"at most the 4 frames of k_short, got 1 \+ 4"),
        (
            {"frame_offset": 1, "k_short": None, "v_short": None},
            ValueError,
            r"frame_offset \+ T must be at most the 4 frames of q, got 1 \+ 4",
        ),
        ({"frame_offset": -1}, ValueError, "frame_offset must be at least 0, got -1"),
        ({"frame_offset": 1.0}, TypeError, "frame_offset must be an int, got float"),
        ({"causal_long": 1}, TypeError, "causal_long must be a bool, got int"),
        (
            {"causal_long": True, "k_long": None, "v_long": None},
            ValueError,
            "causal_long needs long keys, got k_long=None",
        ),
        (
            {"causal_long": True, "k_long": zeros(2, 5, 2, 16), "v_long": zeros(2, 5, 2, 16)},
            ValueError,
            "k_long must hold one token for each of the 4 frames of k_short .* got 5",
        ),
        ({"k_cur": zeros(2, 4, 3, 2, 8)}, ValueError, "k_cur must be .* as in q"),
        ({"k_cur": zeros(2, 4, 0, 2, 16)}, ValueError, "k_cur must hold at least one token"),
        ({"v_cur": zeros(2, 4, 4, 2, 16)}, ValueError, r"v_cur must have the shape of k_cur"),
        ({"k_long": zeros(2, 4, 4, 2, 16)}, ValueError, r"k_long must be \(B, L, H, D\)"),
        ({"k_long": None}, ValueError, "k_long and v_long come together: v_long was given"),
        ({"v_short": None}, ValueError, "k_short and v_short come together: k_short was given"),
        ({"q": zeros(2, 4, 5, 2, 16).long()}, TypeError, "q must be one of .* got .*int64"),
        ({"v_long": zeros(2, 4, 2, 16).half()}, TypeError, "v_long must have q's dtype .*float32"),
        ({"k_cur": zeros(2, 4, 3, 2, 16, device="meta")}, ValueError, "k_cur must be on q's dev"),
        ({"window": 4}, ValueError, "window must be odd and at least 1 .* got 4"),
        ({"window": 0}, ValueError, "window must be odd and at least 1 .* got 0"),
        ({"window": 3.0}, TypeError, "window must be an int or a pair .* got float 3.0"),
        ({"window": True}, TypeError, "window must be an int or a pair .* got bool True"),
        ({"window": (1, 2, 3)}, TypeError, "window must be an int or a pair .* got tuple"),
        ({"window": (3,)}, TypeError, r"window must be an int or a pair .* got tuple \(3,\)"),
        ({"window": (1, -1)}, ValueError, r"window must be a pair .* from 0 on, got \(1, -1\)"),
        ({"window": 2**63 + 1}, ValueError, r"window must be below 2\*\*63, got 92233720"),
        ({"window": (0, 2**63)}, ValueError, r"window must be below 2\*\*63, got \(0, 92"),
        ({"scale": "big"}, TypeError, "scale must be a float or None, got str"),
        ({"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
        ({"backend": "cudnn"}, ValueError, "backend must be one of cpu, .*reference, got 'cudnn'"),
    ],
)  # fmt: skip
def test_message(changed, error, message):
    with pytest.raises(error, match=message):
        call(**changed)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("window", [2**63 - 1, (2**63 - 1, 0)])
def test_a_window_wider_than_any_clip(window, backend):
    narrow = 7 if isinstance(window, int) else (3, 0)
    assert call(window=window, backend=backend).equal(call(window=narrow, backend=backend))

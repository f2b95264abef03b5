"""Bad input: the message names the argument, what it must be and what it was."""

import pytest
import torch

from stat_kernels import shrinking_temporal_attention
from stat_kernels.testing import INPUTS, Case, make_inputs

CASE = Case(B=2, T=4, Nq=5, H=2, D=16, Nc=3, Ns=2, L=4)


def call(window=3, scale=None, backend="cpu", **changed):
    inputs = dict(zip(INPUTS, make_inputs(CASE), strict=True)) | changed
    return shrinking_temporal_attention(
        *inputs.values(), window=window, scale=scale, backend=backend
    )


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
            {"k_short": zeros(2, 7, 2, 2, 16), "v_short": zeros(2, 7, 2, 2, 16)},
            ValueError,
            r"k_short must be \(B, T, Ns, H, D\) with B, T, H, D as in q \(2, 4, ..., 2, 16\), "
            r"got \(2, 7, 2, 2, 16\)",
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
        ({"window": 3.0}, TypeError, "window must be an int, got float"),
        ({"window": True}, TypeError, "window must be an int, got bool"),
        ({"scale": "big"}, TypeError, "scale must be a float or None, got str"),
        ({"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
        ({"backend": "cudnn"}, ValueError, "backend must be one of cpu, .*reference, got 'cudnn'"),
    ],
)  # fmt: skip
def test_message(changed, error, message):
    with pytest.raises(error, match=message):
        call(**changed)

"""The reference against the definition written as loops, one query at a time."""

import math

import pytest
import torch

from stat_kernels import shrinking_temporal_attention
from stat_kernels.testing import Case, make_inputs
from tests.kernels.shared import PIECES, check_pieces


def by_definition(q, k_cur, v_cur, k_short, v_short, k_long, v_long, window, scale):
    out = torch.empty_like(q)
    lse = torch.empty(*q.shape[:2], q.shape[3], q.shape[2], dtype=q.dtype)
    batches, frames, queries, heads, _ = q.shape
    for b in range(batches):
        for i in range(frames):
            near = [j for j in range(frames) if j != i and abs(j - i) <= window // 2]
            for h in range(heads):
                keys, values = list(k_cur[b, i, :, h]), list(v_cur[b, i, :, h])
                for j in near if k_short is not None else []:
                    keys += list(k_short[b, j, :, h])
                    values += list(v_short[b, j, :, h])
                if k_long is not None:
                    keys += list(k_long[b, :, h])
                    values += list(v_long[b, :, h])
                for n in range(queries):
                    scores = torch.stack([scale * q[b, i, n, h].dot(k) for k in keys])
                    weights = scores.exp() / scores.exp().sum()
                    out[b, i, n, h] = sum(w * v for w, v in zip(weights, values, strict=True))
                    lse[b, i, h, n] = scores.exp().sum().log()
    return out, lse


@pytest.mark.parametrize(
    "case",
    [
        Case(B=2, T=4, Nq=2, H=2, D=8, Nc=3, Ns=2, L=4, window=3),
        Case(T=4, Nq=2, H=1, D=8, Nc=3, Ns=2, L=4, window=9),
        Case(T=3, Nq=2, H=1, D=8, Nc=3, Ns=0, L=5),
        Case(T=3, Nq=2, H=1, D=8, Nc=3, Ns=2, L=0, window=5),
        Case(T=1, Nq=2, H=1, D=8, Nc=1, Ns=2, L=0, window=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_equals_the_definition(case, backend):
    inputs = make_inputs(case, torch.float64)
    out, lse = by_definition(*inputs, case.window, 1 / math.sqrt(case.D))
    got, got_lse = shrinking_temporal_attention(
        *inputs, window=case.window, backend=backend, return_lse=True
    )
    assert got.is_contiguous()
    torch.testing.assert_close(got, out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_lse, lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_scale(backend):
    case = Case(T=2, Nq=3, H=1, D=8, Nc=3, Ns=2, L=2)
    q, *others = make_inputs(case, torch.float64)
    scaled = shrinking_temporal_attention(q, *others, window=3, scale=0.5, backend=backend)
    plain = shrinking_temporal_attention(q * 0.5 * math.sqrt(8), *others, window=3, backend=backend)
    torch.testing.assert_close(scaled, plain)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_three_partial_attentions_merged_by_lse(backend):
    """One softmax over all keys is the lse-weighted mean of attentions over its parts."""
    case = Case(T=3, Nq=5, H=2, D=16, Nc=4, Ns=0, L=3)
    q, k_cur, v_cur, _, _, k_long, v_long = make_inputs(case, torch.float64)

    def attend(k, v, k_l=None, v_l=None):
        return shrinking_temporal_attention(
            q, k, v, None, None, k_l, v_l, backend=backend, return_lse=True
        )

    (out_a, lse_a) = attend(k_cur[:, :, :2], v_cur[:, :, :2])
    (out_b, lse_b) = attend(k_cur[:, :, 2:], v_cur[:, :, 2:], k_long, v_long)
    whole, lse = attend(k_cur, v_cur, k_long, v_long)
    torch.testing.assert_close(torch.logaddexp(lse_a, lse_b), lse)
    weights = [(part - lse).exp().transpose(2, 3)[..., None] for part in (lse_a, lse_b)]
    torch.testing.assert_close(weights[0] * out_a + weights[1] * out_b, whole)


def test_repeated_keys_are_what_the_paper_writes():
    """A window over the whole clip with Ns = Nc attends to every other frame's tokens."""
    case = Case(T=4, Nq=3, H=1, D=8, Nc=2, Ns=2, L=0, window=9)
    q, k, v, *_ = make_inputs(case, torch.float64)
    got = shrinking_temporal_attention(q, k, v, k, v, window=9, backend="reference")
    flat_k, flat_v = (x.flatten(1, 2).transpose(1, 2) for x in (k, v))  # (B, H, T*N, D)
    full = torch.nn.functional.scaled_dot_product_attention(
        q.flatten(1, 2).transpose(1, 2), flat_k, flat_v
    )
    torch.testing.assert_close(got, full.transpose(1, 2).unflatten(1, (4, 3)))


@pytest.mark.parametrize(("frames", "window", "causal"), PIECES)
def test_a_clip_in_pieces(frames, window, causal):
    check_pieces("reference", torch.float32, frames, window, causal)

"""Checks of one backend's window, frame offset, causal long keys, NaN and infinities.

The tests of the CPU kernel, the emulated CUDA kernels and the interpreted Triton kernels run them.
"""

import torch
from torch import Tensor

from stat_kernels.checks import window_pair
from stat_kernels.testing import INPUTS, Case, check_backend, make_inputs, oracle, run

# Windows that are not symmetric; short keys of more frames than the queries'; causal long keys.
REACHES = [
    Case(T=5, Nq=9, H=1, D=64, Nc=6, Ns=3, L=7, window=(2, 0)),
    Case(T=5, Nq=9, H=1, D=64, Nc=6, Ns=3, L=0, window=(0, 3)),
    Case(T=4, Nq=9, H=1, D=64, Nc=6, Ns=3, L=4, window=(9, 1), causal_long=True),
    Case(T=3, Nq=9, H=1, D=64, Nc=6, Ns=3, L=2, window=5, S=9, frame_offset=4),
    Case(T=3, Nq=9, H=1, D=64, Nc=6, Ns=3, L=0, window=(1, 0), S=8, frame_offset=5),
    Case(T=1, Nq=9, H=1, D=64, Nc=6, Ns=20, L=6, window=(3, 0), S=6, frame_offset=5,
         causal_long=True),
    Case(T=2, Nq=9, H=1, D=64, Nc=6, Ns=0, L=40, window=1, frame_offset=37, causal_long=True),
    Case(B=2, T=6, Nq=70, H=2, D=64, Nc=6, Ns=3, L=9, window=(0, 0), S=9, frame_offset=2,
         causal_long=True),
]  # fmt: skip


def check_reach(backend: str, case: Case, dtype: torch.dtype) -> None:
    """Outputs and gradients against the oracle."""
    check_backend(backend, make_inputs(case, dtype), case.window, **case.options)


def check_pieces(
    backend: str, dtype: torch.dtype, frames: int, window: tuple[int, int], causal: bool
) -> None:
    """A clip in pieces of some frames, each with its halo of short keys, is the whole clip.

    Causal long keys have as many frames as the short ones, so a piece's halo is all its past.
    """
    case = Case(T=5, Nq=9, H=1, D=64, Nc=6, Ns=3, L=5, window=window, causal_long=causal)
    inputs = dict(zip(INPUTS, make_inputs(case, dtype), strict=True))
    grad = torch.randn_like(inputs["q"])
    whole = run(tuple(inputs.values()), window, backend, grad, **case.options).tensors
    summed = {name: torch.zeros_like(x, dtype=torch.float32) for name, x in whole.items()}
    for begin in range(0, case.T, frames):
        own = slice(begin, min(begin + frames, case.T))
        start = 0 if causal else max(0, begin - window[0])
        halo = slice(start, min(own.stop + window[1], case.T))
        of = {"cur": own, "q": own, "out": own, "lse": own, "short": halo}
        of["long"] = halo if causal else slice(None)
        part = {name: x[:, of[name.split("_")[-1]]] for name, x in inputs.items()}
        options = {"frame_offset": begin - start, "causal_long": causal}
        found = run(tuple(part.values()), window, backend, grad[:, own], **options).tensors
        for name, x in found.items():
            summed[name][:, of[name.split("_")[-1]]] += x
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for name, x in summed.items():
        torch.testing.assert_close(
            x, whole[name].float(), rtol=tolerance, atol=tolerance, msg=f"{backend}: {name}"
        )


PIECES = [  # frames of a piece, window, causal long keys; the last: frame by frame
    (2, (1, 1), False),
    (2, (2, 1), True),
    (3, (0, 2), False),
    (1, (2, 0), True),
]


def check_nan_stays_in_the_window(backend: str, case: Case, dtype: torch.dtype) -> None:
    """A NaN in a query reaches the gradients of the keys of its head that it attends, no others."""
    inputs = make_inputs(case, dtype)
    (left, right), i = window_pair(case.window), case.T // 2
    own = i + case.frame_offset
    inputs[0][0, i, 2, 0, 7] = float("nan")
    grad = torch.randn_like(inputs[0])
    found = run(inputs, case.window, backend, grad, **case.options).tensors
    frames = {
        "cur": [t == i for t in range(case.T)],
        "short": [j != own and own - left <= j <= own + right for j in range(case.S or case.T)],
        "long": [not case.causal_long or n <= own for n in range(case.L)],
    }
    for part, reached in frames.items():
        for name in (f"grad_k_{part}", f"grad_v_{part}"):
            if name in found:
                nan = found[name].isnan()
                assert nan[0, ..., 0, :].flatten(1).all(1).tolist() == reached, name
                assert nan.sum() == nan[0, ..., 0, :].sum(), name  # of other clips and heads
                assert nan[0, ..., 0, :].flatten(1).any(1).tolist() == reached, name
    assert only(found["out"].isnan(), (0, i, 2, 0))
    assert only(found["grad_q"].isnan(), (0, i, 2, 0))


def only(mask: Tensor, index: tuple[int, ...]) -> bool:
    """Whether a mask is True at an index of its first axes and nowhere else."""
    return bool(mask[index].all()) and mask.sum() == mask[index].sum()


def check_infinite_scores(backend: str, dtype: torch.dtype) -> None:
    """lse is infinite where all scores are -inf or one is +inf; else -inf is a weight of 0."""
    case = Case(T=1, Nq=4, H=1, D=64, Nc=150, Ns=0, L=9)
    q, *others = make_inputs(case, dtype)
    q.zero_()
    huge, inf = 3e38, float("inf")  # the product of two huge numbers is infinite in float32
    for query, channels in enumerate(((inf, 0), (-inf, 0), (0, huge), (0, -huge))):
        q[0, 0, query, 0, :2] = torch.tensor(channels)
    for k in (others[0], others[4]):
        k[..., 0], k[..., 1] = -1, 0
    others[0][..., 1] = -huge  # all keys of the first tiles
    found = run((q, *others), case.window, backend).tensors
    exact = oracle((q, *others), case.window).tensors
    lse = found["lse"][0, 0, 0]
    assert lse[0] == -inf
    assert lse[1] == lse[3] == inf
    torch.testing.assert_close(lse[2].double(), exact["lse"][0, 0, 0, 2])
    torch.testing.assert_close(
        found["out"][0, 0, 2].double(), exact["out"][0, 0, 2], rtol=1e-2, atol=1e-2
    )
    assert found["out"][0, 0, [0, 1, 3]].isnan().all()


def check_everything(backend: str, dtype: torch.dtype) -> None:
    """All of the above."""
    for case in REACHES:
        check_reach(backend, case, dtype)
        check_nan_stays_in_the_window(backend, case, dtype)
    for pieces in PIECES:
        check_pieces(backend, dtype, *pieces)
    check_infinite_scores(backend, dtype)

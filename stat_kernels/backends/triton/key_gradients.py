"""Gradients of keys and values: which kernels write them, and the sums of what they leave.

Every gradient, or partial sum of one, has one owner, which writes it once. Partial sums are added
in order by another kernel. No atomics: the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stat_kernels.backends.triton.launch import Call, cdiv, run, stride_names
from stat_kernels.backends.triton.own_key_gradients import own_key_gradients
from stat_kernels.backends.triton.short_key_gradients import short_key_gradients

# Own and long keys share a launch where a frame has so many queries for each long key. The partial
# sums of a frame are then at most as large as its queries; elsewhere a span of the clip's queries
# keeps them below an eighth of that.
FRAME_QUERIES_PER_KEY = 4
SPAN_QUERIES = 1024
SPAN_QUERIES_PER_KEY = 32
# Queries behind one partial sum of a short key, unless that makes more than MOST_CHUNKS of them:
# without a limit the partial sums would grow with the window.
CHUNK_QUERIES = 2048
MOST_CHUNKS = 4
SUM_BLOCK = 128


@triton.jit(do_not_specialize=["CHUNKS", "B", "F", "N", "H", *stride_names("grad_k", "grad_v")])
def sum_chunks_kernel(
    partial, grad_k, grad_v, grad_k_b, grad_k_t, grad_k_n, grad_k_h,
    grad_v_b, grad_v_t, grad_v_n, grad_v_h, CHUNKS, B, F, N, H,
    UNIT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v (B, F, N, H, D): partial (2, CHUNKS, B, F, N, H, D) summed over chunks."""
    size = F * N * H * D  # of a clip
    blocks = tl.cdiv(size, BLOCK)
    clip = tl.program_id(0) // blocks
    of_values = clip // B
    b = (clip % B).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    valid = column < size
    partial += (of_values * CHUNKS * B + b) * size
    acc = tl.zeros([BLOCK], tl.float32)
    step = B.to(tl.int64) * size
    for _ in range(CHUNKS):
        acc += tl.load(partial + column, mask=valid, other=0.0)
        partial += step
    row = column // D
    h = row % H
    n = row // H % N
    f = (row // H // N).to(tl.int64)
    if of_values == 0:
        offset = b * grad_k_b + f * grad_k_t + n.to(tl.int64) * grad_k_n + h.to(tl.int64) * grad_k_h
        grad = grad_k + offset * UNIT + column % D
    else:
        offset = b * grad_v_b + f * grad_v_t + n.to(tl.int64) * grad_v_n + h.to(tl.int64) * grad_v_h
        grad = grad_v + offset * UNIT + column % D
    tl.store(grad, acc.to(grad_k.dtype.element_ty), mask=valid)


def key_gradients(call: Call, statistics: Tensor) -> None:
    """Fills ``call.grads`` of k_cur, v_cur, k_short, v_short, k_long, v_long where these exist.

    Args:
        statistics: (B, H, T * Nq, 2), from ``query_gradient``.
    """
    _own_and_long(call, statistics)
    if call.tensors[3] is not None:
        _short(call, statistics)


def _own_and_long(call: Call, statistics: Tensor) -> None:
    t, nq, _, nc, _, length, *_ = call.sizes
    together = nq >= FRAME_QUERIES_PER_KEY * length
    if length == 0 or not together:
        own_key_gradients(call, statistics, (nc, 0), nq, _partial(call, 0, 1, 1))
    if length > 0:
        span = nq if together else max(SPAN_QUERIES, SPAN_QUERIES_PER_KEY * length)
        partial = _partial(call, cdiv(t * nq, span), 1, length)
        own_key_gradients(call, statistics, (nc if together else 0, length), span, partial)
        _sum_chunks(call, partial, call.grads[5:7])


def _short(call: Call, statistics: Tensor) -> None:
    t, nq, _, _, ns, _, frames, _, left, right = call.sizes
    # What a tile of 64 keys is attended by, whatever the tile of the table is.
    queries = min(t, cdiv(64, ns) + left + right) * nq
    chunks = min(MOST_CHUNKS, cdiv(queries, CHUNK_QUERIES))
    if chunks == 1:
        short_key_gradients(call, statistics, 1, call.grads[3:5], 0)
        return
    partial = _partial(call, chunks, frames, ns)
    first = (partial[0, 0], partial[1, 0])
    short_key_gradients(call, statistics, chunks, first, partial[0, 0].numel())
    _sum_chunks(call, partial, call.grads[3:5])


def _partial(call: Call, chunks: int, frames: int, keys: int) -> Tensor:
    """Uninitialised partial sums for keys and values, (2, chunks, B, frames, keys, H, D)."""
    b, _, _, h, d = call.q.shape
    size = (2, chunks, b, frames, keys, h, d)
    return torch.empty(size, dtype=torch.float32, device=call.q.device)


def _sum_chunks(call: Call, partial: Tensor, gradients: tuple[Tensor, ...]) -> None:
    """Adds (2, chunks, B, F, N, H, D) over the chunks."""
    _, chunks, b, f, n, h, d = partial.shape
    run(
        sum_chunks_kernel, call.q, 2 * b * cdiv(f * n * h * d, SUM_BLOCK), partial,
        *gradients, *call.strides_of(*gradients), chunks, b, f, n, h,
        UNIT=call.unit, D=d, BLOCK=SUM_BLOCK,
    )  # fmt: skip

"""Peer: three partial attentions (current, short, long) over unrepeated keys, merged by logsumexp.

Each part is a call of PyTorch's fused attention, neighbours are read through an overlapping view,
and nothing is repeated. Each part's backward pass is given the merged output and logsumexp, which
makes its gradients those of the whole, as in ring attention. PyTorch's autograd cannot do this: its
fused attention has no gradient of the logsumexp.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.materialised import Attention, radius_of
from stat_kernels.testing import Case

aten = torch.ops.aten


def merged_partials(case: Case, device: str) -> Attention:
    """Up to three fused calls and a merge, with the flash kernel on a CPU and the memory-efficient
    one on CUDA."""
    radius = radius_of(case)
    mask = _neighbour_mask(case, device) if radius else None

    def neighbours(x: Tensor) -> Tensor:
        """(B, T, Ns, H, D) -> (B, T, (2r + 1) * Ns, H, D), a view of the padded clip."""
        padded = F.pad(x, (0, 0, 0, 0, 0, 0, radius, radius))
        return padded.unfold(1, 2 * radius + 1, 1).movedim(-1, 2).flatten(2, 3)

    def attend(q, k_cur, v_cur, k_short, v_short, k_long, v_long):
        keys_values = [k_cur, v_cur]
        keys_values += [neighbours(k_short), neighbours(v_short)] if radius else [None, None]
        return _Merged.apply(q, *keys_values, k_long, v_long, mask)

    return attend


def _neighbour_mask(case: Case, device: str) -> Tensor:
    """(B * T, 1, 1, (2r + 1) * Ns and some), 0 or -inf: rows of a multiple of 8, as the efficient
    kernel wants its bias to lie in memory; what is too much is cut off by the caller.
    """
    radius = radius_of(case)
    offsets = torch.arange(-radius, radius + 1)
    frames = torch.arange(case.T)[:, None] + offsets
    absent = (frames < 0) | (frames >= case.T) | (offsets == 0)
    absent = absent.repeat_interleave(case.Ns, dim=1)
    mask = torch.zeros(absent.shape).masked_fill(absent, float("-inf"))
    mask = F.pad(mask, (0, -mask.shape[1] % 8))
    return mask[None].expand(case.B, -1, -1).flatten(0, 1)[:, None, None].to(device)


def _calls(q: Tensor, tensors: tuple[Tensor | None, ...], mask: Tensor | None):
    """(query, key, value, mask) of each part in the kernels' layout (batch, H, tokens, D)."""
    k_cur, v_cur, k_short, v_short, k_long, v_long = tensors
    frames = q.flatten(0, 1).transpose(1, 2)  # (B * T, H, Nq, D)

    def heads(x: Tensor) -> Tensor:
        return x.flatten(0, 1).transpose(1, 2)

    yield frames, heads(k_cur), heads(v_cur), None
    if k_short is not None:
        yield frames, heads(k_short), heads(v_short), mask.to(q.dtype)[..., : k_short.shape[2]]
    if k_long is not None:
        whole = q.flatten(1, 2).transpose(1, 2)  # (B, H, T * Nq, D)
        yield whole, k_long.transpose(1, 2), v_long.transpose(1, 2), None


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k_cur, v_cur, k_short, v_short, k_long, v_long, mask):
        b, t, nq, h, _ = q.shape
        tensors = (k_cur, v_cur, k_short, v_short, k_long, v_long)
        parts = [_forward(*call) for call in _calls(q, tensors, mask)]
        outs = [out.transpose(1, 2).reshape(q.shape) for out, _ in parts]
        # (B, T, Nq, H): the layout that the outputs' scaling broadcasts over
        lses = [lse.transpose(1, 2).reshape(b, t, nq, h) for _, lse in parts]
        lse = torch.stack(lses).logsumexp(dim=0)
        weights = [(part - lse).exp()[..., None].to(q.dtype) for part in lses]
        out = outs[0] * weights[0]
        for part, weight in zip(outs[1:], weights[1:], strict=True):
            out = torch.addcmul(out, part, weight)
        ctx.save_for_backward(q, *tensors, mask, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, *tensors, mask, out, lse = ctx.saved_tensors
        grad_q = torch.zeros_like(q)
        grads: list[Tensor] = []
        for query, key, value, part_mask in _calls(q, tuple(tensors), mask):
            shape = query.transpose(1, 2).shape  # (batch, tokens, H, D)
            grad, whole = (x.reshape(shape).transpose(1, 2) for x in (grad_out, out))
            part_lse = lse.reshape(shape[:3]).transpose(1, 2)
            part = _backward(grad, query, key, value, part_mask, whole, part_lse)
            grad_query, grad_key, grad_value = (x.transpose(1, 2) for x in part)
            grad_q += grad_query.reshape(q.shape)
            grads += [grad_key, grad_value]
        found = iter(grads)
        inputs = (None if x is None else next(found).reshape(x.shape) for x in tensors)
        return (grad_q, *inputs, None)


def _forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None):
    """out (batch, H, tokens, D) and lse (batch, H, tokens)."""
    if query.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=_expanded(mask, query)
        )
    out, lse, _, _ = aten._scaled_dot_product_efficient_attention(
        query, key, value, _expanded(mask, query), True
    )
    return out, lse[:, :, : query.shape[2]]


def _backward(grad, query, key, value, mask, out, lse):
    """Gradients of query, key and value, given the merged out and lse."""
    if query.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, 0.0, False, attn_mask=_expanded(mask, query)
        )
    lse = F.pad(lse.contiguous(), (0, -lse.shape[2] % 32))  # as the efficient kernel lays it out
    unused = torch.zeros((), dtype=torch.long)  # the dropout's seed and offset
    grads = aten._scaled_dot_product_efficient_attention_backward(
        grad, query, key, value, _expanded(mask, query), out, lse, unused, unused,
        0.0, [True, True, True, False],
    )  # fmt: skip
    return grads[:3]


def _expanded(mask: Tensor | None, query: Tensor) -> Tensor | None:
    return None if mask is None else mask.expand(-1, query.shape[1], query.shape[2], -1)

"""A block of the model and its parts as calls to be timed, with any backend."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from stat_kernels import dispatch, products, shrinking_temporal_attention

Piece = tuple[Callable[..., Any], tuple[Any, ...], list[Tensor]]  # function, arguments, parameters


def pieces(block: nn.Module, x: Tensor, grid: tuple[int, int]) -> dict[str, list[Piece]]:
    """The block's parts with the arguments they are called with inside it."""
    attn = block.attn
    modules = {"norms": [block.norm1, block.norm2], "projections": [attn.qkv, attn.proj]}
    modules |= {"pooling": [attn.pool_k, attn.pool_v], "MLP": [block.mlp]}
    modules["pooling"] += [attn.pool_q] if attn.pool_q is not None else []
    seen: dict[nn.Module, tuple[Any, ...]] = {}
    operation: list[tuple[Any, ...]] = []

    def spy(*inputs: Any, **options: Any) -> Tensor:
        operation.append(inputs)
        return shrinking_temporal_attention(*inputs, **options)

    with ExitStack() as stack, torch.no_grad():
        for module in (m for group in modules.values() for m in group):
            hook = module.register_forward_pre_hook(lambda m, args: seen.update({m: args}))
            stack.callback(hook.remove)
        stack.enter_context(mock.patch("stat_kernels.modules.shrinking_temporal_attention", spy))
        stack.enter_context(settings(attn, fused=False))
        block(x, grid)
        pooled, grid_kv = attn.pool_k(*seen[attn.pool_k])
    found = {
        part: [(m, seen[m], list(m.parameters())) for m in group] for part, group in modules.items()
    }
    # the average pooling to short keys is pooling too, once for keys and once for values
    found["pooling"] += 2 * [(attn._granularities, (pooled, grid_kv), [])]
    found["attention"] = [(shrinking_temporal_attention, operation[-1], [])]
    return found


def insist(backend: str, window: int) -> Callable[..., Tensor]:
    """The operation by that backend and no other."""

    def attend(*inputs: Tensor | None) -> Tensor:
        return shrinking_temporal_attention(*inputs, window=window, backend=backend)

    return attend


def whole(
    block: nn.Module,
    x: Tensor,
    grid: tuple[int, int],
    backend: str,
    module: nn.Module | None = None,
    fused: bool = True,
) -> Piece:
    """A call of the block, or of a module of it, with the layer's settings."""
    module = module or block

    def run(tokens: Tensor) -> Tensor:
        plain = "reference" if backend == dispatch.REFERENCE else None
        with (
            settings(block.attn, backend=backend, fused=fused),
            settings(block.mlp, backend=plain),
        ):
            return module(tokens, grid)[0]

    return run, (x,), list(module.parameters())


def as_with(
    backend: str,
    block: nn.Module,
    module: nn.Module,
    arguments: tuple[Any, ...],
    parameters: list[Tensor],
) -> Piece:
    """A call of a linear layer or of the MLP, as a block with that backend makes it."""
    plain = backend == dispatch.REFERENCE
    call = module if plain or module is block.mlp else partial(products.apply_linear, module)

    def run(*inputs: Tensor) -> Tensor:
        with settings(block.mlp, backend=dispatch.REFERENCE if plain else None):
            return call(*inputs)

    return run, arguments, parameters


@contextmanager
def settings(module: nn.Module, **values: Any) -> Iterator[None]:
    """The module's attributes are these meanwhile."""
    before = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(before)


def forward_call(
    function: Callable[..., Any], arguments: tuple[Any, ...], parameters: list[Tensor]
) -> Callable[[], Any]:
    """The function without gradients."""

    def call() -> Any:
        with torch.no_grad():
            return function(*arguments)

    return call


def both_call(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    parameters: list[Tensor],
    with_outputs: bool = False,
) -> Callable[[], Any]:
    """The function and its gradients; called, it gives the latter, after the outputs if asked."""
    leaves = [a.clone().requires_grad_() if isinstance(a, Tensor) else a for a in arguments]
    wanted = [a for a in leaves if isinstance(a, Tensor)] + parameters
    with torch.no_grad():
        shapes = [torch.ones_like(y) for y in _tensors(function(*arguments))]

    def call() -> Any:
        outputs = _tensors(function(*leaves))
        gradients = torch.autograd.grad(outputs, wanted, shapes)
        return [*outputs, *gradients] if with_outputs else gradients

    return call


def _tensors(outputs: Any) -> list[Tensor]:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [y for y in outputs if isinstance(y, Tensor)]


def sequence(calls: list[Callable[[], Any]]) -> Callable[[], None]:
    """All of them, one after the other."""

    def run() -> None:
        for call in calls:
            call()

    return run

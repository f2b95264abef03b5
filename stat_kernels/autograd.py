"""One autograd rule for an operator, wherever it is differentiated.

``torch.library.register_autograd`` ignores tangents, so that forward-mode derivatives would be
zero, and fails under ``torch.func``'s transforms. Here the rule is a node of one autograd level, as
PyTorch's own operators have it: each level of nested transforms adds its own and redispatches.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import _C
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction


def register(
    library: torch.library.Library,
    operator: torch._ops.OpOverload,
    backward: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Registers the derivative of an operator without keyword-only arguments.

    Args:
        library: keeps the registration alive.
        backward, setup_context: as ``torch.library.register_autograd`` takes them.

    Forward-mode differentiation raises a RuntimeError.
    """

    class Rule(_SingleLevelFunction):
        @staticmethod
        def forward(keys, *inputs):
            # A node's forward runs without grad mode, which the next level needs again.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return below(keys, *inputs)

        @staticmethod
        def setup_context(ctx, inputs, output):
            if setup_context is not None:
                setup_context(ctx, inputs[1:], output)

        @staticmethod
        def backward(ctx, *gradients):
            return None, *backward(ctx, *gradients)

        @staticmethod
        def jvp(ctx, *tangents):
            raise RuntimeError(
                f"{operator.name()} has no forward-mode derivative (jvp, jacfwd); "
                "use backend='reference' where one is needed"
            )

    def below(keys, *inputs):
        with _C._AutoDispatchBelowAutograd():
            return operator.redispatch(keys & _C._after_autograd_keyset, *inputs)

    def differentiable(keys, *inputs):
        reverse = _C.is_grad_enabled() and _C._any_requires_grad(*inputs)
        if not reverse and forward_ad._current_level < 0:
            return below(keys, *inputs)
        with enable_single_level_autograd_function():
            return Rule.apply(keys, *inputs)

    library.impl(operator, differentiable, "Autograd", with_keyset=True)

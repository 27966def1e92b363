"""Backwards through the head of a model, as many tokens at a time as their logits have room for.

Shapes: B batch, T time, D hidden, N tokens, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_NOTHING = 1e-30  # a slope that no gradient feels
_LOGITS_AT_ONCE = 2**24  # 64 MB in float32, a few times


def gradient_at_head(
    hidden: Tensor, logits_of: Callable[[Tensor], Tensor], slope_of: Callable[[Tensor, slice], Tensor]
) -> Tensor:
    """The gradient at `hidden` [B, T, D], behind the last block, of a scalar that depends on the logits.

    logits_of   as `Skeleton.head` gives it
    slope_of    (logits_NV, which of the B T tokens they are of) -> the scalar's gradient at these logits, a new tensor
    A token whose logits are not finite has no gradient.
    """
    hidden_ND, parts, start, count = hidden.flatten(0, -2), [], 0, 1
    while start < len(hidden_ND):
        tokens = slice(start, min(start + count, len(hidden_ND)))
        with torch.enable_grad():
            part_ND = hidden_ND[tokens].detach().requires_grad_()
            logits_NV = logits_of(part_ND)
        # The slope is known without autograd: only the head itself is differentiated. Products of numbers below 1e-38
        # would take fifty times as long.
        slope_NV = slope_of(logits_NV.detach(), tokens)
        slope_NV.masked_fill_(slope_NV.abs() < _NOTHING, 0)
        (gradient_ND,) = torch.autograd.grad(logits_NV, part_ND, slope_NV)
        parts.append(torch.where(torch.isfinite(gradient_ND), gradient_ND, 0))
        start, count = tokens.stop, max(1, _LOGITS_AT_ONCE // logits_NV.shape[1])
    return torch.cat(parts).view_as(hidden)

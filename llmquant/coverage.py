"""`--samples auto`: how many windows of text the experts of a model need.

One pass of the original model over the most windows that are taken counts how many tokens each expert gets, window by
window. The number is the smallest one, from a run's usual number on, with which nine of ten experts of every layer get
as many tokens as they have inputs. The windows themselves are drawn anew, in that number.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import RecipeError, option
from llmquant.model.experts import Experts
from llmquant.model.skeleton import Skeleton
from llmquant.model.streams import Streams, unnamed_file

_RARE = 0.1  # of a layer's experts may get fewer


def enough_batches(skeleton: Skeleton, batches: Sequence[Tensor]) -> int | None:
    """How many of `batches` of ids [B, T] nine of ten experts of every layer need; None where all are too few.

    0 for a model without experts. RecipeError for one whose blocks share more than hidden states: its forwards would
    have to wait for all of the text twice.
    """
    if not any(block.shares for block in skeleton.blocks):
        return 0
    if skeleton.parked:
        raise RecipeError(
            f"{option('samples')} auto",
            f"parked forwards: {skeleton.parked}",
            expected="blocks that share hidden states only",
            remedy=f"a number of {option('samples')}",
        )
    needed = 0
    with Streams({"text": 1}, 0, unnamed_file) as streams:
        stream = streams.new("text")
        skeleton.record(batches, stream.append)
        for block in skeleton.blocks:
            counts: dict[Experts, list[list[int]]] = {}
            with block.loaded():
                handles = [
                    experts.up_inputs.register_forward_pre_hook(_counter(counts.setdefault(experts, [])))
                    for experts in block.module.modules()
                    if isinstance(experts, Experts)
                ]
                stream.update(block.forward)
            for handle in handles:
                handle.remove()
            for experts, rows in counts.items():
                enough = _enough(torch.tensor(rows), experts.form.hidden)
                if enough is None:
                    return None
                needed = max(needed, enough)
    return needed


def _counter(rows: list[list[int]]) -> Any:
    def count(module: Any, inputs: tuple[Any, ...]) -> None:
        rows.append([x.shape[0] for x in inputs[0]])

    return count


def _enough(counts: Tensor, in_features: int) -> int | None:
    """The first number of batches by which a tenth of the experts at most has fewer tokens than `in_features`.

    >>> _enough(torch.tensor([[2, 1], [2, 2], [2, 3]]), 3), _enough(torch.tensor([[2, 1]]), 3)
    (2, None)
    """
    rarest = counts.cumsum(0).float().quantile(_RARE, dim=1, interpolation="lower")
    reached = (rarest >= in_features).nonzero()
    return int(reached[0]) + 1 if len(reached) else None

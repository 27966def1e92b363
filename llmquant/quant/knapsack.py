"""One choice for each unit, so that the sum of losses is least within a budget: a multiple-choice knapsack, exactly.

All (cost, loss) pairs that some choice of the first k units reaches and that no other pair beats in both are the
frontier of k. That of k + 1 comes from it by adding every choice of one more unit. Equal blocks have equal costs, so
sums coincide and frontiers stay short: thousands of pairs for hundreds of units.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Choice:
    """cost: whole numbers, such as bits; loss: what is added up and should be small."""

    cost: int
    loss: float


def choose(units: Sequence[Sequence[Choice]], budget: int) -> list[int] | None:
    """The index of the choice of every unit; None where even the cheapest ones are above the budget.

    Of equal losses the cheaper one.

    >>> small, large = [Choice(2, 1.0), Choice(4, 0.5)], [Choice(2, 9.0), Choice(4, 3.0)]
    >>> choose([small, large], 6), choose([small, large], 8), choose([small, large], 3)
    ([0, 1], [1, 1], None)
    """
    least = [min(choice.cost for choice in choices) for choices in units]
    rest = sum(least)  # the least that the units that follow cost
    costs, losses = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # of every frontier: the pair it came from, and the choice
    for choices, cheapest in zip(units, least, strict=True):
        rest -= cheapest
        # 1. Every pair with every choice.
        cost = np.concatenate([costs + choice.cost for choice in choices])
        loss = np.concatenate([losses + choice.loss for choice in choices])
        came = np.tile(np.arange(len(costs)), len(choices))
        chosen = np.repeat(np.arange(len(choices)), len(costs))
        # 2. By cost; of those, the ones with less loss than all cheaper ones.
        order = np.lexsort((loss, cost))
        order = order[cost[order] + rest <= budget]
        before = np.concatenate([[np.inf], np.minimum.accumulate(loss[order])[:-1]])
        kept = order[loss[order] < before]
        if not len(kept):
            return None
        costs, losses = cost[kept], loss[kept]
        steps.append((came[kept], chosen[kept]))
    # 3. Back from the least loss.
    at, picks = len(costs) - 1, list[int]()
    for came, chosen in reversed(steps):
        picks.append(int(chosen[at]))
        at = int(came[at])
    return picks[::-1]

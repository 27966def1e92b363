"""The knapsack against brute force."""

import itertools
import random

import pytest

from llmquant.quant.knapsack import Choice, choose


def brute(units: list[list[Choice]], budget: int) -> float | None:
    sums = [
        sum(choice.loss for choice in picks)
        for picks in itertools.product(*units)
        if sum(choice.cost for choice in picks) <= budget
    ]
    return min(sums) if sums else None


@pytest.mark.parametrize("seed", range(200))
def test_no_other_choice_is_better(seed: int) -> None:
    dice = random.Random(seed)
    units = [
        [Choice(dice.randint(0, 9), dice.choice([dice.random(), 0.0, 1.0])) for _ in range(dice.randint(1, 4))]
        for _ in range(dice.randint(1, 6))
    ]
    budget = dice.randint(0, 40)
    picks, wanted = choose(units, budget), brute(units, budget)
    if picks is None:
        assert wanted is None
        return
    chosen = [choices[pick] for choices, pick in zip(units, picks, strict=True)]
    assert sum(choice.cost for choice in chosen) <= budget
    assert sum(choice.loss for choice in chosen) == pytest.approx(wanted)


def test_a_model_of_eighty_blocks_takes_moments() -> None:
    dice = random.Random(0)
    sizes = (3 * 2**24, 2**26, 2**28, 2**27)
    units = [
        [
            Choice(size // 8 * round(8 * (bits + 16 / 128)), size * dice.random() * 4.0**-bits)
            for bits in (2, 3, 4, 8, 16)
        ]
        for _ in range(80)
        for size in sizes
    ]
    budget = int(4.5 * 80 * sum(sizes))
    picks = choose(units, budget)
    assert picks is not None
    spent = sum(choices[pick].cost for choices, pick in zip(units, picks, strict=True))
    assert 0.999 * budget < spent <= budget

"""Blocks made by hand: which linears share an input."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from llmquant.model.block import Block


class ChangesItsInput(nn.Module):
    """Two linears read an input; a third reads it after something was written into it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden * 2
        y = self.a(x) + self.b(x)
        x.add_(1)
        result: torch.Tensor = y + self.c(x)
        return result


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_input_that_was_written_into_is_another_one(mode: Callable[[], AbstractContextManager[None]]) -> None:
    module = ChangesItsInput()
    weights: Any = None  # nothing is asked of them
    block = Block(0, "block", module, [], weights)
    with mode():
        steps = block.steps(partial(module, torch.ones(1, 4, 8)))
    assert steps == [["block.a", "block.b"], ["block.c"]]

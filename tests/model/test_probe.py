"""What a forward without weights tells: steps, linears that no one can see, parts that no text reaches."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmquant.errors import SourceError
from llmquant.model.block import Block
from llmquant.model.probe import NEVER, TWICE, probe
from llmquant.model.skeleton import Skeleton
from llmquant.source.resolve import open_source


class Odd(nn.Module):
    """Two linears read an input; a third reads it after something was written into it; others are odd."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.twice, self.never = (nn.Linear(8, 8, device="meta") for _ in range(5))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden * 2
        y = self.a(x) + self.b(x)
        x.add_(1)
        y = self.twice(self.twice(y + self.c(x)))
        return nn.functional.linear(y, self.never.weight)


class OddModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Odd()
        self.tower = nn.Sequential(nn.Linear(8, 8, device="meta"), nn.Linear(8, 8, device="meta"))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        result: torch.Tensor = self.block(torch.ones(*input_ids.shape, 8))
        return result


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_forward_without_weights(mode: Callable[[], AbstractContextManager[None]]) -> None:
    model, weights = OddModel(), None
    block = Block(0, "block", model.block, [], weights)  # type: ignore[arg-type] # nothing is asked of them
    with mode():
        assert probe("model", model, [block]) == ["tower"]
    assert block.steps == [["block.a", "block.b"], ["block.c"]]
    assert block.unseen == {"block.twice": TWICE, "block.never": NEVER}
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_model_that_wants_more_than_text_is_refused() -> None:
    class WantsMore(nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> None:
            raise ValueError("pixel_values are missing")

    where = r"^model: WantsMore cannot be run on text alone \(ValueError: pixel_values are missing\)$"
    with pytest.raises(SourceError, match=where):
        probe("model", WantsMore(), [])


def test_linears_that_share_an_input_are_one_step(tiny_model: Callable[[str], Path]) -> None:
    expected: dict[str, Any] = {
        "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
        "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
        "gptj": [["q_proj", "k_proj", "v_proj", "fc_in"], ["out_proj"], ["fc_out"]],
        "cohere": [["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], ["o_proj"], ["down_proj"]],
    }
    for name, steps in expected.items():
        block = Skeleton(open_source(tiny_model(name))).blocks[1]
        assert [[module.rpartition(".")[2] for module in step] for step in block.steps] == steps

"""Which outputs a block adds to its hidden states: found on made-up weights, true of real ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from llmquant.model.block import Block
from llmquant.model.skeleton import Skeleton
from llmquant.source.resolve import open_source

IDS = torch.randint(5, 4000, (2, 12), generator=torch.Generator().manual_seed(0))
# These norm an output before they add it.
NONE = ("gemma2", "gemma3", "olmo2")


def added(block: Block, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What a loaded block adds to `hidden`, and the outputs of its linears."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, inputs, output: outputs.__setitem__(name, output.reshape(hidden.shape).clone())

    handles = [block.linears[name].register_forward_hook(keep(name)) for name in block.adds]
    leaving = block.forward(hidden)
    for handle in handles:
        handle.remove()
    return leaving - hidden, outputs


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_adds_these_and_nothing_else(name: str, dtype: torch.dtype, tiny_model: Callable[[str], Path]) -> None:
    """Oracle: the block itself, with its own weights."""
    skeleton = Skeleton(open_source(tiny_model(name)))
    found = Skeleton(open_source(tiny_model(name)), dtype=dtype)
    for block, other in zip(skeleton.blocks, found.blocks, strict=True):
        if name in NONE:
            assert not other.adds
            continue
        assert len(other.adds) == 2
        assert list(other.adds) == sorted(other.adds, key=lambda linear: other.order[linear])
        assert list(other.adds.values()) == pytest.approx(list(block.adds.values()), rel=0.01)
        with block.loaded():
            hidden = torch.randn(2, 12, skeleton.hidden_size)
            skeleton.embed(IDS)  # every block knows its arguments afterwards
            total, outputs = added(block, hidden)
        expected = sum(factor * outputs[linear] for linear, factor in block.adds.items())
        torch.testing.assert_close(total, expected, rtol=1e-3, atol=1e-3)
    if name == "granite":
        assert list(found.blocks[0].adds.values()) == pytest.approx([0.5, 0.5], rel=0.01)


def test_before_experts_only(tmp_path: Path) -> None:
    """What experts add is not known before they are solved, and down projections are theirs alone."""
    import transformers

    folder = tiny.build(tmp_path / "m", ("Qwen3MoeConfig", tiny.LLAMA | tiny.EXPERTS | {"head_dim": 16}))
    assert transformers.AutoConfig.from_pretrained(folder).model_type == "qwen3_moe"
    for block in Skeleton(open_source(folder)).blocks:
        assert [linear.rpartition(".")[2] for linear in block.adds] == ["o_proj"]

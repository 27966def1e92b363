"""The insurance of a run: its first block and head against those of stock transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import llmquant
from llmquant.errors import SourceError
from llmquant.model.block import Block
from llmquant.model.skeleton import Skeleton
from llmquant.model.stock import compare_with_stock
from llmquant.source.resolve import open_source

IDS = torch.arange(3, 43)
ROOM = 10**9
MODELS = [*tiny.ARCHITECTURES, "gpt2"]


def skeleton_of(folder: Path, dtype: torch.dtype = torch.float32) -> Skeleton:
    return Skeleton(open_source(folder), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_both_compute_the_same(name: str, dtype: torch.dtype, tiny_model: Callable[[str], Path]) -> None:
    said: list[str] = []
    compare_with_stock(skeleton_of(tiny_model(name), dtype), IDS, ROOM, said.append)
    assert said == []


def spoiled(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake of ours, of the kinds that have been made."""
    if what == "another tensor":
        read = Skeleton.embed
        monkeypatch.setattr(Skeleton, "embed", lambda self, ids: read(self, ids).roll(1, -1))
    else:
        forward = Block.forward

        def without_mask(self: Block, batch: Any, products: Any = None) -> Tensor:
            for call in self.calls.values():
                call.kwargs["attention_mask"] = torch.zeros(1, 1, 32, 32)
            return forward(self, batch, products)

        monkeypatch.setattr(Block, "forward", without_mask)


@pytest.mark.parametrize("what", ["another tensor", "no attention mask"])
def test_a_mistake_of_ours_ends_the_run_before_the_work(
    what: str, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(what, monkeypatch)
    recipe = llmquant.make_recipe("x", flags={"samples": 4, "seq_len": 32, "eval_data": "none", "group_size": 32})
    with pytest.raises(SourceError, match=r"logits behind its first block differ by .*please report it"):
        llmquant.quantize(tiny_model("llama"), recipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_compared_is_said(tiny_model: Callable[[str], Path]) -> None:
    said: list[str] = []
    compare_with_stock(skeleton_of(tiny_model("llama")), IDS, 1000, said.append)
    compare_with_stock(skeleton_of(tiny_model(next(iter(tiny.PARKED)))), IDS, ROOM, said.append)
    skeleton = skeleton_of(tiny_model("llama"))
    skeleton.stack = "model.nowhere"
    compare_with_stock(skeleton, IDS, ROOM, said.append)
    first = "not compared with transformers' own first block"
    assert [line.startswith(first) for line in said] == [True] * 3
    assert [line[len(first) :][:25] for line in said] == [
        ", which would take 0.0 GB",
        ": its forwards are parked",
        ", which it cannot run alo",
    ]

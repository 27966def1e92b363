"""Blocks streamed one by one give exactly what the whole model gives."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from llmquant.errors import SourceError
from llmquant.model.skeleton import Skeleton
from llmquant.model.tape import Tape
from llmquant.quant import matmul as products
from llmquant.source.resolve import open_source


def open_skeleton(folder: Path | str) -> Skeleton:
    return Skeleton(open_source(folder))


def streamed_logits(folder: Path, batches: torch.Tensor) -> torch.Tensor:
    skeleton = open_skeleton(folder)
    hidden: list[torch.Tensor] = []
    skeleton.record(list(batches), hidden.append)
    for block in skeleton.blocks:
        with block.loaded():
            hidden = [block.forward(h) for h in hidden]
    assert all(tensor.is_meta for _, tensor in skeleton.model.named_parameters()), "a block was not freed"
    with skeleton.head() as logits_of:
        return torch.stack([logits_of(h.flatten(0, 1)) for h in hidden])


@pytest.mark.parametrize("name", [*tiny.ARCHITECTURES, "gpt2"])
def test_streamed_blocks_equal_the_whole_model(
    name: str, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_ONEDNN", None)  # products as in the stock model, for equality to the bit
    folder = tiny_model(name)
    batches = torch.randint(0, 512, (2, 2, 40), generator=torch.Generator().manual_seed(1))
    streamed = streamed_logits(folder, batches)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        whole = torch.stack([model(ids).logits.flatten(0, 1) for ids in batches])
    assert torch.equal(streamed, whole)


def test_head_by_chunks_equals_head_at_once(tiny_model: Callable[[str], Path]) -> None:
    skeleton = open_skeleton(tiny_model("gemma2"))
    hidden = torch.randn(24, 64, generator=torch.Generator().manual_seed(2))
    with skeleton.head() as logits_of:
        chunks = torch.cat([logits_of(part) for part in hidden.split(5)])
        torch.testing.assert_close(chunks, logits_of(hidden), rtol=0, atol=1e-6)


def refused(tmp_path: Path, architecture: tuple[str, dict[str, object]]) -> str:
    folder = tiny.build(tmp_path / "model", architecture)

    def record() -> None:
        skeleton = open_skeleton(folder)
        skeleton.record([torch.full((1, 8), token) for token in (3, 4)], lambda hidden: None)

    with pytest.raises(SourceError) as error:
        record()
    return str(error.value)


def test_arguments_that_depend_on_tokens_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    real = modeling_llama.LlamaModel.forward

    def forward(self: object, input_ids: torch.Tensor, **kwargs: object) -> object:
        return real(self, input_ids=input_ids, token_argument=input_ids.float(), **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)
    assert "depends on the tokens" in refused(tmp_path, tiny.ARCHITECTURES["llama"])


def test_blocks_that_share_more_than_hidden_states_are_refused() -> None:
    hidden, attention = torch.ones(1, 8, 64), torch.ones(1)

    def block(*args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden, attention

    def tape() -> Tape:
        started = Tape("model", "Model", 3, None)
        started.stand_in(0, block, (hidden,), {})
        return started

    with pytest.raises(SourceError, match="hidden states change between block 0 and block 1"):
        tape().stand_in(1, block, (hidden * 2,), {})
    with pytest.raises(SourceError, match="block 1 is given another output of the block before it"):
        tape().stand_in(1, block, (hidden,), {"router": attention})
    with pytest.raises(SourceError, match="block 2 runs as number 1"):
        tape().stand_in(2, block, (hidden,), {})
    with pytest.raises(SourceError, match="1 of 3 blocks run"):
        tape().check([])
    with pytest.raises(SourceError, match="write into an argument"):
        Tape("model", "Model", 3, None).stand_in(0, block, (hidden,), {"shared_kv": {0: attention}})


def test_tied_embeddings_need_no_second_tensor(tiny_model: Callable[[str], Path]) -> None:
    skeleton = open_skeleton("demo")
    assert skeleton.weights.tied == {"lm_head.weight": "model.embed_tokens.weight"}

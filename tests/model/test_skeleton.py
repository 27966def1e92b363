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


def test_arguments_that_depend_on_tokens_go_with_their_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    real, block = modeling_llama.LlamaModel.forward, modeling_llama.LlamaDecoderLayer.forward

    def forward(self: object, input_ids: torch.Tensor, **kwargs: object) -> object:
        return real(self, input_ids=input_ids, token_argument=input_ids.float(), **kwargs)

    def with_token(self: object, hidden: torch.Tensor, token_argument: torch.Tensor, **kwargs: object) -> object:
        return block(self, hidden * (1 + token_argument[..., None]), **kwargs)

    monkeypatch.setattr(products, "_ONEDNN", None)
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)
    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", with_token)
    folder = tiny.build(tmp_path / "model", tiny.ARCHITECTURES["llama"])
    skeleton, stream = open_skeleton(folder), open_skeleton(folder).new_stream()
    assert skeleton.parked == "an argument of a block depends on the tokens"
    batches = torch.randint(0, 512, (2, 2, 8), generator=torch.Generator().manual_seed(1))
    skeleton.record(list(batches), stream.append)
    for each in skeleton.blocks:
        with each.loaded():
            stream.update(each.forward)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad(), skeleton.head() as logits_of:
        for hidden, ids in zip(stream.hidden(), batches, strict=True):
            assert torch.equal(logits_of(hidden.flatten(0, 1)), model(ids).logits.flatten(0, 1))


def test_the_tape_refuses_what_made_up_tokens_did_not_show() -> None:
    hidden, mask = torch.ones(1, 8, 64), torch.ones(1)

    def tape(*masks: torch.Tensor) -> Tape:
        started = Tape("model", (0, 0))
        for index, each in enumerate(masks):
            started.stand_in(index, abs, (hidden, each), {})
        return started

    tape(mask, mask).check(tape(mask.clone(), mask).calls)
    with pytest.raises(SourceError, match="block 1 is not given what the block before it returned"):
        tape(mask).stand_in(1, abs, (hidden * 2,), {})
    with pytest.raises(SourceError, match="block 0 is not given what"):
        tape(mask).stand_in(0, abs, (hidden,), {})
    with pytest.raises(SourceError, match="block 1 is not run"):
        tape(mask).check([])
    with pytest.raises(SourceError, match="block 1 has an argument that depends on the tokens"):
        tape(mask, mask).check(tape(mask, mask * 2).calls)


def test_tied_embeddings_need_no_second_tensor(tiny_model: Callable[[str], Path]) -> None:
    skeleton = open_skeleton("demo")
    assert skeleton.weights.tied == {"lm_head.weight": "model.embed_tokens.weight"}

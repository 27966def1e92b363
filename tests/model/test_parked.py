"""Forwards that wait in blocks give what the whole model gives, however often a block is run in between."""

import gc
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from toys import TOYS, Toy
from transformers import AutoModelForCausalLM

from llmquant.model.parked import Parked, ParkedForwards
from llmquant.model.skeleton import Skeleton
from llmquant.model.streams import ParkedStream
from llmquant.source.resolve import open_source

BATCHES = list(torch.randint(0, 32, (3, 2, 5), generator=torch.Generator().manual_seed(1)))


def forwards_of(model: Toy) -> ParkedForwards:
    return ParkedForwards(model, model.model.layers, torch.device("cpu"), "toy")


def held(forward: Parked) -> int:
    return sum(forward.held().values())


def started(model: Toy, forwards: ParkedForwards | None = None) -> ParkedStream:
    stream, forwards = ParkedStream(), forwards or forwards_of(model)
    for ids in BATCHES:
        stream.append(forwards.starting(ids))
    return stream


@torch.no_grad()
def run_block(model: Toy, index: int, forward: Parked) -> Any:
    block = model.model.layers[index]
    return forward.run(index, partial(type(block).forward, block))


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("name", TOYS)
def test_waiting_forwards_give_what_the_model_gives(name: str, runs: int) -> None:
    model = TOYS[name][0]()
    forwards = forwards_of(model)
    stream = started(model, forwards)
    assert stream.n_tokens == 30
    for index, block in enumerate(model.model.layers):

        def answer(forward: Parked, index: int = index, block: Any = block) -> Any:
            for _ in range(runs - 1):  # with other weights, and what they write is gone
                block.linear.weight.data.neg_()
                run_block(model, index, forward)
                block.linear.weight.data.neg_()
                run_block(model, index, forward)
            return run_block(model, index, forward)

        stream.update(answer)
    with torch.no_grad():
        whole = [model.model(ids).last_hidden_state for ids in BATCHES]
        logits = [model(ids).logits for ids in BATCHES]
    assert all(map(torch.equal, stream.hidden(), whole))
    with forwards.head() as head:
        for batch, wanted in zip(stream.hidden(), logits, strict=True):
            assert torch.equal(head(batch.flatten(0, 1)), wanted.flatten(0, 1))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", TOYS)
def test_the_answer_that_is_handed_back_counts_and_no_other(name: str) -> None:
    """The middle block runs with its own weights and with others: handed back is the first, then the second."""
    model = TOYS[name][0]()
    middle = model.model.layers[1].linear
    found = []
    for place in (0, 1):
        forward = Parked(forwards_of(model), BATCHES[0])
        forward.go_on(run_block(model, 0, forward))
        answers = [run_block(model, 1, forward)]
        middle.weight.data.neg_()
        answers.append(run_block(model, 1, forward))
        if place == 0:
            middle.weight.data.neg_()
        forward.go_on(answers[place])
        forward.go_on(run_block(model, 2, forward))
        with torch.no_grad():
            assert torch.equal(forward.hidden, model.model(BATCHES[0]).last_hidden_state)
        found.append(forward.hidden)
    assert not torch.equal(*found)


def test_every_stream_has_forwards_of_its_own() -> None:
    model = TOYS["dict"][0]()
    one, other = started(model), started(model)
    linear = model.model.layers[1].linear
    for index in range(3):
        one.update(partial(run_block, model, index))
        before = linear.weight.data.clone()
        linear.weight.data.zero_()
        other.update(partial(run_block, model, index))
        linear.weight.data = before
    with torch.no_grad():
        assert torch.equal(next(one.hidden()), model.model(BATCHES[0]).last_hidden_state)
        linear.weight.data.zero_()
        assert torch.equal(next(other.hidden()), model.model(BATCHES[0]).last_hidden_state)
    assert one.sums() != other.sums()


def test_a_forward_that_is_given_up_lets_go_of_everything_and_of_no_setting() -> None:
    model = TOYS["tokens"][0]()
    stream = started(model)
    stream.update(partial(run_block, model, 0))
    assert all(held(forward) > 0 for forward in stream)
    alive = [weakref.ref(hidden) for hidden in stream.hidden()]
    stream.close()
    gc.collect()
    assert torch.is_grad_enabled()
    assert not list(stream)
    assert not any(hidden() is not None for hidden in alive)


def test_a_block_out_of_turn_is_a_mistake() -> None:
    model = TOYS["dict"][0]()
    with pytest.raises(AssertionError, match="waits in block 0 does not go through block 2"):
        run_block(model, 2, Parked(forwards_of(model), BATCHES[0]))


def test_an_error_of_the_model_reaches_the_caller() -> None:
    model = TOYS["nested"][0]()
    forward = Parked(forwards_of(model), BATCHES[0])
    answer = run_block(model, 0, forward)
    model.model.layers[1].register_forward_pre_hook(lambda *inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forward.go_on(answer)
    assert all("forward" not in module.__dict__ for module in model.modules())


# -- real models ---------------------------------------------------------------------------------------------
def streamed(folder: Path, batches: list[Tensor]) -> tuple[Skeleton, list[Tensor], int]:
    """Logits of all batches, and the most bytes that their forwards held."""
    skeleton = Skeleton(open_source(folder))
    stream = skeleton.new_stream()
    skeleton.record(batches, stream.append)
    most = 0
    for block in skeleton.blocks:
        most = max(most, sum(held(forward) for forward in stream))
        with block.loaded():
            stream.update(block.forward)
    with skeleton.head() as logits_of:
        return skeleton, [logits_of(hidden.flatten(0, 1)) for hidden in stream.hidden()], most


@pytest.mark.parametrize("name", tiny.some_of(tiny.PARKED, quick="gemma4"))
def test_parked_forwards_equal_the_whole_model(
    name: str, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmquant.quant.matmul._ONEDNN", None)  # products as in the stock model
    folder, generator = tiny_model(name), torch.Generator().manual_seed(1)
    batches = [torch.randint(0, 512, shape, generator=generator) for shape in ((2, 40), (2, 40), (1, 24))]
    skeleton, logits, held = streamed(folder, batches)
    assert skeleton.parked
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for found, ids in zip(logits, batches, strict=True):
            assert torch.equal(found, stock(ids, use_cache=False).logits.flatten(0, 1))
    counted = skeleton.stream_bytes(160, (2, 40)) + skeleton.stream_bytes(24, (1, 24))
    assert held <= counted <= 1.3 * held


def test_bytes_are_those_of_whole_batches_and_of_the_rest(tiny_model: Callable[[str], Path]) -> None:
    skeleton = Skeleton(open_source(tiny_model("gemma4")))
    one, three, four = (skeleton.stream_bytes(n * 32, (n, 32)) for n in (1, 3, 4))
    assert one < three < four
    assert skeleton.stream_bytes(11 * 32, (4, 32)) == 2 * four + three
    assert skeleton.stream_bytes(3 * 32, (4, 32)) == three
    assert all(tensor.is_meta for _, tensor in skeleton.model.named_parameters()), "nothing is loaded for that"


def test_batches_of_one_shape_keep_the_arguments_of_their_own_tokens(tiny_model: Callable[[str], Path]) -> None:
    """Calibration must not run with the inputs by layer of the evaluation, whose batches have the same shape."""
    folder = tiny_model("gemma4")
    skeleton = Skeleton(open_source(folder))
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().model
    ids = torch.randint(0, 512, (2, 1, 16), generator=torch.Generator().manual_seed(1))
    streams = [skeleton.new_stream(), skeleton.new_stream()]
    for batch, stream in zip(ids, streams, strict=True):
        skeleton.record([batch], stream.append)
    given: list[Tensor] = []
    with skeleton.blocks[0].loaded() as block:
        block.module.per_layer_input_gate.register_forward_hook(
            lambda module, inputs, gated: given.append(gated.clone())
        )
        projected: list[Tensor] = []
        block.module.per_layer_projection.register_forward_pre_hook(lambda module, inputs: projected.append(inputs[0]))
        for stream in streams:
            stream.update(block.forward)
    with torch.no_grad():
        for batch, gated, product in zip(ids, given, projected, strict=True):
            inputs = stock.project_per_layer_inputs(stock.embed_tokens(batch), stock.get_per_layer_inputs(batch, None))
            torch.testing.assert_close(product, block.module.act_fn(gated) * inputs[:, :, 0])
    assert not torch.equal(*projected)
    assert not skeleton.blocks[0].calls, "there is nothing that a later batch could overwrite"

"""Models of three small blocks that share what the tests say, in the form that transformers' models have."""

from collections import UserDict, namedtuple
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from llmquant.model.weights import Weights

Named = namedtuple("Named", ["first", "second"])


class Block(nn.Module):
    """Adds to the hidden states a linear of them and of all that it is given; `share` does the sharing."""

    def __init__(self, index: int, share: Callable[..., Any]) -> None:
        super().__init__()
        self.linear, self.index, self.share = nn.Linear(8, 8), index, share

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.share(self, hidden + torch.tanh(self.linear(hidden)), *args, **kwargs)


class Base(nn.Module):
    def __init__(self, loop: Callable[..., Tensor], share: Callable[..., Any]) -> None:
        super().__init__()
        self.embedding, self.by_layer = nn.Embedding(32, 8), nn.Embedding(32, 8)
        self.layers = nn.ModuleList(Block(index, share) for index in range(3))
        self.norm, self.loop = nn.LayerNorm(8), loop

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.norm(self.loop(self, input_ids, self.embedding(input_ids))))


class Toy(nn.Module):
    """`loop` (base, ids, hidden) goes through the blocks; `share` (block, hidden, ...) is the end of a block."""

    def __init__(self, loop: Callable[..., Tensor], share: Callable[..., Any] = lambda block, hidden: hidden) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.lm_head = Base(loop, share), nn.Linear(8, 32)

    @property
    def base_model(self) -> nn.Module:
        return self.model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids).last_hidden_state) / 2)


class ToyWeights(Weights):
    """The weights of a model that has them already."""

    def __init__(self, model: Any) -> None:
        self._model, self.names = model, list(model.state_dict())
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.source: Any = SimpleNamespace(name="toy")


# -- loops over the blocks, and ends of blocks ----------------------------------------------------------------
def plain(base: Any, ids: Tensor, hidden: Tensor) -> Tensor:
    mask = torch.ones(ids.shape)
    for block in base.layers:
        hidden = block(hidden, mask)
    return hidden


def masked(block: Any, hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden * mask[..., None]


def sharing(container: Callable[[], Any]) -> Callable[..., Tensor]:
    """Blocks get one container."""

    def loop(base: Any, ids: Tensor, hidden: Tensor) -> Tensor:
        shared = container()
        for block in base.layers:
            hidden = block(hidden, shared=shared)
        return hidden

    return loop


def keyed(block: Any, hidden: Tensor, shared: Any) -> Tensor:
    """The second block writes, the third reads; each adds one to a count, which a second run must not see."""
    shared["runs"] = shared.get("runs", 0) + 1
    if block.index == 1:
        shared["keys"] = (hidden * 2, [hidden])
    return hidden * shared["runs"] + (shared["keys"][0] + shared["keys"][1][0] if block.index == 2 else 0)


def listed(block: Any, hidden: Tensor, shared: list[Tensor]) -> Tensor:
    shared.append(hidden)
    return hidden + sum(shared) / len(shared)


def nested(block: Any, hidden: Tensor, shared: tuple[Any, Any]) -> Tensor:
    one, other = shared
    one["all"].append(hidden)
    assert other.second is one, "the same container twice is one container in a copy, too"
    return hidden + torch.stack(other.second["all"]).sum(0)


def make_nested() -> tuple[Any, Any]:
    one: dict[str, list[Tensor]] = {"all": []}
    return one, Named(None, one)


def finding(base: Any, ids: Tensor, hidden: Tensor) -> Tensor:
    """Each block but the first is given what the one before it found."""
    found = None
    for block in base.layers:
        hidden, found = block(hidden, found=found)
    return hidden


def found_late(block: Any, hidden: Tensor, found: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return (hidden if found is None else hidden + found), (hidden * 3 if block.index else None)


def between(base: Any, ids: Tensor, hidden: Tensor) -> Tensor:
    for block in base.layers:
        hidden = block(hidden * 2)
    return hidden


def between_in_place(base: Any, ids: Tensor, hidden: Tensor) -> Tensor:
    for block in base.layers:
        hidden = block(hidden)
        hidden.mul_(2)
    return hidden


def by_tokens(base: Any, ids: Tensor, hidden: Tensor) -> Tensor:
    with torch.no_grad():  # as some models do: what it leaves behind is the thread's
        for block in base.layers:
            hidden = block(hidden, base.by_layer(ids))
    return hidden


def by_padding(base: Any, ids: Tensor, hidden: Tensor) -> Tensor:
    padding = base.by_layer.weight[0]  # a part of the weights, for as long as the forward waits
    for block in base.layers:
        hidden = block(hidden, ids[..., None] * padding)
    return hidden


def adds(block: Any, hidden: Tensor, other: Tensor) -> Tensor:
    return hidden + other


def mutable(base: Any, ids: Tensor, hidden: Tensor) -> Tensor:
    shared = SimpleNamespace(sum=torch.zeros(()))
    for block in base.layers:
        hidden = block(hidden, shared)
    return hidden


def writes_attribute(block: Any, hidden: Tensor, shared: Any) -> Tensor:
    shared.sum = shared.sum + hidden.sum()
    return hidden + shared.sum


def writes_tensor(block: Any, hidden: Tensor, mask: Tensor) -> Tensor:
    mask += 1
    return hidden * mask[..., None]


def cycled(base: Any, ids: Tensor, hidden: Tensor) -> Tensor:
    for _ in range(2):
        with nullcontext():
            for block in base.layers:
                hidden = block(hidden)
    return hidden


def halved(base: Any, ids: Tensor, hidden: Tensor) -> Tensor:
    for block in base.layers[:2]:
        hidden = block(hidden)
    return hidden


def backwards(base: Any, ids: Tensor, hidden: Tensor) -> Tensor:
    for block in reversed(base.layers):
        hidden = block(hidden)
    return hidden


def broken(base: Any, ids: Tensor, hidden: Tensor) -> Tensor:
    raise KeyError("language")


WRITES = "blocks write into an argument that they share"
# name -> (the model, why its forwards are parked)
TOYS: dict[str, tuple[Callable[[], Toy], str | None]] = {
    "hidden states": (lambda: Toy(plain, masked), None),
    "dict": (lambda: Toy(sharing(dict), keyed), WRITES),
    "UserDict": (lambda: Toy(sharing(UserDict), keyed), WRITES),
    "list": (lambda: Toy(sharing(list), listed), WRITES),
    "nested": (lambda: Toy(sharing(make_nested), nested), WRITES),
    "found": (lambda: Toy(finding, found_late), "a block is given what a block before it found"),
    "between": (lambda: Toy(between), "hidden states change between two blocks"),
    "in place": (lambda: Toy(between_in_place), "hidden states change between two blocks"),
    "tokens": (lambda: Toy(by_tokens, adds), "an argument of a block depends on the tokens"),
    "view": (lambda: Toy(by_padding, adds), "an argument of a block depends on the tokens"),
}
# name -> (the model, why it is refused)
REFUSED: dict[str, tuple[Callable[[], Toy], str]] = {
    "cycled": (lambda: Toy(cycled), "a block runs 2 times in one forward"),
    "halved": (lambda: Toy(halved), "2 of 3 blocks run in one forward"),
    "backwards": (lambda: Toy(backwards), "block 2 runs as number 0"),
    "broken": (lambda: Toy(broken), "its forward fails (KeyError: 'language')"),
    "object": (lambda: Toy(mutable, writes_attribute), "block 0 writes into a SimpleNamespace that it is given"),
    "tensor": (lambda: Toy(plain, writes_tensor), "block 0 writes into a tensor that it is given"),
}

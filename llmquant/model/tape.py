"""The tape: one forward of the model records what each of its blocks is called with.

The `forward` of every block is replaced on the instance by a stand-in, which lets hidden states pass through unchanged.
This is for models whose blocks share nothing but hidden states (`sharing.py`). A stream is just those then: it can be
spilled, kept and resumed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.errors import SourceError

# (index of the block, its own forward, args, kwargs) -> what the model gets as the block's output
StandIn = Callable[[int, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@dataclass
class Call:
    """Arguments of one block's forward, hidden states left out; `at` is where they go."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    at: int | str

    def __call__(self, forward: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Run `forward` on `hidden`; the hidden states it returns."""
        if isinstance(self.at, int):
            args = (*self.args[: self.at], hidden, *self.args[self.at :])
            return hidden_of(forward(*args, **self.kwargs))
        return hidden_of(forward(*self.args, **{**self.kwargs, self.at: hidden}))


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returned."""
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


class Stop(Exception):  # noqa: N818 (not an error)
    """Ends the model's forward where nothing more is wanted from it."""


def stop(*args: Any, **kwargs: Any) -> None:
    raise Stop


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of the module's class, whatever stands in for it."""
    return partial(type(module).forward, module)


def ended_before_head(model: Any) -> AbstractContextManager[None]:
    """Forwards of `model` end with `Stop` where its head would run, which makes the logits."""
    head = model.get_output_embeddings()
    return nullcontext() if head is None else forward_replaced(head, stop)


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`forward` in place of the module's own while the `with` lasts."""
    # On the instance, not around it: class, attributes and state-dict names stay what the model expects.
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


@contextmanager
def stand_ins(blocks: Sequence[nn.Module], stand_in: StandIn) -> Iterator[None]:
    """`stand_in` in place of every block's forward while the `with` lasts."""
    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(forward_replaced(block, _bind(stand_in, index, own_forward(block))))
        yield


def _bind(stand_in: StandIn, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: stand_in(index, forward, args, kwargs)


def answer(hidden: Tensor, width: int) -> Any:
    """What a block returns for `hidden`: a tensor where `width` is 0, else a tuple of `width` values."""
    return (hidden, *[None] * (width - 1)) if width else hidden


class Tape:
    """Records the calls of all blocks in one forward in which they let hidden states pass.

    widths    of each block's answer
    calls     what each block was called with
    first     the hidden states that entered the first one
    """

    def __init__(self, where: str, widths: Sequence[int]) -> None:
        self._where, self._widths = where, widths
        self.calls: list[Call] = []
        self.first = torch.empty(0)

    def stand_in(self, index: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        hidden, call = take_hidden(args, kwargs)
        if index == 0:
            self.first = hidden
        if index != len(self.calls) or hidden is not self.first:
            raise self._refusal(index, "is not given what the block before it returned")
        self.calls.append(call)
        return answer(hidden, self._widths[index])

    def check(self, known: Sequence[Call]) -> None:
        """All blocks were called, and with the arguments that an earlier batch of this shape saw (none: the first)."""
        if len(self.calls) != len(self._widths):
            raise self._refusal(len(self.calls), "is not run")
        for index, (mine, other) in enumerate(zip(self.calls, known, strict=False)):
            pairs = zip(tensors((mine.args, mine.kwargs)), tensors((other.args, other.kwargs)), strict=True)
            if any(a is not b and not torch.equal(a, b) for a, b in pairs):
                raise self._refusal(index, "has an argument that depends on the tokens")

    def _refusal(self, index: int, got: str) -> SourceError:
        return SourceError(
            self._where,
            f"block {index} {got}, which made-up tokens did not show",
            expected="blocks that share hidden states only",
        )


def take_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """The hidden states among a block's arguments, which are the first float tensor, and the call without them."""
    for at, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value, Call(args[:at] + args[at + 1 :], kwargs, at)
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            return value, Call(args, {key: item for key, item in kwargs.items() if key != name}, name)
    raise SourceError("decoder block", "is called without hidden states")


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of a value and of the containers in it."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(item)

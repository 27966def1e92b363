"""The tape: one forward of the model records what each of its blocks is called with.

The `forward` of every block is replaced on the instance by a stand-in, which lets hidden states pass through unchanged.
A model whose blocks share more than hidden states is refused by name.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
            return _hidden(forward(*args, **self.kwargs))
        return _hidden(forward(*self.args, **{**self.kwargs, self.at: hidden}))


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


class Stop(Exception):  # noqa: N818 (not an error)
    """Ends the model's forward where nothing more is wanted from it."""


def stop(*args: Any, **kwargs: Any) -> None:
    raise Stop


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
            own = partial(type(block).forward, block)
            stack.enter_context(forward_replaced(block, _bind(stand_in, index, own)))
        yield


def _bind(stand_in: StandIn, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: stand_in(index, forward, args, kwargs)


def answer(hidden: Tensor, width: int) -> Any:
    """What a block returns for `hidden`: a tensor where `width` is 0, else a tuple of `width` values."""
    return (hidden, *[None] * (width - 1)) if width else hidden


class Tape:
    """Records the calls of all blocks in one forward, and whether hidden states are all that they share.

    `width` is that of `answer`. If it is None, the first block, which must be loaded, is run for real to learn it.
    `where` and `model_class` are for errors.
    """

    def __init__(self, where: str, model_class: str, n_blocks: int, width: int | None) -> None:
        self.where, self.model_class, self.n_blocks = where, model_class, n_blocks
        self.width = width
        self.calls: list[Call] = []
        self.first = torch.empty(0)
        self._last: Tensor | None = None
        self._others: list[Tensor] = []  # what the first block returned besides its hidden states

    def stand_in(self, index: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        hidden, at = take_hidden(args, kwargs)
        if index != len(self.calls):
            self._refuse(f"block {index} runs as number {len(self.calls)}")
        if self._last is not None and hidden is not self._last:
            self._refuse(f"hidden states change between block {index - 1} and block {index}")
        rest = args[:at] + args[at + 1 :] if isinstance(at, int) else args
        named = {name: value for name, value in kwargs.items() if name != at}
        if any(tensor is other for tensor in _tensors((rest, named)) for other in self._others):
            self._refuse(f"block {index} is given another output of the block before it")
        self.calls.append(Call(rest, named, at))
        self._last = hidden
        if index == 0:
            self.first = hidden
            if self.width is None:
                return self._learn(hidden, (rest, named), forward(*args, **kwargs))
        return answer(hidden, self.width or 0)

    def _learn(self, hidden: Tensor, arguments: Any, output: Any) -> Any:
        if any(_tensors_in_mappings(arguments)):
            self._refuse("blocks write into an argument that they share")
        self.width = len(output) if isinstance(output, tuple) else 0
        if not isinstance(output, tuple):
            return hidden
        self._others = list(_tensors(output[1:]))
        return (hidden, *output[1:])

    def check(self, known: Sequence[Call]) -> None:
        """All blocks were called, and with the arguments that an earlier batch of this shape saw (none: the first)."""
        if len(self.calls) != self.n_blocks:
            self._refuse(f"{len(self.calls)} of {self.n_blocks} blocks run in one forward")
        for index, (mine, other) in enumerate(zip(self.calls, known, strict=False)):
            pairs = zip(_tensors((mine.args, mine.kwargs)), _tensors((other.args, other.kwargs)), strict=True)
            if any(a is not b and not torch.equal(a, b) for a, b in pairs):
                self._refuse(f"an argument of block {index} depends on the tokens")

    def _refuse(self, got: str) -> None:
        raise SourceError(
            self.where,
            f"{self.model_class} cannot be streamed block by block: {got}",
            expected="blocks that share hidden states only",
        )


def take_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, int | str]:
    """The hidden states among a block's arguments and their place: the first float tensor."""
    for i, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value, i
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            return value, name
    raise SourceError("decoder block", "is called without hidden states")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _tensors_in_mappings(arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Iterator[bool]:
    """For each dict or list among a block's arguments, whether it holds tensors once the block has run.

    Masks and rope tables come as tensors or tuples; a dict or list with tensors is one that blocks fill.
    """
    rest, named = arguments
    for value in (*rest, *named.values()):
        if isinstance(value, dict | list):
            yield any(True for _ in _tensors(value))

"""Parked forwards: the model's whole forward over each batch, waiting in a block until the block has been run.

This is for models whose blocks share more than hidden states (`sharing.py`). Each forward is a greenlet, a call stack
of its own in the same thread. In the stand-in of a block it hands out the arguments of that call. The pipeline runs the
block on them and hands the result back, and the forward goes on to the next block. What happens outside the blocks is
done by the model's own code: inputs by layer, work between blocks, the final norm.

A block may be run several times on the same arguments, with other weights each time, before one result is handed back.
So that every run finds what the first one found, each gets its own copies of the dicts and lists among the arguments.
What it writes into them reaches the forward with the result that is handed back, and with no other.

The price: what forwards hold lies in memory, on the device that computes. It has no place in a file or a snapshot.

Shapes: B batch, T time, D hidden, N tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from llmquant.errors import SourceError
from llmquant.model.made_up import made_up
from llmquant.model.paused import held
from llmquant.model.tape import forward_replaced, own_forward, stand_ins, take_hidden
from llmquant.model.weights import Weights


@dataclass(frozen=True)
class Answer:
    """What one run of a block returned, and wrote into its copies of the arguments."""

    output: Any
    copies: "_Copies"


class Parked:
    """One forward, which waits in a block, or stands before the head.

    n_tokens   of its batch
    hidden     the hidden states that the block is called with; behind the last block, those that the head reads
    """

    def __init__(self, forwards: "ParkedForwards", ids_BT: Tensor) -> None:
        self.n_tokens = ids_BT.numel()
        self.hidden = torch.empty(0)
        self._forwards, self._run = forwards, greenlet(forwards.run)
        self._call: tuple[int, tuple[Any, ...], dict[str, Any]] | None = None
        self._go(ids_BT)

    def run(self, index: int, forward: Callable[..., Any]) -> Answer:
        """`forward` of the block `index`, in which it waits, on the arguments of the call."""
        at, args, kwargs = self._call or (None, (), {})
        assert at == index, f"a forward that waits in block {at} does not go through block {index}"
        copies = _Copies()
        return Answer(forward(*copies.of(args), **copies.of(kwargs)), copies)

    def go_on(self, answer: Answer) -> None:
        """Hand the answer back; the forward goes on to the next block, or to the head."""
        answer.copies.write_home()
        self._go(answer.copies.home(answer.output))

    def _go(self, value: Any) -> None:
        self._call, self.hidden = None, torch.empty(0)  # the forward alone holds them, and lets go of them
        with self._forwards.running():
            self._run.parent = getcurrent()
            found = self._run.switch(value)
        if self._run.dead:
            self.hidden = found
        else:
            self._call, self.hidden = found, take_hidden(*found[1:])[0]

    def held(self) -> dict[int, int]:
        """Address and bytes of every storage that it holds while it waits in a block."""
        return held(self._run.gr_frame)

    def close(self) -> None:
        """Give up, and free what the forward holds."""
        self._call, self.hidden = None, torch.empty(0)
        if not self._run.dead:
            with self._forwards.running():
                self._run.throw()


Batch = Tensor | Parked  # what a stream holds of a batch: its hidden states, or its forward


class _Ended(Exception):  # noqa: N818 (not an error)
    """Carries what the model found before its head out of the rest of its forward."""


class ParkedForwards:
    """The forwards of one model, up to its head, and the head behind them.

    `where` is the checkpoint's name, for errors.
    """

    def __init__(self, model: Any, blocks: Sequence[nn.Module], device: torch.device, where: str) -> None:
        self._model, self._blocks, self._device = model, blocks, device
        self._base = model.base_model
        self._kind: Any = tuple  # type of what the base model returns
        if self._base is model:
            raise SourceError(where, f"{type(model).__name__} has no base model under its head")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Forwards run within it only: their settings do not stay behind when they wait."""

        def park(index: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            return getcurrent().parent.switch((index, args, kwargs))

        def end(*args: Any, **kwargs: Any) -> None:
            raise _Ended(own_forward(self._base)(*args, **kwargs))

        with stand_ins(self._blocks, park), forward_replaced(self._base, end), torch.no_grad():
            yield

    def starting(self, ids_BT: Tensor) -> Callable[[], Parked]:
        """Each call starts another forward of this batch: every stream has its own."""
        return partial(Parked, self, ids_BT)

    def run(self, ids_BT: Tensor) -> Tensor:
        """One forward: the hidden states [B, T, D] that the head reads."""
        try:
            self._model(input_ids=ids_BT.to(self._device), use_cache=False)
        except _Ended as ended:
            output = ended.args[0]
        self._kind = type(output)
        hidden: Tensor = output if isinstance(output, Tensor) else output[0]
        return hidden

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from such hidden states [N, D] to float32 logits [N, V], with all that the model does to them."""
        hidden_now = torch.empty(0)

        def found(*args: Any, **kwargs: Any) -> Any:
            if issubclass(self._kind, Tensor):
                return hidden_now
            return (hidden_now,) if issubclass(self._kind, tuple) else self._kind(last_hidden_state=hidden_now)

        def logits(hidden_ND: Tensor) -> Tensor:
            nonlocal hidden_now
            hidden_now = hidden_ND[None].to(self._device)
            ids = torch.zeros(1, hidden_ND.shape[0], dtype=torch.long, device=self._device)
            out: Tensor = self._model(input_ids=ids, use_cache=False).logits[0].float()
            return out

        with forward_replaced(self._base, found), torch.no_grad():
            yield logits


class ParkedBytes:
    """Bytes that a forward holds at most while it waits, found on made-up weights.

    `grows`: whether blocks add to it, such as keys and values for later blocks.
    """

    def __init__(self, model: Any, blocks: Sequence[nn.Module], weights: Weights, *, grows: bool) -> None:
        self._model, self._blocks, self._weights, self._grows = model, blocks, weights, grows
        self._known: dict[tuple[int, int], int] = {}

    def of(self, shape: tuple[int, int]) -> int:
        """Of one batch [B, T] of this shape: what it holds before the first block, measured, and what blocks add."""
        if shape not in self._known:
            (before,) = self._sizes(shape, 1)
            line, square = self._added
            self._known[shape] = before + math.ceil(shape[0] * (line * shape[1] + square * shape[1] ** 2))
        return self._known[shape]

    @cached_property
    def _added(self) -> tuple[float, float]:
        """What blocks add, as factors of T and T^2, by two runs over few tokens.

        Keys and values are a line in T; what every token keeps of every other is a square.
        """
        few, more = 8, 16
        # The first block adds its own hidden states to the embeddings, even where others add nothing.
        n_blocks = len(self._blocks) if self._grows else 2
        of_few, of_more = (
            (max(sizes) - sizes[0]) / n for n in (few, more) for sizes in [self._sizes((1, n), n_blocks)]
        )
        square = max(0.0, (of_more - of_few) / (more - few))
        return max(0.0, of_few - few * square), square

    def _sizes(self, shape: tuple[int, int], n_blocks: int) -> list[int]:
        """What a forward holds in each of the first blocks."""
        with made_up(self._model, self._weights.device), torch.no_grad():
            own = {self._weights.get(name).untyped_storage().data_ptr() for name in self._weights.names}
            forwards = ParkedForwards(self._model, self._blocks, self._weights.device, self._weights.source.name)
            forward, sizes = Parked(forwards, torch.zeros(shape, dtype=torch.long)), []
            for index, block in enumerate(self._blocks[:n_blocks]):
                sizes.append(sum(nbytes for address, nbytes in forward.held().items() if address not in own))
                if index + 1 < n_blocks:
                    forward.go_on(forward.run(index, own_forward(block)))
            forward.close()
        return sizes


class _Copies:
    """Copies of the dicts and lists among a block's arguments, and the way home for what is written into them."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Any, Any]] = []  # the forward's own, its copy

    def of(self, value: Any) -> Any:
        """`value` with copies in it; all that is no container is the same object."""
        if isinstance(value, tuple):
            return _rebuilt(value, self.of)
        if not isinstance(value, MutableMapping | MutableSequence):
            return value
        for own, copied in self._pairs:
            if own is value:
                return copied
        copied = copy(value)
        self._pairs.append((value, copied))
        for key, item in _items(value):
            copied[key] = self.of(item)
        return copied

    def home(self, value: Any) -> Any:
        """`value` with the forward's own containers where it has copies of them."""
        if isinstance(value, tuple):
            return _rebuilt(value, self.home)
        return next((own for own, copied in self._pairs if copied is value), value)

    def write_home(self) -> None:
        """What was written into copies is now in the forward's own."""
        for own, copied in self._pairs:
            written = [(key, self.home(item)) for key, item in _items(copied)]
            if [(key, id(item)) for key, item in _items(own)] == [(key, id(item)) for key, item in written]:
                continue
            own.clear()
            if isinstance(own, MutableMapping):
                own.update(written)
            else:
                own.extend(item for _, item in written)


def _items(container: Any) -> list[tuple[Any, Any]]:
    return list(container.items() if isinstance(container, MutableMapping) else enumerate(container))


def _rebuilt(values: tuple[Any, ...], function: Callable[[Any], Any]) -> tuple[Any, ...]:
    """The tuple with `function` of its items; the same object where nothing changes."""
    items = [function(value) for value in values]
    if all(new is old for new, old in zip(items, values, strict=True)):
        return values
    return type(values)(*items) if hasattr(values, "_fields") else type(values)(items)

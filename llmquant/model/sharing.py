"""What the blocks of a model share besides hidden states, found before any weight is read.

The model's own forward runs on made-up weights over a few tokens, three times: with its blocks, with stand-ins that let
hidden states pass, and so again with other tokens. Where every block gets the same arguments in all three, hidden
states are all that the blocks share, and one recorded call of each block serves every batch (`tape.py`). Where it does
not, whole forwards must be kept, batch by batch (`parked.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.errors import LLMQuantError, SourceError
from llmquant.model.made_up import made_up
from llmquant.model.parked import Parked, ParkedForwards
from llmquant.model.tape import Stop, answer, ended_before_head, hidden_of, stand_ins, take_hidden, tensors
from llmquant.model.weights import Weights

_TOKENS = 8  # enough to see what depends on what
_AGAIN = "blocks that find the same when they are run again"


@dataclass(frozen=True)
class Sharing:
    """What was found.

    reason   why hidden states are not all that the blocks share; None where they are
    widths   of each block's answer (`tape.answer`)
    inner    embeddings outside the blocks that run when the first block has run, or of whose weights a forward holds a
             part while it waits
    grows    whether blocks keep something for later blocks
    """

    reason: str | None
    widths: tuple[int, ...]
    inner: frozenset[nn.Module] = frozenset()
    grows: bool = False


@dataclass
class _Argument:
    """One argument of a block: all that it held at the call. A `container` is one that a block could write into."""

    container: bool
    leaves: list[Any]

    def equals(self, other: "_Argument") -> bool:
        return _equal(self.leaves, other.leaves)


@dataclass
class _Seen:
    """One forward: which blocks ran, with which hidden states and with which other arguments."""

    order: list[int] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)  # whether hidden states are the very tensor that was handed on
    arguments: list[list[_Argument]] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    inner: set[nn.Module] = field(default_factory=set)


def find_sharing(model: Any, blocks: Sequence[nn.Module], weights: Weights) -> Sharing:
    """Run the model on made-up weights. SourceError where its blocks do not run once each, in their order, or where a
    block writes into what cannot be copied."""
    with made_up(model, weights.device), torch.no_grad():
        trial = _Trial(model, blocks, weights)
        try:
            real = trial.forward(seed=0, real=True, widths=())
        except LLMQuantError:
            raise
        except Exception as error:  # whatever the model's code raises
            raise trial.refusal(f"its forward fails ({_brief(error)})", "a model that runs on text alone") from error
        trial.check_order(real.order)
        widths = tuple(real.widths)
        reason, grows = trial.reason(real, widths)
        shape = real.hidden[0].shape
        if _TOKENS not in shape[:-1] or (reason is None and shape[:2] != (1, _TOKENS)):
            raise trial.refusal(f"its hidden states are {list(shape)} for {_TOKENS} tokens")
        inner = real.inner | trial.viewed() if reason else set()
        return Sharing(reason, widths, frozenset(inner), grows)


class _Trial:
    """The model's forwards on made-up weights, and what follows from comparing them."""

    def __init__(self, model: Any, blocks: Sequence[nn.Module], weights: Weights) -> None:
        self._model, self._blocks, self._weights = model, blocks, weights
        inside = {id(module) for block in blocks for module in block.modules()}
        self._embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding) and id(m) not in inside]

    def forward(self, seed: int, *, real: bool, widths: Sequence[int]) -> _Seen:
        """One forward over random tokens; blocks run where `real`, else hidden states pass through."""
        seen, last = _Seen(), torch.empty(0)

        def stand_in(index: int, forward: Any, args: Any, kwargs: Any) -> Any:
            nonlocal last
            hidden, call = take_hidden(args, kwargs)
            others = (*call.args, *call.kwargs.values())
            seen.order.append(index)
            seen.same.append(hidden is last or len(seen.order) == 1)
            seen.hidden.append(hidden.clone())
            seen.arguments.append([_Argument(_may_be_written(it), list(_leaves(it))) for it in others])
            output = self._run(index, forward, args, kwargs) if real else answer(hidden, widths[index])
            seen.widths.append(len(output) if isinstance(output, tuple) else 0)
            last = hidden_of(output)
            return output

        def note(module: nn.Module, inputs: Any) -> None:
            if seen.order:
                seen.inner.add(module)

        generator = torch.Generator().manual_seed(seed)
        vocabulary = self._model.get_input_embeddings().num_embeddings
        ids = torch.randint(vocabulary, (1, _TOKENS), generator=generator).to(self._weights.device)
        with ExitStack() as stack:
            for module in self._embeddings:
                stack.callback(module.register_forward_pre_hook(note).remove)
            stack.enter_context(ended_before_head(self._model))
            stack.enter_context(stand_ins(self._blocks, stand_in))
            with suppress(Stop):
                self._model(input_ids=ids, use_cache=False)
        return seen

    def _run(self, index: int, forward: Any, args: Any, kwargs: Any) -> Any:
        """The block itself; refused where it could not be run again with the same arguments."""
        before = [(tensor, tensor._version) for tensor in tensors((args, kwargs))]
        objects = list(_objects((args, kwargs)))
        held = [list(_leaves(vars(item))) for item in objects]
        output = forward(*args, **kwargs)
        if any(tensor._version != version for tensor, version in before):
            raise self.refusal(f"block {index} writes into a tensor that it is given", _AGAIN)
        for item, leaves in zip(objects, held, strict=True):
            if not _equal(leaves, list(_leaves(vars(item)))):
                raise self.refusal(f"block {index} writes into a {type(item).__name__} that it is given", _AGAIN)
        return output

    def check_order(self, order: Sequence[int]) -> None:
        n_blocks, most = len(self._blocks), max((order.count(index) for index in set(order)), default=0)
        if most > 1:
            raise self.refusal(f"a block runs {most} times in one forward")
        if len(order) != n_blocks:
            raise self.refusal(f"{len(order)} of {n_blocks} blocks run in one forward")
        for place, index in enumerate(order):
            if place != index:
                raise self.refusal(f"block {index} runs as number {place}")

    def reason(self, real: _Seen, widths: tuple[int, ...]) -> tuple[str | None, bool]:
        """Why the tape cannot hold what the blocks share, and whether they keep something for later blocks."""
        try:
            passed = self.forward(seed=0, real=False, widths=widths)
            others = self.forward(seed=1, real=False, widths=widths)
        except Exception as error:  # the model's code, which gets None for what blocks return besides hidden states
            return f"the model needs more from its blocks than hidden states ({_brief(error)})", True
        counts = [[len(given) for given in seen.arguments] for seen in (real, passed, others)]
        if not counts[0] == counts[1] == counts[2]:
            return "blocks are not always called with the same arguments", True
        given = list(zip(chain(*passed.arguments), chain(*real.arguments), chain(*others.arguments), strict=True))
        found = [with_blocks for without, with_blocks, _ in given if not without.equals(with_blocks)]
        if any(argument.container for argument in found):
            return "blocks write into an argument that they share", True
        if found:
            return "a block is given what a block before it found", True
        if not all(passed.same) or not all(_same(hidden, passed.hidden[0]) for hidden in passed.hidden):
            return "hidden states change between two blocks", False
        if not all(one.equals(other) for one, _, other in given):
            return "an argument of a block depends on the tokens", False
        return None, False

    def viewed(self) -> set[nn.Module]:
        """Embeddings of whose weights a waiting forward holds a part, and with it all of the weights."""
        forwards = ParkedForwards(self._model, self._blocks, self._weights.device, self._weights.source.name)
        forward = Parked(forwards, torch.zeros(1, _TOKENS, dtype=torch.long))
        held = forward.held()
        forward.close()
        return {module for module in self._embeddings if module.weight.untyped_storage().data_ptr() in held}

    def refusal(self, got: str, expected: str = "blocks that run once each, in their order") -> SourceError:
        return SourceError(
            self._weights.source.name,
            f"{type(self._model).__name__} cannot be streamed block by block: {got}",
            expected=expected,
        )


# -- comparing arguments --------------------------------------------------------------------------------------
def _leaves(value: Any) -> Iterator[Any]:
    """All that a value holds, its structure included, as plain values and copies of tensors."""
    if isinstance(value, Tensor):
        yield value.clone()
    elif isinstance(value, Mapping):
        yield list(value)
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, tuple | list):
        yield len(value)
        for item in value:
            yield from _leaves(item)
    elif _is_object(value):
        yield type(value)
        yield from _leaves(vars(value))
    else:
        yield value if isinstance(value, bool | int | float | str) else type(value)


def _may_be_written(value: Any) -> bool:
    """Whether a value is, or holds, a container that a block could write into."""
    return isinstance(value, list | Mapping) or (isinstance(value, tuple) and any(map(_may_be_written, value)))


def _objects(value: Any) -> Iterator[Any]:
    """Objects in a value that are neither tensors nor containers: nobody knows how to copy them."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _objects(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _objects(item)
    elif _is_object(value):
        yield value


def _is_object(value: Any) -> bool:
    plain = isinstance(value, Tensor | nn.Module | type) or callable(value)
    return hasattr(value, "__dict__") and not plain


def _equal(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(map(_same, some, others))


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other)
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]

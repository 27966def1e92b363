"""A causal LM with one decoder block in memory at a time, by the model's own transformers code.

No table of architectures: blocks, the arguments of each, and which linears share an input are found by running the
model's own forward. What its blocks share decides how (`model/sharing.py`).

- The tape (`model/tape.py`): arguments are recorded once. Later the first block's stand-in hands out stored hidden
  states, and the rest of the model's forward (final norm, head, soft-cap) runs on them.
- Parked forwards (`model/parked.py`), where blocks share more than hidden states: each batch of each stream keeps its
  own forward of the model, which waits while the pipeline works.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.model.block import Block
from llmquant.model.meta import open_model
from llmquant.model.parked import Batch, ParkedBytes, ParkedForwards
from llmquant.model.probe import probe
from llmquant.model.sharing import Sharing, find_sharing
from llmquant.model.streams import Stream, new_stream
from llmquant.model.tape import Stop, Tape, answer, ended_before_head, forward_replaced, stand_ins, take_hidden
from llmquant.model.weights import Value, Weights
from llmquant.source.base import Source

CPU = torch.device("cpu")

LogitsOf = Callable[[Tensor], Tensor]  # hidden states [N, D] -> float32 logits [N, V]


class Skeleton:
    """A causal LM without weights, whose blocks are loaded and freed one by one.

    where     the checkpoint's name, for errors
    source    the checkpoint as the model holds it: experts one by one
    weights   its parameters, in and out of memory
    blocks    its decoder blocks, in order
    stack     the path of the module that holds them
    idle      how the names of parts begin that no text reaches
    """

    def __init__(self, source: Source, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> None:
        self.where = source.name
        opened = open_model(source, dtype)
        self.model, self.source = opened.model, opened.source
        self.weights = Weights(self.model, self.source, opened.param_of, device, dtype)
        self.stack = opened.stack
        self._stack = f"{opened.stack}."
        params: list[list[str]] = [[] for _ in opened.blocks]
        for param in self.weights.names:
            if (index := self.block_of(param)) is not None:
                params[index].append(param)
        self.blocks = [
            Block(index, f"{self._stack}{index}", module, params[index], self.weights)
            for index, module in enumerate(opened.blocks)
        ]
        self.idle = tuple(f"{name}." for name in probe(self.where, self.model, self.blocks))
        for name in self.weights.names:  # a class may ask any of its parameters on which device it lies
            if name.startswith(self.idle):
                unread = self.weights.get(name)
                self.weights.put(name, torch.zeros((), dtype=unread.dtype, device=device).expand(unread.shape))
        for module in self.model.modules():  # computed buffers (rope tables) are real and stay on the device
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)

    @property
    def device(self) -> torch.device:
        return self.weights.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.weights.dtype

    @property
    def param_of(self) -> dict[str, str]:
        """Tensor name in the checkpoint -> name in the model, for those the model knows."""
        return self.weights.param_of

    @property
    def _config(self) -> Any:
        return self.model.config.get_text_config(decoder=True)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states between blocks."""
        return int(self._config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding."""
        return int(self.model.get_input_embeddings().num_embeddings)

    @property
    def context(self) -> int | None:
        """The longest sequence that the model was made for, where its config says."""
        length = getattr(self._config, "max_position_embeddings", None)
        return length if isinstance(length, int) else None

    @property
    def modules(self) -> dict[str, Any]:
        """All modules of the model by their names, those that several share by each of them."""
        return self.weights.modules

    def block_of(self, param: str) -> int | None:
        """Index of the block that holds the parameter, None outside the blocks."""
        if not param.startswith(self._stack):
            return None
        return int(param[len(self._stack) :].split(".", 1)[0])

    def experts_of(self, module: str) -> str | None:
        """The module of experts that a linear is part of; None for all others."""
        index = self.block_of(module)
        if index is None or index >= len(self.blocks):  # a layer that the model's class does not know
            return None
        return self.blocks[index].experts_of(module)

    def read_experts_on_demand(self, limit: int) -> int:
        """Have experts read whenever a batch of text uses them, in blocks whose experts would take more than `limit`
        bytes; the most that those of one block would take, 0 where none does.

        They would be there twice in the compute dtype, original and quantized, beside a byte for each code.
        """
        largest = 0
        for block in self.blocks:
            names = [f"{name}.weight" for name in block.shares]
            size = sum(math.prod(self.weights.shape(name)) for name in names) * (2 * self.dtype.itemsize + 1)
            if size > limit:
                self.weights.on_demand.update(names)
                largest = max(largest, size)
        return largest

    def unquantizable(self, module: str) -> str:
        """Why a linear of a block must stay as it is; "" where it need not."""
        index = self.block_of(module)
        if index is not None and (why := self.blocks[index].unseen.get(module)):
            return why
        return "the model wants it in float32" if self.weights.is_strict(f"{module}.weight") else ""

    # -- what the blocks share -----------------------------------------------------------------------------
    @property
    def _modules(self) -> list[nn.Module]:
        return [block.module for block in self.blocks]

    @cached_property
    def sharing(self) -> Sharing:
        """What its blocks share. SourceError where they cannot be run one by one."""
        return find_sharing(self.model, self._modules, self.weights)

    @property
    def parked(self) -> str | None:
        """Why its forwards are parked; None where the tape holds all."""
        return self.sharing.reason

    @cached_property
    def _parked_forwards(self) -> ParkedForwards:
        """Their outer weights are in memory from now on, but for embeddings that only the first block reads."""
        self.weights.load(self._inner)
        return ParkedForwards(self.model, self._modules, self.device, self.where)

    def stream_bytes(self, n_tokens: int, shape: tuple[int, int]) -> int:
        """Bytes of a stream of batches [B, T] of this shape, at most, with `n_tokens` tokens in all."""
        if self.parked is None:
            return n_tokens * self.hidden_size * self.dtype.itemsize
        whole, rest = divmod(n_tokens // shape[1], shape[0])
        sizes = [(whole, shape), (1, (rest, shape[1]))]
        return sum(count * self._parked_bytes.of(each) for count, each in sizes if count and each[0])

    @cached_property
    def _parked_bytes(self) -> ParkedBytes:
        return ParkedBytes(self.model, self._modules, self.weights, grows=self.sharing.grows)

    def _outer(self, *without: nn.Module | None) -> list[str]:
        """Parameters outside the blocks that a text needs, except those of some modules."""
        skip = {name for name, module in self.model.named_modules() if any(module is other for other in without)}
        outside = [name for name in self.weights.names if self.block_of(name) is None]
        return [n for n in outside if n.rpartition(".")[0] not in skip and not n.startswith(self.idle)]

    @cached_property
    def _inner(self) -> list[str]:
        """Parameters outside the blocks that run between them, or might; nearly always a small part."""
        embeddings = [m for m in self.model.modules() if isinstance(m, nn.Embedding) and m not in self.sharing.inner]
        return self._outer(self.model.get_output_embeddings(), *embeddings)

    # -- into the blocks, and out of them ------------------------------------------------------------------
    def record(
        self,
        batches: Iterable[Tensor],
        entry: Callable[[Any], None],
        instead: Mapping[str, Value] = MappingProxyType({}),
    ) -> None:
        """Begin with batches of ids [B, T]: `entry`, a stream's `append`, gets of each what enters the first block.

        instead   other weights of parameters outside the blocks, by name
        Every block knows its arguments afterwards. SourceError where the tape was taken for the blocks and cannot hold
        the arguments of these batches.
        """
        names = self._outer(self.model.get_output_embeddings())
        instead = {name: value for name, value in instead.items() if name in names}
        if self.parked is not None:
            forwards = self._parked_forwards
            with self.weights.loaded([name for name in names if name not in set(self._inner)], instead):
                for ids in batches:
                    entry(forwards.starting(ids))
            return
        with ended_before_head(self.model), self.weights.loaded(names, instead), torch.no_grad():
            for ids in batches:
                shape = tuple(ids.shape)
                tape = Tape(self.where, self.sharing.widths)
                with stand_ins(self._modules, tape.stand_in), suppress(Stop):
                    self.model(input_ids=ids.to(self.device), use_cache=False)
                tape.check([block.calls[shape] for block in self.blocks if shape in block.calls])
                for block, call in zip(self.blocks, tape.calls, strict=True):
                    block.calls.setdefault(shape, call)
                entry(tape.first)

    def new_stream(self) -> Stream:
        """A stream in memory for what enters the first block."""
        return new_stream(parked=self.parked is not None)

    def embed(self, ids_BT: Tensor) -> Batch:
        """What enters the first block, for `Block.forward`: the hidden states [B, T, D], or a parked forward."""
        stream = self.new_stream()
        self.record([ids_BT], stream.append)
        batch: Batch = next(iter(stream))
        return batch

    def head(self) -> AbstractContextManager[LogitsOf]:
        """A function from hidden states [N, D] behind the last block to float32 logits [N, V].

        It is all that the model does to them: final norm (parked forwards have it behind them), head, soft-cap. The
        input embedding itself is not loaded; where the head is tied to it, the head is.
        """
        return self._tape_head() if self.parked is None else self._parked_head()

    @contextmanager
    def heads(self, instead: Mapping[str, Value]) -> Iterator[tuple[LogitsOf, LogitsOf]]:
        """`head` as the checkpoint has it, and with other weights, by name; the same where these are not the head's."""
        module = self.model.get_output_embeddings()
        own = {name: value for name, value in instead.items() if self.modules[name.rpartition(".")[0]] is module}
        with self.head() as logits_of:
            if not own:
                yield logits_of, logits_of
                return
            made = {name: value if isinstance(value, Tensor) else value() for name, value in own.items()}
            held = {name: value.to(self.device, self.weights.compute_dtype(name)) for name, value in made.items()}
            del made

            def other(hidden_ND: Tensor) -> Tensor:
                with self.weights.holding(held):
                    return logits_of(hidden_ND)

            yield logits_of, other

    @contextmanager
    def _parked_head(self) -> Iterator[LogitsOf]:
        head = self.model.get_output_embeddings()
        kept = {*self._inner, *self._outer(head)}
        with self.weights.loaded([n for n in self._outer() if n not in kept]), self._parked_forwards.head() as logits:
            yield logits

    @contextmanager
    def _tape_head(self) -> Iterator[LogitsOf]:
        embedding = self.model.get_input_embeddings()
        hidden_now: list[Tensor] = []

        def stand_in(index: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            hidden = hidden_now[0] if index == 0 else take_hidden(args, kwargs)[0]
            return answer(hidden, self.sharing.widths[index])

        def logits(hidden_ND: Tensor) -> Tensor:
            hidden_now[:] = [hidden_ND[None].to(self.device, self.dtype)]
            ids = torch.zeros(1, hidden_ND.shape[0], dtype=torch.long, device=self.device)
            out: Tensor = self.model(input_ids=ids, use_cache=False).logits[0].float()
            return out

        def no_embedding(ids: Tensor) -> Tensor:
            return torch.zeros(*ids.shape, embedding.embedding_dim, device=self.device, dtype=self.dtype)

        with (
            forward_replaced(embedding, no_embedding),
            self.weights.loaded(self._outer(embedding)),
            stand_ins(self._modules, stand_in),
            torch.no_grad(),
        ):
            yield logits

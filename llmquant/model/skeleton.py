"""A causal LM with one decoder block in memory at a time, by the model's own transformers code.

No table of architectures: blocks, the arguments of each, and which linears share an input are found by running the
model's own forward (`model/tape.py`). Arguments are recorded once. Later the first block's stand-in hands out stored
hidden states, and the rest of the model's forward (final norm, head, soft-cap) runs on them.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.model.block import Block
from llmquant.model.experts import Experts
from llmquant.model.meta import find_blocks, open_model
from llmquant.model.probe import probe
from llmquant.model.tape import Stop, Tape, answer, forward_replaced, stand_ins, stop, take_hidden
from llmquant.model.weights import Weights
from llmquant.source.base import Source

CPU = torch.device("cpu")


class Skeleton:
    """A causal LM without weights, whose blocks are loaded and freed one by one.

    where     the checkpoint's name, for errors
    source    the checkpoint as the model holds it: experts one by one
    weights   its parameters, in and out of memory
    blocks    its decoder blocks, in order
    """

    def __init__(self, source: Source, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> None:
        self.where = source.name
        self.model, self.source, param_of = open_model(source, dtype)
        self.weights = Weights(self.model, self.source, param_of, device, dtype)
        stack = find_blocks(self.model, source)
        self._stack = stack[0][0].rpartition(".")[0] + "."
        params: list[list[str]] = [[] for _ in stack]
        for param in self.weights.names:
            if (index := self.block_of(param)) is not None:
                params[index].append(param)
        self.blocks = [Block(i, name, module, params[i], self.weights) for i, (name, module) in enumerate(stack)]
        self._idle = tuple(f"{name}." for name in probe(self.where, self.model, self.blocks))
        for module in self.model.modules():  # computed buffers (rope tables) are real and stay on the device
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)
        names = [name for name, module in self.model.named_modules() if isinstance(module, Experts)]
        self._experts = [f"{name}." for name in names]
        self._shared = {param for param in self.weights.tied.values() if self.block_of(param) is not None}
        self._width: int | None = None  # of a block's answer; the tape learns it

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

    def block_of(self, param: str) -> int | None:
        """Index of the block that holds the parameter, None outside the blocks."""
        if not param.startswith(self._stack):
            return None
        return int(param[len(self._stack) :].split(".", 1)[0])

    def experts_of(self, module: str) -> str | None:
        """The module of experts that a linear is part of; None for all others."""
        return next((owner[:-1] for owner in self._experts if module.startswith(owner)), None)

    def unquantizable(self, module: str) -> str:
        """Why a linear of a block must stay as it is; "" where it need not."""
        index, param = self.block_of(module), f"{module}.weight"
        if index is not None and (why := self.blocks[index].unseen.get(module)):
            return why
        if param in self._shared:
            return "several blocks share it"
        return "the model wants it in float32" if self.weights.is_strict(param) else ""

    def _outer(self, without: nn.Module | None) -> list[str]:
        """Parameters outside the blocks that a text needs, except those of one module."""
        skip = {name for name, module in self.model.named_modules() if module is without}
        outside = [name for name in self.weights.names if self.block_of(name) is None]
        return [n for n in outside if n.rpartition(".")[0] not in skip and not n.startswith(self._idle)]

    # -- into the blocks, and out of them ------------------------------------------------------------------
    def record(self, batches: Iterable[Tensor], entry: Callable[[Tensor], None]) -> None:
        """Give the hidden states [B, T, D] that enter the first block to `entry`, batch by batch of ids [B, T].

        Every block knows its arguments for batches of these shapes afterwards (`Block.calls`). SourceError where blocks
        share more than hidden states, or where an argument depends on the tokens.
        """
        head, modules = self.model.get_output_embeddings(), [block.module for block in self.blocks]
        needed = self._outer(without=head) + self.blocks[0].params
        ended = nullcontext() if head is None else forward_replaced(head, stop)
        with ended, self.weights.loaded(needed), torch.no_grad():
            for ids in batches:
                shape = tuple(ids.shape)
                tape = Tape(self.where, type(self.model).__name__, len(modules), self._width)
                with stand_ins(modules, tape.stand_in), suppress(Stop):
                    self.model(input_ids=ids.to(self.device), use_cache=False)
                tape.check([block.calls[shape] for block in self.blocks if shape in block.calls])
                self._width = tape.width or 0
                for block, call in zip(self.blocks, tape.calls, strict=True):
                    block.calls.setdefault(shape, call)
                entry(tape.first)

    def embed(self, ids_BT: Tensor) -> Tensor:
        """The hidden states [B, T, D] that enter the first block; `record` of one batch."""
        entered: list[Tensor] = []
        self.record([ids_BT], entered.append)
        return entered[0]

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from the last block's hidden states [N, D] to float32 logits [N, V]: final norm, head, soft-cap.

        The input embedding itself is not loaded; where the head is tied to it, the head is.
        """
        embedding = self.model.get_input_embeddings()
        hidden_now: list[Tensor] = []

        def stand_in(index: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            return answer(hidden_now[0] if index == 0 else take_hidden(args, kwargs)[0], self._width or 0)

        def logits(hidden_ND: Tensor) -> Tensor:
            hidden_now[:] = [hidden_ND[None].to(self.device, self.dtype)]
            ids = torch.zeros(1, hidden_ND.shape[0], dtype=torch.long, device=self.device)
            out: Tensor = self.model(input_ids=ids, use_cache=False).logits[0].float()
            return out

        def no_embedding(ids: Tensor) -> Tensor:
            return torch.zeros(*ids.shape, embedding.embedding_dim, device=self.device, dtype=self.dtype)

        outer, modules = self._outer(without=embedding), [block.module for block in self.blocks]
        with (
            forward_replaced(embedding, no_embedding),
            self.weights.loaded(outer),
            stand_ins(modules, stand_in),
            torch.no_grad(),
        ):
            yield logits

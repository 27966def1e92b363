"""A causal LM with one decoder block in memory at a time, by the model's own transformers code.

No table of architectures: blocks, the arguments of each, and which linears share an input are found by running
the model's own forward (`model/tape.py`). Its arguments are recorded once; later, stored hidden states are given out by
the first block's stand-in and the rest of the model's forward (final norm, head, soft-cap, ...) runs on them.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.errors import SourceError
from llmquant.model.meta import build_model, dtype_plan, find_blocks, find_ties, is_linear, names_of_tensors
from llmquant.model.tape import Calls, Stop, Tape, answer, forward_replaced, stand_ins, stop, take_hidden
from llmquant.source.base import Source

Read = Callable[[str], Tensor]  # name of a parameter in the model -> its dense weight


class Skeleton:
    """A causal LM without weights, whose blocks are loaded and freed one by one.

    blocks        (name, module) of the decoder blocks, in order
    params        names of all parameters and persistent buffers
    param_of      tensor name in the checkpoint -> name in the model, for those the model knows
    tied          parameters that the checkpoint holds only under another parameter's name -> that name
    """

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.where = source.name
        self.model = build_model(source, dtype)
        for module in self.model.modules():  # computed buffers (rope tables) are real and stay on the device
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        self.params: list[str] = list(self.model.state_dict())
        self.param_of = names_of_tensors(self.model, source)
        self.tied = find_ties(self.model, set(self.param_of.values()), source)
        self.blocks = find_blocks(self.model, source)
        self._stack = self.blocks[0][0].rpartition(".")[0] + "."
        self._dtype_plan = dtype_plan(self.model, dtype)
        self._refuse_fused_experts()
        self._width = 0  # of the blocks' answer; the tape learns it

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

    # -- structure -------------------------------------------------------------------------------------
    def block_of(self, param: str) -> int | None:
        """Index of the block that holds the parameter, None outside the blocks."""
        if not param.startswith(self._stack):
            return None
        return int(param[len(self._stack) :].split(".", 1)[0])

    def linears(self, index: int) -> dict[str, nn.Module]:
        """nn.Linear and Conv1D modules of a block by their full names."""
        prefix, block = self.blocks[index]
        return {f"{prefix}.{name}": m for name, m in block.named_modules() if is_linear(m)}

    def _refuse_fused_experts(self) -> None:
        for name, block in self.blocks:
            for path, module in block.named_modules():
                for leaf, parameter in module.named_parameters(recurse=False):
                    if parameter.ndim >= 3 and not isinstance(module, nn.Conv1d):
                        raise SourceError(
                            f"{self.where}: {name}.{path}.{leaf}",
                            f"all experts in one tensor {tuple(parameter.shape)} ({type(module).__name__})",
                            expected="nn.Linear or Conv1D weights",
                            remedy="fused MoE experts are not supported yet",
                        )

    # -- weights in and out ----------------------------------------------------------------------------
    def load(self, params: Iterable[str], read: Read) -> None:
        """Fill `params` with `read(name)`, cast to the compute dtype (or the dtype the model insists on)."""
        for name in params:
            tensor = read(self.tied.get(name, name))
            wanted = self._compute_dtype(name) if tensor.is_floating_point() else tensor.dtype
            self.set(name, tensor.to(self.device, wanted))

    def free(self, params: Iterable[str]) -> None:
        """Give the memory of `params` back; computed buffers (rope tables) are not among them and stay."""
        for name in params:
            self.set(name, torch.empty_like(self.get(name), device="meta"))

    def block_params(self, index: int) -> list[str]:
        return [name for name in self.params if self.block_of(name) == index]

    @contextmanager
    def loaded(self, params: Sequence[str], read: Read) -> Iterator[None]:
        """`params` in memory for the length of a `with`."""
        try:
            self.load(params, read)
            yield
        finally:
            self.free(params)

    def get(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        value: Tensor = getattr(self.model.get_submodule(path), leaf)
        return value

    def set(self, name: str, value: Tensor) -> None:
        """Replace one parameter or buffer by a tensor of the same shape."""
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value

    def _compute_dtype(self, name: str) -> torch.dtype:
        return next((dtype for pattern, dtype in self._dtype_plan.items() if re.search(pattern, name)), self.dtype)

    def _outer(self, without: nn.Module | None) -> list[str]:
        """Parameters outside the blocks, except those of one module."""
        skip = {name for name, module in self.model.named_modules() if module is without}
        return [n for n in self.params if self.block_of(n) is None and n.rpartition(".")[0] not in skip]

    # -- the tape --------------------------------------------------------------------------------------
    def record(self, batches: Iterable[Tensor], read: Read, entry: Callable[[Tensor], None]) -> Calls:
        """Give the hidden states [B, T, D] that enter the first block to `entry`, batch by batch of ids [B, T].

        Returns every block's arguments by the shape of the batch. SourceError where blocks share more than
        hidden states, or where an argument depends on the tokens.
        """
        head, blocks = self.model.get_output_embeddings(), [block for _, block in self.blocks]
        calls: Calls = {}
        needed = self._outer(without=head) + self.block_params(0)
        ended = nullcontext() if head is None else forward_replaced(head, stop)
        with ended, self.loaded(needed, read), torch.no_grad():
            for ids in batches:
                width = self._width if calls else None
                tape = Tape(self.where, type(self.model).__name__, len(blocks), width)
                with stand_ins(blocks, tape.stand_in), suppress(Stop):
                    self.model(input_ids=ids.to(self.device), use_cache=False)
                tape.check(calls.get(tuple(ids.shape)))
                self._width = tape.width or 0
                calls.setdefault(tuple(ids.shape), tape.calls)
                entry(tape.first)
        return calls

    @contextmanager
    def head(self, read: Read) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from the last block's hidden states [N, D] to float32 logits [N, V]: final norm, head, soft-cap.

        The input embedding itself is not loaded; where the head is tied to it, the head is.
        """
        embedding = self.model.get_input_embeddings()
        hidden_now: list[Tensor] = []

        def stand_in(index: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            return answer(hidden_now[0] if index == 0 else take_hidden(args, kwargs)[0], self._width)

        def logits(hidden_ND: Tensor) -> Tensor:
            hidden_now[:] = [hidden_ND[None].to(self.device, self.dtype)]
            ids = torch.zeros(1, hidden_ND.shape[0], dtype=torch.long, device=self.device)
            out: Tensor = self.model(input_ids=ids, use_cache=False).logits[0].float()
            return out

        def no_embedding(ids: Tensor) -> Tensor:
            return torch.zeros(*ids.shape, embedding.embedding_dim, device=self.device, dtype=self.dtype)

        outer, blocks = self._outer(without=embedding), [block for _, block in self.blocks]
        with (
            forward_replaced(embedding, no_embedding),
            self.loaded(outer, read),
            stand_ins(blocks, stand_in),
            torch.no_grad(),
        ):
            yield logits

    # -- steps -----------------------------------------------------------------------------------------
    def steps(self, index: int, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> list[list[str]]:
        """Linears of the loaded block by the input they share, in the order in which its `forward` reaches them."""
        seen: dict[tuple[Any, ...], list[str]] = {}
        alive: list[Tensor] = []  # inputs stay referenced, or another one could be born at the same address

        def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            alive.append(x)
            seen.setdefault((x.data_ptr(), x.numel(), x.shape[-1], x.stride()), []).append(name)

        hooks = [m.register_forward_pre_hook(partial(note, name)) for name, m in self.linears(index).items()]
        try:
            forward(hidden)
        finally:
            for hook in hooks:
                hook.remove()
        names = [name for step in seen.values() for name in step]
        if len(names) != len(set(names)):
            twice = next(name for name in names if names.count(name) > 1)
            raise SourceError(
                f"{self.where}: {twice}", "runs more than once in a block", remedy="keep it in 16 bit with --ignore"
            )
        return list(seen.values())

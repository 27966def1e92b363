"""The model's own transformers code on the meta device, with one decoder block in memory at a time.

No table of architectures: blocks, the arguments of each, and which linears share an input are found by running
the model's own forward (the "tape"). All use of transformers' private interfaces is in this file.

How the tape works: the `forward` of every block is replaced on the instance. One forward of the model records
what each block is called with while hidden states pass through unchanged; later, stored hidden states are given
out by the first block's stand-in and the rest of the model's forward (final norm, head, soft-cap, ...) runs on
them. A model whose blocks share more than hidden states is refused by name.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.config_bounds import refuse_absurd, refuse_buffers
from llmquant.errors import SourceError
from llmquant.remote_code import remedy
from llmquant.source import Source

Read = Callable[[str], Tensor]  # name of a parameter in the model -> its dense weight


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


Calls = dict[tuple[int, ...], list[Call]]  # arguments of every block, by the shape of the token batch


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


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
        self.model = _build(source, dtype)
        for module in self.model.modules():  # computed buffers (rope tables) are real and stay on the device
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        self.params: list[str] = list(self.model.state_dict())
        self.param_of = _names(self.model, source)
        self.tied = _ties(self.model, set(self.param_of.values()), source)
        self.blocks = _find_blocks(self.model, source)
        self._stack = self.blocks[0][0].rpartition(".")[0] + "."
        self._dtype_plan: dict[str, torch.dtype] = self.model._get_dtype_plan(dtype)
        self._refuse_fused_experts()
        # What the blocks return: 0 a tensor, n a tuple of n with the hidden states first. Learnt by the tape.
        self._answer_as_tuple = 0

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
        head = self.model.get_output_embeddings()
        calls: Calls = {}
        needed = self._outer(without=head) + self.block_params(0)
        if head is not None:
            head.__dict__["forward"] = _stop
        try:
            with self.loaded(needed, read), torch.no_grad():
                for ids in batches:
                    tape = Tape(self, run_first=not calls)
                    with self._stand_ins(tape.stand_in), suppress(Stop):
                        self.model(input_ids=ids.to(self.device), use_cache=False)
                    tape.check(calls.get(tuple(ids.shape)))
                    calls.setdefault(tuple(ids.shape), tape.calls)
                    entry(tape.first)
        finally:
            if head is not None:
                del head.__dict__["forward"]
        return calls

    @contextmanager
    def head(self, read: Read) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from the last block's hidden states [N, D] to float32 logits [N, V]: final norm, head, soft-cap.

        The input embedding itself is not loaded; where the head is tied to it, the head is.
        """
        embedding = self.model.get_input_embeddings()
        hidden_now: list[Tensor] = []

        def stand_in(index: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            return self.answer(hidden_now[0] if index == 0 else take_hidden(args, kwargs)[0])

        def logits(hidden_ND: Tensor) -> Tensor:
            hidden_now[:] = [hidden_ND[None].to(self.device, self.dtype)]
            ids = torch.zeros(1, hidden_ND.shape[0], dtype=torch.long, device=self.device)
            out: Tensor = self.model(input_ids=ids, use_cache=False).logits[0].float()
            return out

        def no_embedding(ids: Tensor) -> Tensor:
            return torch.zeros(*ids.shape, embedding.embedding_dim, device=self.device, dtype=self.dtype)

        embedding.__dict__["forward"] = no_embedding
        try:
            with self.loaded(self._outer(without=embedding), read), self._stand_ins(stand_in), torch.no_grad():
                yield logits
        finally:
            del embedding.__dict__["forward"]

    @contextmanager
    def _stand_ins(self, stand_in: Callable[[int, Callable[..., Any], Any, Any], Any]) -> Iterator[None]:
        # On the instance, not around it: class, attributes and state-dict names stay what the model expects.
        for index, (_, block) in enumerate(self.blocks):
            block.__dict__["forward"] = _bind(stand_in, index, block)
        try:
            yield
        finally:
            for _, block in self.blocks:
                del block.__dict__["forward"]

    def answer(self, hidden: Tensor) -> Any:
        """`hidden` in the shape in which this model's blocks return it."""
        return (hidden, *[None] * (self._answer_as_tuple - 1)) if self._answer_as_tuple else hidden

    # -- steps -----------------------------------------------------------------------------------------
    def steps(self, index: int, call: Call, hidden: Tensor) -> list[list[str]]:
        """Linears of the loaded block by the input they share, in the order in which the forward reaches them."""
        seen: dict[tuple[Any, ...], list[str]] = {}
        alive: list[Tensor] = []  # inputs stay referenced, or another one could be born at the same address

        def note(name: str, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            alive.append(x)
            seen.setdefault((x.data_ptr(), x.numel(), x.shape[-1], x.stride()), []).append(name)

        with hooked({name: partial(note, name) for name in self.linears(index)}, self.linears(index)):
            call(self.blocks[index][1], hidden)
        names = [name for step in seen.values() for name in step]
        if len(names) != len(set(names)):
            twice = next(name for name in names if names.count(name) > 1)
            raise SourceError(
                f"{self.where}: {twice}", "runs more than once in a block", remedy="keep it in 16 bit with --ignore"
            )
        return list(seen.values())


@contextmanager
def hooked(
    notes: Mapping[str, Callable[[tuple[Tensor, ...]], None]], modules: Mapping[str, nn.Module]
) -> Iterator[None]:
    """While the `with` lasts, `notes[name]` is called with the inputs of `modules[name]` before it runs."""

    def hook(note: Callable[[tuple[Tensor, ...]], None]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: note(inputs)

    handles = [modules[name].register_forward_pre_hook(hook(note)) for name, note in notes.items()]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


class Stop(Exception):  # noqa: N818 (not an error)
    """Ends the model's forward where nothing more is wanted from it."""


def _stop(*args: Any, **kwargs: Any) -> None:
    raise Stop


def _bind(stand_in: Callable[..., Any], index: int, block: nn.Module) -> Callable[..., Any]:
    return lambda *args, **kwargs: stand_in(index, partial(type(block).forward, block), args, kwargs)


class Tape:
    """Records the calls of all blocks in one forward, and whether hidden states are all that they share.

    `run_first`: run the first block for real (it is loaded), to learn in which shape the blocks answer.
    """

    def __init__(self, skeleton: Skeleton, run_first: bool) -> None:
        self.skeleton = skeleton
        self.run_first = run_first
        self.calls: list[Call] = []
        self.first = torch.empty(0)
        self._last: Tensor | None = None
        self._others: list[Tensor] = []  # what the first block returned beside its hidden states

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
            if self.run_first:
                return self._learn(hidden, (rest, named), forward(*args, **kwargs))
        return self.skeleton.answer(hidden)

    def _learn(self, hidden: Tensor, arguments: Any, output: Any) -> Any:
        if any(_tensors_in_mappings(arguments)):
            self._refuse("blocks write into an argument that they share")
        self.skeleton._answer_as_tuple = len(output) if isinstance(output, tuple) else 0
        if not isinstance(output, tuple):
            return hidden
        self._others = list(_tensors(output[1:]))
        return (hidden, *output[1:])

    def check(self, known: list[Call] | None) -> None:
        """All blocks were called, and with the arguments that an earlier batch of this shape saw."""
        n_blocks = len(self.skeleton.blocks)
        if len(self.calls) != n_blocks:
            self._refuse(f"{len(self.calls)} of {n_blocks} blocks run in one forward")
        for index, (mine, other) in enumerate(zip(self.calls, known or [], strict=False)):
            pairs = zip(_tensors((mine.args, mine.kwargs)), _tensors((other.args, other.kwargs)), strict=True)
            if any(a is not b and not torch.equal(a, b) for a, b in pairs):
                self._refuse(f"an argument of block {index} depends on the tokens")

    def _refuse(self, got: str) -> None:
        raise SourceError(
            self.skeleton.where,
            f"{type(self.skeleton.model).__name__} cannot be streamed block by block: {got}",
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


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight lies as [in_features, out_features]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _build(source: Source, dtype: torch.dtype) -> Any:
    """The model's class with every parameter on the meta device and computed buffers (rope) real."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    refuse_absurd(source, source.config)
    config = source.safe_config
    config.pop("quantization_config", None)
    auto_map = config.get("auto_map")  # is there only where the user trusts it; by class, else transformers' own
    own = auto_map if isinstance(auto_map, dict) else {}
    model_type = config.pop("model_type", None)
    known = isinstance(model_type, str) and model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not known and "AutoModelForCausalLM" not in own:
        architectures = str(config.get("architectures") or "no architecture named")[:80]
        raise SourceError(
            f"{source.name}: config.json",
            f"model_type {model_type!r} ({architectures}) is no causal LM of the installed transformers",
            remedy=remedy(source) or "a newer transformers may know it",
        )
    try:
        if "AutoConfig" in own:
            settings = _own_class(source, own["AutoConfig"]).from_dict(config)
        else:
            settings = AutoConfig.for_model(model_type, **config)
        # Not the Auto class for code of the checkpoint: it would register that for other models of this process, too.
        make = AutoModelForCausalLM.from_config
        if "AutoModelForCausalLM" in own:
            make = _own_class(source, own["AutoModelForCausalLM"])._from_config
        with torch.device("meta"), no_init_weights():  # nothing is allocated, and buffers can be counted
            empty = make(settings, dtype=dtype)
        refuse_buffers(source, sum(buffer.nbytes for buffer in empty.buffers()))
        with init_empty_weights(include_buffers=False), no_init_weights():
            built = make(settings, dtype=dtype)
    except SourceError:
        raise
    except Exception as error:  # what a wrong config raises depends on the model class
        brief = f"{type(error).__name__}: {error}"[:200]
        raise SourceError(f"{source.name}: config.json", f"transformers cannot build the model ({brief})") from error
    return built.eval()


def _own_class(source: Source, reference: str) -> Any:
    """A class of the checkpoint's own code, by transformers' mechanism for that. This runs the code."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    assert source.code, "only code that the user trusts is run"
    return get_class_from_dynamic_module(reference, str(source.folder.absolute()), local_files_only=True)


def _names(model: Any, source: Source) -> dict[str, str]:
    """Tensor names of the checkpoint in the model's terms, by transformers' own renaming rules; shapes checked."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    known = model.state_dict()
    names: dict[str, str] = {}
    for key, info in source.tensors.items():
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if name not in known:
            continue
        if converter is not None:
            raise SourceError(
                f"{source.name}: {key}",
                f"is merged with others into {name} when the model is loaded (fused MoE experts)",
                expected="one tensor per parameter",
                remedy="this architecture is not supported yet",
            )
        if tuple(known[name].shape) != info.shape:
            raise SourceError(
                f"{source.name}: {key}",
                f"shape {list(info.shape)}",
                expected=f"{list(known[name].shape)} by config.json",
                remedy="config.json and the weights do not belong together",
            )
        if name in names.values():
            raise SourceError(f"{source.name}: {key}", f"a second tensor for {name}")
        names[key] = name
    return names


def _ties(model: Any, present: set[str], source: Source) -> dict[str, str]:
    """Parameters that the checkpoint holds only under another name they are tied to: name -> that name."""
    tied: dict[str, str] = dict(model.all_tied_weights_keys)
    ties: dict[str, str] = {}
    for name in model.state_dict():
        if name in present:
            continue
        if tied.get(name) not in present:
            raise SourceError(
                source.name,
                f"no weights for {name}",
                expected="every parameter of the model",
                remedy="config.json and the weights do not belong together, or the download is incomplete",
            )
        ties[name] = tied[name]
    return ties


def _find_blocks(model: Any, source: Source) -> list[tuple[str, nn.Module]]:
    """The ModuleList of the decoder that holds most parameters."""
    decoder = model.get_decoder() or model
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    stacks = [
        (sum(p.numel() for p in module.parameters()), name, module)
        for name, module in decoder.named_modules(prefix=prefix)
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not stacks:
        raise SourceError(source.name, "no list of decoder blocks found", expected="a decoder-only causal LM")
    _, name, stack = max(stacks, key=lambda item: item[0])
    return [(f"{name}.{i}", block) for i, block in enumerate(stack)]

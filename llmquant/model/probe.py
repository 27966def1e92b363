"""What a model runs for a text, found by one forward without weights, before any work.

It runs on made-up weights (`made_up.py`), on the CPU, over a few tokens. It tells

- which linears of a block run as layers, and which of them read the same input (q, k and v): `Block.steps`,
- which do not, or more than once; their inputs cannot be seen, so they are not quantized: `Block.unseen`,
- how many of the tokens reach an expert: `Block.shares`,
- which add their outputs to the hidden states: `Block.adds` (`adds.py`),
- which parts of the model no text reaches (a vision tower): their weights are never loaded.
"""

from collections import Counter
from collections.abc import Sequence
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from llmquant.errors import SourceError
from llmquant.model.adds import finding_adds
from llmquant.model.block import Block
from llmquant.model.made_up import made_up

_TOKENS = 8
NEVER, TWICE = "its block does not run it as a layer", "its block runs it more than once"


def probe(where: str, model: Any, blocks: Sequence[Block]) -> list[str]:
    """Fill in `steps`, `order`, `unseen`, `adds` and `shares` of all blocks.

    Returns the names of parts outside of the blocks that no text reaches. SourceError where the model cannot be run on
    text alone.
    """
    reads: list[dict[tuple[Any, ...], list[str]]] = [{} for _ in blocks]
    linears = [{module: name for name, module in block.linears.items()} for block in blocks]
    index_of = {block.module: block.index for block in blocks}
    alive: list[Tensor] = []  # inputs stay referenced, or another one could be born at the same address
    rows, ran_linears = Counter[str](), [list[str]() for _ in blocks]
    ran: set[nn.Module] = set()
    current = -1

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal current
        ran.add(module)
        current = index_of.get(module, current)
        if current >= 0 and module in linears[current]:
            alive.append(inputs[0])
            ran_linears[current].append(linears[current][module])
            rows[linears[current][module]] += inputs[0].numel() // inputs[0].shape[-1]
            reads[current].setdefault(_place(inputs[0]), []).append(linears[current][module])

    with (
        made_up(model, torch.device("cpu")),
        register_module_forward_pre_hook(note),
        finding_adds(blocks),
        torch.no_grad(),
    ):
        try:
            model(input_ids=torch.zeros(1, _TOKENS, dtype=torch.long), use_cache=False)
        except Exception as error:  # what a model raises that wants more than text depends on its class
            brief = f"{type(error).__name__}: {error}"[:160]
            at = f", in {name}" if (name := _module_of(error, model)) else ""
            raise SourceError(where, f"{type(model).__name__} cannot be run on text alone{at} ({brief})") from error
    for block, seen in zip(blocks, reads, strict=True):
        runs = Counter(name for step in seen.values() for name in step)
        block.unseen = {name: TWICE if runs[name] else NEVER for name in block.linears if runs[name] != 1}
        steps = [[name for name in step if name not in block.unseen] for step in seen.values()]
        block.steps = [step for step in steps if step]
        block.order = {name: place for place, name in enumerate(dict.fromkeys(ran_linears[block.index]))}
        block.shares = _shares(block, rows)
    inside = {module for block in blocks for module in block.module.modules()}
    return _idle(model, ran | inside)


def _shares(block: Block, rows: Counter[str]) -> dict[str, float]:
    """The part of a text's tokens that reaches a linear of an expert, on average over a layer's experts."""
    waves: dict[nn.Module, list[str]] = {}
    for step in block.steps:
        for name in step:
            if (place := block.expert(name)) is not None:
                waves.setdefault(place[0], []).append(name)
    return {
        name: share
        for names in waves.values()
        for share in [sum(rows[each] for each in names) / len(names) / _TOKENS]
        for name in names
    }


def _place(x: Tensor) -> tuple[Any, ...]:
    """The same for two linears that read the same elements of the same memory, with nothing written in between.

    Tensors without elements all lie at one address: those are told apart as objects.
    """
    if not x.numel():
        return (id(x),)
    return x.untyped_storage().data_ptr(), x.storage_offset(), x.shape, x.stride(), _state(x)


def _state(x: Tensor) -> int:
    """A number that changes when something is written into `x`: torch's count of writes to its memory.

    Inference tensors have no such count; for them it is a hash of the values.
    """
    if not x.is_inference():
        return x._version
    return hash(x.cpu().contiguous().view(torch.uint8).numpy().tobytes())


def _module_of(error: BaseException, model: Any) -> str:
    """The module in whose forward an error was raised; "" for the model's own."""
    names, found = {module: name for name, module in model.named_modules()}, ""
    for frame, _ in walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        found = names.get(owner, found) if isinstance(owner, nn.Module) else found
    return found


def _idle(model: Any, ran: set[nn.Module]) -> list[str]:
    """The largest modules in which nothing ran. Single layers are not among them: a weight may be used without its
    layer's forward (a tied head)."""
    found: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found) or not any(True for _ in module.children()):
            continue
        if not any(inner in ran for inner in module.modules()):
            found.append(name)
    return found

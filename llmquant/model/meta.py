"""A model on the meta device, ready to be streamed: its class, its experts taken apart, its tensors by name."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmquant.errors import SourceError
from llmquant.model.classes import build_model
from llmquant.model.names import checked_names, convert, names_in
from llmquant.model.unfuse import unfuse
from llmquant.quant.matmul import fast_linears
from llmquant.source.base import Source
from llmquant.source.wrapped import DerivedSource


@dataclass(frozen=True)
class Opened:
    """A model and its checkpoint, which fit each other.

    model      on the meta device
    stack      the name of its list of decoder blocks
    blocks     those, in order
    source     the checkpoint as the model holds it: another view of the one given where tensors hold all experts at
               once, or are merged when they are loaded
    param_of   tensor name in the checkpoint -> name in the model, for those the model knows
    """

    model: Any
    stack: str
    blocks: list[nn.Module]
    source: Source
    param_of: dict[str, str]


def open_model(source: Source, dtype: torch.dtype) -> Opened:
    """The model of a checkpoint on the meta device, its experts one by one. SourceError where they do not fit."""
    from transformers.initialization import no_init_weights

    model = build_model(source, dtype)
    names = names_in(model, source)
    stack, blocks = find_blocks(model, source)
    with no_init_weights():  # linears on the meta device have nothing to initialize
        derived = unfuse(model, stack, source, names)
    merged = convert(model, source, names)
    names.renamed.update({name: name for name in merged})
    fast_linears(model)
    if derived or merged:
        source = DerivedSource(source, derived | merged)
    return Opened(model, stack, blocks, source, checked_names(model, source, names.renamed))


def find_blocks(model: Any, source: Source) -> tuple[str, list[nn.Module]]:
    """(name, blocks) of the list of modules that is as long as the text decoder has layers; of several, or of none, the
    largest.

    Looked for in what the model calls its decoder, and in all of it where that is no stack of layers.
    """
    n_layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    for root in (model.get_decoder() or model, model):
        prefix = next(name for name, module in model.named_modules() if module is root)
        stacks = [
            (len(module) == n_layers, sum(p.numel() for p in module.parameters()), name, module)
            for name, module in root.named_modules(prefix=prefix)
            if isinstance(module, nn.ModuleList) and len(module)
        ]
        if stacks:
            *_, name, stack = max(stacks, key=lambda item: item[:2])
            return name, list(stack)
    raise SourceError(source.name, "no list of decoder blocks found", expected="a decoder-only causal LM")


def dtype_plan(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Patterns of parameter names -> the dtype that the class insists on when it computes in `dtype`."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    return plan


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def shape_OI(module: Any) -> tuple[int, int]:  # noqa: N802 (the suffix of its dimensions)
    """(out_features, in_features) of a linear, however its weight lies."""
    rows, columns = module.weight.shape
    return (int(columns), int(rows)) if is_conv1d(module) else (int(rows), int(columns))


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight lies as [in_features, out_features]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)

"""The model's own transformers class on the meta device, and what the checkpoint's tensors are called in it.

No table of architectures. All use of transformers' private interfaces is in this file and in `loads.py`.
"""

from typing import Any

import torch
from torch import nn

from llmquant.errors import SourceError
from llmquant.quant.matmul import fast_linears
from llmquant.source.base import Source
from llmquant.source.bounds import refuse_absurd, refuse_buffers


def build_model(source: Source, dtype: torch.dtype) -> Any:
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
            remedy=source.code_remedy() or "a newer transformers may know it",
        )
    try:
        if "AutoConfig" in own:
            settings = own_class(source, own["AutoConfig"]).from_dict(config)
        else:
            settings = AutoConfig.for_model(model_type, **config)
        # Not the Auto class for code of the checkpoint: it would register that for other models of this process, too.
        make = AutoModelForCausalLM.from_config
        if "AutoModelForCausalLM" in own:
            make = own_class(source, own["AutoModelForCausalLM"])._from_config
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
    fast_linears(built)
    return built.eval()


def own_class(source: Source, reference: str) -> Any:
    """A class of the checkpoint's own code, by transformers' mechanism for that. This runs the code."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    assert source.code, "only code that the user trusts is run"
    return get_class_from_dynamic_module(reference, str(source.folder.absolute()), local_files_only=True)


def names_of_tensors(model: Any, source: Source) -> dict[str, str]:
    """Tensor names of the checkpoint in the model's terms, by transformers' own renaming rules; shapes checked."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    known = model.state_dict()
    keys: dict[str, str] = {}  # name in the model -> name in the checkpoint
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
        if name in keys:
            raise SourceError(f"{source.name}: {key}", f"a second tensor for {name}")
        keys[name] = key
    return {key: name for name, key in keys.items()}


def find_ties(model: Any, present: set[str], source: Source) -> dict[str, str]:
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


def find_blocks(model: Any, source: Source) -> list[tuple[str, nn.Module]]:
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


def dtype_plan(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Patterns of parameter names -> the dtype that the class insists on when it computes in `dtype`."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    return plan


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight lies as [in_features, out_features]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)

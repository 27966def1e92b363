"""The model's own transformers class, built on the meta device. No table of architectures.

The class is the one that `architectures` in config.json names: a user's `from_pretrained` builds it, too, and a type
may have several (Qwen3.5 has one for text and one that sees pictures). Where it names none that generates text, the
Auto classes decide by `model_type`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from llmquant.errors import SourceError
from llmquant.source.base import Source
from llmquant.source.bounds import refuse_absurd, refuse_buffers

_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}  # as transformers writes them in JSON


def build_model(source: Source, dtype: torch.dtype) -> Any:
    """The model's class with every parameter on the meta device and computed buffers (rope) real.

    SourceError where no class of the installed transformers fits, or where it cannot be built.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    refuse_absurd(source, source.config)
    config = _floats(source.safe_config)
    config.pop("quantization_config", None)
    auto_map = config.get("auto_map")  # is there only where the user trusts it; by class, else transformers' own
    own = auto_map if isinstance(auto_map, dict) else {}
    model_type = config.pop("model_type", None)
    if "AutoModelForCausalLM" not in own and (refusal := _refusal(source, model_type, config)):
        raise refusal
    try:
        if "AutoConfig" in own:
            settings = own_class(source, own["AutoConfig"]).from_dict(config)
        else:
            settings = AutoConfig.for_model(model_type, **config)
        if "AutoModelForCausalLM" in own:
            make = own_class(source, own["AutoModelForCausalLM"])._from_config
        else:
            make = _maker(model_type, config)
        with torch.device("meta"), no_init_weights():  # nothing is allocated, and buffers can be counted
            built = make(settings, dtype=dtype)
        refuse_buffers(source, sum(buffer.nbytes for buffer in built.buffers()))
        if "AutoModelForCausalLM" in own:  # such a class may compute its buffers while it is made, and only then
            with init_empty_weights(include_buffers=False), no_init_weights():
                built = make(settings, dtype=dtype)
        else:
            _compute_buffers(built)
    except SourceError:
        raise
    except Exception as error:  # what a wrong config raises depends on the model class
        brief = f"{type(error).__name__}: {error}"[:200]
        raise SourceError(f"{source.name}: config.json", f"transformers cannot build the model ({brief})") from error
    return built.eval()


def _compute_buffers(model: Any) -> None:
    """Fill in the buffers that no checkpoint holds (rope tables), by the model's own initialization of them."""
    persistent = model.state_dict()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in persistent:
            tensor._is_hf_initialized = True  # its initialization leaves these alone
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    model.initialize_weights()


def _refusal(source: Source, model_type: Any, config: dict[str, Any]) -> SourceError | None:
    """Why transformers has no class for this config that predicts the next token; None where it has one."""
    where, architectures = f"{source.name}: config.json", str(config.get("architectures") or "no architecture")[:80]
    if config.get("is_encoder_decoder"):
        return SourceError(where, f"{architectures} is an encoder-decoder", expected="a decoder-only model")
    if any(isinstance(model_type, str) and model_type in mapping for mapping in _mappings()):
        return None
    return SourceError(
        where,
        f"model_type {model_type!r} ({architectures}) is no causal LM of the installed transformers",
        remedy=source.code_remedy() or "a newer transformers may know it",
    )


def _mappings() -> list[dict[str, Any]]:
    """model_type -> name of its class, for text only, for pictures and text, and for any inputs; in this order."""
    from transformers.models.auto import modeling_auto as auto

    return [
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    ]


def _maker(model_type: str, config: dict[str, Any]) -> Callable[..., Any]:
    """What makes the model from its configuration: the class that `architectures` names, else an Auto class."""
    import transformers

    named = config.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    known = {
        each
        for mapping in _mappings()
        for entry in mapping.values()
        for each in (entry if isinstance(entry, list | tuple) else [entry])
    }
    if name in known:
        make: Callable[..., Any] = getattr(transformers, name)._from_config
        return make
    autos = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
    auto = next(auto for auto, mapping in zip(autos, _mappings(), strict=True) if model_type in mapping)
    by_type: Callable[..., Any] = getattr(transformers, auto).from_config
    return by_type


def _floats(value: Any) -> Any:
    """`value` with the floats that JSON does not know in the place of what transformers writes for them."""
    if isinstance(value, dict):
        if set(value) == {"__float__"} and value["__float__"] in _FLOATS:
            return _FLOATS[value["__float__"]]
        return {key: _floats(item) for key, item in value.items()}
    return [_floats(item) for item in value] if isinstance(value, list) else value


def own_class(source: Source, reference: str) -> Any:
    """A class of the checkpoint's own code, by transformers' mechanism for that. This runs the code."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    assert source.code, "only code that the user trusts is run"
    return get_class_from_dynamic_module(reference, str(source.folder.absolute()), local_files_only=True)

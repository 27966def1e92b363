"""The model's own transformers class, built on the meta device. No table of architectures.

The class is the one that `architectures` in config.json names: a user's `from_pretrained` builds it, too, and a type
may have several (Qwen3.5 has one for text and one that sees pictures). Where it names none that generates text, the
Auto classes decide by `model_type`.
"""

from functools import partial
from typing import Any

import torch

from llmquant.errors import SourceError
from llmquant.model.loads import Opener, openers
from llmquant.source.base import Source
from llmquant.source.bounds import refuse_absurd, refuse_buffers


def build_model(source: Source, dtype: torch.dtype) -> Any:
    """The model's class with every parameter on the meta device and computed buffers (rope) real.

    SourceError where no class of the installed transformers fits, or where it cannot be built.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    refuse_absurd(source, source.config)
    config, own = _config_of(source)
    if not own and (refusal := _refusal(source, config.get("model_type"), config)):
        raise refusal
    try:
        opener = _opener(source, config, own=own)
        make = partial(opener.cls._from_config, opener.settings)
        with torch.device("meta"), no_init_weights():  # nothing is allocated, and buffers can be counted
            built = make(dtype=dtype)
        refuse_buffers(source, sum(buffer.nbytes for buffer in built.buffers()))
        if own:  # such a class may compute its buffers while it is made, and only then
            with init_empty_weights(include_buffers=False), no_init_weights():
                built = make(dtype=dtype)
        else:
            _compute_buffers(built)
    except SourceError:
        raise
    except Exception as error:  # what a wrong config raises depends on the model class
        brief = f"{type(error).__name__}: {error}"[:200]
        raise SourceError(f"{source.name}: config.json", f"transformers cannot build the model ({brief})") from error
    return built.eval()


def _config_of(source: Source) -> tuple[dict[str, Any], bool]:
    """The config that the model is built by, and whether its class is code of the checkpoint that the user trusts."""
    config = source.safe_config
    config.pop("quantization_config", None)
    config.pop("return_dict", None)  # we read outputs by their names
    auto_map = config.get("auto_map")  # is there only where the user trusts it
    return config, isinstance(auto_map, dict) and "AutoModelForCausalLM" in auto_map


def _opener(source: Source, config: dict[str, Any], *, own: bool) -> Opener:
    found = openers(config, partial(own_class, source) if own else None)
    return next(opener for opener in found if own or opener.name in _generators())


def opener_of(source: Source) -> Opener:
    """The class that `build_model` builds, with new settings for it."""
    config, own = _config_of(source)
    return _opener(source, config, own=own)


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
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    where, architectures = f"{source.name}: config.json", str(config.get("architectures") or "no architecture")[:80]
    if config.get("is_encoder_decoder"):
        return SourceError(where, f"{architectures} is an encoder-decoder", expected="a decoder-only model")
    if any(isinstance(model_type, str) and model_type in mapping for mapping in _mappings()):
        return None
    got = f"model_type {model_type!r} ({architectures}) is no causal LM of the installed transformers"
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        return SourceError(where, got, expected="a model that predicts the next token")
    return SourceError(where, got, remedy=source.code_remedy() or "a newer transformers may know it")


def _mappings() -> list[dict[str, Any]]:
    """model_type -> name of its class, for text only, for pictures and text, and for any inputs; in this order."""
    from transformers.models.auto import modeling_auto as auto

    return [
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    ]


def _generators() -> set[str]:
    """Names of the classes that predict the next token."""
    entries = [entry for mapping in _mappings() for entry in mapping.values()]
    return {name for entry in entries for name in (entry if isinstance(entry, list | tuple) else [entry])}


def own_class(source: Source, reference: str) -> Any:
    """A class of the checkpoint's own code, by transformers' mechanism for that. This runs the code."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    assert source.code, "only code that the user trusts is run"
    return get_class_from_dynamic_module(reference, str(source.folder.absolute()), local_files_only=True)

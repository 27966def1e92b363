"""A tiny random checkpoint of any type of the installed transformers, as real uploads have it.

A type is what config.json calls `model_type`; a name is a type, or `type:variant` (`overrides.py`). Where a type has
classes with and without vision, uploads are of the class with: `qwen3_5` is Qwen3_5ForConditionalGeneration, and
`qwen3_5:text` the class that AutoModelForCausalLM makes of the same config.

Sizes come by the names of the fields, so most types need no line of their own. Lists with an entry for each layer are
cut so that every kind of layer is left.
"""

import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from contract.overrides import OVERRIDES
from contract.sizes import TEXT, TOWER
from llmquant.demo import DEMO

MAX_PARAMETERS = 90_000_000
AUTO = {
    AutoModelForImageTextToText: modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    AutoModelForMultimodalLM: modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    AutoModelForCausalLM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
# Types whose config has a vision part, and a causal class without it.
TWO_CLASSES = tuple(
    name
    for name, causal in AUTO[AutoModelForCausalLM].items()
    if AUTO[AutoModelForImageTextToText].get(name, causal) != causal
)


def types() -> list[str]:
    """Every type that transformers can generate text with, by the three mappings."""
    causal, *more = (AUTO[auto] for auto in (AutoModelForCausalLM, *AUTO))
    return list(dict.fromkeys([*causal, *(name for names in more for name in names)]))


def variants() -> list[str]:
    """Names that differ from their type alone."""
    return [*(name for name in OVERRIDES if ":" in name), *(f"{name}:text" for name in TWO_CLASSES)]


def type_of(name: str) -> str:
    """Without the variant, or what an upload (`uploads.py`) has beside it."""
    return re.split("[:+]", name)[0]


def config_of(name: str) -> Any:
    """The tiny config of a type or variant."""
    kind = type_of(name)
    config_class = CONFIG_MAPPING[kind]
    return config_class(**_arguments(config_class, OVERRIDES.get(name, OVERRIDES.get(kind, {})), TEXT))


def new_model(name: str, config: Any) -> Any:
    """A model of the class that uploads of this type name in `architectures`, in float32."""
    autos = [AutoModelForCausalLM] if name.endswith(":text") else AUTO
    auto = next(auto for auto in autos if type_of(name) in AUTO[auto])
    if type(config) in auto._model_mapping:
        return auto.from_config(config, dtype=torch.float32)
    named = getattr(transformers, AUTO[auto][type_of(name)])  # known by the name of its type alone
    return named._from_config(config, dtype=torch.float32)


def meta_model(name: str) -> Any:
    """The model without weights."""
    with quiet(), torch.device("meta"):
        return new_model(name, config_of(name))


def build(name: str, folder: Path) -> Path:
    """Write a random bf16 checkpoint with the demo's tokenizer into `folder`.

    Whatever transformers raises where it cannot build the type; ValueError where it is not tiny.
    """
    size = sum(parameter.numel() for parameter in meta_model(name).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{name}: {size / 1e6:.0f} M parameters; add to OVERRIDES what makes it small")
    with quiet():
        torch.manual_seed(0)
        model = new_model(name, config_of(name))
        scramble(model)
        model.to(torch.bfloat16).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def add_tokenizer(folder: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / file, folder / file)


@torch.no_grad()
def scramble(model: Any) -> None:
    """Random weights that keep the scale of what passes through; norms, biases and statistics that are not 0 or 1.

    A tensor that is lost or set anew shows in the logits then.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator).to(like.dtype)

    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.ndim >= 2:
            fan_in = parameter.shape[-1] if parameter.ndim < 4 else parameter[0].numel()
            parameter.copy_(noise(parameter) / fan_in**0.5)
        else:
            parameter.add_(0.1 * noise(parameter))
    for path, buffer in model.named_buffers():
        owner, leaf = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        if leaf not in owner._non_persistent_buffers_set and buffer.is_floating_point():
            buffer.add_(0.1 * noise(buffer))


@contextmanager
def quiet() -> Iterator[None]:
    """Without the remarks of transformers about configs and loading."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# -- configs ---------------------------------------------------------------------------------------------------------
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "block_types", "ffn_layer_types")
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")


def _arguments(config_class: Any, own: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a config of this class tiny, its nested configs included. `own` goes before `sizes`."""
    nested = getattr(config_class, "sub_configs", {})
    plain = {key: value for key, value in own.items() if key not in nested}
    default = _default(config_class)
    found = _flat(config_class, default, plain, sizes)
    for key, declared in nested.items():
        if key in own and not isinstance(own[key], dict):
            found[key] = own[key]
            continue
        inner, usual = own.get(key, {}), _get(default, key)
        if usual is None and default is not None and key not in own:
            continue  # a part that this type has, but not by default
        part = CONFIG_MAPPING[inner["model_type"]] if "model_type" in inner else declared
        if "model_type" not in inner and hasattr(usual, "sub_configs"):
            part = type(usual)
        if part.__name__ == "AutoConfig":
            continue
        of_text = _is_text(key)
        known = OVERRIDES.get(part.model_type, {}) if of_text else {}
        found[key] = _arguments(part, {**known, **inner}, TEXT if of_text else TOWER) | {"model_type": part.model_type}
    return found


def _is_text(key: str) -> bool:
    return "vision" not in key and any(word in key for word in ("text", "llm", "language", "decoder", "thinker"))


def _flat(config_class: Any, default: Any, own: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are no configs themselves."""
    nested, aliases = getattr(config_class, "sub_configs", {}), getattr(config_class, "attribute_map", {})
    fields = _fields(config_class) | set(aliases)
    found = {key: value for key, value in sizes.items() if key in fields and key not in nested}
    for alias, field in aliases.items():
        if alias in found and field in found and alias not in own:
            del found[alias]
    for key in list(found):
        usual, is_list = _get(default, key), isinstance(found[key], list)
        single = not isinstance(found[key], list | dict)
        if (single and isinstance(usual, list | dict)) or (is_list and not isinstance(usual, list | tuple)):
            del found[key]  # this type means something else by the name
    found.update(own)
    for key in own:
        if aliases.get(key) in found and aliases[key] not in own:
            del found[aliases[key]]
    rope = _get(default, "rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope and "rope_parameters" not in own:
        found["rope_parameters"] = {**rope, "mrope_section": _sections(found, rope, default)}
    return found | _per_layer(fields, default, own, found)


def _sections(found: Mapping[str, Any], rope: Mapping[str, Any], default: Any) -> list[int]:
    """Thirds of the rotated half of a head, for time, height and width."""
    heads = found.get("num_attention_heads", 4)
    width = found.get("head_dim", found.get("hidden_size", 128) // heads)
    half = int(width * (rope.get("partial_rotary_factor") or _get(default, "partial_rotary_factor") or 1.0)) // 2
    return [half - 2 * (half // 3), half // 3, half // 3]


def _per_layer(fields: set[str], default: Any, own: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """A depth that has room for every kind of layer, and the lists that name the kind of each."""
    lists = (
        {key: list(value) for key in PER_LAYER if (value := vars(default).get(key)) and key not in own}
        if default
        else {}
    )
    if not lists:
        return {}
    kinds = {key: list(dict.fromkeys(value)) for key, value in lists.items()}
    depth_field = next((key for key in DEPTHS if key in found), None)
    most = max(map(len, kinds.values()))
    depth = own.get(depth_field or "") or max(4 if most > 1 else 3, most)
    cut = {key: [some[i % len(some)] for i in range(depth)] for key, some in kinds.items() if key in fields}
    return cut | ({depth_field: depth} if depth_field else {})


def _fields(config_class: Any) -> set[str]:
    return set(getattr(config_class, "__dataclass_fields__", {})).union(
        *(vars(base).get("__annotations__", {}) for base in config_class.__mro__)
    )


def _default(config_class: Any) -> Any:
    """The config as it is without arguments; None where it needs some."""
    with suppress(Exception):
        return config_class()


def _get(config: Any, key: str) -> Any:
    with suppress(Exception):  # some fields are properties that raise
        return getattr(config, key, None)

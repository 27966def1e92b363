"""What config.json says, as the tensors have it: configs are written by hand, copied and forgotten.

Every function takes a config and gives a new one, or answers a question about it.
"""

import math
import re
from typing import Any

import torch

from llmquant.source.header import TensorInfo

_QUANTIZATION = ("quantization_config", "quantization")
_TIE, _LIMIT = "tie_word_embeddings", "time_step_limit"
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.")
# Keys of a config, at any depth, that would make a loader run foreign code, or would choose kernels or other files.
_UNSAFE_KEYS = re.compile(
    r"auto_map|transformers_weights|trust_remote_code|_?attn_implementation.*|_?experts_implementation.*"
    r"|.*kernel_config|use_kernels"
)


def with_tagged_limits(config: dict[str, Any]) -> dict[str, Any]:
    """A config with infinite limits as transformers 5 writes them, {"__float__": "Infinity"}: Python's own `Infinity`,
    which transformers 4 wrote (Mamba 2 and hybrids with it), is no JSON."""
    config = dict(config)
    if isinstance(limits := config.get(_LIMIT), list):
        config[_LIMIT] = [{"__float__": "Infinity"} if limit == math.inf else limit for limit in limits]
    inner = {key: value for key, value in config.items() if isinstance(value, dict) and _LIMIT in value}
    return config | {key: with_tagged_limits(value) for key, value in inner.items()}


def told_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """What a config says of a quantization; {} where it says nothing."""
    found: Any = next((config[key] for key in _QUANTIZATION if config.get(key)), {})
    return found if isinstance(found, dict) else {"quant_method": "unknown method"}


def is_packed(info: TensorInfo) -> bool:
    """Whether a tensor holds codes: a matrix of anything but 16 and 32 bit floats."""
    return len(info.shape) > 1 and info.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """`config` that tells of no quantization."""
    return {key: value for key, value in config.items() if key not in _QUANTIZATION}


def is_head(name: str) -> bool:
    """Whether a stored tensor is the weight of an output head, packed or not."""
    return name.startswith(("lm_head.weight", "lm_head.qweight"))


def is_embedding(name: str) -> bool:
    """Whether a stored tensor belongs to the input embedding."""
    return bool(_EMBEDDING.search(name))


def says_tied(config: dict[str, Any]) -> bool:
    """Whether it ties the head to the embedding, at the top or one level below."""
    return any(part.get(_TIE) for part in (config, *config.values()) if isinstance(part, dict))


def without_tie(config: dict[str, Any]) -> dict[str, Any]:
    """`config` that ties no head to the embedding, at no level."""
    inner = {key: value | {_TIE: False} for key, value in config.items() if isinstance(value, dict) and value.get(_TIE)}
    return config | {_TIE: False} | inner


def safe_config(config: dict[str, Any], *, keep_code: bool = False) -> dict[str, Any]:
    """`config` without the keys that would run foreign code or choose kernels, at every level of nesting.

    With `keep_code` auto_map stays, because the user trusts its code.
    """
    kept = ("auto_map",) if keep_code else ()

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if k in kept or not _UNSAFE_KEYS.fullmatch(str(k))}
        return [clean(item) for item in value] if isinstance(value, list) else value

    cleaned: dict[str, Any] = clean(config)
    return cleaned

"""Does config.json fit the tensors of its checkpoint? Checked before a model is built from it.

A config may name a billion layers, or heads of a billion channels. Building such a model takes hours or fills the
memory, long before the shapes of the tensors refute it. So every size in the config is compared with the headers first.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

from llmquant.errors import SourceError
from llmquant.source.base import Source

_MAX_DEPTH = 32  # of nesting; real ones have four levels
_LAYERS = re.compile(r"num_hidden_layers|num_layers|n_layers?|(num_)?decoder_layers")
# Keys that say how many or how wide: some tensor has such a dimension. Lengths and token ids (_FREE) may be anything.
_SIZES = re.compile(
    r"(num|n|d)_\w+|\w*_(size|dim|dims|rank|heads?|layers?|experts?|groups|width|inner|channels)|dim|hidden\w*"
)
_FREE = re.compile(r"\w*(position|ctx|context|window|chunk|token|param|label|step|sample|flop|batch|_id)\w*")
_ROOM = 16  # a size may be this many times the largest dimension of any tensor


def refuse_absurd(source: Source, config: dict[str, Any]) -> None:
    """SourceError for a size at any level of `config` that is far above those of all tensors, and for NaN and Inf."""
    n_tensors = len(source.tensors)
    largest = max((size for info in source.tensors.values() for size in info.shape), default=0)
    for path, value in _leaves(source, config, "", 0):
        key = re.sub(r"\[\d+\]$", "", path.rpartition(".")[2])
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            _refuse(source, path, value, "a finite number")
        if _LAYERS.fullmatch(key) and value > n_tensors:
            _refuse(source, path, value, f"at most its {n_tensors} tensors")
        if _SIZES.fullmatch(key) and not _FREE.fullmatch(key) and value > max(_ROOM * largest, 1024):
            _refuse(source, path, value, f"a size near those of its tensors, none of which has more than {largest}")


def refuse_buffers(source: Source, nbytes: int) -> None:
    """SourceError if the buffers that the model computes itself (masks, rope tables) are larger than its weights."""
    if nbytes > (limit := max(64_000_000, source.weight_bytes)):
        raise SourceError(
            f"{source.name}: config.json", f"a model with {nbytes} bytes of buffers", expected=f"at most {limit}"
        )


def _leaves(source: Source, value: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Every value that is not a container, with its path, such as `text_config.layer_types[3]`."""
    if depth > _MAX_DEPTH:
        raise SourceError(f"{source.name}: config.json", f"more than {_MAX_DEPTH} levels of nesting")
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(source, item, f"{path}.{key}" if path else key, depth + 1)
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield from _leaves(source, item, f"{path}[{position}]", depth + 1)
    else:
        yield path, value


def _refuse(source: Source, path: str, value: float, expected: str) -> None:
    raise SourceError(f"{source.name}: config.json", f"{path[-80:]} {value:.12g}", expected=expected)

"""What the quantization config of a checkpoint says of one linear, where linears differ.

Configs come from strangers: what is not of the expected type says nothing, and a pattern that is none is refused.
"""

import re
from collections.abc import Iterator
from typing import Any

from llmquant.errors import SourceError

Entry = dict[str, Any]


class Named:
    """Entries by the names of modules. A stored name may lack the first part of the module's, or have one before it:
    `h.0.attn` is `transformer.h.0.attn` (BLOOM)."""

    def __init__(self) -> None:
        self._by_name: dict[str, Entry] = {}
        self._by_rest: dict[str, Entry] = {}

    def add(self, name: str, entry: Entry) -> None:
        self._by_name.setdefault(name, entry)
        self._by_rest.setdefault(name.partition(".")[2], entry)

    def find(self, stored: str) -> Entry | None:
        shorter = stored.partition(".")[2]
        return self._by_name.get(stored) or self._by_rest.get(stored) or self._by_name.get(shorter)


class ConfigGroups:
    """compressed-tensors: `weights` of each group, by targets that are names, patterns behind re:, or classes."""

    def __init__(self, config: Entry) -> None:
        self._names, self._patterns, self._classes = Named(), list[tuple[re.Pattern[str], Entry]](), list[Entry]()
        for target, weights in _targets(config.get("config_groups")):
            if target.startswith("re:"):
                self._patterns.append((_pattern(target.removeprefix("re:")), weights))
            elif "." in target:
                self._names.add(target, weights)
            else:
                self._classes.append(weights)

    def find(self, stored: str) -> Entry:
        """What is said of a linear: by its name, by a pattern else, by its class else; {} where nothing is."""
        if (named := self._names.find(stored)) is not None:
            return named
        matching = [weights for pattern, weights in self._patterns if pattern.match(stored)]
        return (matching or self._classes or [{}])[0]


def _targets(groups: Any) -> Iterator[tuple[str, Entry]]:
    for group in groups.values() if isinstance(groups, dict) else ():
        weights, targets = (group.get("weights"), group.get("targets")) if isinstance(group, dict) else (None, None)
        if isinstance(weights, dict) and isinstance(targets, list):
            yield from ((target, weights) for target in targets if isinstance(target, str))


class Dynamic:
    """GPTQModel's `dynamic`: entries by patterns, the first that matches from the start of the name on decides."""

    def __init__(self, config: Entry) -> None:
        patterns = config.get("dynamic")
        self._patterns = [
            (_pattern(pattern.removeprefix("+:")), entry)
            for pattern, entry in (patterns.items() if isinstance(patterns, dict) else ())
            if isinstance(entry, dict) and not pattern.startswith("-:")
        ]

    def find(self, stored: str) -> Entry:
        return next((entry for pattern, entry in self._patterns if pattern.match(stored)), {})


def own_entries(config: Entry) -> Named:
    """mlx-lm: an entry for a module beside the settings of all."""
    named = Named()
    for name, entry in config.items():
        if isinstance(entry, dict):
            named.add(name, entry)
    return named


def stated_bits(bits: Any, prefix: str) -> int:
    """Bits that a config states; 0 where it does not."""
    if bits is None:
        return 0
    if type(bits) is not int or not 2 <= bits <= 8:
        raise SourceError(prefix, f"{bits!r} bits by the config", expected="2 to 8")
    return bits


def refuse_transforms(config: Entry) -> None:
    """SourceError where the weights are not those of the model: turned by a transform, or sparse in a packed form."""
    sparsity = config.get("sparsity_config")
    sparse = isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense"
    rotated = [key for key in ("transform_config", "rotation") if config.get(key)]
    for key in [*rotated, *["sparsity_config"] * sparse]:
        raise SourceError("quantization_config", f"{key}, which is not read", expected="weights of the model itself")


def not_applied(config: Entry) -> list[str]:
    """What a checkpoint's servers do beside dequantizing its weights, and llmquant does not: its figures are those of
    the weights alone.

    >>> not_applied({"config_groups": {"g": {"input_activations": {"num_bits": 8}}}, "activation_scheme": "static"})
    ['activations in 8 bits', 'activations in FP8 (static)']
    """
    groups = config.get("config_groups")
    said = [
        f"{what} in {_bits_of(group[key])}"
        for group in (groups.values() if isinstance(groups, dict) else ())
        for key, what in (("input_activations", "activations"), ("output_activations", "outputs"))
        if isinstance(group, dict) and group.get(key)
    ]
    if config.get("activation_scheme"):
        said.append(f"activations in FP8 ({config['activation_scheme']})")
    if config.get("kv_cache_scheme"):
        said.append(f"keys and values in {_bits_of(config['kv_cache_scheme'])}")
    if config.get("adapter"):
        said.append("an adapter beside the codes")
    return list(dict.fromkeys(str(text)[:80] for text in said))


def _bits_of(scheme: Any) -> str:
    return f"{scheme.get('num_bits')} bits" if isinstance(scheme, dict) else str(scheme)


def unnamed(config: Entry) -> str | None:
    """The layout of a config that names no method: mlx-lm writes only bits and group size."""
    return "mlx" if {"group_size", "bits"} <= config.keys() else None


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise SourceError(
            "quantization_config", f"pattern {text!r} ({error})", expected="a regular expression"
        ) from None

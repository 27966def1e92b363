"""What the checkpoint's tensors are called in the model, by transformers' own rules.

A rule renames a tensor, or converts several into one parameter (all experts of a layer; a convolution stored in three
parts), or one into several. Renamed tensors are read one by one. Converted ones are `Derived`: the library's own
conversion, run when the parameter is read. Experts are taken apart instead (`experts.py`).

Private interfaces of transformers are used in this file, `classes.py`, `loads.py` and `meta.py` only.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import SourceError
from llmquant.source.base import Source
from llmquant.source.names import natural_key
from llmquant.source.wrapped import Derived


@dataclass
class Group:
    """Tensors that one rule converts into the parameter `name` (the first one, where it makes several).

    keys   (pattern of the rule that matched, tensor), as people count
    """

    rule: Any
    keys: list[tuple[str, str]] = field(default_factory=list)

    @property
    def operations(self) -> list[str]:
        return [type(operation).__name__ for operation in self.rule.operations]

    def by_pattern(self) -> list[list[str]]:
        """The tensors of every pattern of the rule, in the rule's order."""
        patterns = list(self.rule.source_patterns)
        found: list[list[str]] = [[] for _ in patterns]
        for pattern, key in self.keys:
            found[patterns.index(pattern)].append(key)
        return [keys for keys in found if keys]


@dataclass(frozen=True)
class Names:
    """What the tensors of a checkpoint are in its model.

    renamed     tensor -> parameter, or a name that the model does not know
    converted   parameter -> the tensors that a rule makes it from
    """

    renamed: dict[str, str]
    converted: dict[str, Group]


def names_in(model: Any, source: Source) -> Names:
    """The names of all tensors of `source` in `model`."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    rule_of = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    known = model.state_dict()
    found = Names({}, {})
    for key in sorted(source.tensors, key=natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if pattern is not None:
            found.converted.setdefault(name, Group(rule_of[pattern])).keys.append((pattern, key))
        elif name in known:
            found.renamed[key] = name
        else:  # transformers keeps the old name where it is the one that the model knows
            found.renamed[key] = key if key in known else name
    return found


def convert(model: Any, source: Source, names: Names) -> dict[str, Derived]:
    """The parameters that rules make from other tensors, under the model's own names."""
    known, found = model.state_dict(), dict[str, Derived]()
    for name, group in names.converted.items():
        keys = tuple(key for _, key in group.keys)
        made = converted(model, name, group, lambda key: _empty(source, key), source)
        for target in made.keys() & known.keys():
            wanted = known[target]
            origin = f"merged from {len(keys)} tensors" if len(keys) > 1 else f"a part of {keys[0]}"
            dtype = source.tensors[keys[0]].dtype

            def read(stored: Source, name: str = name, group: Group = group, target: str = target) -> Tensor:
                return converted(model, name, group, stored.read_finite, stored)[target].contiguous()

            found[target] = Derived(dtype, tuple(wanted.shape), keys, origin, read)
    return found


def _empty(source: Source, key: str) -> Tensor:
    info = source.tensors[key]
    return torch.empty(info.shape, dtype=info.dtype, device="meta")


def converted(
    model: Any, name: str, group: Group, tensor_of: Callable[[str], Tensor], source: Source
) -> dict[str, Tensor]:
    """What the rule of `group` makes from its tensors. SourceError where it cannot."""
    rule = copy.deepcopy(group.rule)
    rule.collected_tensors.clear()
    for pattern, key in group.keys:
        rule.add_tensor(name, key, pattern, tensor_of(key))
    try:
        made: Mapping[str, Any] = rule.convert(name, model=model, config=model.config)
    except Exception as error:  # what it raises depends on the operation
        brief = f"{type(error).__name__}: {error}"[:160]
        raise SourceError(
            f"{source.name}: {name}",
            f"transformers cannot make it from {len(group.keys)} tensors ({brief})",
            remedy="config.json and the weights do not belong together",
        ) from error
    return {target: made[0] if isinstance(made, list) else made for target, made in made.items()}


def checked_names(model: Any, source: Source, renamed: Mapping[str, str]) -> dict[str, str]:
    """`renamed` without the tensors that the model does not know; SourceError where shapes differ or two are one."""
    known = model.state_dict()
    keys: dict[str, str] = {}  # name in the model -> name in the checkpoint
    for key, name in renamed.items():
        if name not in known or key not in source.tensors:
            continue
        shape = source.tensors[key].shape
        if tuple(known[name].shape) != shape:
            raise SourceError(
                f"{source.name}: {key}",
                f"shape {list(shape)}",
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

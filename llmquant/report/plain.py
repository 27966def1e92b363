"""Dataclasses from the plain data of a JSON file, and back.

A file is damaged, or of another version, more often than code is wrong: so every value is checked against the type of
its field, and the first one that does not fit ends in one error with the path of the key (`layers[3].name`).

How a class describes an object of the file (`report/data.py` has the classes):
- its fields are the keys, in the order of the file;
- a field without a default is always in the file;
- a field whose default is None is left out of the file where it is None;
- a field with any other default came with a later version of llmquant: files of earlier ones lack it.
A TypedDict describes an object that may hold other keys than its own; those are kept as they are.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

from llmquant.errors import LLMQuantError, VerifyError

T = TypeVar("T")
_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}


def plain(value: Any) -> Any:
    """`value` as JSON holds it: objects for dataclasses, lists for tuples, null for a number beyond a float."""
    if is_dataclass(value):
        found = {}
        for key in _keys_of(value.__class__):
            item = getattr(value, key.name)
            if item is not None or not key.left_out:
                found[key.name] = _without_infinity(item) if key.may_be_infinite else plain(item)
        return found
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):  # of numbers or texts, mostly, and many: histograms
        return [item if item.__class__ in _WORDS else plain(item) for item in value]
    return value


def _without_infinity(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_without_infinity(item) for item in value]
    return None if value == math.inf else value


def parse(kind: type[T], value: Any, where: str, error: type[LLMQuantError] = VerifyError) -> T:
    """`value`, which `plain` or a JSON file gave, as the dataclass `kind`; an `error` about the file `where`."""
    try:
        found: T = _parse(kind, value, "")
    except _MissingError as fault:
        got, remedy = "is an earlier version's", f"quantize or export again: it has no {fault.path}"
        raise error(where, got, remedy=remedy) from None
    except _FaultError as fault:
        place = f"{where}: {fault.path}" if fault.path else where
        raise error(place, fault.got, expected=fault.expected, remedy=fault.remedy) from None
    return found


def parse_file(kind: type[T], path: Path, error: type[LLMQuantError] = VerifyError) -> T:
    """The JSON file `path` as `kind`."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as fault:
        got, expected = f"cannot be read ({fault})", "a folder llmquant wrote"
        raise error(str(path), got, expected=expected) from None
    return parse(kind, value, str(path), error)


class _FaultError(Exception):
    def __init__(self, path: str, got: str, expected: str, remedy: str = "fetch or make it again") -> None:
        super().__init__(path, got)
        self.path, self.got, self.expected, self.remedy = path.lstrip("."), got, expected, remedy


class _MissingError(_FaultError):
    """A key that this version always writes."""


def _parse(kind: Any, value: Any, path: str) -> Any:
    if kind is Any:
        return value
    origin, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _parse_object(kind, _checked(value, dict, "an object", path), path)
    if is_typeddict(kind):
        return _parse_open_object(kind, _checked(value, dict, "an object", path), path)
    if origin is dict:
        items = _checked(value, dict, "an object", path).items()
        return {key: _parse(inner[1], item, f"{path}.{key}") for key, item in items}
    if origin in (tuple, list):
        return _parse_list(origin, inner, _checked(value, list, "a list", path), path)
    if origin is Annotated:  # `scores.Exponential`
        return math.inf if value is None else _parse(inner[0], value, path)
    if origin in (UnionType, Union):
        return _parse(_member(inner, value), value, path)
    if origin is Literal:
        if value not in inner or isinstance(value, bool):
            raise _FaultError(path, _said(value), f"one of {', '.join(map(str, inner))}")
        return value
    allowed = (int, float) if kind is float else kind
    if isinstance(value, bool) and kind is not bool:
        raise _FaultError(path, _said(value), _WORDS[kind])
    if isinstance(value, float) and not math.isfinite(value):  # which Python reads, and JSON does not have
        raise _FaultError(path, str(value), "a finite number")
    return _checked(value, allowed, _WORDS[kind], path)


def _parse_object(kind: Any, value: dict[str, Any], path: str) -> Any:
    found = {}
    for key in _keys_of(kind):
        if key.name in value:
            found[key.name] = _parse(key.kind, value[key.name], f"{path}.{key.name}")
        elif key.required:
            raise _MissingError(f"{path}.{key.name}", "is missing", "")
    if len(found) < len(value):
        odd = sorted(value.keys() - found.keys())
        got, remedy = "a key that this version does not know", "use the version of llmquant that wrote it"
        raise _FaultError(f"{path}.{odd[0]}", got, "", remedy)
    try:
        return kind(**found)
    except ValueError as error:  # what a class says of fields that do not fit together
        raise _FaultError(path, str(error), "") from None


def _parse_open_object(kind: Any, value: dict[str, Any], path: str) -> dict[str, Any]:
    if missing := sorted(kind.__required_keys__ - value.keys()):
        raise _MissingError(f"{path}.{missing[0]}", "is missing", "")
    hints = get_type_hints(kind)
    return {name: _parse(hints.get(name, Any), item, f"{path}.{name}") for name, item in value.items()}


def _parse_list(origin: Any, inner: tuple[Any, ...], value: list[Any], path: str) -> Any:
    if origin is tuple and inner[-1] is not Ellipsis and len(value) != len(inner):
        raise _FaultError(path, f"{len(value)} items", f"{len(inner)} of them")
    if inner[0] in _WORDS and all(item.__class__ is inner[0] for item in value) and inner[0] is not float:
        return origin(value)  # the same without a call for each, which histograms would feel
    kinds = inner if len(inner) == len(value) and inner[-1] is not Ellipsis else (inner[0],) * len(value)
    found = [_parse(kind, item, f"{path}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))]
    return origin(found)


def _member(kinds: tuple[Any, ...], value: Any) -> Any:
    """Which type of a union `value` is to be read as: the one of its JSON type, else the last that is not None."""
    for kind in kinds:
        if isinstance(value, get_origin(kind) or kind):
            return kind
    return next(kind for kind in reversed(kinds) if kind is not NoneType)


def _checked(value: Any, allowed: Any, expected: str, path: str) -> Any:
    if not isinstance(value, allowed):
        raise _FaultError(path, _said(value), expected)
    return value


def _said(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:40] if not isinstance(value, dict | list) else _kind_of(value)


def _kind_of(value: dict[str, Any] | list[Any]) -> str:
    return "an object" if isinstance(value, dict) else "a list"


@dataclass(frozen=True)
class _Key:
    """A field, as the file sees it."""

    name: str
    kind: Any
    required: bool
    left_out: bool  # where it is None
    may_be_infinite: bool


@cache
def _keys_of(kind: Any) -> tuple[_Key, ...]:
    hints = get_type_hints(kind, include_extras=True)
    return tuple(
        _Key(
            f.name,
            hints[f.name],
            required=f.default is MISSING and f.default_factory is MISSING,
            left_out=f.default is None,
            may_be_infinite=_may_be_infinite(hints[f.name]),
        )
        for f in fields(kind)
    )


def _may_be_infinite(kind: Any) -> bool:
    """Whether the type says so: `scores.Exponential`, alone or in a tuple."""
    return get_origin(kind) is Annotated or any(map(_may_be_infinite, get_args(kind)))

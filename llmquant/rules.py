"""A rule says how the linears that it matches are quantized, or that they are kept as they are.

A recipe is an ordered list of rules and its own fields: the first rule that matches a linear decides it, what a rule
does not say falls to the recipe's fields, and so does a linear that no rule matches. `--ignore` is a keep rule that
stands before all others. A rule is written in three ways that mean the same:

    --rule 'down_proj: bits=8, group_size=64'              on the command line, and so in reports
    [[rules]]                                              in a recipe file
    match = "down_proj"
    bits = 8
    group_size = 64
    Rule("down_proj", bits=8, group_size=64)               in Python

`match` is a regular expression that is searched for in the module's name (`model.layers.3.mlp.down_proj`), or, after
`glob:`, a pattern with *, ? and [...] that must fit the whole name.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from llmquant.errors import RecipeError, did_you_mean, option
from llmquant.formats.facts import FUSED, GROUPS, WIDTHS

METHODS = ("gptq", "rtn")
# What a rule, or the recipe where no rule does, decides about a linear.
SETTINGS: dict[str, tuple[Any, ...]] = {
    "bits": WIDTHS,
    "group_size": GROUPS,
    "symmetric": (True, False),
    "method": METHODS,
}
_GLOB, _RE = "glob:", "re:"
_ROUTER = re.compile(r"(^|\.)(\w+_)?router(_\w+)?(\.|$)")
_GATE = re.compile(r"(^|\.)(\w+_)?gate(\.|$)")
_JOINED = {name for members in FUSED.values() for name in members}  # q, k and v of one kind, gate and up

# Linears of a block that stay dense by themselves: what the ledger calls them, and which they are, by the name in the
# block, outputs and inputs. Their weights are next to nothing and their errors choose experts, or scale whole heads.
# By name: routers (`mlp.router`, `ffn.router.layer`, `mlp.gate`, `mlp.gate.wg`) and gates of shared experts, but no
# gate as wide as half its input, which is half of an MLP. By shape: one output for a head or a state (Qwen 3.5's
# `in_proj_a`, DeepSeek's `weights_proj`). The shape is held against the input, too: a small model is not made of
# nothing else. What servers join with its neighbours (k and v of one head) has their scheme.
SMALL: dict[str, Callable[[str, int, int], bool]] = {
    "router or gate": lambda path, rows, columns: (
        bool(_ROUTER.search(path)) or (bool(_GATE.search(path)) and 2 * rows <= columns)
    ),
    "narrow linear": lambda path, rows, columns: (
        rows <= 64 and 16 * rows <= columns and path.rpartition(".")[2] not in _JOINED
    ),
}


@dataclass(frozen=True)
class Rule:
    """`match`, and either `keep` or at least one setting; None: the recipe's own."""

    match: str
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    method: str | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        where = f"rule {self.match!r}"
        if not isinstance(self.match, str) or not self.match.removeprefix(_GLOB).strip():
            raise RecipeError(
                where, "has no pattern", expected="match: a regular expression, or glob:PATTERN", field="rules"
            )
        for name, value in self.settings.items():
            wanted = bool if name == "symmetric" else str if name == "method" else int
            # True is 1 for Python, and no number of bits.
            if type(value) is not wanted or value not in SETTINGS[name]:
                allowed = ", ".join(map(_written, SETTINGS[name]))
                raise RecipeError(f"{where}: {name}", repr(value), expected=f"one of {allowed}", field="rules")
        if type(self.keep) is not bool:
            raise RecipeError(f"{where}: keep", repr(self.keep), expected="true or false", field="rules")
        if self.keep == bool(self.settings):
            got = f"keeps, and sets {', '.join(self.settings)}" if self.keep else "says nothing"
            raise RecipeError(where, got, expected=f"keep, or some of {', '.join(SETTINGS)}", field="rules")
        if not self.match.startswith(_GLOB):
            try:
                re.compile(self.match)
            except re.error as error:
                raise RecipeError(
                    where, f"{error}", expected="a regular expression, or glob:PATTERN", field="rules"
                ) from None

    @property
    def settings(self) -> dict[str, Any]:
        """What it sets, by the names of the recipe's fields."""
        return {name: value for name in SETTINGS if (value := getattr(self, name)) is not None}

    def matches(self, module: str) -> bool:
        """
        >>> Rule("down_proj", bits=8).matches("model.layers.0.mlp.down_proj")
        True
        >>> Rule("glob:down_proj", bits=8).matches("model.layers.0.mlp.down_proj")
        False
        """
        if self.match.startswith(_GLOB):
            return fnmatchcase(module, self.match.removeprefix(_GLOB))
        return re.search(self.match, module) is not None

    def __str__(self) -> str:
        """As on the command line; `parse_rule` reads it back.

        >>> str(Rule("down_proj", bits=8, symmetric=False))
        'down_proj: bits=8, symmetric=false'
        """
        settings = ", ".join(f"{name}={_written(value)}" for name, value in self.settings.items())
        return f"{self.match}: {settings or 'keep'}"


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def parse_rule(text: str) -> Rule:
    """`PATTERN: keep` or `PATTERN: name=value, ...`; what stands behind the last colon are the settings.

    >>> parse_rule("glob:*.down_proj: bits=8, group_size=64")
    Rule(match='glob:*.down_proj', bits=8, group_size=64, symmetric=None, method=None, keep=False)
    """
    match, colon, settings = text.rpartition(":")
    where = f"rule {text!r}"
    if not colon:
        raise RecipeError(
            where, "no settings", expected="PATTERN: bits=8, group_size=64 or PATTERN: keep", field="rules"
        )
    values: dict[str, Any] = {"match": match.strip()}
    for part in settings.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if name in values:
            raise RecipeError(where, f"{name} is there twice", field="rules")
        if name == "keep" and not equals:
            values[name] = True
        elif name not in SETTINGS or not equals:
            known = ", ".join(f"{known}=..." for known in SETTINGS)
            raise RecipeError(where, f"{part.strip()!r}", expected=f"keep, or some of {known}", field="rules")
        else:
            values[name] = {_written(allowed): allowed for allowed in SETTINGS[name]}.get(value, value)
    return Rule(**values)


def make_rules(values: Iterable[Rule | str | Mapping[str, Any]]) -> tuple[Rule, ...]:
    """Rules from any of their three forms; two with the same pattern are refused, as the second would never apply."""
    rules = tuple(map(_make_rule, values))
    seen: set[str] = set()
    for rule in rules:
        if rule.match in seen:
            raise RecipeError(
                f"rule {rule.match!r}", "is there twice", remedy="put its settings into one rule", field="rules"
            )
        seen.add(rule.match)
    return rules


def _make_rule(value: Rule | str | Mapping[str, Any]) -> Rule:
    if isinstance(value, Rule):
        return value
    if isinstance(value, str):
        return parse_rule(value)
    if not isinstance(value, Mapping):
        raise RecipeError("recipe: rules", f"{value!r}", expected="a table with match and settings", field="rules")
    known = [field.name for field in fields(Rule)]
    for name in value:
        if name not in known:
            raise RecipeError(
                f"rule {value.get('match', '')!r}: {name}",
                "unknown key",
                remedy=did_you_mean(str(name), known),
                field="rules",
            )
    return Rule(**{"match": "", **value})


@dataclass(frozen=True)
class Ignored:
    """A pattern of --ignore, in any of the ways that quantizers write them.

    a regular expression   searched for in a tensor's and in its module's name: `down_proj`, `layers\\.0\\.`
    re:EXPRESSION          from the start of a module's or a tensor's name on, as compressed-tensors has it
    glob:PATTERN, *.proj   all of a module's or a tensor's name; glob: may be left out where it is no expression
    """

    pattern: str

    def __post_init__(self) -> None:
        if self._glob is None:
            try:
                re.compile(self.pattern.removeprefix(_RE))
            except re.error as error:
                raise RecipeError(
                    option("ignore"),
                    f"{self.pattern!r} ({error})",
                    expected="a regular expression, or a pattern with *",
                ) from None

    @property
    def _glob(self) -> str | None:
        if self.pattern.startswith(_GLOB):
            return self.pattern.removeprefix(_GLOB)
        return self.pattern if self.pattern.startswith("*") else None

    def matches(self, key: str, module: str) -> bool:
        """Whether it keeps the tensor `key` of `module`.

        >>> [Ignored(p).matches("a.down_proj.weight", "a.down_proj") for p in ("down", "re:.*down_proj", "*.down_proj")]
        [True, True, True]
        >>> [Ignored(p).matches("a.down_proj.weight", "a.down_proj") for p in ("re:down", "*.down", "glob:down_proj")]
        [False, False, False]
        """
        return self._fits(key) or self._fits(module)

    def _fits(self, name: str) -> bool:
        if (glob := self._glob) is not None:
            return fnmatchcase(name, glob)
        if self.pattern.startswith(_RE):
            return re.match(self.pattern.removeprefix(_RE), name) is not None
        return re.search(self.pattern, name) is not None


def split_patterns(patterns: Iterable[str]) -> tuple[str, ...]:
    """One pattern each: commas that stand in no bracket part them.

    >>> split_patterns(["lm_head,re:.*gate$", "x{1,2}", "(a,b)"])
    ('lm_head', 're:.*gate$', 'x{1,2}', '(a,b)')
    """
    found: list[str] = []
    for text in patterns:
        depth, start = 0, 0
        for at, char in enumerate(text):
            depth += (char in "([{") - (char in ")]}")
            if char == "," and depth <= 0:
                found.append(text[start:at])
                start = at + 1
        found.append(text[start:])
    return tuple(dict.fromkeys(part for text in found if (part := text.strip())))


def why_small(path: str, rows: int, columns: int) -> str:
    """Why a linear stays dense by itself (`SMALL`), for the ledger; "" where it does not. `path`: its name in a block.

    >>> why_small("mlp.gate", 128, 2048), why_small("mlp.gate_proj", 5632, 2048)
    ('router or gate: 128 outputs of 2048 inputs', '')
    """
    what = next((what for what, fits in SMALL.items() if fits(path, rows, columns)), "")
    return what and f"{what}: {rows} outputs of {columns} inputs"

r"""Which linears a config says stay dense: exact names, or patterns that hold whichever class opens the checkpoint.

Loaders of compressed-tensors compare each entry of `ignore` with the names of their own modules: with the whole name,
or, after `re:`, as a regular expression from its start on. The names differ from class to class. A router is
`model.layers.3.mlp.gate` in a text class and `model.language_model.layers.3.mlp.gate` in the one with the vision tower,
which the text class does not have at all. What they share is how names end and what a tower is called. So a pattern
skips the front of the name and begins with the first part of it that no quantized linear's name has:

    re:(.*\.)?visual\..*                    a tower, or mtp
    re:(.*\.)?gate$                         the routers of all blocks
    re:(.*\.)?layers\.61\..*                a block in which nothing is quantized
    re:(.*\.)?layers\.0\.mlp\.down_proj$    one linear
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise

_FEW = 8  # names of one kind that are written out
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_FRONT = r"(.*\.)?"


def ignore_list(dense: Sequence[str], quantized: Collection[str], *, by_pattern: bool) -> list[str]:
    r"""Entries that match every module of `dense` and none of `quantized`.

    by_pattern   classes name modules differently; if not, exact names are written, where there are few of a kind

    >>> blocks = [f"model.layers.{i}.mlp" for i in range(9)]
    >>> ignore_list(["lm_head", *(f"{block}.gate" for block in blocks)], [f"{block}.gate_proj" for block in blocks],
    ...             by_pattern=False)
    ['lm_head', 're:(.*\\.)?gate$']
    """
    names = dict.fromkeys(dense)
    counts, entries = Counter(map(_kind, names)), dict[str, re.Pattern[str] | None]()
    patterns = _Patterns(quantized)
    for name in names:
        if any(pattern is not None and pattern.match(name) for pattern in entries.values()):
            continue
        if by_pattern or counts[_kind(name)] > _FEW:
            found = patterns.of(name)
            entries[name if found is None else f"re:{found}"] = None if found is None else re.compile(found)
        else:
            entries[name] = None
    return list(entries)


def _kind(name: str) -> str:
    return _NUMBER.sub("*", name)


class _Patterns:
    """Patterns for dense modules that match none of the `quantized` ones."""

    def __init__(self, quantized: Collection[str]) -> None:
        self.quantized, self.kinds = quantized, {_NUMBER.sub("0", name) for name in quantized}
        parts = [name.split(".") for name in quantized]
        self.parts = {part for name in parts for part in name}
        self.pairs = {pair for name in parts for pair in pairwise(name)}

    def of(self, name: str) -> str | None:
        """The shortest; None where each would match a quantized module, too."""
        for tail, numbered in self._tails(name.split(".")):
            pattern = re.compile(_FRONT + tail)
            if not any(pattern.match(other) for other in (self.quantized if numbered else self.kinds)):
                return pattern.pattern
        return None

    def _tails(self, parts: list[str]) -> Iterator[tuple[str, bool]]:
        """Ends of patterns, and whether they have numbers, from the widest on."""
        last = len(parts) - 1
        for i, part in enumerate(parts):
            end = "$" if i == last else r"\..*"
            if part.isdigit():
                if i and (parts[i - 1], part) not in self.pairs:
                    yield rf"{re.escape(parts[i - 1])}\.{part}{end}", True
            elif part not in self.parts:
                yield re.escape(part) + end, False
        begin = next((i - 1 for i, part in enumerate(parts) if i and part.isdigit()), 0)
        yield r"\.".join(map(re.escape, parts[begin:])) + "$", True

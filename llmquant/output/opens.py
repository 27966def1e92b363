"""Before any work: does what will be written open in stock transformers, with every parameter filled?

The loader is asked itself (`model/loads.py`). What it says of the original's own tensors is no fault of ours and is
taken off. A class that cannot hold packed linears (its initialization or its tying looks at their dense weights) is
given `"dequantize": true` in the config, by which transformers unpacks all linears as it loads them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmquant.formats import LinearSpec
from llmquant.formats.base import Layout
from llmquant.formats.runtimes import Finding
from llmquant.model.loads import CODES, Loaded, load_empty, openers
from llmquant.source.names import natural_key, without_numbers
from llmquant.versions import versions

_PARTS = (CODES, ".weight_scale", ".weight_shape")
_SHOWN = 3  # kinds of tensors in a message


@dataclass(frozen=True)
class Opening:
    """What stock transformers does with a checkpoint.

    problems    why it does not open; empty where it does
    mended      what keeps its class from holding packed linears, for which the config says "dequantize"
    merged      how many packed linears it makes dense because its class merges them (experts); "" for none
    elsewhere   why AutoModelForCausalLM does not open it, where that is not the class that config.json names
    unchecked   why none of this could be found out
    """

    problems: tuple[str, ...] = ()
    mended: tuple[str, ...] = ()
    merged: str = ""
    elsewhere: tuple[str, ...] = ()
    unchecked: str = ""

    @property
    def findings(self) -> list[Finding]:
        """The same as the lint says it."""
        others, said = "other runtimes may keep them packed", list[tuple[str, str, str]]()
        for problem in self.problems:
            said.append(("refuses", problem, "keep those in 16 bit with --ignore, or use another --format"))
        for problem in self.mended[:1]:
            got = (
                f'"dequantize" in the config makes all linears dense as they are loaded: its class {problem} without it'
            )
            said.append(("warns", got, others))
        if self.merged and not self.mended:
            said.append(("warns", f"merges {self.merged} packed linears, and makes them dense for that", others))
        for problem in self.elsewhere:
            said.append(("warns", f"by AutoModelForCausalLM it {problem}", "use the class that config.json names"))
        if self.unchecked:
            said.append(("warns", f"whether it opens was not tried: {self.unchecked}", "open it before you share it"))
        version, source = versions()["transformers"], "its from_pretrained, run without weights"
        return [Finding("transformers", version, severity, (), got, remedy, source) for severity, got, remedy in said]


def check_opens(
    config: Mapping[str, Any],
    layout: Layout,
    original: Layout,
    specs: Sequence[LinearSpec] = (),
    own_class: Callable[[str], Any] | None = None,
) -> Opening:
    """What transformers makes of the tensors of `layout` under `config`, the config.json as it will be written.

    original    all stored tensors of the checkpoint that it is made from
    specs       the linears that are packed in `layout`
    own_class   finds a class of the checkpoint's own code, where the user trusts that
    """
    trial = _Trial(config, layout, original, specs, own_class)
    classes = range(len(openers(config, own_class)))
    if not classes:
        return Opening(unchecked="transformers has no class for it")
    plain = [trial.problems(0, index) for index in classes]
    ways = range(2 if trial.packed and trial.raised else 1)  # no other fault is one of packed linears
    for way in ways:
        if not any(trial.problems(way, index) for index in classes):
            reasons = tuple(problem for found in plain for problem in found)
            return Opening(mended=reasons, merged=trial.merged, unchecked=trial.unchecked)
    for way in ways:  # none in which every class opens it: the one of config.json decides
        if not trial.problems(way, 0):
            reasons = plain[0] if way else ()
            return Opening(mended=reasons, merged=trial.merged, elsewhere=trial.problems(way, 1))
    return Opening(problems=plain[0])


class _Trial:
    """Every class that may open a checkpoint, with the config as it is (way 0) and with "dequantize" in it (way 1)."""

    def __init__(
        self,
        config: Mapping[str, Any],
        layout: Layout,
        original: Layout,
        specs: Sequence[LinearSpec],
        own_class: Callable[[str], Any] | None,
    ) -> None:
        self.layout, self.original, self.own_class = layout, original, own_class
        told = config.get("quantization_config") or {}
        self.configs = [{**config}, {**config, "quantization_config": {**told, "dequantize": True}}]
        self.packed = "config_groups" in told and not told.get("dequantize")
        self.dense = {key: value for key, value in config.items() if key != "quantization_config"}
        self.schemes = {
            spec.key.removesuffix(".weight") + CODES: (spec.scheme.bits, spec.scheme.group_size) for spec in specs
        }
        self.raised, self.unchecked, self.merged = False, "", ""
        self._problems: dict[tuple[int, int], tuple[str, ...]] = {}
        self._known: dict[int, Loaded] = {}

    def problems(self, way: int, index: int) -> tuple[str, ...]:
        """What the class does not take, and takes of the original."""
        if (way, index) not in self._problems:
            opener = openers(self.configs[way], self.own_class)[index]
            found = load_empty(opener, self.layout)
            if not way and not index and found.unpacked:
                self.merged = f"{len(found.unpacked)} of {sum(name.endswith(CODES) for name in self.layout)}"
            self._problems[way, index] = self._judge(found, index)
        return self._problems[way, index]

    def _judge(self, found: Loaded, index: int) -> tuple[str, ...]:
        wrong = {name: has for name, has in found.unpacked.items() if has != self.schemes.get(name, has)}
        if found == Loaded(unpacked=found.unpacked) and not wrong:
            return ()
        if index not in self._known:
            self._known[index] = load_empty(openers(self.dense, self.own_class)[index], self.original)
        known = self._known[index]
        if known.error or (index and known.missing):  # then nobody opens the original by this class either
            if not index:
                self.unchecked = f"its class cannot be asked without weights ({known.error})"
            return ()
        self.raised |= bool(found.error)
        return tuple(_texts(found, known, wrong))


def _texts(found: Loaded, known: Loaded, wrong: Mapping[str, tuple[int, int]]) -> list[str]:
    """What is wrong with a load and was not with the original's, in kinds and counts."""
    if found.error:
        return [f"fails at {found.error}"]
    random = {_dense(name) for name in found.missing} - known.missing
    ignored = {_dense(name) for name in found.unexpected} - known.unexpected - random
    texts = {
        "leaves {} random": (random - found.failed.keys(), "parameter"),
        "has no place for {}": (ignored, "tensor"),
        "expects another shape of {}": (found.misfits - known.misfits, "parameter"),
        "cannot merge {}": (set(found.failed), "parameter"),
        "takes bits and group size of others for {}": (set(wrong), "tensor"),
    }
    return [text.format(_counted(names, what)) for text, (names, what) in texts.items() if names]


def _dense(name: str) -> str:
    """A packed linear's tensors, by the name of its weight."""
    return next((name.removesuffix(part) + ".weight" for part in _PARTS if name.endswith(part)), name)


def _counted(names: Iterable[str], what: str) -> str:
    """
    >>> _counted(["h.0.mlp.up.weight", "h.1.mlp.up.weight"], "tensor")
    '2 tensors (h.*.mlp.up.weight)'
    """
    kinds = Counter(without_numbers(name) for name in sorted(names, key=natural_key))
    shown = ", ".join(list(kinds)[:_SHOWN]) + (f" and {len(kinds) - _SHOWN} more kinds" if len(kinds) > _SHOWN else "")
    count = kinds.total()
    return f"{count} {what}{'s' * (count > 1)} ({shown})"

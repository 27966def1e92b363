"""One row per tensor of the checkpoint: quantized or copied, and why. Nothing is left out silently."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch

from llmquant.errors import RecipeError, SourceError, option
from llmquant.formats import FORMATS, LinearSpec
from llmquant.formats.base import Layout, in_block
from llmquant.formats.facts import fused_sets
from llmquant.formats.ignored import ignore_list
from llmquant.model.meta import is_conv1d, is_linear
from llmquant.model.skeleton import Skeleton
from llmquant.quant.grid import QuantScheme
from llmquant.quant.solvers import DATA_FREE
from llmquant.recipe import Recipe
from llmquant.rules import Rule, why_small
from llmquant.source.base import Source
from llmquant.source.names import natural_key, without_numbers

_SMALL = 50  # a linear with less than this part of its block's weights is not worth a refusal
_NO_LINEAR = re.compile(r"embed|norm|wte|wpe", re.IGNORECASE)  # in the names of weights that no class of ours knows
_STORABLE = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Row:
    """A ledger row. `spec` is there for quantized rows only; `block` is None outside the decoder blocks."""

    name: str
    action: str  # quantized | copied | left out
    reason: str
    dtype: str
    shape: tuple[int, ...]
    block: int | None
    spec: LinearSpec | None = None
    by_rule: bool = False  # a rule of the recipe had a say

    def as_dict(self) -> dict[str, Any]:
        """The row as report.json holds it. `module`, of quantized rows, is the name under which `layers` lists it."""
        row = {
            "name": self.name,
            "action": self.action,
            "reason": self.reason,
            "dtype": self.dtype,
            "shape": list(self.shape),
        }
        if self.spec is not None:
            row |= {"module": self.spec.module, **asdict(self.spec.scheme)} | (
                {"method": self.spec.method} if self.by_rule else {}
            )
        return row


@dataclass(frozen=True)
class Plan:
    """What will be done with every tensor, in the order of the output."""

    rows: tuple[Row, ...]
    dense_linears: tuple[str, ...]  # module names of linears that stay dense
    layout: Layout  # every tensor of the output
    ignore: tuple[str, ...] = ()  # the same linears, and those that the class does not know, as names or patterns

    @cached_property
    def specs(self) -> list[LinearSpec]:
        return [row.spec for row in self.rows if row.spec is not None]

    def block(self, index: int | None) -> list[Row]:
        return self._by_block.get(index, [])

    @cached_property
    def _by_block(self) -> dict[int | None, list[Row]]:
        found: dict[int | None, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.block, []).append(row)
        return found

    def borrowed(self, skeleton: Skeleton, index: int) -> list[LinearSpec]:
        """Linears of a block that run with the quantized weights of an earlier block, each as one of this block."""
        tied = {p: owner for p, owner in skeleton.weights.tied.items() if skeleton.block_of(p) == index}
        by_param = {spec.param: spec for spec in self.specs} if tied else {}
        return [
            replace(by_param[owner], module=param.removesuffix(".weight"))
            for param, owner in tied.items()
            if owner in by_param
        ]

    @property
    def calibrated(self) -> bool:
        """Whether some linear's solver wants calibration text."""
        return any(spec.method not in DATA_FREE for spec in self.specs)

    @property
    def mean_bits(self) -> float:
        """Bits of a code, over all quantized weights."""
        sizes = [(spec.shape[0] * spec.shape[1], spec.scheme.bits) for spec in self.specs]
        return sum(size * bits for size, bits in sizes) / sum(size for size, _ in sizes)

    @property
    def most_bits(self) -> int:
        return max(spec.scheme.bits for spec in self.specs)

    @property
    def output_bytes(self) -> int:
        return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in self.layout.values())

    def bits_per_weight(self, format_name: str) -> float:
        """Stored bits of the quantized linears, scales included, by their number of weights."""
        bits = sum(FORMATS[format_name].weight_bits(spec) for spec in self.specs)
        return bits / max(1, sum(spec.shape[0] * spec.shape[1] for spec in self.specs))


def make_plan(source: Source, skeleton: Skeleton, recipe: Recipe) -> Plan:
    """Decide on every tensor of `source`.

    Quantized: the weight of each Linear or Conv1D inside a decoder block, as `treatments` says. Everything else is
    copied; a tensor that holds all experts, of which none is quantized, as it is. Raises RecipeError where a group size
    does not divide (all offenders named), where nothing is left to quantize, or a rule or pattern decides nothing;
    FormatError by the format.
    """
    keys = sorted(source.tensors, key=natural_key)
    chosen = treatments(keys, skeleton, recipe)
    _refuse_unknown_experts(keys, skeleton, recipe)
    if whole := [key for key, parts in source.slices.items() if not _any_quantized(skeleton, parts, chosen)]:
        source = source.listed(whole)
        keys = sorted(source.tensors, key=natural_key)
    rows = [_row(source, skeleton, key, chosen.get(_module(skeleton, key))) for key in keys]
    specs = [row.spec for row in rows if row.spec is not None]
    if not specs:
        kept = any(rule.keep for rule in recipe.rules)
        raise RecipeError(
            source.name,
            "no linear is left to quantize",
            remedy=f"check {option('ignore')}" + " and the rules that keep" * kept,
            field="ignore",
        )
    _check_groups(specs)
    _check_borrowed(specs, skeleton)
    return lay_out(rows, skeleton, recipe.format)


def _refuse_unknown_experts(keys: Iterable[str], skeleton: Skeleton, recipe: Recipe) -> None:
    """SourceError for experts that are no linears, unless the user keeps them: they would be most of the model."""
    for key in keys:
        param = skeleton.param_of.get(key)
        if param is None or skeleton.block_of(param) is None or len(skeleton.source.tensors[key].shape) < 2:
            continue
        module = skeleton.model.get_submodule(param.rpartition(".")[0])
        known = is_linear(module) or "expert" not in type(module).__name__.lower()
        if not known and not any(re.search(pattern, key) for pattern in recipe.ignore):
            raise SourceError(
                f"{skeleton.where}: {key}",
                f"experts of an unknown form ({type(module).__name__})",
                expected="projections of every expert with a gate and an activation between them",
                remedy=f"keep them in 16 bit with {option('ignore')}",
            )


def _any_quantized(skeleton: Skeleton, keys: Iterable[str], chosen: Mapping[str, "Treatment"]) -> bool:
    found = (chosen.get(_module(skeleton, key)) for key in keys)
    return any(treatment is not None and treatment.scheme is not None for treatment in found)


def lay_out(rows: Sequence[Row], skeleton: Skeleton, format_name: str) -> Plan:
    """The plan with these rows: the tensors of the output, and which linears stay dense.

    FormatError where the format cannot hold the linears, SourceError where two tensors would have one name.
    """
    fmt, specs = FORMATS[format_name], [row.spec for row in rows if row.spec is not None]
    fmt.check(specs)
    layout: Layout = {}
    for row in rows:
        stored = {row.name: (getattr(torch, row.dtype), row.shape)}
        new: Layout = stored if row.spec is None else fmt.layout(row.spec)
        if clash := sorted(name for name in new if name in layout):  # not sets: `layout` grows to all tensors
            raise SourceError(skeleton.where, f"the output would hold {clash[0]} twice")
        layout |= new
    quantized = {spec.module for spec in specs}
    dense = [n for n, m in skeleton.model.named_modules() if is_linear(m) and n not in quantized]
    return Plan(tuple(rows), tuple(dense), layout, tuple(_ignore(rows, skeleton, dense)))


def _ignore(rows: Sequence[Row], skeleton: Skeleton, dense: Sequence[str]) -> list[str]:
    """Names or patterns of all that may be a linear and stays dense, whichever class opens the checkpoint.

    dense   those of the class that we run: a checkpoint may hold the weights of others, too (vision towers, mtp)
    """
    quantized = {spec.module: spec.prefix.rstrip(".") for row in rows if (spec := row.spec) is not None}
    known, stored = set(dense), dict[str, str | None]()  # name of a dense linear in the checkpoint -> in the class
    for row in rows:
        if row.spec is None and row.name.endswith(".weight") and len(row.shape) == 2:
            module = _module(skeleton, row.name)
            if row.name in skeleton.param_of:
                if module in known:
                    stored[row.name.removesuffix(".weight")] = module
            elif not _NO_LINEAR.search(row.name):
                stored[module] = None
    parts = any(isinstance(part, dict) and "model_type" in part for part in skeleton.source.config.values())
    varied = parts or any(name != module for name, module in stored.items())
    return ignore_list([*dense, *stored], {*quantized, *quantized.values()}, by_pattern=varied)


@dataclass(frozen=True)
class Treatment:
    """How one linear is quantized; `scheme` None: it is kept. `why` is for the ledger, `by_rule`: a rule had a say."""

    scheme: QuantScheme | None
    method: str
    why: str
    by_rule: bool = False

    @property
    def care(self) -> tuple[float, ...]:
        """How much of the weight it keeps: dense, then bits, smaller groups, zero points."""
        if self.scheme is None:
            return (math.inf,)
        group = math.inf if self.scheme.group_size == -1 else self.scheme.group_size
        return (self.scheme.bits, -group, not self.scheme.symmetric)


def treatments(keys: Sequence[str], skeleton: Skeleton, recipe: Recipe) -> dict[str, Treatment]:
    """The treatment of every linear of the decoder blocks whose weight is among `keys`, by the name of its module.

    The first that matches decides: an --ignore pattern (in the tensor's name, or all of the module's), a rule, the
    recipe's own fields. What is too small to be worth its error (`rules.SMALL`) stays dense, unless a rule matches
    nothing but such linears, and so means them. RecipeError where a pattern or a rule decides nothing.
    """
    chosen: dict[str, Treatment] = {}
    linears = [_module(skeleton, key) for key in keys if _is_candidate(skeleton, key)]
    small = {module: why for module in linears if (why := _why_small(skeleton, module))}
    meant = [rule for rule in recipe.rules if not any(rule.matches(m) for m in linears if m not in small)]
    unused_patterns, unused_rules = dict.fromkeys(recipe.ignore), dict.fromkeys(recipe.rules)
    for key in keys:
        module = _module(skeleton, key)
        ignored = [p for p in recipe.ignore if re.search(p, key) or re.fullmatch(p, module)]
        for pattern in ignored:
            unused_patterns.pop(pattern, None)
        if not _is_candidate(skeleton, key):
            continue
        rule = next((rule for rule in recipe.rules if rule.matches(module)), None)
        if ignored:
            chosen[module] = Treatment(None, "", f"--ignore {ignored[0]}")
        elif why := skeleton.unquantizable(module):
            chosen[module] = Treatment(None, "", why)
        elif module in small and rule not in meant and not (rule is not None and rule.keep):
            chosen[module] = Treatment(None, "", small[module])
        else:
            chosen[module] = _spared(_treatment(recipe, rule), module, skeleton)
            if rule is not None:
                unused_rules.pop(rule, None)
    if unused_patterns:
        first = sorted(unused_patterns)[0]
        raise RecipeError(option("ignore"), f"{first!r} matches no tensor", expected="a regular expression that does")
    for rule in unused_rules:
        _refuse_unused(rule, skeleton, chosen)
    return _widened(chosen, skeleton)


def _is_candidate(skeleton: Skeleton, key: str) -> bool:
    """Whether the tensor is the weight of a linear in a decoder block."""
    param = skeleton.param_of.get(key)
    if param is None or skeleton.block_of(param) is None or not param.endswith(".weight"):
        return False
    return is_linear(skeleton.model.get_submodule(param.removesuffix(".weight")))


def _why_small(skeleton: Skeleton, module: str) -> str:
    """Why a linear is too small to be quantized, for the ledger; "" where it is not."""
    linear = skeleton.model.get_submodule(module)
    rows, columns = linear.weight.shape[::-1] if is_conv1d(linear) else linear.weight.shape
    _, path = in_block(module) or ("", module)
    return why_small(path, rows, columns)


def _treatment(recipe: Recipe, rule: Rule | None) -> Treatment:
    if rule is not None and rule.keep:
        return Treatment(None, "", f"rule '{rule}'", True)
    settings = {} if rule is None else rule.settings
    bits, group_size, symmetric, method = (
        settings.get(name, getattr(recipe, name)) for name in ("bits", "group_size", "symmetric", "method")
    )
    why = "linear layer of a decoder block" + ("" if rule is None else f", rule '{rule}'")
    return Treatment(QuantScheme(bits, group_size, symmetric), method, why, rule is not None)


def _spared(treatment: Treatment, module: str, skeleton: Skeleton) -> Treatment:
    """`treatment`, or keep a small linear whose inputs its groups do not divide; a large one is refused later."""
    linear, scheme = skeleton.model.get_submodule(module), treatment.scheme
    in_features = linear.weight.shape[0 if is_conv1d(linear) else 1]
    if scheme is None or scheme.divides(in_features):
        return treatment
    index = skeleton.block_of(module)
    assert index is not None
    if _SMALL * linear.weight.numel() > skeleton.blocks[index].n_weights:
        return treatment
    why = f"small, and groups of {scheme.group_size} do not divide its {in_features} inputs"
    return Treatment(None, "", why, treatment.by_rule)


def _refuse_unused(rule: Rule, skeleton: Skeleton, linears: Iterable[str]) -> None:
    """RecipeError that says why no linear is decided by `rule`."""
    where = f"rule '{rule}'"
    if any(rule.matches(module) for module in linears):
        raise RecipeError(
            where,
            "decides nothing: what stands before it matches all its linears",
            remedy="put it before, or out",
            field="rules",
        )
    found = [(name, type(m).__name__) for name, m in skeleton.model.named_modules() if name and rule.matches(name)]
    if found:
        name, kind = found[-1]
        raise RecipeError(
            where, f"matches {name} ({kind})", expected="a linear layer of a decoder block", field="rules"
        )
    raise RecipeError(where, "matches no module", expected="the name of a linear layer, or a part of it", field="rules")


def _expert_sets(chosen: Mapping[str, Treatment], skeleton: Skeleton) -> list[list[str]]:
    """The linears of all experts of each layer: servers run them in one kernel, of one scheme.

    RecipeError where --ignore keeps some of a layer's experts and not all.
    """
    sets: dict[str, list[str]] = {}
    for module in chosen:
        if (owner := skeleton.experts_of(module)) is not None:
            sets.setdefault(owner, []).append(module)
    for owner, members in sets.items():
        kept = [member for member in members if chosen[member].scheme is None and not chosen[member].by_rule]
        if kept and len(kept) < len(members):
            raise RecipeError(
                owner,
                f"{len(kept)} of the {len(members)} linears of its experts are kept ({chosen[kept[0]].why})",
                expected="all experts of a layer, or none: servers run them in one kernel",
                remedy=f"{option('ignore')} {re.escape(owner.rpartition('.')[2])}, or a pattern that spares them",
                field="ignore",
            )
    return list(sets.values())


def _widened(chosen: dict[str, Treatment], skeleton: Skeleton) -> dict[str, Treatment]:
    """Sets that servers run as one matrix (q, k, v; gate, up) get the scheme of their most careful member, and so do
    all experts of a layer.

    Only where a rule decided a member: --ignore alone keeps what it names and nothing else. It holds for all formats,
    as one checkpoint may be exported to any other.
    """
    wider = dict(chosen)
    for members in (*fused_sets(chosen), *_expert_sets(chosen, skeleton)):
        best = max(members, key=lambda member: chosen[member].care)  # the first of equals
        if not any(chosen[member].by_rule for member in members):
            continue
        for member in members:
            if chosen[member].scheme != (scheme := chosen[best].scheme):
                leaf, together = best.rpartition(".")[2], "servers run them as one matrix"
                what = "linear layer of a decoder block, with the scheme" if scheme else f"{chosen[best].why}, the fate"
                why = f"{what} of {leaf}: {together}"
                wider[member] = Treatment(scheme, "" if scheme is None else chosen[member].method, why, True)
    return wider


def _module(skeleton: Skeleton, key: str) -> str:
    return skeleton.param_of.get(key, key).rpartition(".")[0]


def _row(source: Source, skeleton: Skeleton, key: str, treatment: Treatment | None) -> Row:
    info = source.tensors[key]
    param = skeleton.param_of.get(key)
    block = skeleton.block_of(param) if param is not None else None
    dtype = str(info.dtype).removeprefix("torch.")
    form = source.stored_as(key)
    origin = source.origin(key)
    read_from = (origin and f", {origin}") + ("" if form is None else f", dequantized from {form}")

    def copied(reason: str) -> Row:
        return Row(key, "copied", reason + read_from, dtype, info.shape, block)

    if param is None:
        if key in skeleton.source.slices:
            return copied("all experts in one tensor, none of them quantized")
        return copied("not a parameter of the model class")
    module_name, _, leaf = param.rpartition(".")
    module = skeleton.model.get_submodule(module_name)
    if block is None:
        return copied(f"outside the decoder blocks ({type(module).__name__})")
    if not is_linear(module):
        return copied(f"not a linear layer ({type(module).__name__})")
    if leaf != "weight" or treatment is None:
        return copied(f"{leaf} of a linear layer")
    if treatment.scheme is None:
        return copied(treatment.why)
    if info.dtype not in _STORABLE:
        raise SourceError(
            key, f"weights in {dtype}", expected="bfloat16, float16 or float32", remedy="use a 16-bit checkpoint"
        )
    conv = is_conv1d(module)
    shape = (info.shape[1], info.shape[0]) if conv else (info.shape[0], info.shape[1])
    kind = "Conv1D" if conv else type(module).__name__
    spec = LinearSpec(key, module_name, kind, shape, info.dtype, treatment.scheme, treatment.method)
    return Row(key, "quantized", treatment.why + read_from, dtype, info.shape, block, spec, treatment.by_rule)


def _check_borrowed(specs: Sequence[LinearSpec], skeleton: Skeleton) -> None:
    """Weights that several modules run with must be quantized before the others need them."""
    for spec in specs:
        block = skeleton.block_of(spec.param) or 0
        for param in skeleton.weights.borrowers.get(spec.param, ()):
            if (skeleton.block_of(param) or 0) <= block:
                raise SourceError(
                    f"{skeleton.where}: {spec.param}",
                    f"{param} runs with it",
                    expected="weights that only later blocks run with, too",
                    remedy=f"keep it in 16 bit with {option('ignore')}",
                )


def _check_groups(specs: list[LinearSpec]) -> None:
    bad = [spec for spec in specs if not spec.scheme.divides(spec.shape[1])]
    if not bad:
        return
    group_size = bad[0].scheme.group_size
    bad = [spec for spec in bad if spec.scheme.group_size == group_size]
    kinds = Counter(f"{without_numbers(f'{spec.module}.')[:-1]} ({spec.shape[1]})" for spec in bad)
    widths = {spec.shape[1] for spec in bad}
    fitting = [g for g in (128, 64, 32) if all(width % g == 0 for width in widths)]
    other = f"{option('group_size')} {fitting[0]} or " if fitting else ""
    raise RecipeError(
        ", ".join(kind if count == 1 else f"{count} x {kind}" for kind, count in kinds.items()),
        f"in_features not divisible by group size {group_size}",
        remedy=f"use {other}{option('group_size')} -1, or keep them in 16 bit with {option('ignore')}",
        field="group_size",
    )

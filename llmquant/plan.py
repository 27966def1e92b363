"""One row per tensor of the checkpoint: quantized or copied, and why. Nothing is left out silently."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch

from llmquant.errors import RecipeError, SourceError, option
from llmquant.formats import FORMATS, LinearSpec
from llmquant.formats.base import Layout
from llmquant.formats.facts import FACTS
from llmquant.formats.ignored import ignore_list
from llmquant.model.meta import is_conv1d, is_linear
from llmquant.model.skeleton import Skeleton
from llmquant.quant.solvers import DATA_FREE
from llmquant.recipe import Recipe
from llmquant.source.base import Source
from llmquant.source.names import kinds, natural_key
from llmquant.treatments import (
    Treatment,
    is_foreign,
    module_of,
    refuse_unknown_experts,
    treatments,
)

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

    @cached_property
    def in_blocks(self) -> list[LinearSpec]:
        """Without those outside the blocks."""
        return [row.spec for row in self.rows if row.spec is not None and row.block is not None]

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
        """Of the linears that are calibrated; of all where none is."""
        calibrated = [spec for spec in self.specs if spec.method not in DATA_FREE]
        return max(spec.scheme.bits for spec in calibrated or self.specs)

    @property
    def output_bytes(self) -> int:
        return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in self.layout.values())

    def bits_per_weight(self, format_name: str) -> float:
        """Stored bits of the quantized linears, scales included, by their number of weights."""
        bits = sum(FORMATS[format_name].weight_bits(spec) for spec in self.specs)
        return bits / max(1, sum(spec.shape[0] * spec.shape[1] for spec in self.specs))


def make_plan(source: Source, skeleton: Skeleton, recipe: Recipe, *, auto: bool = False) -> Plan:
    """Decide on every tensor of `source`; `auto`: the recipe's group size was chosen (`treatments.with_group_size`).

    Quantized: the weight of each Linear or Conv1D inside a decoder block, as `treatments` says. Everything else is
    copied; a tensor that holds all experts, of which none is quantized, as it is. Raises RecipeError where a group size
    does not divide (all offenders named), where nothing is left to quantize, or a rule or pattern decides nothing;
    FormatError by the format.
    """
    keys = sorted(source.tensors, key=natural_key)
    chosen = treatments(keys, skeleton, recipe, auto=auto)
    refuse_unknown_experts(keys, skeleton, recipe)
    if whole := [key for key, parts in source.slices.items() if not _any_quantized(skeleton, parts, chosen)]:
        source = source.listed(whole)
        keys = sorted(source.tensors, key=natural_key)
    rows = [_row(source, skeleton, key, chosen.get(module_of(skeleton, key))) for key in keys]
    specs = [row.spec for row in rows if row.spec is not None]
    if not specs:
        kept = any(rule.keep for rule in recipe.rules)
        (why, count), *_ = Counter(t.why for t in chosen.values()).most_common(1) or [("no linear", 0)]
        raise RecipeError(
            source.name,
            "no linear is left to quantize" + (f" ({count} of {len(chosen)}: {why})" if count else ""),
            remedy=f"check {option('ignore')}" + " and the rules that keep" * kept,
            field="ignore",
        )
    _check_groups(specs, recipe)
    _check_borrowed(specs, skeleton)
    return lay_out(rows, skeleton, recipe.format)


def _any_quantized(skeleton: Skeleton, keys: Iterable[str], chosen: Mapping[str, Treatment]) -> bool:
    found = (chosen.get(module_of(skeleton, key)) for key in keys)
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
            module = module_of(skeleton, row.name)
            if row.name in skeleton.param_of:
                if module in known:
                    stored[row.name.removesuffix(".weight")] = module
            elif is_foreign(skeleton, row.name, row.shape):
                stored[module] = None
    parts = any(isinstance(part, dict) and "model_type" in part for part in skeleton.source.config.values())
    varied = parts or any(name != module for name, module in stored.items())
    return ignore_list([*dense, *stored], {*quantized, *quantized.values()}, by_pattern=varied)


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
        if treatment is None:
            return copied("not a parameter of the model class")
        module_name, conv, kind = key.removesuffix(".weight"), False, "Linear"
    else:
        if (why := _why_copied(skeleton, param, treatment)) is not None:
            return copied(why)
        module_name = param.removesuffix(".weight")
        module = skeleton.modules[module_name]
        conv = is_conv1d(module)
        kind = "Conv1D" if conv else type(module).__name__
    assert treatment is not None
    if treatment.scheme is None:
        return copied(treatment.why)
    if info.dtype not in _STORABLE:
        raise SourceError(
            key, f"weights in {dtype}", expected="bfloat16, float16 or float32", remedy="use a 16-bit checkpoint"
        )
    shape = (info.shape[1], info.shape[0]) if conv else (info.shape[0], info.shape[1])
    spec = LinearSpec(key, module_name, kind, shape, info.dtype, treatment.scheme, treatment.method)
    return Row(key, "quantized", treatment.why + read_from, dtype, info.shape, block, spec, treatment.by_rule)


def _why_copied(skeleton: Skeleton, param: str, treatment: Treatment | None) -> str | None:
    """Why a parameter of the model is no weight that could be quantized; None where it is one."""
    module_name, _, leaf = param.rpartition(".")
    module = skeleton.modules[module_name]
    if leaf == "weight" and treatment is not None:
        return None
    if skeleton.block_of(param) is None:
        return f"outside the decoder blocks ({type(module).__name__})"
    return f"{leaf} of a linear layer" if is_linear(module) else f"not a linear layer ({type(module).__name__})"


def _check_borrowed(specs: Sequence[LinearSpec], skeleton: Skeleton) -> None:
    """Weights that several modules run with must be quantized before the others need them."""
    for spec in specs:
        if (block := skeleton.block_of(spec.param)) is None:  # the embedding, and a head that is tied to it
            continue
        for param in skeleton.weights.borrowers.get(spec.param, ()):
            if (skeleton.block_of(param) or 0) <= block:
                raise SourceError(
                    f"{skeleton.where}: {spec.param}",
                    f"{param} runs with it",
                    expected="weights that only later blocks run with, too",
                    remedy=f"keep it in 16 bit with {option('ignore')}",
                )


def _check_groups(specs: list[LinearSpec], recipe: Recipe) -> None:
    bad = [spec for spec in specs if not spec.scheme.divides(spec.shape[1])]
    if not bad:
        return
    group_size = bad[0].scheme.group_size
    bad = [spec for spec in bad if spec.scheme.group_size == group_size]
    held = [size for size in (128, 64, 32, -1) if all(size in FACTS[name].groups for name in recipe.formats)]
    fitting = [size for size in held if size == -1 or all(spec.shape[1] % size == 0 for spec in bad)]
    sizes = " or ".join(str(size) for size in dict.fromkeys([*fitting[:1], *fitting[-1:]]))
    raise RecipeError(
        kinds(f"{spec.module} ({spec.shape[1]})" for spec in bad),
        f"in_features not divisible by group size {group_size}",
        remedy=(f"use {option('group_size')} {sizes}, or " if sizes else "")
        + f"keep them in 16 bit with {option('unfit')} keep",
        field="group_size",
    )

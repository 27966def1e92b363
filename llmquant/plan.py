"""One row per tensor of the checkpoint: quantized or copied, and why. Nothing is left out silently."""

import re
from dataclasses import asdict, dataclass
from typing import Any

import torch

from llmquant.errors import RecipeError, SourceError, option
from llmquant.formats import FORMATS, LinearSpec
from llmquant.formats.base import Layout
from llmquant.model.meta import is_conv1d, is_linear
from llmquant.model.skeleton import Skeleton
from llmquant.quant.grid import QuantScheme
from llmquant.recipe import Recipe
from llmquant.source.base import Source
from llmquant.source.names import natural_key

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
            row |= {"module": self.spec.module, **asdict(self.spec.scheme)}
        return row


@dataclass(frozen=True)
class Plan:
    """What will be done with every tensor, in the order of the output."""

    rows: tuple[Row, ...]
    dense_linears: tuple[str, ...]  # module names of linears that stay dense
    layout: Layout  # every tensor of the output

    @property
    def specs(self) -> list[LinearSpec]:
        return [row.spec for row in self.rows if row.spec is not None]

    def block(self, index: int | None) -> list[Row]:
        return [row for row in self.rows if row.block == index]

    @property
    def output_bytes(self) -> int:
        return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in self.layout.values())

    def bits_per_weight(self, format_name: str) -> float:
        """Stored bits of the quantized linears, scales included, by their number of weights."""
        bits = sum(FORMATS[format_name].weight_bits(spec) for spec in self.specs)
        return bits / max(1, sum(spec.shape[0] * spec.shape[1] for spec in self.specs))


def make_plan(source: Source, skeleton: Skeleton, recipe: Recipe) -> Plan:
    """Decide on every tensor of `source`.

    Quantized: the weight of each Linear or Conv1D inside a decoder block that no --ignore pattern matches.
    Everything else is copied. Raises RecipeError where a group size does not divide (all offenders named),
    where nothing is left to quantize or a pattern matches nothing, FormatError by the format.
    """
    patterns = {pattern: re.compile(pattern) for pattern in recipe.ignore}
    unused = set(patterns)
    rows = []
    for key in sorted(source.tensors, key=natural_key):
        ignored_by = [
            p for p, compiled in patterns.items() if compiled.search(key) or compiled.fullmatch(_module(skeleton, key))
        ]
        unused.difference_update(ignored_by)
        rows.append(_row(source, skeleton, recipe, key, ignored_by))
    if unused:
        raise RecipeError(
            option("ignore"), f"{sorted(unused)[0]!r} matches no tensor", expected="a regular expression that does"
        )
    specs = [row.spec for row in rows if row.spec is not None]
    if not specs:
        raise RecipeError(
            source.name, "no linear is left to quantize", remedy=f"check {option('ignore')}", field="ignore"
        )
    _check_groups(specs, recipe)

    fmt = FORMATS[recipe.format]
    fmt.check(specs)
    layout: Layout = {}
    for row in rows:
        info = source.tensors[row.name]
        new = fmt.layout(row.spec) if row.spec is not None else {row.name: (info.dtype, info.shape)}
        if clash := sorted(name for name in new if name in layout):  # not sets: `layout` grows to all tensors
            raise SourceError(source.name, f"the output would hold {clash[0]} twice")
        layout |= new
    quantized = {spec.module for spec in specs}
    dense = [n for n, m in skeleton.model.named_modules() if is_linear(m) and n not in quantized]
    return Plan(tuple(rows), tuple(dense), layout)


def _module(skeleton: Skeleton, key: str) -> str:
    return skeleton.param_of.get(key, key).rpartition(".")[0]


def _row(source: Source, skeleton: Skeleton, recipe: Recipe, key: str, ignored_by: list[str]) -> Row:
    info = source.tensors[key]
    param = skeleton.param_of.get(key)
    block = skeleton.block_of(param) if param is not None else None

    form = source.stored_as(key)
    read_from = "" if form is None else f", dequantized from {form}"

    def copied(reason: str) -> Row:
        return Row(key, "copied", reason + read_from, str(info.dtype).removeprefix("torch."), info.shape, block)

    if param is None:
        return copied("not a parameter of the model class")
    module_name, _, leaf = param.rpartition(".")
    module = skeleton.model.get_submodule(module_name)
    if block is None:
        return copied(f"outside the decoder blocks ({type(module).__name__})")
    if not is_linear(module):
        return copied(f"not a linear layer ({type(module).__name__})")
    if leaf != "weight":
        return copied(f"{leaf} of a linear layer")
    if ignored_by:
        return copied(f"--ignore {ignored_by[0]}")
    if info.dtype not in _STORABLE:
        raise SourceError(
            key,
            f"weights in {str(info.dtype).removeprefix('torch.')}",
            expected="bfloat16, float16 or float32",
            remedy="use a 16-bit checkpoint",
        )
    conv = is_conv1d(module)
    shape = (info.shape[1], info.shape[0]) if conv else (info.shape[0], info.shape[1])
    scheme = QuantScheme(recipe.bits, recipe.group_size, recipe.symmetric)
    spec = LinearSpec(key, module_name, "Conv1D" if conv else type(module).__name__, shape, info.dtype, scheme)
    return Row(
        key,
        "quantized",
        "linear layer of a decoder block" + read_from,
        str(info.dtype).removeprefix("torch."),
        info.shape,
        block,
        spec,
    )


def _check_groups(specs: list[LinearSpec], recipe: Recipe) -> None:
    bad = [spec for spec in specs if not spec.scheme.divides(spec.shape[1])]
    if not bad:
        return
    kinds = sorted({f"{spec.module} ({spec.shape[1]})" for spec in bad}, key=natural_key)
    widths = {spec.shape[1] for spec in bad}
    fitting = [g for g in (128, 64, 32) if all(width % g == 0 for width in widths)]
    other = f"{option('group_size')} {fitting[0]} or " if fitting else ""
    raise RecipeError(
        ", ".join(kinds),
        f"in_features not divisible by group size {recipe.group_size}",
        remedy=f"use {other}{option('group_size')} -1, or keep them in 16 bit with {option('ignore')}",
        field="group_size",
    )

"""A checkpoint that llmquant wrote, opened again: its report, and codes and scales exactly as they are stored."""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from llmquant.blocks.measure import LayerReport
from llmquant.checkpoint import PackedSource, open_checkpoint
from llmquant.errors import RecipeError, SourceError, option
from llmquant.formats import LinearSpec
from llmquant.formats.facts import FACTS
from llmquant.quant.grid import QuantizedWeight
from llmquant.recipe import Recipe
from llmquant.report.data import RunReport
from llmquant.report.plain import parse_file, plain
from llmquant.source.base import Source


def open_packed(model: str | Path, *, trust_remote_code: bool = False) -> PackedSource:
    """A checkpoint that llmquant wrote and whose linears are on integer grids."""
    source = open_checkpoint(model, trust_remote_code=trust_remote_code)
    if not isinstance(source, PackedSource):
        raise SourceError(
            source.name,
            "is not quantized, or dense again (fake)",
            expected="codes that llmquant wrote",
            remedy=f"write the format that you want in the run itself, with {option('format')}",
        )
    if source.method in FACTS and FACTS[source.method].one_file:
        raise SourceError(
            source.name, "is a GGUF file", expected="safetensors", remedy="use the checkpoint that it was made from"
        )
    if "report.json" not in source.files():
        raise SourceError(source.name, "no report.json", expected="a checkpoint that llmquant wrote")
    return source


def read_report(source: PackedSource) -> RunReport:
    return parse_file(RunReport, source.local("report.json"), SourceError)


def canonical(source: PackedSource, spec: LinearSpec) -> QuantizedWeight:
    """Codes, scales and zeros of one linear, exactly as they are stored."""
    linear = source.packed[spec.key]
    assert linear.grid is not None
    grid = linear.grid(source.stored.read)
    zeros = None if spec.scheme.symmetric or grid.zeros_OG is None else grid.zeros_OG.contiguous().to(torch.int8)
    in_order = torch.arange(spec.shape[1]) // spec.scheme.group(spec.shape[1])
    try:
        if grid.group_I is not None and not torch.equal(grid.group_I, in_order):
            raise ValueError("its groups are not in the order of the columns")
        codes = grid.codes_OI.contiguous().to(torch.int8)
        return QuantizedWeight(codes, grid.scales_OG.contiguous().float(), spec.scheme, zeros)
    except ValueError as error:
        raise SourceError(spec.key, str(error), expected="a grid as llmquant makes it") from None


class Finished:
    """A checkpoint whose codes another run takes over, instead of choosing its own."""

    def __init__(self, model: str | Path, *, trust_remote_code: bool = False) -> None:
        self.source = open_packed(model, trust_remote_code=trust_remote_code)
        self.report = read_report(self.source)

    @property
    def recipe(self) -> dict[str, Any]:
        """What decided it, by the names of a recipe that this version knows. Without its other formats, and
        with the rules that its target led to in the place of that."""
        known = {field.name for field in fields(Recipe)} - {"exports", "target_bpw", "target_size"}
        values: dict[str, Any] = {name: value for name, value in dict(self.report.recipe).items() if name in known}
        if self.report.allocation is not None:
            values["rules"] = [*values.get("rules", ()), *self.report.allocation.rules]
        return values

    @cached_property
    def _layers(self) -> dict[str, LayerReport]:
        return {layer.name: LayerReport.from_dict(plain(layer)) for layer in self.report.layers}

    def refuse_other(self, specs: Sequence[LinearSpec]) -> None:
        """RecipeError unless its quantized linears are these."""
        mine = {key: (linear.shape, linear.bits, linear.n_groups) for key, linear in self.source.packed.items()}
        theirs = {spec.key: (spec.shape, spec.scheme.bits, spec.scheme.groups(spec.shape[1])) for spec in specs}
        if odd := sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key)):
            raise self._another(f"{len(odd)} of its linears are not as the original and its recipe make them", odd[0])

    def refuse_other_weights(self, original: Source, copied: Iterable[str]) -> None:
        """RecipeError unless it holds these tensors, which no run changes, as the original does."""
        there = [name for name in copied if name in self.source.tensors]
        if odd := [name for name in there if not torch.equal(self.source.read(name), original.read(name))]:
            raise self._another(f"{len(odd)} of its tensors are not the original's", odd[0])

    def _another(self, got: str, example: str) -> RecipeError:
        return RecipeError(
            self.source.name,
            f"{got}, such as {example}",
            expected="the checkpoint of a run on this model",
            remedy=f"name the original with {option('reference')}",
        )

    def weight(self, spec: LinearSpec) -> QuantizedWeight:
        return canonical(self.source, spec)

    def in_order(self, specs: Sequence[LinearSpec]) -> list[LinearSpec]:
        """`specs` as its own run had them one after the other."""
        places = {name: place for place, name in enumerate(self._layers)}
        return sorted(specs, key=lambda spec: places.get(spec.module, len(places)))

    def layer(self, spec: LinearSpec) -> LayerReport:
        """What its own run said of a linear."""
        try:
            return self._layers[spec.module]
        except KeyError:
            raise SourceError(f"{self.source.name}: report.json", f"says nothing of {spec.module}") from None

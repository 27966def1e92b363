"""Linears that share an input: one task for the solver, and its solution set back into the block linear by linear."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from llmquant.blocks.forwards import Step
from llmquant.blocks.measure import Found, Inputs, LayerReport, measure
from llmquant.blocks.spread import spread
from llmquant.errors import SolveError, option
from llmquant.formats import FORMATS, LinearSpec
from llmquant.model.block import Block
from llmquant.quant.grid import QuantizedWeight, QuantScheme
from llmquant.quant.hessian import Hessian
from llmquant.quant.solvers import Curvature, LayerTask, SolveOptions
from llmquant.quant.solvers.refine import default_sweeps
from llmquant.ranks import ALONE, Ranks
from llmquant.recipe import Recipe


@dataclass(frozen=True)
class Solved:
    """One quantized linear; its codes and scales are on the CPU, whatever device solved it. None: they are stored."""

    spec: LinearSpec
    weight: QuantizedWeight | None
    report: LayerReport


def stacks(specs: Sequence[LinearSpec]) -> list[list[LinearSpec]]:
    """Linears that share an input in lists of one scheme and solver: each is one task."""
    alike: dict[tuple[QuantScheme, str], list[LinearSpec]] = {}
    for spec in specs:
        alike.setdefault((spec.scheme, spec.method), []).append(spec)
    return list(alike.values())


def solve_steps(
    block: Block,
    steps: Sequence[Step],
    hessians: Sequence[Hessian],
    recipe: Recipe,
    curvature: Mapping[str, Curvature] = MappingProxyType({}),
    ranks: Ranks = ALONE,
) -> list[Solved]:
    """Quantize the linears of `steps` and leave their dequantized weights in the block.

    hessians    of the inputs of each step
    curvature   of the stacks of the block, by the first module of each

    Where there are as many steps as ranks (experts), each rank solves whole steps; else its rows of every one.
    SolveError where the policy is to fail.
    """
    pairs = list(zip(steps, hessians, strict=True))
    if ranks.alone or len(pairs) < ranks.size:
        return [item for step, hessian in pairs for item in solve_step(block, step, hessian, recipe, curvature, ranks)]
    owners = _owners(steps, ranks.size)
    own = {
        number: [item for item, _ in _solved(block, step, hessian, recipe, curvature, ALONE)]
        for number, (step, hessian) in enumerate(pairs)
        if owners[number] == ranks.rank
    }
    everywhere = {number: items for of_rank in ranks.gathered(own) for number, items in of_rank.items()}
    return [_set_back(block, item, recipe.format) for number in sorted(everywhere) for item in everywhere[number]]


def _owners(steps: Sequence[Step], n_ranks: int) -> list[int]:
    """The rank that solves each step: the dearest first, each to the one that is least busy."""
    costs = [step.in_features**2 * (step.in_features + sum(spec.shape[0] for spec in step.specs)) for step in steps]
    busy, owners = [0] * n_ranks, [0] * len(steps)
    for number in sorted(range(len(steps)), key=lambda number: -costs[number]):
        owners[number] = busy.index(min(busy))
        busy[owners[number]] += costs[number]
    return owners


def solve_step(
    block: Block,
    step: Step,
    hessian: Hessian | None,
    recipe: Recipe,
    curvature: Mapping[str, Curvature] = MappingProxyType({}),
    ranks: Ranks = ALONE,
) -> list[Solved]:
    """The same for one step. All its linears share the Hessian (None: a solver that needs none); those of one scheme
    and solver are one task, whose rows the ranks share."""
    solved = _solved(block, step, hessian, recipe, curvature, ranks)
    return [_set_back(block, item, recipe.format, dense_OI) for item, dense_OI in solved]


def solve_alone(spec: LinearSpec, weight_OI: Tensor, recipe: Recipe) -> Solved:
    """Quantize a linear that no block of ours runs, by a method that needs no text."""
    task = LayerTask(spec.module, weight_OI, None, 0, spec.scheme)
    part = spread(task, spec.method, _options(Step([spec], 0.0), recipe))
    return _report(spec, weight_OI, part, Inputs(None, 0), recipe.format)[0]


def _solved(
    block: Block,
    step: Step,
    hessian: Hessian | None,
    recipe: Recipe,
    curvature: Mapping[str, Curvature],
    ranks: Ranks,
) -> Iterator[tuple[Solved, Tensor]]:
    """The linears of a step one by one, and what a loader makes of each, dense_OI; the block is as it was."""
    inputs = _inputs(_together(step.specs), hessian, recipe)
    drift_II = None if hessian is None else hessian.take_drift()
    residual_OI = None if hessian is None else hessian.take_residual()
    for specs in stacks(step.specs):
        weights = [block.weight(spec) for spec in specs]
        # The task, rows stacked and H_O in float32, is not kept here: it is freed before the parts are reported.
        part = spread(
            _task(specs, weights, inputs, drift_II, residual_OI, curvature.get(specs[0].module, ())),
            specs[0].method,
            _options(replace(step, specs=specs), recipe),
            ranks,
        )
        start = 0
        for spec, weight_OI in zip(specs, weights, strict=True):
            rows = slice(start, start + len(weight_OI))
            start = rows.stop
            yield _report(spec, weight_OI, part.rows(rows), inputs, recipe.format)


def _task(
    specs: Sequence[LinearSpec],
    weights: Sequence[Tensor],
    inputs: Inputs,
    drift_II: Tensor | None,
    residual_OI: Tensor | None,
    H_OO: Curvature,
) -> LayerTask:
    """Linears of one input, scheme and solver as one task of stacked rows, which know nothing of each other's."""
    weight_OI = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
    exact = tuple((rows, H_bb.float()) for rows, H_bb in H_OO)
    facts = inputs.H_II, inputs.n_tokens, specs[0].scheme, drift_II, residual_OI, exact
    return LayerTask(_together(specs), weight_OI, *facts)


def _together(specs: Sequence[LinearSpec]) -> str:
    """The linears of one input, for an error: the first three, as every expert of a layer may be among them."""
    more = f" + {len(specs) - 3} more" if len(specs) > 3 else ""
    return " + ".join(spec.module for spec in specs[:3]) + more


def _inputs(name: str, hessian: Hessian | None, recipe: Recipe) -> Inputs:
    if hessian is None:
        return Inputs(None, 0)
    if not hessian.n_excluded:
        return Inputs(hessian.mean(), hessian.n_tokens)
    note = f"{hessian.n_excluded} tokens with non-finite activations left out"
    if recipe.on_bad_layer == "fail":
        raise SolveError(
            name,
            f"its input has {note}",
            remedy=f"another {option('dtype')}, or accept it with {option('on_bad_layer')} rtn",
        )
    return Inputs(hessian.mean(), hessian.n_tokens, (note,))


def _options(step: Step, recipe: Recipe) -> SolveOptions:
    scheme = step.specs[0].scheme
    return SolveOptions(
        recipe.grid,
        recipe.order,
        recipe.damp,
        step.propagation,
        step.residual,
        recipe.refit,
        default_sweeps(scheme.bits, scheme.group_size) if recipe.sweeps is None else recipe.sweeps,
        on_bad_layer=recipe.on_bad_layer,
    )


def _report(
    spec: LinearSpec, weight_OI: Tensor, part: Found, inputs: Inputs, format_name: str
) -> tuple[Solved, Tensor]:
    """How well it was quantized, by the weight as a loader will see it; and that weight, dense_OI."""
    dense_OI = FORMATS[format_name].loaded(spec, part.weight)
    bits = FORMATS[format_name].weight_bits(spec) / (spec.shape[0] * spec.shape[1])
    report = measure(spec, weight_OI, dense_OI, part, inputs, bits)
    return Solved(spec, part.weight.cpu(), report), dense_OI


def _set_back(block: Block, item: Solved, format_name: str, dense_OI: Tensor | None = None) -> Solved:
    """The block runs with the quantized weight from now on; `dense_OI` where it is made already."""
    assert item.weight is not None
    if (read := block.stored(item.spec, item.weight)) is not None:
        block.set_weight(item.spec, read)
        return replace(item, weight=None)
    again = partial(_loaded, format_name, item.spec, item.weight, block.device)
    block.set_weight(item.spec, again if dense_OI is None or block.is_made(item.spec) else dense_OI)
    return item


def _loaded(format_name: str, spec: LinearSpec, weight: QuantizedWeight, device: torch.device) -> Tensor:
    return FORMATS[format_name].loaded(spec, weight.to(device))

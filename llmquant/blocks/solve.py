"""Linears that share an input: one task for the solver, and its solution set back into the block linear by linear."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from llmquant.blocks.forwards import Step
from llmquant.blocks.measure import Inputs, LayerReport, measure
from llmquant.errors import SolveError, option
from llmquant.formats import FORMATS, LinearSpec
from llmquant.model.block import Block
from llmquant.quant.grid import QuantizedWeight, QuantScheme
from llmquant.quant.hessian import Hessian
from llmquant.quant.matmul import matmul
from llmquant.quant.solvers import SOLVERS, Curvature, LayerTask, Solution, SolveOptions
from llmquant.quant.solvers.refine import default_sweeps
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


def solve_step(
    block: Block,
    step: Step,
    hessian: Hessian | None,
    recipe: Recipe,
    curvature: Mapping[str, Curvature] = MappingProxyType({}),
) -> list[Solved]:
    """Quantize the linears of `step` and leave their dequantized weights in the block.

    curvature   of the stacks of the block, by the first module of each

    All share the Hessian; those of one scheme and solver are one task. SolveError where the policy is to fail.
    """
    inputs = _inputs(_together(step.specs), hessian, recipe)
    drift_II = None if hessian is None else hessian.take_drift()
    residual_OI = None if hessian is None else hessian.take_residual()
    tasks = [replace(step, specs=specs) for specs in stacks(step.specs)]
    return [
        solved for task in tasks for solved in _solve(block, task, inputs, (drift_II, residual_OI), recipe, curvature)
    ]


def solve_alone(spec: LinearSpec, weight_OI: Tensor, recipe: Recipe) -> Solved:
    """Quantize a linear that no block of ours runs, by a method that needs no text."""
    step = Step([spec], 0.0)
    task = LayerTask(spec.module, weight_OI, None, 0, spec.scheme)
    part = SOLVERS[spec.method](task, _options(step, recipe))
    report, _ = _report(spec, weight_OI, part, Inputs(None, 0), recipe.format)
    return Solved(spec, part.weight.cpu(), report)


def _solve(
    block: Block,
    step: Step,
    inputs: Inputs,
    drifts: tuple[Tensor | None, Tensor | None],
    recipe: Recipe,
    curvature: Mapping[str, Curvature],
) -> list[Solved]:
    """Linears of one input, scheme and solver as one task of stacked rows, which know nothing of each other's.

    drifts   drift_II of the input, and R_OI of the residual
    """
    drift_II, residual_OI = drifts
    specs, weights = step.specs, [block.weight(spec) for spec in step.specs]
    name = _together(specs)
    # All rows stacked are a copy: the solver's, freed before the parts are reported.
    weight_OI = torch.cat(weights) if len(weights) > 1 else weights[0]
    drift_OI = None
    if drift_II is not None and (residual_OI is not None or len(weight_OI) <= len(drift_II)):
        drift_OI, drift_II = matmul(weight_OI, drift_II), None
    if drift_OI is not None and residual_OI is not None:
        drift_OI.add_(residual_OI, alpha=step.residual)
    H_OO = curvature.get(specs[0].module, ())
    task = LayerTask(name, weight_OI, inputs.H_II, inputs.n_tokens, specs[0].scheme, drift_OI, drift_II, H_OO)
    solution = SOLVERS[specs[0].method](task, _options(step, recipe))
    del task, weight_OI, drift_OI, drift_II, residual_OI, drifts
    done, start = [], 0
    for spec, weight_OI in zip(specs, weights, strict=True):
        part = solution.rows(slice(start, start + len(weight_OI)))
        start += len(weight_OI)
        done.append(_set_back(block, spec, weight_OI, part, inputs, recipe.format))
    return done


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
        recipe.refit,
        default_sweeps(scheme.bits, scheme.group_size) if recipe.sweeps is None else recipe.sweeps,
        on_bad_layer=recipe.on_bad_layer,
    )


def _set_back(
    block: Block, spec: LinearSpec, weight_OI: Tensor, part: Solution, inputs: Inputs, format_name: str
) -> Solved:
    report, dense_OI = _report(spec, weight_OI, part, inputs, format_name)
    weight = part.weight.cpu()
    if (read := block.stored(spec, weight)) is not None:
        block.set_weight(spec, read)
        return Solved(spec, None, report)
    again = partial(FORMATS[format_name].loaded, spec, weight)
    block.set_weight(spec, again if block.is_made(spec) else dense_OI)
    return Solved(spec, weight, report)


def _report(
    spec: LinearSpec, weight_OI: Tensor, part: Solution, inputs: Inputs, format_name: str
) -> tuple[LayerReport, Tensor]:
    """How well it was quantized, by the weight as a loader will see it; and that weight, dense_OI."""
    dense_OI = FORMATS[format_name].loaded(spec, part.weight)
    bits = FORMATS[format_name].weight_bits(spec) / (spec.shape[0] * spec.shape[1])
    return measure(spec, weight_OI, dense_OI, part, inputs, bits), dense_OI

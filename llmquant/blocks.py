"""Quantize the linears of one block that is in memory: Hessians, solve, dequantized weights set back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llmquant.errors import SolveError, SourceError
from llmquant.formats import FORMATS, LinearSpec
from llmquant.grid import QuantizedWeight, absmax_scales, quantize_to_grid
from llmquant.hessian import Hessian
from llmquant.recipe import Recipe
from llmquant.report import LayerReport
from llmquant.skeleton import Call, Calls, Skeleton, Stop, hooked
from llmquant.solvers import DATA_FREE, SOLVERS, LayerTask, Solution, SolveOptions
from llmquant.streams import Stream


@dataclass(frozen=True)
class Solved:
    """One quantized linear."""

    spec: LinearSpec
    weight: QuantizedWeight
    report: LayerReport


def forward_of(skeleton: Skeleton, index: int, calls: Calls) -> Callable[[Tensor], Tensor]:
    """The loaded block as a function of hidden states [B, T, D], with the arguments recorded for their shape."""
    block = skeleton.blocks[index][1]

    def forward(hidden: Tensor) -> Tensor:
        with torch.no_grad():
            return _call_for(calls, index, hidden)(block, hidden.to(skeleton.device))

    return forward


def _call_for(calls: Calls, index: int, hidden: Tensor) -> Call:
    return calls[tuple(hidden.shape[:2])][index]


def set_weight(skeleton: Skeleton, spec: LinearSpec, weight_OI: Tensor) -> None:
    """Put a dense weight_OI into the model, in the module's own layout and the compute dtype."""
    dense = weight_OI.to(skeleton.get(f"{spec.module}.weight").dtype)
    skeleton.set(f"{spec.module}.weight", dense.T.contiguous() if spec.transposed else dense)


def get_weight(skeleton: Skeleton, spec: LinearSpec) -> Tensor:
    """weight_OI of a loaded linear, float32."""
    weight = skeleton.get(f"{spec.module}.weight").detach().float()
    return weight.T.contiguous() if spec.transposed else weight


def quantize_block(
    skeleton: Skeleton, index: int, specs: Sequence[LinearSpec], recipe: Recipe, calls: Calls, stream: Stream | None
) -> list[Solved]:
    """Quantize the linears `specs` of the loaded block `index` and leave their dequantized weights in it.

    `stream`: calibration hidden states that enter the block, computed by the already quantized blocks before it;
    None for data-free methods. With passes = "step" each step's Hessian sees the quantized steps before it.
    """
    if stream is None or recipe.method in DATA_FREE:
        return [solved for spec in specs for solved in _solve(skeleton, [spec], None, recipe)]
    steps = _steps(skeleton, index, specs, calls, stream)
    passes = [[step] for step in steps] if recipe.passes == "step" else [steps]
    done = []
    for steps_of_pass in passes:
        hessians = _collect(skeleton, index, steps_of_pass, calls, stream)
        for step, hessian in zip(steps_of_pass, hessians, strict=True):
            done += _solve(skeleton, step, hessian, recipe)
    return done


def _steps(
    skeleton: Skeleton, index: int, specs: Sequence[LinearSpec], calls: Calls, stream: Stream
) -> list[list[LinearSpec]]:
    """The planned linears by shared input, in the order of the forward; all of them must be reached."""
    by_module = {spec.module: spec for spec in specs}
    hidden = next(iter(stream))
    names = skeleton.steps(index, _call_for(calls, index, hidden), hidden.to(skeleton.device))
    steps = [[by_module[name] for name in step if name in by_module] for step in names]
    reached = {spec.module for step in steps for spec in step}
    if missed := sorted(set(by_module) - reached):
        raise SourceError(
            f"{skeleton.where}: {missed[0]}",
            "the block's forward does not run it as a layer, so its input cannot be seen",
            remedy="keep it in 16 bit with --ignore, or use --method rtn",
        )
    return [step for step in steps if step]


def _collect(
    skeleton: Skeleton, index: int, steps: Sequence[Sequence[LinearSpec]], calls: Calls, stream: Stream
) -> list[Hessian]:
    """Hessians of the steps' inputs over the whole stream; the forward stops where the last one has been seen."""
    linears = skeleton.linears(index)
    hessians = [Hessian(step[0].shape[1], skeleton.device) for step in steps]

    def note(position: int, inputs: tuple[Tensor, ...]) -> None:
        hessians[position].add(inputs[0])
        if position == len(steps) - 1:
            raise Stop

    notes = {step[0].module: partial(note, position) for position, step in enumerate(steps)}
    forward = forward_of(skeleton, index, calls)
    with hooked(notes, linears):
        for hidden in stream:
            try:
                forward(hidden)
            except Stop:
                continue
    return hessians


def _solve(skeleton: Skeleton, step: Sequence[LinearSpec], hessian: Hessian | None, recipe: Recipe) -> list[Solved]:
    """Solve linears that share an input as one task of stacked rows: every row is a problem of its own."""
    weights = [get_weight(skeleton, spec) for spec in step]
    name = " + ".join(spec.module for spec in step)
    notes: tuple[str, ...] = ()
    H_II, n_tokens = None, 0
    if hessian is not None:
        n_tokens = hessian.n_tokens
        H_II = hessian.mean()
        if hessian.n_excluded:
            notes = (f"{hessian.n_excluded} tokens with non-finite activations left out",)
            if recipe.on_bad_layer == "fail":
                raise SolveError(
                    name, f"its input has {notes[0]}", remedy="another --dtype, or accept it with --on-bad-layer rtn"
                )
    task = LayerTask(name, torch.cat(weights), H_II, n_tokens, step[0].scheme)
    options = SolveOptions(recipe.grid, recipe.order, recipe.damp, on_bad_layer=recipe.on_bad_layer)
    solution = SOLVERS[recipe.method](task, options)
    return _split(skeleton, step, weights, task, solution, recipe, notes)


def _split(
    skeleton: Skeleton,
    step: Sequence[LinearSpec],
    weights: Sequence[Tensor],
    task: LayerTask,
    solution: Solution,
    recipe: Recipe,
    notes: tuple[str, ...],
) -> list[Solved]:
    done, start = [], 0
    for spec, weight_OI in zip(step, weights, strict=True):
        rows = slice(start, start + weight_OI.shape[0])
        start = rows.stop
        quantized = QuantizedWeight(
            solution.weight.codes_OI[rows].contiguous(), solution.weight.scales_OG[rows].contiguous(), spec.scheme
        )
        dense = quantized.dequantize()
        report = _report(
            spec, weight_OI, dense, float(solution.loss_O[rows].sum()), task, recipe, notes + solution.notes
        )
        set_weight(skeleton, spec, dense)
        done.append(Solved(spec, quantized, report))
    return done


def _report(
    spec: LinearSpec,
    weight_OI: Tensor,
    dense_OI: Tensor,
    loss: float,
    task: LayerTask,
    recipe: Recipe,
    notes: tuple[str, ...],
) -> LayerReport:
    power = float(weight_OI.square().sum())
    weight_error = float((weight_OI - dense_OI).square().sum()) / power if power else 0.0
    rows, columns = spec.shape
    bits = FORMATS[recipe.format].weight_bits(spec) / (rows * columns)
    if task.H_II is None:
        return LayerReport(spec.module, None, None, None, weight_error, bits, 0, notes)
    plain = absmax_scales(weight_OI, spec.scheme)
    plain_OI = QuantizedWeight(quantize_to_grid(weight_OI, plain, spec.scheme), plain, spec.scheme).dequantize()
    rtn_loss = _quadratic(weight_OI - plain_OI, task.H_II)
    energy = _quadratic(weight_OI, task.H_II)
    relative = loss / energy if energy else 0.0
    return LayerReport(spec.module, loss, rtn_loss, relative, weight_error, bits, task.n_tokens, notes)


def _quadratic(E_OI: Tensor, H_II: Tensor) -> float:
    """tr(E H E^T)."""
    return float(torch.sum((E_OI @ H_II) * E_OI))

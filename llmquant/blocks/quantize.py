"""Quantize the linears of one block that is in memory, step by step in the order of its forward."""

from collections.abc import Sequence

from torch import Tensor

from llmquant.blocks.forwards import BlockForwards, CalibrationStreams, Step
from llmquant.blocks.solve import Solved, solve_step
from llmquant.errors import SourceError, option
from llmquant.formats import LinearSpec
from llmquant.memory import SLACK, trim
from llmquant.model.block import Block
from llmquant.model.paused import pausing
from llmquant.quant.hessian import default_propagation
from llmquant.quant.solvers import DATA_FREE
from llmquant.recipe import Recipe


def quantize_block(
    block: Block,
    specs: Sequence[LinearSpec],
    recipe: Recipe,
    streams: CalibrationStreams | None,
    settled: Sequence[tuple[LinearSpec, Tensor]] = (),
    *,
    advance: bool = True,
) -> list[Solved]:
    """Quantize the linears `specs` of the loaded `block` and leave their dequantized weights in it.

    `streams` holds the calibration text before the block; None for data-free methods. With passes = "step" each step's
    Hessian sees the quantized steps before it. With `advance` both streams are through the block afterwards.
    settled   linears that run with weights of an earlier block, and what those were quantized to, weight_OI
    """
    if streams is None:
        for spec, weight_OI in settled:
            block.set_weight(spec, weight_OI)
        return _without_text(block, specs, recipe)
    needed = any(spec.method not in DATA_FREE for spec in specs)
    steps = _steps(block, specs, recipe, streams) if needed else []
    linears = block.linears
    done: list[Solved] = []
    with pausing([linears[step.specs[0].module] for step in steps]):
        forwards = BlockForwards(block, specs, streams, settled)
        if not needed:  # but later blocks want the text behind this one
            done = _without_text(block, specs, recipe)
            forwards.weights_changed(Step(list(specs), 0.0))
        elif recipe.passes == "block":
            hessians = forwards.hessians_of_all(steps)
        for position, step in enumerate(steps):
            hessian = hessians[position] if recipe.passes == "block" else forwards.hessian(position, step)
            trim(SLACK)
            done += solve_step(block, step, hessian, recipe)
            forwards.weights_changed(step)
            trim(SLACK)
        if advance:
            forwards.finish()
        forwards.close()
    return done


def _without_text(block: Block, specs: Sequence[LinearSpec], recipe: Recipe) -> list[Solved]:
    return [solved for spec in specs for solved in solve_step(block, Step([spec], 0.0), None, recipe)]


def _steps(block: Block, specs: Sequence[LinearSpec], recipe: Recipe, streams: CalibrationStreams) -> list[Step]:
    """The planned linears by shared input, in the order of the forward; all of them must be reached."""
    by_module = {spec.module: spec for spec in specs}
    hidden, width = next(iter(streams.quantized)), next(streams.quantized.hidden()).shape[-1]
    names = block.steps(lambda: block.forward(hidden, streams.products), by_module)
    steps = [[by_module[name] for name in step] for step in names]
    reached = {spec.module for step in steps for spec in step}
    if missed := sorted(set(by_module) - reached):
        raise SourceError(
            f"{block.where}: {missed[0]}",
            "the block's forward does not run it as a layer, so its input cannot be seen",
            remedy=f"keep it in 16 bit with {option('ignore')}, or use {option('method')} rtn",
        )

    def strength(in_features: int) -> float:
        if streams.original is None:
            return 0.0
        wide = in_features > width
        auto = default_propagation(streams.quantized.n_tokens, in_features, wide=wide)
        return auto if recipe.propagation == "auto" else float(recipe.propagation)

    return [Step(step, strength(step[0].shape[1])) for step in steps]

"""Quantize the linears of one block that is in memory, step by step in the order of its forward."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import Tensor, nn

from llmquant.blocks.forwards import BlockForwards, CalibrationStreams, Step, Wave
from llmquant.blocks.solve import Solved, solve_step, solve_steps
from llmquant.formats import LinearSpec
from llmquant.memory import SLACK, trim
from llmquant.model.block import Block
from llmquant.model.experts import Gather
from llmquant.model.paused import pausing
from llmquant.quant.hessian import LENT, Hessian, default_propagation, pooled, residual_part
from llmquant.quant.solvers import DATA_FREE, Curvature
from llmquant.recipe import Recipe


def quantize_block(
    block: Block,
    specs: Sequence[LinearSpec],
    recipe: Recipe,
    streams: CalibrationStreams | None,
    settled: Sequence[tuple[LinearSpec, Tensor]] = (),
    *,
    curvature: Mapping[str, Curvature] = MappingProxyType({}),
    advance: bool = True,
) -> list[Solved]:
    """Quantize the linears `specs` of the loaded `block` and leave their dequantized weights in it.

    `streams` holds the calibration text before the block; None for data-free methods. With passes = "step" each wave's
    Hessians see the quantized waves before it. With `advance` both streams are through the block afterwards.
    settled   linears that run with weights of an earlier block, and what those were quantized to, weight_OI
    curvature   H_O of its stacks of linears, by the first module of each; without one all outputs count alike
    """
    if streams is None:
        for spec, weight_OI in settled:
            block.set_weight(spec, weight_OI)
        return _without_text(block, specs, recipe)
    needed = any(spec.method not in DATA_FREE for spec in specs)
    width = next(streams.quantized.hidden()).shape[-1]
    waves = _waves(block, specs, recipe, streams, width) if needed else []
    done: list[Solved] = []
    with pausing([wave.module for wave in waves], _kept(block, waves)):
        forwards = BlockForwards(block, specs, streams, settled)
        if not needed:  # but later blocks want the text behind this one
            done = _without_text(block, specs, recipe)
            forwards.weights_changed(specs)
        elif recipe.passes == "block":
            of_all = forwards.hessians_of_all(waves)
        for position, wave in enumerate(waves):
            parts = [wave] if recipe.passes == "block" else wave.parts()
            # Hidden states mean the same to all experts; what lies within an expert has an order of its own.
            lending = isinstance(wave.module, Gather) and not wave.module.down and wave.steps[0].in_features == width
            pool = forwards.pool(position, wave) if lending and len(parts) > 1 else None
            for part in parts:
                hessians = of_all[position] if recipe.passes == "block" else forwards.hessians(position, part)
                if lending:
                    _lend(hessians, pool or pooled(hessians))
                trim(SLACK)
                done += solve_steps(block, part.steps, hessians, recipe, curvature, streams.ranks)
            forwards.weights_changed([spec for step in wave.steps for spec in step.specs])
            trim(SLACK)
        if advance:
            forwards.finish()
        forwards.close()
    return done


def strength(recipe: Recipe, n_tokens: int, in_features: int, width: int) -> float:
    """Of error propagation into linears of so many inputs, over so many tokens; `width` is that of hidden states."""
    if recipe.propagation != "auto":
        return float(recipe.propagation)
    return default_propagation(n_tokens, in_features, wide=in_features > width)


def _kept(block: Block, waves: Sequence[Wave]) -> dict[str, nn.Module]:
    """Linears whose outputs a later one of `waves` finds in its residual."""
    names = list(block.adds)
    asked = [names.index(wave.steps[0].specs[0].module) for wave in waves if wave.steps[0].residual]
    return {name: block.linears[name] for name in names[: max(asked, default=0)]}


def _without_text(block: Block, specs: Sequence[LinearSpec], recipe: Recipe) -> list[Solved]:
    return [solved for spec in specs for solved in solve_step(block, Step([spec], 0.0), None, recipe)]


def _lend(hessians: Sequence[Hessian], pool: Hessian) -> None:
    """Lend every expert's Hessian some of what all experts of the layer read."""
    for hessian in hessians:
        hessian.lend(pool, LENT * len(hessian.sum_II))


def _waves(
    block: Block, specs: Sequence[LinearSpec], recipe: Recipe, streams: CalibrationStreams, width: int
) -> list[Wave]:
    """The planned linears by shared input, in the order of the forward; those of all experts of a layer together."""
    by_module = {spec.module: spec for spec in specs}
    linears, n_tokens = block.linears, streams.n_tokens

    waves: dict[nn.Module, Wave] = {}
    steps = [members for names in block.steps if (members := [by_module[name] for name in names if name in by_module])]
    # What is kept may have read an input long before: the forward is paused at the first one that is not.
    for members in sorted(steps, key=lambda members: block.order[members[0].module]):
        if (place := block.expert(members[0].module)) is None:
            module = linears[members[0].module]
            alone = len(members) == 1 and members[0].module in block.adds
            in_features = members[0].shape[1]
            propagation = strength(recipe, n_tokens, in_features, width) if streams.original is not None else 0.0
            part = residual_part(recipe.residual, n_tokens, in_features)
            step = Step(members, propagation, part if alone and propagation else 0.0)
            waves[module] = Wave(module, [step])
        else:
            # Without error propagation: the original model sends other tokens to an expert.
            gather, expert = place
            wave = waves.setdefault(gather, Wave(gather, [], []))
            wave.steps.append(Step(members, 0.0))
            assert wave.experts is not None
            wave.experts.append(expert)
    return list(waves.values())

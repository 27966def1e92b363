"""Quantize the linears of one block that is in memory: Hessians, solve, dequantized weights set back."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

import torch
from torch import Tensor

from llmquant.blocks.measure import LayerReport, measure
from llmquant.errors import SolveError, SourceError
from llmquant.formats import FORMATS, LinearSpec
from llmquant.memory import SLACK, trim
from llmquant.model.paused import Paused, pausing
from llmquant.model.skeleton import Skeleton
from llmquant.model.streams import Stream
from llmquant.model.tape import Call, Calls
from llmquant.quant.grid import QuantizedWeight
from llmquant.quant.hessian import Hessian, default_propagation
from llmquant.quant.matmul import forwards_in, matmul
from llmquant.quant.solvers import DATA_FREE, SOLVERS, LayerTask, Solution, SolveOptions
from llmquant.quant.solvers.refine import default_sweeps
from llmquant.recipe import Recipe


@dataclass(frozen=True)
class Solved:
    """One quantized linear."""

    spec: LinearSpec
    weight: QuantizedWeight
    report: LayerReport


def forward_of(
    skeleton: Skeleton, index: int, calls: Calls, products: torch.dtype | None = None
) -> Callable[[Tensor], Tensor]:
    """The loaded block as a function of hidden states [B, T, D], with the arguments recorded for their shape.

    `products`: the precision of its products, where it is not that of the compute dtype.
    """
    block = skeleton.blocks[index][1]

    def forward(hidden: Tensor) -> Tensor:
        with torch.no_grad(), forwards_in(products or skeleton.dtype, skeleton.dtype):
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


@dataclass(frozen=True)
class CalibrationStreams:
    """Hidden states before the block: of the quantized blocks, and of the original ones (for error propagation).

    `spare_bytes` is what forwards may hold while they are paused between the steps of a block; `products` is the
    precision of their products and of the Hessians.
    """

    quantized: Stream
    original: Stream | None = None
    spare_bytes: int = 0
    products: torch.dtype = torch.float32

    def append(self, hidden: Tensor) -> None:
        """Before the first block both are the same."""
        self.quantized.append(hidden)
        if self.original is not None:
            self.original.append(hidden)


def quantize_block(
    skeleton: Skeleton,
    index: int,
    specs: Sequence[LinearSpec],
    recipe: Recipe,
    calls: Calls,
    streams: CalibrationStreams | None,
    *,
    advance: bool = True,
) -> list[Solved]:
    """Quantize the linears `specs` of the loaded block `index` and leave their dequantized weights in it.

    `streams` holds the calibration hidden states; None for data-free methods. With passes = "step" each step's
    Hessian sees the quantized steps before it. With `advance` both streams are through the block afterwards.
    """
    if streams is None or recipe.method in DATA_FREE:
        return [solved for spec in specs for solved in _solve(skeleton, [spec], None, recipe)]
    steps = _steps(skeleton, index, specs, recipe, calls, streams)
    linears = skeleton.linears(index)
    done: list[Solved] = []
    with pausing([linears[step.specs[0].module] for step in steps]):
        runs = _Runs(skeleton, index, specs, calls, streams)
        if recipe.passes == "block":
            hessians = runs.hessians_of_all(steps)
        for position, step in enumerate(steps):
            hessian = hessians[position] if recipe.passes == "block" else runs.hessian(position, step)
            trim(SLACK)
            done += _solve(skeleton, step.specs, hessian, recipe, step.propagation)
            runs.weights_changed(step)
            trim(SLACK)
        if advance:
            runs.finish()
        runs.close()
    return done


@dataclass(frozen=True)
class Step:
    """Linears that share an input, and the strength of error propagation into them."""

    specs: list[LinearSpec]
    propagation: float

    @property
    def in_features(self) -> int:
        return self.specs[0].shape[1]


def _steps(
    skeleton: Skeleton,
    index: int,
    specs: Sequence[LinearSpec],
    recipe: Recipe,
    calls: Calls,
    streams: CalibrationStreams,
) -> list[Step]:
    """The planned linears by shared input, in the order of the forward; all of them must be reached."""
    by_module = {spec.module: spec for spec in specs}
    hidden = next(iter(streams.quantized))
    names = skeleton.steps(index, forward_of(skeleton, index, calls, streams.products), hidden)
    steps = [[by_module[name] for name in step if name in by_module] for step in names]
    reached = {spec.module for step in steps for spec in step}
    if missed := sorted(set(by_module) - reached):
        raise SourceError(
            f"{skeleton.where}: {missed[0]}",
            "the block's forward does not run it as a layer, so its input cannot be seen",
            remedy="keep it in 16 bit with --ignore, or use --method rtn",
        )

    def strength(in_features: int) -> float:
        if streams.original is None:
            return 0.0
        wide = in_features > skeleton.hidden_size
        auto = default_propagation(streams.quantized.n_tokens, in_features, wide=wide)
        return auto if recipe.propagation == "auto" else float(recipe.propagation)

    return [Step(step, strength(step[0].shape[1])) for step in steps if step]


class _Runs:
    """The forwards of both calibration streams through one block, paused at the same step batch by batch.

    Forwards stay paused between the steps as long as what they hold fits `spare_bytes`; the others are run anew up
    to each step. The original's forwards see the block's original weights, the others what is in the block; both are
    rounded once to the precision of the products, instead of in each forward.
    """

    def __init__(
        self, skeleton: Skeleton, index: int, specs: Sequence[LinearSpec], calls: Calls, streams: CalibrationStreams
    ) -> None:
        self._skeleton, self._streams = skeleton, streams
        self._forward = forward_of(skeleton, index, calls, streams.products)
        self._plain = forward_of(skeleton, index, calls)
        self._around = partial(forwards_in, streams.products, skeleton.dtype)
        self._exact = {name: skeleton.get(name) for name in (f"{spec.module}.weight" for spec in specs)}
        self._originals = {name: weight.to(streams.products) for name, weight in self._exact.items()}
        self._current = dict(self._originals)
        self._kept: dict[tuple[int, str], tuple[Paused, int]] = {}  # with the bytes it holds

    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            self._skeleton.set(name, weight)

    def weights_changed(self, step: "Step") -> None:
        """The linears of `step` have other weights in the block now."""
        for name in (f"{spec.module}.weight" for spec in step.specs):
            self._exact[name] = self._skeleton.get(name)
            self._current[name] = self._exact[name].to(self._streams.products)

    def hessian(self, position: int, step: Step) -> Hessian:
        """Over all batches, of the inputs of the step at `position`; steps must come in order."""
        hessian = self._empty(step)
        for x, original in self._pairs(position):
            hessian.add(x, original)
        self._put(self._exact)
        return hessian

    def hessians_of_all(self, steps: Sequence[Step]) -> list[Hessian]:
        """The Hessians of all steps in one pass, before any of them is quantized."""
        hessians = [self._empty(step) for step in steps]
        original = self._streams.original
        for hidden, other in zip(self._streams.quantized, original or self._streams.quantized, strict=True):
            run, reference = self._paused(hidden), self._paused(other)
            for position, hessian in enumerate(hessians):
                hessian.add(run.input_of(position), reference.input_of(position) if original is not None else None)
            run.close()
            reference.close()
        return hessians

    def _empty(self, step: Step) -> Hessian:
        drift = step.propagation > 0
        return Hessian(step.in_features, self._skeleton.device, drift=drift, products=self._streams.products)

    def _paused(self, hidden: Tensor) -> Paused:
        return Paused(partial(self._plain, hidden), self._around)

    def _pairs(self, position: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Inputs of a step, of the quantized and of the original model, batch by batch."""
        original = self._streams.original
        others = iter(original) if original is not None else None
        for batch, hidden in enumerate(self._streams.quantized):
            reference = None
            if others is not None:
                self._put(self._originals)
                reference = self._input(position, batch, "original", next(others))
            self._put(self._current)
            yield self._input(position, batch, "quantized", hidden), reference

    def _input(self, position: int, batch: int, stream: str, hidden: Tensor) -> Tensor:
        run, _ = self._kept.pop((batch, stream), (None, 0))
        run = run or self._paused(hidden)
        x = run.input_of(position)
        held, spare = run.held_bytes(), self._streams.spare_bytes - sum(held for _, held in self._kept.values())
        if held <= spare:
            self._kept[batch, stream] = run, held
        else:
            run.close()
        return x

    def finish(self) -> None:
        """Both streams through the whole block."""
        if self._streams.original is not None:
            self._put(self._originals)
            self._advance(self._streams.original, "original")
        self._put(self._current)
        self._advance(self._streams.quantized, "quantized")
        self._put(self._exact)

    def _advance(self, stream: Stream, name: str) -> None:
        batches = count()

        def advanced(hidden: Tensor) -> Tensor:
            run, _ = self._kept.pop((next(batches), name), (None, 0))
            return self._forward(hidden) if run is None else run.finish()

        stream.update(advanced)

    def close(self) -> None:
        for run, _ in self._kept.values():
            run.close()
        self._kept.clear()


def _solve(
    skeleton: Skeleton, step: Sequence[LinearSpec], hessian: Hessian | None, recipe: Recipe, propagation: float = 0.0
) -> list[Solved]:
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
    # All rows stacked are a copy: the solver's, let go before the parts are reported.
    weight_OI = torch.cat(weights) if len(weights) > 1 else weights[0]
    drift_OI, drift_II = None, None if hessian is None else hessian.take_drift()
    if drift_II is not None and len(weight_OI) <= len(drift_II):
        drift_OI, drift_II = matmul(weight_OI, drift_II), None
    task = LayerTask(name, weight_OI, H_II, n_tokens, step[0].scheme, drift_OI, drift_II)
    options = SolveOptions(
        recipe.grid,
        recipe.order,
        recipe.damp,
        propagation,
        recipe.refit,
        default_sweeps(step[0].scheme.bits, step[0].scheme.group_size) if recipe.sweeps is None else recipe.sweeps,
        on_bad_layer=recipe.on_bad_layer,
    )
    solution = SOLVERS[recipe.method](task, options)
    del task, weight_OI, drift_OI, drift_II
    return _split(skeleton, step, weights, H_II, n_tokens, solution, recipe, notes)


def _split(
    skeleton: Skeleton,
    step: Sequence[LinearSpec],
    weights: Sequence[Tensor],
    H_II: Tensor | None,
    n_tokens: int,
    solution: Solution,
    recipe: Recipe,
    notes: tuple[str, ...],
) -> list[Solved]:
    done, start = [], 0
    for spec, weight_OI in zip(step, weights, strict=True):
        rows = slice(start, start + weight_OI.shape[0])
        start = rows.stop
        quantized = solution.weight.rows(rows)
        dense = FORMATS[recipe.format].loaded(spec, quantized)
        report = measure(
            spec,
            weight_OI,
            quantized,
            dense,
            solution.target_OI[rows],
            float(solution.loss_O[rows].sum()),
            H_II,
            n_tokens,
            recipe,
            notes + solution.notes,
        )
        set_weight(skeleton, spec, dense)
        done.append(Solved(spec, quantized, report))
    return done

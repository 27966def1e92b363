"""The calibration text's forwards through one block, paused where its linears read their inputs.

Two streams go through: the quantized one, whose hidden states come from the blocks as they were written, and the
original one, which error propagation compares it with. At each step the quantized forwards see the block with the
steps before it quantized, the original forwards see the block's own weights. All experts of a layer are one wave of
steps: none of them reads what another one computes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmquant.formats import LinearSpec
from llmquant.model.block import Block
from llmquant.model.parked import Batch, Parked
from llmquant.model.paused import Paused
from llmquant.model.streams import Stream
from llmquant.model.weights import Value
from llmquant.quant.hessian import Hessian
from llmquant.quant.matmul import forwards_in
from llmquant.ranks import ALONE, Ranks, Sums

_AT_ONCE = 2**27  # entries of all Hessians of experts that are summed up at once: 512 MB


def entries_of_experts(in_features: int) -> int:
    """Entries of the Hessians of experts that are held at once, and of the one that they all lend from."""
    return int(max(_AT_ONCE, in_features**2) + in_features**2)


@dataclass(frozen=True)
class CalibrationStreams:
    """Hidden states before the block: of the quantized blocks, and of the original ones (for error propagation).

    `spare_bytes` is what forwards may hold while they are paused between the steps of a block; `products` is the
    precision of their products and of the Hessians; `ranks` have a part of the text each, these streams hold one.
    """

    quantized: Stream
    original: Stream | None = None
    spare_bytes: int = 0
    products: torch.dtype = torch.float32
    ranks: Ranks = ALONE

    @property
    def n_tokens(self) -> int:
        """Of the whole text."""
        return sum(self.ranks.gathered(self.quantized.n_tokens))

    @property
    def n_rounds(self) -> int:
        """Batches of the rank that has most."""
        return max(self.ranks.gathered(self.quantized.n_batches))

    def append(self, start: Any) -> None:
        """Before the first block both are the same. `start` is what `Stream.append` takes."""
        self.quantized.append(start)
        if self.original is not None:
            self.original.append(start)


@dataclass(frozen=True)
class Step:
    """Linears that share an input, and the strength of error propagation into them.

    residual   how much of it is meant for the residual that the only linear's output is added to; 0: none, or no such
    """

    specs: list[LinearSpec]
    propagation: float
    residual: float = 0.0

    @property
    def in_features(self) -> int:
        return self.specs[0].shape[1]


@dataclass(frozen=True)
class Wave:
    """Steps whose inputs a forward reads at one point: a single step, or one of every expert of a layer.

    module    where the forward is paused
    experts   each step's expert, whose input is that entry of what `module` reads; None for a single step
    """

    module: nn.Module
    steps: list[Step]
    experts: list[int] | None = None

    def parts(self) -> list["Wave"]:
        """The wave in parts whose Hessians fit the memory that is meant for them."""
        if self.experts is None:
            return [self]
        count = max(1, _AT_ONCE // self.steps[0].in_features ** 2)
        starts = range(0, len(self.steps), count)
        return [
            Wave(self.module, self.steps[start : start + count], self.experts[start : start + count])
            for start in starts
        ]

    def inputs(self, read: Any) -> list[Tensor]:
        """The input of every step, from what `module` reads."""
        return [read] if self.experts is None else [read[expert] for expert in self.experts]


class _Read(NamedTuple):
    """What a wave's module reads in one batch, what entered the block, and the outputs kept on the way from there."""

    hidden: Batch
    x: Any
    outputs: Mapping[str, Tensor]


class BlockForwards:
    """The forwards of both calibration streams through one block, paused at the same wave batch by batch.

    Forwards stay paused between the waves as long as what they hold fits `spare_bytes`; the others run anew up to each
    wave. Weights are rounded once to the precision of the products, instead of in each forward.
    """

    def __init__(
        self,
        block: Block,
        specs: Sequence[LinearSpec],
        streams: CalibrationStreams,
        settled: Sequence[tuple[LinearSpec, Tensor]] = (),
    ) -> None:
        self._block, self._streams, self._n_rounds = block, streams, streams.n_rounds
        others = [spec for spec, _ in settled]
        self._originals = {spec.param: block.rounded(spec.param, streams.products) for spec in (*specs, *others)}
        self._current = dict(self._originals)
        for spec, weight_OI in settled:
            block.set_weight(spec, weight_OI)
        self.weights_changed(others)
        self._kept: dict[tuple[int, str], tuple[Paused, int]] = {}  # with the bytes it holds

    def weights_changed(self, specs: Sequence[LinearSpec]) -> None:
        """These linears have other weights in the block now."""
        for spec in specs:
            self._current[spec.param] = self._block.rounded(spec.param, self._streams.products)

    def hessians(self, position: int, wave: Wave) -> list[Hessian]:
        """One for each step of the wave at `position`, over all batches; waves must come in order."""
        hessians, original = [self._empty(step) for step in wave.steps], self._streams.original
        told = self._told(hessians)
        others = iter(original) if original is not None and any(step.propagation for step in wave.steps) else None
        for batch, hidden in enumerate(self._streams.quantized):
            reference = None
            if others is not None:
                reference = self._read(self._originals, position, (batch, "original"), next(others))
            self._add(wave, hessians, self._read(self._current, position, (batch, "quantized"), hidden), reference)
            told.batch()
        return self._of_all_ranks(hessians, told)

    def pool(self, position: int, wave: Wave) -> Hessian:
        """The Hessian of what all experts of a wave read; for a wave whose own do not fit the memory together."""
        pool = self._empty(wave.steps[0])
        told = self._told([pool])
        for batch, hidden in enumerate(self._streams.quantized):
            for x in wave.inputs(self._read(self._current, position, (batch, "quantized"), hidden).x):
                pool.add(x)
            told.batch()
        return self._of_all_ranks([pool], told)[0]

    def hessians_of_all(self, waves: Sequence[Wave]) -> list[list[Hessian]]:
        """The Hessians of all waves in one pass, before any of them is quantized."""
        hessians = [[self._empty(step) for step in wave.steps] for wave in waves]
        told = self._told([hessian for of_wave in hessians for hessian in of_wave])
        original = self._streams.original
        for hidden, other in zip(self._streams.quantized, original or self._streams.quantized, strict=True):
            run, reference = self._paused(hidden), self._paused(other)
            for position, (wave, sums) in enumerate(zip(waves, hessians, strict=True)):
                paired = None
                if original is not None and wave.experts is None:
                    paired = _Read(other, reference.input_of(position), reference.outputs)
                self._add(wave, sums, _Read(hidden, run.input_of(position), run.outputs), paired)
            run.close()
            reference.close()
            told.batch()
        self._of_all_ranks([hessian for of_wave in hessians for hessian in of_wave], told)
        return hessians

    def _told(self, hessians: Sequence[Hessian]) -> Sums:
        return Sums(self._streams.ranks, [total for hessian in hessians for total in hessian.sums()], self._n_rounds)

    def _of_all_ranks(self, hessians: list[Hessian], told: Sums) -> list[Hessian]:
        told.finish()
        for hessian in hessians:
            hessian.count_all(self._streams.ranks)
        return hessians

    def _empty(self, step: Step) -> Hessian:
        drift, width = step.propagation > 0, step.specs[0].shape[0] if step.residual else 0
        return Hessian(
            step.in_features, self._block.device, drift=drift, residual=width, products=self._streams.products
        )

    def _add(self, wave: Wave, hessians: Sequence[Hessian], read: _Read, reference: _Read | None) -> None:
        """One batch to the sums of a wave; `reference`: what the original forward reads, where they are compared."""
        references: Sequence[Tensor | None] = [None] * len(hessians)
        residual = None
        if reference is not None:
            references = wave.inputs(reference.x)
            if wave.steps[0].residual:
                module = wave.steps[0].specs[0].module
                residual = self._residual(module, reference).sub_(self._residual(module, read))
        for hessian, x, original in zip(hessians, wave.inputs(read.x), references, strict=True):
            hessian.add(x, original, residual)

    def _residual(self, module: str, read: _Read) -> Tensor:
        """r / c, a new tensor: what stands where the block adds c times the output of a linear.

        That is what entered the block, and what other linears have added to it since.
        """
        adds = self._block.adds
        entered = read.hidden.hidden if isinstance(read.hidden, Parked) else read.hidden
        total = entered.to(self._block.device, torch.float32, copy=True)
        for name, factor in adds.items():
            if name == module:
                break
            total.add_(read.outputs[name].view_as(total), alpha=factor)
        return total.div_(adds[module])

    def _paused(self, hidden: Batch) -> Paused:
        return Paused(
            partial(self._block.forward, hidden), partial(forwards_in, self._streams.products, self._block.dtype)
        )

    def _read(self, weights: Mapping[str, Value], position: int, key: tuple[int, str], hidden: Batch) -> _Read:
        """What the wave at `position` reads with `weights` in the block, by the forward of `key` (batch, stream)."""
        run, _ = self._kept.pop(key, (None, 0))
        run = run or self._paused(hidden)
        with self._block.holding(weights):
            read = _Read(hidden, run.input_of(position), run.outputs)
        held, spare = run.held_bytes(), self._streams.spare_bytes - sum(held for _, held in self._kept.values())
        if held <= spare:
            self._kept[key] = run, held
        else:
            run.close()
        return read

    def finish(self) -> None:
        """Both streams through the whole block."""
        if self._streams.original is not None:
            self._advance(self._originals, self._streams.original, "original")
        self._advance(self._current, self._streams.quantized, "quantized")

    def _advance(self, weights: Mapping[str, Value], stream: Stream, name: str) -> None:
        batches = count()

        def advanced(hidden: Batch) -> Any:
            run, _ = self._kept.pop((next(batches), name), (None, 0))
            return self._block.forward(hidden, self._streams.products) if run is None else run.finish()

        with self._block.holding(weights):
            stream.update(advanced)

    def close(self) -> None:
        for run, _ in self._kept.values():
            run.close()
        self._kept.clear()

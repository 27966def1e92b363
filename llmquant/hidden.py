"""The hidden states of a run between two blocks: those of the calibration text, and those of every lane.

All of them go through each block while it is in memory, and stand before the next one afterwards.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from llmquant.blocks.forwards import CalibrationStreams
from llmquant.errors import ResumeError, option
from llmquant.formats import LinearSpec
from llmquant.job import Job
from llmquant.lanes.baselines import dequantized
from llmquant.lanes.scores import BEFORE, OF_OURS, ORIGINAL, OURS, Lanes
from llmquant.model.block import Block
from llmquant.model.streams import Stream, Streams
from llmquant.model.weights import Value
from llmquant.text.windows import Windows


class HiddenStates:
    """The streams of one run.

    calibration   through the quantized blocks and, for error propagation, through the original ones; None: no text
    lanes         of the evaluation; None without one
    """

    def __init__(self, job: Job, streams: Streams) -> None:
        self._job, self._streams, self._ranks = job, streams, job.options.ranks
        self.calibration: CalibrationStreams | None = None
        if job.calibration is not None and job.finished is None:
            original = streams.new("calibration (original)") if job.recipe.propagation != 0 else None
            quantized = streams.new("calibration")
            self.calibration = CalibrationStreams(
                quantized, original, streams.spare_bytes, job.products, job.options.ranks
            )
        self.lanes = None
        if job.evaluation is not None:
            self.lanes = Lanes(job.lanes, job.evaluation.share_of(self._ranks), streams)

    def streams(self) -> dict[str, Stream]:
        """All of them by name."""
        found = dict(self.lanes.streams) if self.lanes is not None else {}
        if self.calibration is not None:
            found["calibration"] = self.calibration.quantized
            if self.calibration.original is not None:
                found["calibration (original)"] = self.calibration.original
        return found

    def embed(self, instead: Mapping[str, Value]) -> None:
        """Fill them with what enters the first block; every block knows its arguments afterwards.

        instead   weights outside the blocks that our own streams begin with, by name
        """
        calibration = self.calibration
        quantized, original = [], []
        if calibration is not None:
            quantized = [calibration.quantized]
            original = [] if calibration.original is None else [calibration.original]
        self._begin(self._job.calibration, quantized, original, instead)
        lanes = {} if self.lanes is None else self.lanes.streams
        ours = [stream for name, stream in lanes.items() if name in OF_OURS]
        others = [stream for name, stream in lanes.items() if name not in OF_OURS]
        self._begin(self._job.evaluation, ours, others, instead)

    def _begin(
        self, windows: Windows | None, ours: list[Stream], others: list[Stream], instead: Mapping[str, Value]
    ) -> None:
        """All streams of a text; those that begin alike in one pass."""
        passes = [(ours, instead), (others, {})] if instead else [([*others, *ours], {})]
        for streams, weights in passes:
            if windows is not None and streams:
                own = windows.share_of(self._ranks)
                self._job.skeleton.record(own.batches(), partial(_append, streams), weights)

    def specs(self, block: Block) -> list[LinearSpec]:
        """The linears of a block that are quantized."""
        return [row.spec for row in self._job.plan.block(block.index) if row.spec is not None]

    def borrowed(self, block: Block) -> list[LinearSpec]:
        """Its linears that run with the quantized weights of an earlier block."""
        return self._job.plan.borrowed(self._job.skeleton, block.index)

    def more_follow(self, block: Block) -> bool:
        """Whether another block follows: behind the last one nobody reads the calibration streams."""
        return block.index + 1 < len(self._job.skeleton.blocks)

    def advance_others(self, block: Block) -> None:
        """Every lane but ours through a block that holds its original weights."""
        if self.lanes is not None:
            self.lanes.advance(ORIGINAL, block.forward)
            specs = [*self.specs(block), *self.borrowed(block)]
            for name in self._job.baselines:
                with block.holding(dequantized(name, block, specs)):
                    self.lanes.advance(name, block.forward)

    def advance_ours(self, block: Block) -> None:
        """Our lane through a block that holds its quantized weights; with a recovery, what they were before it."""
        if self.lanes is not None:
            self.lanes.advance(BEFORE if BEFORE in self._job.lanes else OURS, block.forward)

    def advance_recovered(self, block: Block) -> None:
        """Our lane through a block that holds what a recovery made of it."""
        if self.lanes is not None:
            self.lanes.advance(OURS, block.forward)

    def replay(self, block: Block, written: Callable[[LinearSpec], Tensor]) -> None:
        """All of them through a finished block, without Hessians and solve.

        written   the dequantized weight_OI of a linear, as it lies on the disk
        """
        calibrate = partial(block.forward, products=self._job.products)
        calibration = self.calibration if self.more_follow(block) else None
        self.advance_others(block)
        if calibration is not None and calibration.original is not None:
            calibration.original.update(calibrate)
        for spec in [*self.specs(block), *self.borrowed(block)]:
            block.set_weight(spec, partial(written, spec))
        if calibration is not None:
            calibration.quantized.update(calibrate)
        self.advance_ours(block)

    def forget(self) -> None:
        """Behind the scores nobody reads any of them."""
        for stream in self.streams().values():
            stream.close()

    def forget_calibration(self) -> None:
        """Behind the last block nobody reads it."""
        for stream in (self.calibration.quantized, self.calibration.original) if self.calibration is not None else ():
            if stream is not None:
                stream.close()
        self.calibration = None

    def spare_bytes(self, budget: int) -> int:
        """What is left of the memory for hidden states."""
        return max(0, budget - self._streams.in_memory)

    def checksums(self) -> dict[str, str]:
        """Digests of the whole text's batches, whichever rank has them."""
        of_ranks = self._ranks.gathered({name: stream.sums() for name, stream in self.streams().items()})
        batches = {name: self._ranks.in_order([one[name] for one in of_ranks]) for name in of_ranks[0]}
        return {name: hashlib.sha256(json.dumps(sums).encode()).hexdigest() for name, sums in batches.items()}

    def check(self, index: int, wanted: dict[str, str]) -> None:
        """ResumeError unless they have the checksums that the interrupted run had behind block `index`."""
        for name, checksum in self.checksums().items():
            if checksum != wanted[name]:
                raise ResumeError(
                    f"block {index + 1}, stream {name}",
                    "differs from what the interrupted run computed",
                    remedy=f"start again with {option('resume')} never",
                )


def _append(streams: list[Stream], start: Any) -> None:
    for stream in streams:
        stream.append(start)

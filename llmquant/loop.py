"""THE loop: one pass over the weights, one block in memory; behind it the recovery, then the scores."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from llmquant.blocks.measure import LayerReport
from llmquant.blocks.quantize import quantize_block
from llmquant.blocks.snapshots import Snapshots
from llmquant.blocks.solve import Solved, solve_alone
from llmquant.blocks.training import BlockTraining
from llmquant.curvature import CurvaturePass
from llmquant.formats import FORMATS, LinearSpec
from llmquant.hidden import HiddenStates
from llmquant.job import Job
from llmquant.log import BlockDone, Progress, Stopwatch
from llmquant.memory import trim
from llmquant.model.block import Block, with_next
from llmquant.model.streams import Streams
from llmquant.model.weights import Value
from llmquant.quant.grid import QuantizedWeight
from llmquant.recovery import Recovery, RecoveryPlan
from llmquant.report.data import LaneReport, RecoveryReport
from llmquant.run_dir import RunDir
from llmquant.scoring import Scoring
from llmquant.text.windows import Windows

Settled = Sequence[tuple[LinearSpec, Tensor]]  # linears that run with an earlier block's weights, and those


class Loop:
    """The loop of one run, from the embeddings to the scores."""

    def __init__(
        self,
        job: Job,
        run: RunDir,
        curvature: CurvaturePass,
        recovery: RecoveryPlan,
        streams: Streams,
        watch: Stopwatch,
        log: Progress,
    ) -> None:
        self.curvature, self.recovery = curvature, recovery
        self.job, self.run, self.watch, self.log = job, run, watch, log
        self.blocks, self.output, self.record = job.skeleton.blocks, job.output, job.output.record
        self.hidden = HiddenStates(job, streams)
        for name in streams.spilled:
            log.line(f"--max-ram: the {name} stream is kept in a file")
        self.ranks = job.options.ranks
        self.snapshots = Snapshots(run, {} if job.parked else self.hidden.streams(), log, self.ranks)

    @cached_property
    def training(self) -> Recovery:
        """Of scales, norms and biases behind the loop."""
        return Recovery(self.recovery, self.job.calibration, self._codes, self.instead)

    def go(self) -> tuple[list[LayerReport], RecoveryReport | None, dict[str, LaneReport], Windows | None]:
        """Layers, recovery, lanes, and the text that these were scored on."""
        trim()
        fresh = not self.run.records
        if fresh:
            self._copy(None)
        layers = self._outside(write=fresh) if self.ranks.first else []
        self.ranks.wait()
        with self.watch.stage("embed"):
            self.hidden.embed(self.instead)
        trim()
        layers += self._finished_before()
        for block, then in with_next(self.blocks[len(self.run.records) :]):
            begin = time.perf_counter()
            ahead = (block.index, block.index + 1)
            self.job.source.prefetch(row.name for index in ahead for row in self.job.plan.block(index))
            with block.loaded(then=then):
                solved = self._block(block)
            self._copy(block.index)
            trim()
            layers += [item.report for item in solved]
            with self.watch.stage("write"):
                self.run.commit_block(self._body(solved))
                self.ranks.wait()
            self._say(block, solved, time.perf_counter() - begin)
            del solved  # a block's codes; the next block would come on top of them
            if self.snapshots.due():
                with self.watch.stage("snapshot"):
                    self.snapshots.save()
        recovered = self._recover() if self.recovery.groups else None
        return layers, recovered, *self._score()

    @property
    def instead(self) -> Mapping[str, Value]:
        """What our streams read in the place of weights outside the blocks: the head or the embedding, quantized."""
        specs = [row.spec for row in self.job.plan.block(None) if row.spec is not None]
        weights = self.job.skeleton.weights
        run = [spec for spec in specs if spec.param in weights.names]
        return {
            name: partial(self._written, spec)
            for spec in run
            for name in (spec.param, *weights.borrowers.get(spec.param, ()))
        }

    def _outside(self, *, write: bool) -> list[LayerReport]:
        """Quantize what is outside the blocks: the head, the embedding, and MTP heads, which nothing runs, if a rule
        names them; a resumed run reports."""
        reports, finished = [], self.job.finished
        for spec in (row.spec for row in self.job.plan.block(None) if row.spec is not None):
            with self.watch.stage("quantize"):
                if finished is not None:
                    solved = Solved(spec, finished.weight(spec), finished.layer(spec))
                else:
                    solved = solve_alone(spec, self.job.source.read_finite(spec.key).float(), self.job.recipe)
            if write and solved.weight is not None:
                with self.watch.stage("write"):
                    self.output.quantized(self.run, spec, solved.weight)
            reports.append(solved.report)
            trim()
        return reports

    def _block(self, block: Block) -> list[Solved]:
        hidden, specs = self.hidden, self.hidden.specs(block)
        with self.watch.stage("evaluate"):
            hidden.advance_others(block)
        with self.watch.stage("quantize"):
            settled = [(spec, self._written(spec)) for spec in hidden.borrowed(block)]
            solved = self._solved(block, specs, settled)
        with self.watch.stage("evaluate"):
            hidden.advance_ours(block)
        with self.watch.stage("write"):
            for item in solved:
                if item.weight is not None and self.ranks.first:
                    self.output.quantized(self.run, item.spec, item.weight)
        return solved

    def _solved(self, block: Block, specs: Sequence[LinearSpec], settled: Settled) -> list[Solved]:
        """The linears of a block, quantized, or as an earlier run quantized them; the block holds them afterwards."""
        if (finished := self.job.finished) is None:
            block.store, advance = self._store, self.hidden.more_follow(block)
            curvature = self.curvature.of(self.run, block)
            streams = self.hidden.calibration
            solved = quantize_block(
                block, specs, self.job.recipe, streams, settled, curvature=curvature, advance=advance
            )
            return [self._with_borrowers(item) for item in solved]
        weights = {spec: finished.weight(spec) for spec in finished.in_order(specs)}
        view = FORMATS[self.job.recipe.format]
        for spec, weight in weights.items():
            block.set_weight(spec, partial(view.loaded, spec, weight))
        for spec, weight_OI in settled:
            block.set_weight(spec, weight_OI)
        return [Solved(spec, weight, finished.layer(spec)) for spec, weight in weights.items()]

    def _with_borrowers(self, item: Solved) -> Solved:
        """A note where other blocks run with this weight, too."""
        numbers = sorted(
            {
                self.job.skeleton.block_of(param) or 0
                for param in self.job.skeleton.weights.borrowers.get(item.spec.param, ())
            }
        )
        if not numbers or item.report.loss is None:
            return item
        others = ", ".join(str(number + 1) for number in numbers)
        note = f"runs in block {others}, too; calibrated on the inputs of its first block only"
        return replace(item, report=replace(item.report, notes=(*item.report.notes, note)))

    def _store(self, spec: LinearSpec, weight: QuantizedWeight) -> Callable[[], Tensor]:
        """Write a linear before its block is done, so that its codes need no memory."""
        if self.ranks.first:
            self.output.quantized(self.run, spec, weight)
        self.ranks.wait()
        return partial(self._written, spec)

    def _body(self, solved: Sequence[Solved]) -> dict[str, Any]:
        """What the journal keeps of a block: all that a resumed run cannot compute from the files."""
        return {
            "layers": [item.report.as_dict() for item in solved],
            "digests": self.record.take_new(),
            "streams": self.hidden.checksums(),
        }

    def _finished_before(self) -> list[LayerReport]:
        """Hidden states behind the blocks of an interrupted run: by its newest snapshot, and through the rest again."""
        committed, behind = list(self.run.records), 0
        if committed:
            with self.watch.stage("resume"):
                behind = self.snapshots.load()
        if behind:
            self.hidden.check(behind - 1, committed[behind - 1]["streams"])
        for index, body in enumerate(committed):
            self.record.restore(body["digests"])
            if index >= behind and self.hidden.streams():
                self._replay(self.blocks[index])
                self.hidden.check(index, body["streams"])
            self.log.line(f"block {index + 1}: finished before")
        return [LayerReport.from_dict(layer) for body in committed for layer in body["layers"]]

    def _replay(self, block: Block) -> None:
        with self.watch.stage("resume"), block.loaded():
            self.hidden.replay(block, self._written)

    def _written(self, spec: LinearSpec) -> Tensor:
        """A quantized linear as the loop left it, dequantized from the disk."""
        stored = self.output.read(self.run, spec)
        if not isinstance(stored, Tensor):
            index = self.job.skeleton.block_of(spec.param)
            if self.run.recovery.steps is not None and index is not None:  # which may have written over its scales
                stored = self.training.blocks[index].quantized(spec, self.training.values(self.run, 0, index), stored)
            stored = FORMATS[self.job.recipe.format].loaded(spec, stored)
        return stored.float()

    def _codes(self, spec: LinearSpec) -> QuantizedWeight:
        stored = self.output.read(self.run, spec)
        assert not isinstance(stored, Tensor)  # `refuse_recovery`
        return stored

    def _recover(self) -> RecoveryReport:
        """Train scales, norms and biases; our lane through the result, which is then written."""
        run, training = self.run, self.training
        if run.recovery.steps is None:  # an interrupted training shall not go through all blocks
            with self.watch.stage("snapshot"):
                self.snapshots.save()
        self.hidden.forget_calibration()
        with self.watch.stage("recover"):
            found = training.train(run, self.hidden.spare_bytes(self.job.options.stream_budget), self.log)
        run.tensors.change()
        for index, of_block in enumerate(training.blocks):
            with self.watch.stage("evaluate"):
                self._advance_recovered(self.hidden, index)
            with self.watch.stage("write"):
                self._change(of_block, training.values(run, run.recovery.best, index))
            trim()
        return found

    def _advance_recovered(self, hidden: HiddenStates, index: int) -> None:
        """Our lane through a block as the best step of the training has it."""
        with self.training.blocks[index].loaded(self.training.values(self.run, self.run.recovery.best, index)):
            hidden.advance_recovered(self.blocks[index])

    def _change(self, of_block: BlockTraining, values: Mapping[str, Tensor]) -> None:
        """Write what is trained in a block over what the loop left."""
        for row in self.job.plan.block(of_block.block.index):
            param = self.job.skeleton.param_of.get(row.name)
            if row.spec is not None and row.spec.param in of_block.scales:
                self.output.quantized(self.run, row.spec, of_block.quantized(row.spec, values))
            elif param is not None and param in of_block.vectors:
                self.output.copied(self.run, row, of_block.vector(param, values))

    def _copy(self, block: int | None) -> None:
        """Write the tensors of a block (None: outside the blocks) that stay as they are."""
        with self.watch.stage("write"):
            for row in self.job.plan.block(block):
                if row.spec is None and self.ranks.first:
                    self.output.copied(self.run, row)

    def _score(self) -> tuple[dict[str, LaneReport], Windows | None]:
        recovered = self._advance_recovered if self.recovery.groups else None
        return Scoring(self.job, self.run, self.instead, self._written, recovered, self.watch, self.log).go(self.hidden)

    def _say(self, block: Block, solved: Sequence[Solved], seconds: float) -> None:
        errors = [item.report.relative_error for item in solved if item.report.relative_error is not None]
        worst = f", largest relative error {max(errors):.2e}" if errors else ""
        done, total = block.index + 1, len(self.blocks)
        line = f"block {done}/{total}: {len(solved)} linears, {seconds:.1f} s{worst}"
        off = self.hidden.lanes.relative_errors() if self.hidden.lanes is not None else {}
        self.log.block(BlockDone(line, done, total, seconds, off))
        for item in solved:
            for note in item.report.notes:
                self.log.line(f"  {item.report.name}: {note}")

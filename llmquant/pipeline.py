"""The way through the program: prepare -> one block at a time -> verified output -> report."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.blocks.forwards import CalibrationStreams
from llmquant.blocks.measure import LayerReport
from llmquant.blocks.quantize import quantize_block
from llmquant.blocks.snapshots import Snapshots, snapshot_bytes
from llmquant.blocks.solve import Solved
from llmquant.checkpoint import stored_forms
from llmquant.comparison import noise_floor
from llmquant.errors import ResumeError, option
from llmquant.export import export_beside
from llmquant.formats import FORMATS, LinearSpec
from llmquant.formats.runtimes import verdicts
from llmquant.job import Job, fingerprint, prepare, refuse_damaged_weights
from llmquant.lanes.baselines import BASELINES, dequantized
from llmquant.lanes.scores import ORIGINAL, OURS, Figures, Lanes, figures
from llmquant.log import SILENT, BlockDone, Log, Progress, Stopwatch, progress_of
from llmquant.memory import trim
from llmquant.model.block import Block
from llmquant.model.streams import Stream, Streams
from llmquant.output.check_files import check_config
from llmquant.plan import Row
from llmquant.recipe import Recipe, RunOptions, make_recipe, parse_size
from llmquant.report.card import make_card
from llmquant.report.data import SCHEMA_VERSION, LaneReport, Report, evaluation_report
from llmquant.report.html import make_html
from llmquant.run_dir import RunDir
from llmquant.versions import versions


def quantize(
    model: str | Path,
    recipe: Recipe | None = None,
    out: str | Path | None = None,
    *,
    revision: str | None = None,
    max_ram: str = "4GB",
    overwrite: bool = False,
    resume: str = "auto",
    runtimes: Sequence[str] = (),
    trust_remote_code: bool = False,
    log: Log = SILENT,
) -> Report:
    """Quantize `model` by `recipe` and write a verified checkpoint to `out` (default ./<name>-<scheme>).

    model     "demo", a local folder, or a Hub id (`revision` names a branch, tag or commit of it)
    The other arguments are those of `recipe.RunOptions`.
    Returns the report, which is also written into the folder of the weights. After an LLMQuantError, `out` is as it
    was before, and finished blocks are kept in `<out>.partial`.
    """
    options = RunOptions(out, revision, max_ram, overwrite, resume, tuple(runtimes), trust_remote_code)
    return quantize_with(model, recipe or make_recipe(str(model)), options, progress_of(log))


def quantize_with(model: str | Path, recipe: Recipe, options: RunOptions, log: Progress = SILENT) -> Report:
    """`quantize` with its options as one object."""
    watch = Stopwatch(log.stage)
    with watch.stage("prepare"):
        job = prepare(model, recipe, options, log)
        output = job.output
        n_tokens = [0 if text is None else text.n_tokens for text in (job.calibration, job.evaluation)]
        sizes = job.stream_sizes(*n_tokens)
        run = RunDir(
            job.target,
            overwrite=options.overwrite,
            needed_bytes=job.needed_bytes(sizes),
            streams_bytes=snapshot_bytes(sizes),
            resume=options.resume,
            fingerprint=fingerprint(job, refuse_damaged_weights(job.source)),
            threads=torch.get_num_threads(),
        )
    with (
        kept_blocks_named(run, len(job.skeleton.blocks), log),
        run,
        Streams(sizes, options.stream_budget, run.scratch) as streams,
    ):
        if run.finished:
            log.line(f"{run.out}: was finished by the interrupted run")
            return load_report(run.out)
        if run.records:
            log.line(f"going on after block {len(run.records)} of {len(job.skeleton.blocks)}")
            torch.set_num_threads(run.threads)
        output.open(run, parse_size("max_shard_size", recipe.max_shard_size))
        layers, lanes = _Pass(job, run, streams, watch, log).go()
        run.tensors.finish()
        with watch.stage("verify"):
            output.finish(run)
        log.line(f"verified: {len(job.plan.layout)} tensors re-read from disk, equal to what was computed")
        with watch.stage("export"):
            size = parse_size("max_shard_size", recipe.max_shard_size)
            export_beside(recipe.exports, run, size, log, trust_remote_code=options.trust_remote_code)
        floor = None if job.evaluation is None else noise_floor(job.source, job.skeleton, job.evaluation, watch)
        report = Report(_report(job, layers, lanes, floor, run.weight_files()), watch.cost(), run.out)
        if recipe.format != "gguf":  # a GGUF file has no config.json
            check_config(run.path, recipe.format, report.data["tensors"])
        run.write_json("report.json", report.data)
        run.write_json("cost.json", report.cost)
        run.write_bytes("README.md", make_card(run.out.name, report.data).encode())
        run.write_bytes("report.html", make_html(run.out.name, report.data).encode())
        run.commit({row.name: output.record.digests[row.name] for row in job.plan.rows})
    return report


@contextmanager
def kept_blocks_named(run: RunDir, n_blocks: int, log: Progress) -> Iterator[None]:
    """Whatever ends the run: one line that says what is kept, where, and how to go on."""
    try:
        yield
    except BaseException:
        if run.partial.exists() and run.records:
            log.line(f"{len(run.records)} of {n_blocks} blocks are kept in {run.partial}; the same command goes on")
        raise


def load_report(out: Path) -> Report:
    """The report of a finished folder."""
    data, cost = (json.loads((out / name).read_text("utf-8")) for name in ("report.json", "cost.json"))
    return Report(data, cost, out)


class _Pass:
    """THE loop: one pass over the weights, one block in memory."""

    def __init__(self, job: Job, run: RunDir, streams: Streams, watch: Stopwatch, log: Progress) -> None:
        self.job, self.run, self.watch, self.log = job, run, watch, log
        self.skeleton, self.output, self.record = job.skeleton, job.output, job.output.record
        self.streams: CalibrationStreams | None = None
        if job.calibration is not None:
            original = streams.new("calibration (original)") if job.recipe.propagation != 0 else None
            self.streams = CalibrationStreams(streams.new("calibration"), original, streams.spare_bytes, job.products)
        self.lanes = Lanes(job.lanes, job.evaluation, streams) if job.evaluation is not None else None
        for name in streams.spilled:
            log.line(f"--max-ram: the {name} stream is kept in a file")
        self.snapshots = Snapshots(run, self._all_streams(), log)

    def go(self) -> tuple[list[LayerReport], dict[str, LaneReport]]:
        job, n_blocks = self.job, len(self.skeleton.blocks)
        trim()
        self._embed()
        trim()
        layers: list[LayerReport] = []
        committed = list(self.run.records)
        if not committed:
            self._copy(None)
        behind = 0
        if committed:
            with self.watch.stage("resume"):
                behind = self.snapshots.load()
        if behind:
            self._check_streams(behind - 1, committed[behind - 1])
        for index, body in enumerate(committed):
            self.record.restore(body["digests"])
            if index >= behind and self._all_streams():
                self._replay(self.skeleton.blocks[index])
                self._check_streams(index, body)
            self.log.line(f"block {index + 1}: finished before")
            layers += [LayerReport.from_dict(layer) for layer in body["layers"]]
        for index in range(len(committed), n_blocks):
            begin = time.perf_counter()
            job.source.prefetch(row.name for i in (index, index + 1) for row in job.plan.block(i))
            with self.skeleton.blocks[index].loaded() as block:
                solved = self._block(block)
            self._copy(index)
            trim()
            layers += [item.report for item in solved]
            with self.watch.stage("write"):
                self.run.commit_block(self._body(solved))
            self._say(index, n_blocks, solved, time.perf_counter() - begin)
            del solved  # a block's codes; the next block would come on top of them
            if self.snapshots.due():
                with self.watch.stage("snapshot"):
                    self.snapshots.save()
        return layers, self._score()

    def _embed(self) -> None:
        """Hidden states before the first block for all windows, and every block's arguments."""
        with self.watch.stage("embed"):
            if self.job.calibration is not None and self.streams is not None:
                self.skeleton.record(self.job.calibration.batches(), self.streams.append)
            if self.job.evaluation is not None and self.lanes is not None:
                self.skeleton.record(self.job.evaluation.batches(), self.lanes.start)

    def _block(self, block: Block) -> list[Solved]:
        specs = self._specs(block)
        with self.watch.stage("evaluate"):
            self._advance_others(block, specs)
        with self.watch.stage("quantize"):
            solved = quantize_block(block, specs, self.job.recipe, self.streams, advance=self._more(block))
        with self.watch.stage("evaluate"):
            self._advance_ours(block)
        with self.watch.stage("write"):
            for item in solved:
                self.output.quantized(self.run, item.spec, item.weight)
        return solved

    def _body(self, solved: Sequence[Solved]) -> dict[str, Any]:
        """What the journal keeps of a block: all that a resumed run cannot compute from the files."""
        return {
            "layers": [item.report.as_dict() for item in solved],
            "digests": self.record.take_new(),
            "streams": {name: stream.checksum() for name, stream in self._all_streams().items()},
        }

    def _all_streams(self) -> dict[str, Stream]:
        streams = dict(self.lanes.streams) if self.lanes is not None else {}
        if self.streams is not None:
            streams["calibration"] = self.streams.quantized
            if self.streams.original is not None:
                streams["calibration (original)"] = self.streams.original
        return streams

    def _replay(self, block: Block) -> None:
        """A finished block again, without Hessians and solve: all streams through it, with the codes on disk."""
        specs = self._specs(block)
        calibrate = partial(block.forward, products=self.job.products)
        with self.watch.stage("resume"), block.loaded():
            self._advance_others(block, specs)
            if self.streams is not None and self.streams.original is not None and self._more(block):
                self.streams.original.update(calibrate)
            for spec in specs:
                stored = self.output.read(self.run, spec)
                if not isinstance(stored, Tensor):
                    stored = FORMATS[self.job.recipe.format].loaded(spec, stored)
                block.set_weight(spec, stored.float())
            if self.streams is not None and self._more(block):
                self.streams.quantized.update(calibrate)
            self._advance_ours(block)

    def _check_streams(self, index: int, body: dict[str, Any]) -> None:
        for name, stream in self._all_streams().items():
            if stream.checksum() != body["streams"][name]:
                raise ResumeError(
                    f"block {index + 1}, stream {name}",
                    "differs from what the interrupted run computed",
                    remedy=f"start again with {option('resume')} never",
                )

    def _specs(self, block: Block) -> list[LinearSpec]:
        return [row.spec for row in self.job.plan.block(block.index) if row.spec is not None]

    def _more(self, block: Block) -> bool:
        """Whether another block follows: behind the last one nobody reads the calibration streams."""
        return block.index + 1 < len(self.skeleton.blocks)

    def _advance_others(self, block: Block, specs: Sequence[LinearSpec]) -> None:
        """Every lane but ours, while the block holds its original weights."""
        if self.lanes is not None:
            self.lanes.advance(ORIGINAL, block.forward)
            for name in self.job.lanes[2:]:
                with block.holding(dequantized(name, block, specs)):
                    self.lanes.advance(name, block.forward)

    def _advance_ours(self, block: Block) -> None:
        if self.lanes is not None:
            self.lanes.advance(OURS, block.forward)

    def _copy(self, block: int | None) -> None:
        """Write the tensors of a block (None: outside the blocks) that stay as they are."""
        with self.watch.stage("write"):
            for row in self.job.plan.block(block):
                if row.spec is None:
                    self.output.copied(self.run, row)

    def _score(self) -> dict[str, LaneReport]:
        if self.lanes is None:
            return {}
        with self.watch.stage("evaluate"), self.skeleton.head() as logits_of:
            scores = self.lanes.score(lambda lane, hidden: logits_of(hidden))
        reports = {
            lane: LaneReport(figures(score, scores[ORIGINAL]), *_size(self.job, lane)) for lane, score in scores.items()
        }
        self.log.scored({lane: report.figures.kl_mean for lane, report in reports.items() if lane != ORIGINAL})
        return reports

    def _say(self, index: int, n_blocks: int, solved: Sequence[Solved], seconds: float) -> None:
        errors = [item.report.relative_error for item in solved if item.report.relative_error is not None]
        worst = f", largest relative error {max(errors):.2e}" if errors else ""
        line = f"block {index + 1}/{n_blocks}: {len(solved)} linears, {seconds:.1f} s{worst}"
        off = self.lanes.relative_errors() if self.lanes is not None else {}
        self.log.block(BlockDone(line, index + 1, n_blocks, seconds, off))
        for item in solved:
            for note in item.report.notes:
                self.log.line(f"  {item.report.name}: {note}")


def _size(job: Job, lane: str) -> tuple[float, int]:
    """Bits per weight of the quantized linears, and bytes of all tensors, of a lane."""
    specs, total = job.plan.specs, job.source.weight_bytes
    dense = sum(part.nbytes for spec in specs for part in job.source.parts(spec.key))
    weights = sum(spec.shape[0] * spec.shape[1] for spec in specs)
    if lane == ORIGINAL:
        return 8 * dense / weights, total
    if lane == OURS:
        return job.plan.bits_per_weight(job.recipe.format), job.plan.output_bytes
    bits = sum(spec.shape[0] * BASELINES[lane].row_bits(spec.shape[1], spec.scheme) for spec in specs)
    return bits / weights, total - dense + int(bits / 8)


def _report(
    job: Job, layers: Sequence[LayerReport], lanes: dict[str, LaneReport], floor: Figures | None, files: dict[str, Any]
) -> dict[str, Any]:
    """report.json: nothing in it differs between two runs of the same job on one machine."""
    specs, dense = job.plan.specs, job.plan.dense_linears
    notes = {layer.name: list(layer.notes) for layer in layers if layer.notes}
    return {
        "schema_version": SCHEMA_VERSION,
        "model": {
            "id": job.source.name,
            "revision": job.source.revision,
            "card": job.card,
            "remote_code": list(job.source.code),
            **({"stored_as": forms} if (forms := stored_forms(job.source)) else {}),
        },
        "versions": versions(),
        "recipe": job.recipe.as_dict(),
        "compute": {
            "device": job.skeleton.device.type,
            "dtype": str(job.skeleton.dtype).removeprefix("torch."),
            "products": str(job.products).removeprefix("torch."),
            "trust_remote_code": job.source.trust_remote_code,
        },
        "bits_per_weight": job.plan.bits_per_weight(job.recipe.format),
        "calibration": None if job.calibration is None else job.calibration.as_dict(),
        "evaluation": None if job.evaluation is None else evaluation_report(job.evaluation, lanes, floor),
        "runtimes": {name: verdicts(specs, name, dense) for name in (job.recipe.format, *job.recipe.exports)},
        "files": files,
        "layers": [layer.as_dict() for layer in layers],
        "tensors": [row.as_dict() | _notes(row, notes) for row in (*job.plan.rows, *job.output.left_out)],
    }


def _notes(row: Row, notes: dict[str, list[str]]) -> dict[str, list[str]]:
    """What was unusual about a quantized tensor, for its row of the ledger. `notes` are those of all, by module."""
    return {"notes": notes[row.spec.module]} if row.spec is not None and row.spec.module in notes else {}

"""The way through the program: prepare -> one block at a time -> verified output -> report."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from llmquant.allocation import Target, allocate
from llmquant.comparison import noise_floor
from llmquant.curvature import CurvaturePass, measure_curvature
from llmquant.export import export_beside
from llmquant.formats import FORMATS
from llmquant.job import Job, fingerprint, prepare, refuse_damaged_weights
from llmquant.log import SILENT, Log, Progress, Stopwatch, progress_of
from llmquant.loop import Loop
from llmquant.model.stock import compare_with_stock
from llmquant.model.streams import Streams
from llmquant.output.check_files import check_config
from llmquant.paths import shown_name
from llmquant.quant.solvers.insurance import refuse_wrong_kernels
from llmquant.recipe import Recipe, RunOptions, make_recipe, parse_size
from llmquant.recovery import RecoveryPlan
from llmquant.report.card import make_card
from llmquant.report.data import Cost, Report, load_report
from llmquant.report.html import make_html
from llmquant.result import run_report
from llmquant.run_dir import FollowedRun, RunDir

_SPARE = 100_000_000  # bytes that every run has room for


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
    report = quantize_on_ranks(model, recipe, options, log)
    assert report is not None
    return report


def quantize_on_ranks(model: str | Path, recipe: Recipe, options: RunOptions, log: Progress) -> Report | None:
    """The same as one of `options.ranks`, all of which call it; the first one gets the report."""
    ranks = options.ranks
    watch = Stopwatch(log.stage)
    with watch.stage("prepare"):
        job = prepare(model, recipe, options, log)
        if job.solves and (problem := refuse_wrong_kernels(job.skeleton.device)):
            log.line(f"kernels of this GPU: {problem}; the CPU does their part, which takes longer")
        output = job.output
        texts = (job.calibration, job.evaluation)
        n_tokens = [0 if text is None else text.n_tokens for text in texts]
        own_tokens = [0 if text is None else text.share_of(ranks).n_tokens for text in texts]
        sizes, own_sizes = job.stream_sizes(*n_tokens), job.stream_sizes(*own_tokens)
        curvature, recovery = CurvaturePass(job, n_tokens[0]), RecoveryPlan(job, n_tokens[0])
        target = Target(job, curvature) if recipe.has_target else None
        more = curvature.disk_bytes + recovery.disk_bytes + (target.more_bytes if target is not None else 0)
        run = _folder(job, job.needed_bytes(sizes) + more, job.snapshot_bytes(sizes))
    with (
        kept_blocks_named(run, len(job.skeleton.blocks), log),
        run,
        Streams(
            own_sizes, options.stream_budget, run.scratch, sizes if job.parked else (), device=job.skeleton.device
        ) as streams,
    ):
        if run.finished:
            log.line(f"{run.out}: was finished by the interrupted run")
            return load_report(run.out) if ranks.first else None
        if run.records:
            log.line(f"going on after block {len(run.records)} of {len(job.skeleton.blocks)}")
            torch.set_num_threads(run.threads)
        elif (text := job.calibration or job.evaluation) is not None and ranks.first:
            with watch.stage("compare"):
                compare_with_stock(job.skeleton, text.ids[0], streams.in_memory + _SPARE, log.line)
        with watch.stage("curvature"):
            measure_curvature(job, curvature, run, log)
        asked, allocation = job.recipe, None
        if target is not None:
            with watch.stage("allocate"):
                job, allocation = allocate(job, run, curvature, target, log)
            output, recovery = job.output, RecoveryPlan(job, n_tokens[0])
        for turn in (True, False):  # the others open what the first one has made
            if ranks.first == turn:
                output.open(run, parse_size("max_shard_size", recipe.max_shard_size))
            ranks.wait()
        layers, recovered, lanes, scored = Loop(job, run, curvature, recovery, streams, watch, log).go()
        if not ranks.first:
            return None
        job = replace(job, evaluation=scored)
        run.tensors.finish()
        with watch.stage("verify"):
            output.finish(run)
        log.line(f"verified: {len(job.plan.layout)} tensors re-read from disk, equal to what was computed")
        with watch.stage("export"):
            size = parse_size("max_shard_size", recipe.max_shard_size)
            export_beside(recipe.exports, run, size, log, trust_remote_code=options.trust_remote_code)
        floor = None if job.evaluation is None else noise_floor(job.source, job.skeleton, job.evaluation, watch)
        facts = run_report(job, asked, layers, allocation, recovered, lanes, floor, run.weight_files())
        report = Report(facts, Cost(**watch.cost()), run.out)
        if not FORMATS[recipe.format].facts.one_file:  # which holds its config itself
            check_config(run.path, recipe.format, facts.tensors)
        run.write_json("report.json", report.data)
        run.write_json("cost.json", report.cost)
        run.write_bytes("README.md", make_card(shown_name(run.out), facts).encode())
        run.write_bytes("report.html", make_html(shown_name(run.out), facts).encode("utf-8", "backslashreplace"))
        run.commit({row.name: output.record.digests[row.name] for row in job.plan.rows})
    return report


def _folder(job: Job, needed_bytes: int, streams_bytes: int) -> RunDir:
    """The folder of the run, which one rank writes and the others follow."""
    options = job.options
    if not options.ranks.first:
        return FollowedRun(job.target, options.ranks)
    return RunDir(
        job.target,
        overwrite=options.overwrite,
        needed_bytes=needed_bytes,
        streams_bytes=streams_bytes,
        resume=options.resume,
        fingerprint=fingerprint(job, refuse_damaged_weights(job.source)),
        threads=torch.get_num_threads(),
        ranks=options.ranks,
    )


@contextmanager
def kept_blocks_named(run: RunDir, n_blocks: int, log: Progress) -> Iterator[None]:
    """Whatever ends the run: one line that says what is kept, where, and how to go on."""
    try:
        yield
    except BaseException:
        if run.partial.exists() and (run.records or run.curvature.complete):
            measured = "the curvature and " * run.curvature.complete
            log.line(
                f"{measured}{len(run.records)} of {n_blocks} blocks are kept in {run.partial}; the same command goes on"
            )
        raise

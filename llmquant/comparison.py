"""Score finished checkpoints against a reference, all streamed block by block over the same windows."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from llmquant.checkpoint import bits_per_weight, open_checkpoint
from llmquant.draft import draft_model, refuse_parked, said_of_parked, stream_bytes
from llmquant.errors import SourceError, option
from llmquant.job import evaluation_text
from llmquant.lanes.enough import first_part, scored_enough
from llmquant.lanes.scores import (
    ORIGINAL,
    Figures,
    Lanes,
    TokenScores,
    bootstrap_ratio,
    exponential,
    figures,
    standard_error,
    window_means,
)
from llmquant.log import SILENT, BlockDone, Log, Progress, Stopwatch, progress_of
from llmquant.memory import trim
from llmquant.model.skeleton import Skeleton
from llmquant.model.streams import Streams, unnamed_file
from llmquant.recipe import Recipe, make_recipe, parse_size
from llmquant.report.data import SCHEMA_VERSION, ComparedModel, CompareReport, Cost, Difference, Report
from llmquant.report.parts import evaluation_report, lane_report, library_versions
from llmquant.source.base import Source
from llmquant.text.tokenizer import load_tokenizer
from llmquant.text.windows import Windows


@dataclass(frozen=True)
class Lane:
    """A checkpoint and its skeleton."""

    source: Source
    skeleton: Skeleton


def evaluate(model: str | Path, *, reference: str | Path | None = None, **options: Any) -> Report:
    """Perplexity of one checkpoint and, with a `reference`, its divergence from it. Options as for `compare`."""
    return compare([model], reference=reference, **options)


def compare(
    models: Sequence[str | Path],
    *,
    reference: str | Path | None = None,
    recipe: Recipe | None = None,
    max_ram: str = "4GB",
    trust_remote_code: bool = False,
    log: Log = SILENT,
) -> Report:
    """Score `models` on the evaluation windows of `recipe` (eval_data, eval_tokens, eval_seq_len, device, dtype).

    Every checkpoint may be 16-bit or quantized (`checkpoint.READERS`); all must share the reference's tokenizer and
    vocabulary. The first lane is the reference (the first model where none is given). One block of one lane is in
    memory at a time, and at the end the heads of all lanes. The report's `differences` are paired over windows.
    trust_remote_code   Python code of any of them may be run
    """
    watch = Stopwatch(progress_of(log).stage)
    options: dict[str, Any] = {"max_ram": max_ram, "trust_remote_code": trust_remote_code, "log": log, "watch": watch}
    windows, lanes, scores = score_tokens(models, reference, recipe, **options)
    first = next(iter(scores.values()))
    reports = {
        name: lane_report(figures(score, first), bits_per_weight(lanes[name].source), lanes[name].source.weight_bytes)
        for name, score in scores.items()
    }
    compared = [
        ComparedModel(lane.source.name, lane.source.revision, tuple(lane.source.code), lane.skeleton.parked)
        for lane in lanes.values()
    ]
    facts = CompareReport(
        schema_version=SCHEMA_VERSION,
        models=tuple(compared),
        trust_remote_code=trust_remote_code,
        versions=library_versions(),
        evaluation=evaluation_report(windows, reports),
        differences=tuple(_differences(scores)),
    )
    return Report(facts, Cost(**watch.cost()))


def score_tokens(
    models: Sequence[str | Path],
    reference: str | Path | None,
    recipe: Recipe | None = None,
    *,
    max_ram: str = "4GB",
    trust_remote_code: bool = False,
    log: Log = SILENT,
    watch: Stopwatch | None = None,
) -> tuple[Windows, dict[str, Lane], dict[str, TokenScores]]:
    """What `compare` sums up: the windows, the lanes, and every token's scores by lane, the reference first."""
    progress = progress_of(log)
    watch = watch or Stopwatch(progress.stage)
    paths = [*([reference] if reference is not None else []), *models]
    recipe = recipe or make_recipe(str(paths[0]))
    with watch.stage("prepare"):
        sources = [open_checkpoint(path, trust_remote_code=trust_remote_code) for path in paths]
        lanes = _open(sources, recipe, progress, named_reference=reference is not None)
        first = next(iter(lanes.values()))
        tokenizer = load_tokenizer(first.source)
        windows = evaluation_text(first.skeleton, tokenizer, recipe, progress)
    score = partial(_scores, lanes, budget=parse_size("max_ram", max_ram), watch=watch, log=progress)
    if recipe.eval_tokens != "auto":
        return windows, lanes, score(windows)
    part = first_part(windows)
    parked = any(lane.skeleton.parked for lane in lanes.values())  # for whose first part --max-ram has room
    found, windows = scored_enough(
        score(part),
        part,
        windows.behind(part),
        score,
        list(lanes)[1:],
        len(part.ids) if parked else None,
        lambda text: progress.line(f"--tokens auto: {text}"),
    )
    return windows, lanes, dict(found)


def _scores(
    lanes: dict[str, Lane], windows: Windows, budget: int, watch: Stopwatch, log: Progress
) -> dict[str, TokenScores]:
    sizes = {name: stream_bytes(lane.skeleton, windows.n_tokens, windows.ids.shape[1]) for name, lane in lanes.items()}
    parked = [name for name, lane in lanes.items() if lane.skeleton.parked]
    refuse_parked({name: sizes[name] for name in parked}, budget, ["eval_tokens"])
    with Streams(sizes, budget, unnamed_file, parked) as streams:
        return _stream(lanes, Lanes(tuple(lanes), windows, streams), watch, log)


def noise_floor(source: Source, skeleton: Skeleton, windows: Windows, watch: Stopwatch) -> Figures | None:
    """What the compute dtype alone costs: the original in it against the original in float32, on 8 windows.

    A divergence near this floor says nothing. None where the compute dtype is float32.
    """
    if skeleton.dtype == torch.float32:
        return None
    few = replace(windows, ids=windows.ids[:8])
    exact = Skeleton(source, skeleton.device, torch.float32)
    lanes = {"float32": Lane(source, exact), "compute": Lane(source, skeleton)}
    # In files, or parked, which is not much: the run's own are still open.
    with Streams(dict.fromkeys(lanes, 1), 0, unnamed_file, lanes if skeleton.parked else ()) as streams:
        scores = _stream(lanes, Lanes(tuple(lanes), few, streams), watch, SILENT)
    return figures(scores["compute"], scores["float32"])


def _open(sources: Sequence[Source], recipe: Recipe, log: Progress, *, named_reference: bool) -> dict[str, Lane]:
    lanes: dict[str, Lane] = {}
    for position, source in enumerate(sources):
        name = ORIGINAL if position == 0 and named_reference else _fresh(source.name, lanes)
        lanes[name] = Lane(source, draft_model(source, recipe, log))
        if reason := lanes[name].skeleton.parked:
            log.line(f"{name}: {said_of_parked(reason)}")
    first = next(iter(lanes.values())).skeleton
    for lane in lanes.values():
        for what in ("vocab_size", "hidden_size"):
            mine, theirs = getattr(lane.skeleton, what), getattr(first, what)
            if mine != theirs:
                raise SourceError(lane.source.name, f"{what} {mine}", expected=f"{theirs}, as the reference has")
        # A GGUF file's context ends where llama.cpp, which knows no window, would compute otherwise.
        length = min(recipe.eval_window, first.context or recipe.eval_window)
        if lane.skeleton.context is not None and lane.skeleton.context < length:
            raise SourceError(
                lane.source.name,
                f"context {lane.skeleton.context}",
                expected=f"at least the {length} tokens of a window",
                remedy=f"{option('seq_len')} {lane.skeleton.context}",
            )
    return lanes


def _fresh(name: str, taken: dict[str, Lane]) -> str:
    """`name`, numbered where another lane has it already."""
    number, fresh = 2, name
    while fresh in taken:
        fresh, number = f"{name} ({number})", number + 1
    return fresh


def _stream(lanes: dict[str, Lane], streams: Lanes, watch: Stopwatch, log: Progress) -> dict[str, TokenScores]:
    """All lanes through all blocks, then through their heads."""
    batches = streams.windows.batches()
    with watch.stage("embed"):
        for name, lane in lanes.items():
            lane.skeleton.record(batches, streams.streams[name].append)
    n_blocks = [len(lane.skeleton.blocks) for lane in lanes.values()]
    for index in range(max(n_blocks)):
        begin = time.perf_counter()
        with watch.stage("evaluate"):
            for name, lane in lanes.items():
                if index < len(lane.skeleton.blocks):
                    _advance(name, lane, index, streams)
        trim()
        line, seconds = f"block {index + 1}/{max(n_blocks)}", time.perf_counter() - begin
        log.block(BlockDone(line, index + 1, max(n_blocks), seconds))
    with watch.stage("head"), ExitStack() as heads:
        logits_of = {name: heads.enter_context(lane.skeleton.head()) for name, lane in lanes.items()}
        return streams.score(lambda name, hidden: logits_of[name](hidden))


def _advance(name: str, lane: Lane, index: int, streams: Lanes) -> None:
    lane.skeleton.weights.prefetch(param for block in lane.skeleton.blocks[index : index + 2] for param in block.params)
    with lane.skeleton.blocks[index].loaded() as block:
        streams.advance(name, block.forward)


def _differences(scores: dict[str, TokenScores]) -> list[Difference]:
    """For each pair of scored checkpoints (reference left out): b minus a, paired over windows."""
    rows = []
    for (a, first), (b, second) in combinations(list(scores.items())[1:], 2):
        keep = first.finite & second.finite
        kl, nll = window_means(second.kl - first.kl, keep), window_means(second.nll - first.nll, keep)
        rows.append(
            Difference(
                a=a,
                b=b,
                kl_difference=float(kl.mean()),
                kl_difference_se=standard_error(kl),
                perplexity_ratio=exponential(float(nll.mean())),
                perplexity_ratio_ci=bootstrap_ratio(nll, seed=0),
            )
        )
    return rows

"""What a run would do and cost, from headers alone: the ledger by kind, sizes, memory, disk, time and problems."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from llmquant.allocation import Target
from llmquant.checkpoint import stored_forms
from llmquant.curvature import CurvaturePass
from llmquant.draft import Draft
from llmquant.draft import draft as make_draft
from llmquant.errors import CalibrationError, LLMQuantError, OutputError, RecipeError, flag, option
from llmquant.formats.runtimes import RUNTIMES, lint, opens
from llmquant.job import said_of_experts, windows
from llmquant.lanes.enough import FIRST_TOKENS, first_part
from llmquant.log import SILENT, Lines
from llmquant.memory import physical_memory
from llmquant.model.devices import device_memory
from llmquant.model.skeleton import Skeleton
from llmquant.paths import expanded
from llmquant.plan import Row
from llmquant.preflight.flops import Tokens, Work, matmul_rate, work_of
from llmquant.preflight.memory_bound import MemoryBound, memory_bound
from llmquant.preflight.shared import Sent, of_busiest, sent, tokens_of_busiest
from llmquant.preflight.trial import try_block
from llmquant.recipe import Recipe, RunOptions
from llmquant.recovery import RecoveryPlan
from llmquant.run_dir import RunDir
from llmquant.source.names import without_numbers
from llmquant.source.resolve import open_source
from llmquant.text.corpus import is_file
from llmquant.text.mixture import parse_mixture
from llmquant.text.tokenizer import has_tokenizer

T = TypeVar("T")

_START_SECONDS = 4.0  # to import torch and transformers, open the model and cut the texts into windows
_FULL_TOKENS = 300_000  # what --eval-tokens full is taken for: wikitext-2's test split has about that many
_LINK_RATE = 10e9  # bytes per second from one rank to another, taken for every network
_DISK_RATE = 300e6  # bytes per second, taken for reading the source twice and writing and re-reading the output


@dataclass(frozen=True)
class Kind:
    """Tensors that differ only in the numbers of their path; `bits` is None for copied ones."""

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    action: str
    reason: str
    bits: int | None
    group_size: int | None


@dataclass(frozen=True)
class Problem:
    """`blocking`: the run would end with `exit_code` before any work."""

    message: str
    blocking: bool
    exit_code: int = 0


@dataclass
class Estimate:
    """All of it as plain data. Bytes and seconds by part; sums are properties."""

    model: str
    revision: str | None
    source_bytes: int
    recipe: dict[str, Any]
    stored_as: dict[str, int] = field(default_factory=dict)  # forms that are not dense -> number of tensors
    compute: dict[str, str] = field(default_factory=dict)
    kinds: list[Kind] = field(default_factory=list)
    output_bytes: int = 0
    bits_per_weight: float | None = None
    opens: dict[str, bool] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)  # of the machine
    device_memory: dict[str, int] = field(default_factory=dict)  # of the accelerator; empty on a CPU
    disk: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # of an idle machine
    busy: float = 1.0  # how many times as long it takes while the machine is as busy as now
    ranks: int = 1
    sent_bytes: int = 0  # by each of several ranks, in all
    sent_bytes_of_block: int = 0  # for the block with most
    assumptions: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """Of the first blocking problem; 0 where the run could start."""
        return next((problem.exit_code for problem in self.problems if problem.blocking), 0)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "memory_bytes": sum(self.memory.values()),
            "device_memory_bytes": sum(self.device_memory.values()),
            "disk_bytes": sum(self.disk.values()),
            "total_seconds": sum(self.seconds.values()),
        }

    def attempt(self, call: Callable[[], T]) -> T | None:
        """`call()`; an error of ours becomes a blocking problem, and None is returned."""
        try:
            return call()
        except LLMQuantError as error:
            self.refuse(error)
            return None

    def refuse(self, error: LLMQuantError) -> None:
        """Note an error that would end the run."""
        self.problems.append(Problem(str(error), True, error.exit_code))

    def warn(self, message: str) -> None:
        self.problems.append(Problem(message, False))


def estimate(
    model: str | Path,
    recipe: Recipe,
    options: RunOptions = RunOptions(),  # noqa: B008 (frozen)
    *,
    timed: bool = False,
) -> Estimate:
    """What a run with the same arguments would do. Reads headers, side files and texts; nothing is written.

    Texts that lie on this machine are cut into windows as a run does it; those on the Hub are not fetched. `timed`
    reads the first block, too, and quantizes it on a few random tokens to see how long that takes here.

    `opens` says which runtimes would open the result; one of `runtimes` that does not is a problem.
    Errors that the run would end with become `problems`; SourceError is raised where not even headers can be read.
    """
    stored = open_source(model, options.revision, trust_remote_code=options.trust_remote_code)
    found = Estimate(stored.name, stored.revision, stored.weight_bytes, recipe.as_dict())
    draft = found.attempt(lambda: make_draft(stored, recipe, options, log=Lines(found.warn), attempt=found.attempt))
    if draft is None:  # nothing else about it would make sense
        return found
    source, skeleton, plan, lanes = draft.source, draft.skeleton, draft.plan, draft.lanes
    found.stored_as = stored_forms(source)
    found.compute = {"device": skeleton.device.type, "dtype": str(skeleton.dtype).removeprefix("torch.")}
    found.kinds = kinds_of([*plan.rows, *draft.output.left_out])
    found.output_bytes = plan.output_bytes
    found.bits_per_weight = plan.bits_per_weight(recipe.format)
    tried = {name: opening.findings for name, opening in draft.openings.items()}
    by_format = [opens(plan.specs, name, plan.dense_linears, tried[name]) for name in tried]
    found.opens = {runtime: any(answer[runtime] for answer in by_format) for runtime in RUNTIMES}
    for finding in (finding for name in tried for finding in lint(plan.specs, name, plan.dense_linears)):
        if finding.runtime in options.runtimes and finding.severity == "warns":
            found.warn(str(finding))
    tokens = _tokens(found, draft)
    sizes = draft.stream_sizes(tokens.calibration, tokens.evaluation)
    curvature, recovery = CurvaturePass(draft, tokens.calibration), RecoveryPlan(draft, tokens.calibration)
    more = 0
    if recipe.has_target and (target := found.attempt(lambda: Target(draft, curvature))) is not None:
        found.bits_per_weight = target.budget / target.n_weights
        more = target.more_bytes
        found.output_bytes += more
        found.assumptions.append("--target-bpw or --target-size: bits and groups by linear are chosen in the run")
    if said := said_of_experts(draft, tokens.calibration):
        found.warn(said)
    found.attempt(lambda: draft.refuse_parked(tokens.calibration, tokens.evaluation))
    n_ranks = options.ranks.size
    own = tokens_of_busiest(tokens, n_ranks)
    n_curvature = of_busiest(curvature.n_tokens, tokens.seq_len, n_ranks)
    own_sizes = draft.stream_sizes(own.calibration, own.evaluation)
    _memory(found, memory_bound(draft, curvature, recovery, own, own_sizes), draft)
    found.disk = {
        "output": draft.output_bytes() + more,
        "streams in files": draft.spilled_bytes(sizes),
        "snapshots of streams, where there is room": draft.snapshot_bytes(sizes),
        "curvature": curvature.disk_bytes,
        "recovery": recovery.disk_bytes,
        "download into the Hub's cache": source.download_bytes(),
    }
    needed = draft.needed_bytes(sizes) + curvature.disk_bytes + recovery.disk_bytes + more
    found.attempt(lambda: _check_target(found, draft.target, options.overwrite, needed))
    _time(found, work_of(draft, curvature, recovery, own, len(lanes), n_curvature), skeleton, draft.products)
    if n_ranks > 1:
        _shared(found, sent(draft, curvature, tokens), n_ranks)
    if timed and n_ranks > 1:
        found.refuse(RecipeError(option("timed"), f"{n_ranks} ranks", remedy=f"leave {option('ranks')} out"))
    if not timed or found.exit_code:
        return found
    trial = found.attempt(lambda: try_block(draft, curvature, recovery, tokens, len(lanes)))
    if trial is not None:
        more_passes = curvature.n_tokens, recovery.forwards, 2 * recipe.has_target
        _replace_time(found, trial.seconds(len(skeleton.blocks), tokens, len(lanes), *more_passes))
    return found


def kinds_of(rows: Sequence[Row]) -> list[Kind]:
    """The ledger with its numbers taken out, in the order of the ledger; what rules set apart stays together."""

    def kind(row: Row) -> Kind:
        scheme = None if row.spec is None else row.spec.scheme
        bits, group = (None, None) if scheme is None else (scheme.bits, scheme.group_size)
        return Kind(without_numbers(row.name), 1, row.shape, row.dtype, row.action, row.reason, bits, group)

    counts = Counter(kind(row) for row in rows)
    places = {name: place for place, name in enumerate(dict.fromkeys(one.name for one in counts))}
    together = sorted(counts.items(), key=lambda item: places[item[0].name])
    return [Kind(**(asdict(one) | {"count": count, "shape": one.shape})) for one, count in together]


def _tokens(found: Estimate, draft: Draft) -> Tokens:
    """What will go through the model: counted where the texts lie on this machine, else as many as the recipe asks
    for. Problems with the texts are noted."""
    recipe, evaluated = draft.recipe, bool(draft.lanes)
    if evaluated and recipe.eval_tokens == "auto":
        found.assumptions.append("--eval-tokens auto: the first part of the text is counted; more may be scored")
    context = draft.skeleton.context or max(recipe.seq_len, recipe.eval_seq_len)
    for name, length, wanted in (
        ("seq_len", recipe.seq_len, draft.calibrated),
        ("eval_seq_len", recipe.eval_window, evaluated),
    ):
        if wanted and length > context:
            found.warn(f"{flag(name)}: {length} is shortened to the model's context of {context}")
    lengths = min(recipe.seq_len, context), min(recipe.eval_window, context)
    parts = (found.attempt(lambda: parse_mixture(recipe.calibration)) or []) if draft.calibrated else []
    texts = [("calibration", part) for part, _ in parts] + ([("eval_data", recipe.eval_data)] if evaluated else [])
    for name, spec in texts:
        found.attempt(partial(_check_text, name, spec))
    if texts and not has_tokenizer(draft.source):
        found.refuse(
            CalibrationError(
                draft.source.name,
                "no tokenizer",
                remedy=f"add its files, or use {option('method')} rtn {option('eval_data')} none",
            )
        )
    if not found.exit_code and all(spec == "builtin" or is_file(spec) for _, spec in texts):
        cut = found.attempt(lambda: windows(draft, SILENT))
        calibration, evaluation = cut or (None, None)
        if evaluation is not None and recipe.eval_tokens == "auto":
            evaluation = first_part(evaluation)
        counts = [0 if text is None else text.n_tokens for text in (calibration, evaluation)]
        return Tokens(counts[0], counts[1], *lengths)
    n_calibration = recipe.most_samples * lengths[0] if draft.calibrated else 0
    if draft.calibrated and recipe.samples == "auto":
        found.assumptions.append(f"--samples auto is taken for {recipe.most_samples} windows, the most")
    full = recipe.eval_tokens == "full"
    if evaluated and full:
        found.assumptions.append(f"--eval-tokens full is taken for {_FULL_TOKENS} tokens")
    taken = {"full": _FULL_TOKENS, "auto": FIRST_TOKENS}.get(str(recipe.eval_tokens), recipe.eval_tokens)
    n_evaluation = int(taken) if evaluated else 0
    return Tokens(n_calibration, n_evaluation, *lengths)


def _memory(found: Estimate, bound: MemoryBound, draft: Draft) -> None:
    """The bounds, and what is wrong with them here."""
    found.memory, found.device_memory = bound.host, bound.device
    total, physical = sum(found.memory.values()), physical_memory()
    if physical is not None and total > physical:
        remedy = "use a smaller --max-ram" + (" or --dtype bfloat16" if not found.device_memory else "")
        found.warn(
            f"memory: up to {total / 1e9:.1f} GB; expected at most the machine's {physical / 1e9:.1f} GB; {remedy}"
        )
    total, physical = sum(found.device_memory.values()), device_memory(draft.skeleton.device)
    if physical is not None and total > physical:
        found.warn(
            f"memory of {draft.skeleton.device}: up to {total / 1e9:.1f} GB; expected at most its {physical / 1e9:.1f} "
            "GB; use a smaller --max-ram (paused forwards) or --device cpu"
        )
    widest = max(spec.shape[1] for spec in draft.plan.specs)
    if draft.calibrated and draft.recipe.most_samples * draft.recipe.seq_len < widest:
        found.warn(f"--samples: fewer calibration tokens than the {widest} inputs of the widest layer; use more")


def _check_text(field: str, spec: str) -> None:
    if is_file(spec) and not expanded(spec, CalibrationError).is_file():
        raise CalibrationError(f"{option(field)} {spec}", "no such file")


def _check_target(found: Estimate, target: Path, overwrite: bool, needed: int) -> None:
    if Path(f"{expanded(target, OutputError)}.partial").exists():
        # Not for us to touch, and RunDir would tidy up what is no run.
        found.warn(f"{target}.partial exists: a run is working there, or `run` would continue an interrupted one")
        return
    try:
        RunDir(target, overwrite=overwrite, needed_bytes=needed)  # checks only: entering it would create the folder
    except OSError as error:
        raise OutputError(str(target), error.strerror or str(error), remedy=f"choose another {option('out')}") from None


def _shared(found: Estimate, each: Sent, n_ranks: int) -> None:
    """What ranks send each other, and how long that may take."""
    found.ranks, found.sent_bytes, found.sent_bytes_of_block = n_ranks, each.total, each.block
    found.seconds["telling other ranks"] = each.total / _LINK_RATE
    found.assumptions.append(f"memory and time of each of {n_ranks} ranks; {_LINK_RATE / 1e9:.0f} GB/s between them")


def _replace_time(found: Estimate, measured: dict[str, float]) -> None:
    """The measured block in the place of what is counted for blocks."""
    kept = {part: found.seconds[part] for part in ("starting", "packing and verifying", "reading and writing")}
    found.seconds = kept | measured
    found.assumptions = [line for line in found.assumptions if not line.startswith("time:")] + [
        "time: the first block measured on a few random tokens, the others taken to be like it; the head's scores, "
        "other programs and downloads not counted"
    ]


def _time(found: Estimate, work: Work, skeleton: Skeleton, products: torch.dtype) -> None:
    """FLOPs by the speed of this device, measured now on one product of matrices; the rest by stated rates."""
    begin = time.perf_counter()
    rate = matmul_rate(skeleton.device, torch.float32)
    by_dtype = {torch.float32: rate.alone}
    for dtype in {skeleton.dtype, products} - by_dtype.keys():
        by_dtype[dtype] = matmul_rate(skeleton.device, dtype).alone
    rates = {"forward": by_dtype[skeleton.dtype], "calibration": by_dtype[products], "solve": rate.alone}
    parts = work.seconds(rates, skeleton.device.type, torch.get_num_threads())
    found.seconds = {"starting": _START_SECONDS} | parts
    found.busy = round(rate.alone / rate.now, 2)
    found.seconds["reading and writing"] = (2 * found.source_bytes + 2 * found.output_bytes) / _DISK_RATE
    if skeleton.device.type == "cpu" and (days := sum(found.seconds.values()) / 86400) > 1:
        found.warn(f"time: about {days:.0f} days on this CPU; use a GPU, fewer --samples, or --method rtn")
    found.assumptions += [
        f"time: {work.flops:.2e} FLOPs at {work.efficiency:.0%} of the "
        f"{rate.alone / 1e9:.0f} GFLOP/s that this machine has when it is idle, by a trial of "
        f"{time.perf_counter() - begin:.1f} s; what is no product at fitted rates; files at "
        f"{_DISK_RATE / 1e6:.0f} MB/s; downloads not counted; it can be wrong by a factor of two",
        "memory is a bound by parts, not a forecast",
    ]

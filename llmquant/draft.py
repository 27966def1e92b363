"""One quantization, as far as it is known without text and weights. Most commands begin here.

The source's headers, the model on the meta device, the plan, the containers of the output: `plan` shows a draft. With
its texts it is a job (`job.py`), which `run` does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from llmquant.blocks.snapshots import snapshot_bytes
from llmquant.checkpoint import as_original
from llmquant.errors import FormatError, RecipeError, option
from llmquant.finished import Finished
from llmquant.formats import FORMATS
from llmquant.formats.facts import FACTS, WIDTHS
from llmquant.formats.runtimes import refuse_runtimes
from llmquant.lanes.baselines import pick_baselines
from llmquant.lanes.scores import BEFORE, ORIGINAL, OURS
from llmquant.log import Progress
from llmquant.memory import physical_memory
from llmquant.model.devices import device_memory, pick_device, pick_dtype, pick_products
from llmquant.model.skeleton import Skeleton
from llmquant.model.streams import spilled
from llmquant.output.containers import Output, open_output
from llmquant.output.opens import Opening
from llmquant.plan import Plan, make_plan
from llmquant.quant.grid import QuantScheme
from llmquant.quant.solvers import CURVED
from llmquant.recipe import Recipe, RunOptions
from llmquant.report.ledger import mostly_dense
from llmquant.source.base import Source
from llmquant.source.files import said_of_left
from llmquant.source.names import kinds
from llmquant.text.windows import windows_per_batch
from llmquant.treatments import UNFIT, with_group_size

T = TypeVar("T")
_MORE_GROUPS = (32,)  # sizes that linears of fewer bits than 8 may have where bits are chosen for each


@dataclass(frozen=True)
class Draft:
    """One quantization, as far as it is known without text and weights. `lanes` is empty without an evaluation."""

    recipe: Recipe
    options: RunOptions
    source: Source
    skeleton: Skeleton
    output: Output
    lanes: tuple[str, ...]
    products: torch.dtype  # of calibration forwards and Hessians
    openings: Mapping[str, Opening]  # of every format that is written: what stock transformers does with it
    chosen: Mapping[str, str]  # what was chosen where the recipe said auto, in words
    finished: Finished | None  # whose codes are taken over

    @property
    def plan(self) -> Plan:
        return self.output.plan

    @property
    def calibrated(self) -> bool:
        """Whether some linear's solver wants calibration text."""
        return self.plan.calibrated

    @property
    def solves(self) -> bool:
        """Whether codes are solved for: not where all are rounded to nearest, or taken over."""
        return self.calibrated and self.finished is None

    @property
    def baselines(self) -> tuple[str, ...]:
        """The lanes that are neither the original's nor ours."""
        return tuple(name for name in self.lanes if name not in (ORIGINAL, OURS, BEFORE))

    @property
    def candidates(self) -> tuple[QuantScheme, ...]:
        """Schemes of which one is chosen for each stack of linears, where the recipe has a target; else none."""
        recipe = self.recipe
        if not recipe.has_target:
            return ()
        assert isinstance(recipe.group_size, int)
        held = [FACTS[name] for name in recipe.formats]
        groups = dict.fromkeys((recipe.group_size, *_MORE_GROUPS))
        return tuple(
            QuantScheme(bits, group, recipe.symmetric)
            for bits in WIDTHS
            for group in groups
            if all(bits in facts.bits and group in facts.groups for facts in held)
            and (group == recipe.group_size or (bits < 8 and (recipe.group_size == -1 or group < recipe.group_size)))
        )

    @property
    def target(self) -> Path:
        """The folder to write."""
        if self.options.out is not None:
            return Path(self.options.out)
        return Path(f"{self.source.name.rpartition('/')[2]}-{self.recipe.scheme_name}")

    @property
    def parked(self) -> str | None:
        """Why forwards are parked; None where they are not, or where there are none."""
        return self.skeleton.parked if self.calibrated or self.lanes else None

    def stream_sizes(self, calibration_tokens: int, evaluation_tokens: int) -> dict[str, int]:
        """Bytes of every stream, calibration first: it is read most often."""
        sizes = {}
        if self.calibrated and self.finished is None:
            sizes["calibration"] = stream_bytes(self.skeleton, calibration_tokens, self.recipe.seq_len)
            if self.recipe.propagation != 0:
                sizes["calibration (original)"] = sizes["calibration"]
        if self.lanes:
            lane = stream_bytes(self.skeleton, evaluation_tokens, self.recipe.eval_window)
            sizes |= dict.fromkeys(self.lanes, lane)
        return sizes

    def refuse_parked(self, calibration_tokens: int, evaluation_tokens: int) -> None:
        """RecipeError where forwards are parked and --max-ram has no room for them."""
        if self.parked:
            fields = [*["samples", "seq_len"] * self.calibrated, *["eval_tokens"] * bool(self.lanes)]
            refuse_parked(self.stream_sizes(calibration_tokens, evaluation_tokens), self.options.stream_budget, fields)

    def spilled_bytes(self, sizes: Mapping[str, int]) -> int:
        """Of streams of these `sizes`, what goes to files; parked forwards cannot."""
        return 0 if self.parked else sum(spilled(sizes, self.options.stream_budget).values())

    def snapshot_bytes(self, sizes: Mapping[str, int]) -> int:
        """What snapshots of streams of these `sizes` take on the disk; parked forwards have none."""
        return 0 if self.parked else snapshot_bytes(sizes)

    def output_bytes(self) -> int:
        """What the output takes on the disk, in all of its formats, with the files beside the weights."""
        return self.plan.output_bytes * (1 + len(self.recipe.exports)) + self.source.side_bytes

    def needed_bytes(self, sizes: Mapping[str, int]) -> int:
        """Disk that a run needs: the output, and streams of these `sizes` that memory has no room for."""
        return self.output_bytes() + self.spilled_bytes(sizes)


def refuse(check: Callable[[], T]) -> T:
    """The way a run takes a check: its error ends the run."""
    return check()


def draft(
    stored: Source, recipe: Recipe, options: RunOptions, *, log: Progress, attempt: Callable[..., Any] = refuse
) -> Draft:
    """Check and plan the quantization of an open checkpoint; nothing but headers and side files has been read.

    Raises every LLMQuantError without which there is no plan. The other checks go through `attempt`, which `plan`
    replaces to list all that is wrong at once.
    """
    source = as_original(stored)
    skeleton = draft_model(source, recipe, log)
    if source.untied:
        log.line("config.json ties the head to the embedding, but a head of its own is stored: that one is used")
    if said := said_of_left(source.left_behind):
        log.line(said)
    recipe, group_size = with_group_size(recipe, skeleton)
    chosen = {"group_size": group_size} if group_size else {}
    if group_size:
        log.line(f"--group-size auto: {group_size}")
    return planned(recipe, options, skeleton, chosen, log, attempt)


def planned(
    recipe: Recipe,
    options: RunOptions,
    skeleton: Skeleton,
    chosen: Mapping[str, str],
    log: Progress,
    attempt: Callable[..., Any] = refuse,
) -> Draft:
    """The draft of a model whose recipe names its group size; `chosen` says what was chosen where it did not."""
    plan = make_plan(skeleton.source, skeleton, recipe, auto="group_size" in chosen)
    if unfit := [row.name.removesuffix(".weight") for row in plan.rows if UNFIT in row.reason]:
        log.line(f"--unfit keep: {len(unfit)} linears stay in 16 bit: {kinds(unfit)}")
    source = skeleton.source.listed(row.name for row in plan.rows)
    output = open_output(recipe.format, source, skeleton, plan)
    plan = output.plan
    if dense := mostly_dense(plan.rows):
        log.line("; not quantized: ".join(dense))
    products = attempt(lambda: pick_products(recipe.products, skeleton.device, skeleton.dtype, plan.most_bits))
    ours = (OURS, BEFORE) if recipe.recover != "off" else (OURS,)
    lanes = (ORIGINAL, *ours, *pick_baselines(recipe, plan.mean_bits)) if recipe.eval_data != "none" else ()
    exports = attempt(lambda: check_exports(recipe.exports, source, skeleton, plan))
    openings = {name: Opening() for name in recipe.exports} | {recipe.format: output.opening} | (exports or {})
    attempt(lambda: refuse_closed(options.runtimes, plan, openings, log))
    finished = None
    if options.codes is not None:
        finished = Finished(options.codes, trust_remote_code=options.trust_remote_code)
        finished.refuse_other(plan.specs)
    products = products or skeleton.dtype
    drawn = Draft(recipe, options, source, skeleton, output, lanes, products, openings, chosen, finished)
    if drawn.parked:
        log.line(said_of_parked(drawn.parked))
        if recipe.curvature != "off" and any(spec.method in CURVED for spec in plan.specs):
            attempt(lambda: refuse_uncurved(recipe))
            log.line("no curvature: no gradients go through parked forwards")
    if recipe.recover != "off":
        attempt(lambda: refuse_recovery(drawn))
    if recipe.has_target:
        attempt(lambda: refuse_target(drawn))
    if not options.ranks.alone:
        attempt(lambda: refuse_shared(drawn))
    return drawn


def draft_model(source: Source, recipe: Recipe, log: Progress) -> Skeleton:
    """The model of an open checkpoint, without weights, on the recipe's device and in its compute dtype."""
    source.announce(log)
    device = pick_device(recipe.device)
    skeleton = Skeleton(source, device, pick_dtype(recipe.dtype, device, source))
    memory = physical_memory() if device.type == "cpu" else device_memory(device)
    if memory is not None and (size := skeleton.read_experts_on_demand(memory // 2)):
        log.line(
            f"experts are read again for every batch of text: those of a block would take {size / 1e9:.1f} GB, more "
            "than half of the memory"
        )
    return skeleton


def check_exports(names: tuple[str, ...], source: Source, skeleton: Skeleton, plan: Plan) -> dict[str, Opening]:
    """FormatError where a run with this plan could not be exported to these formats; before the work."""
    openings = {}
    for name in names:
        FORMATS[name].check(plan.specs)
        openings[name] = open_output(name, source, skeleton, plan).opening
    return openings


def refuse_closed(runtimes: tuple[str, ...], plan: Plan, openings: Mapping[str, Opening], log: Progress) -> None:
    """FormatError where one of `runtimes` opens none of the formats, or where none is named and stock transformers does
    not open one that it knows. Whatever else it has against them is a line of the log."""
    found = {name: opening.findings for name, opening in openings.items()}
    refuse_runtimes(runtimes, plan.specs, found, plan.dense_linears)
    for name, findings in found.items():
        for finding in findings:
            if finding.severity == "refuses" and not runtimes:
                raise FormatError(
                    f"{name} in {finding.runtime} {finding.version}",
                    finding.got,
                    expected="a checkpoint that it opens",
                    remedy=f"keep those in 16 bit with {option('ignore')}, use another {option('format')}, or name the "
                    f"runtimes that must open it with {option('runtimes')}",
                )
            log.line(f"{name}: {finding}")


def refuse_uncurved(recipe: Recipe) -> None:
    """RecipeError where the recipe insists on the curvature of a model that it cannot be measured of."""
    if recipe.curvature == "full":
        raise RecipeError(
            f"{option('curvature')} full",
            "no gradients go through parked forwards",
            remedy=f"use {option('curvature')} auto",
        )


def refuse_recovery(draft: Draft) -> None:
    """RecipeError where a recipe that asks for a recovery cannot have one."""
    got = ""
    if draft.parked:
        got, remedy = "no gradients go through parked forwards", f"use {option('recover')} off"
    elif not draft.calibrated:
        got, remedy = f"no calibration text is read by {option('method')} {draft.recipe.method}", "use gptq"
    elif any(FACTS[name].dense for name in draft.recipe.formats):
        got, remedy = "the format fake holds no scales", f"use another {option('format')}"
    if got:
        raise RecipeError(f"{option('recover')} {draft.recipe.recover}", got, remedy=remedy)


def refuse_target(draft: Draft) -> None:
    """RecipeError where bits cannot be chosen for each linear."""
    recipe, got = draft.recipe, ""
    if unmixed := [name for name in recipe.formats if not FACTS[name].mixes]:
        got, remedy = f"{unmixed[0]} knows one scheme for all layers", f"use {option('format')} compressed-tensors"
    elif draft.parked:
        got, remedy = "no gradients go through parked forwards", f"use {option('bits')} and {option('rules')}"
    elif recipe.curvature == "off" or not any(spec.method in CURVED for spec in draft.plan.specs):
        got, remedy = f"nothing is measured with {option('curvature')} off or without text", "leave those out"
    if got:
        name = _target_field(recipe)
        raise RecipeError(f"{option(name)} {getattr(recipe, name)}", got, remedy=remedy)


def _target_field(recipe: Recipe) -> str:
    return "target_bpw" if recipe.target_size is None else "target_size"


def refuse_shared(draft: Draft) -> None:
    """RecipeError for what several ranks cannot do together."""
    recipe, size = draft.recipe, draft.options.ranks.size
    for field, wanted in (("recover", recipe.recover != "off"), (_target_field(recipe), recipe.has_target)):
        if wanted:
            raise RecipeError(option(field), f"{size} ranks", expected="one process", remedy="leave torchrun out")


def stream_bytes(skeleton: Skeleton, n_tokens: int, seq_len: int) -> int:
    """Bytes of a stream of `n_tokens` tokens in windows of at most `seq_len`."""
    length = min(seq_len, skeleton.context or seq_len)
    return skeleton.stream_bytes(n_tokens, (windows_per_batch(length), length))


def said_of_parked(reason: str) -> str:
    """What the log says of parked forwards."""
    return f"parked forwards: {reason}; they stay in memory, without snapshots"


def refuse_parked(sizes: Mapping[str, int], max_ram: int, fields: Sequence[str]) -> None:
    """RecipeError where parked forwards of these sizes are more than `max_ram`. `fields` decide how many there are."""
    if (total := sum(sizes.values())) > max_ram:
        raise RecipeError(
            option("max_ram"),
            f"parked forwards, which cannot go to files, take {_said(total)}",
            expected=f"at most {_said(max_ram)}",
            remedy=f"a smaller {' or '.join(map(option, fields))}, or a larger {option('max_ram')}",
        )


def _said(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"

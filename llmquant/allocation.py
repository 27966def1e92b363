"""Which linears get more bits: chosen so that the predictions change least, within a size.

The curvature pass has measured what every candidate scheme would cost the predictions, stack by stack: linears that
share an input, as servers fuse them (q, k, v; gate, up). Here

    choose     the knapsack of these costs within the target; 16 bit is a candidate, too
    measure    the divergence itself, of the allocation and of the best uniform scheme within the target: the loop, on a
               few windows of the calibration text, scored on a few others
    rules      of the mixture where it wins by more than chance, else of the uniform scheme: the loop knows nothing else

What a rule of the recipe decides, and experts, stay as the recipe says, and count.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmquant.blocks.forwards import CalibrationStreams
from llmquant.blocks.gradients import fitting
from llmquant.blocks.quantize import quantize_block
from llmquant.curvature import CurvaturePass
from llmquant.draft import Draft, planned, stream_bytes
from llmquant.errors import RecipeError, option
from llmquant.formats import FORMATS, LinearSpec
from llmquant.job import Job
from llmquant.lanes.scores import ORIGINAL, Array, Lanes, standard_error, window_means
from llmquant.log import SILENT, Progress
from llmquant.memory import trim
from llmquant.model.streams import Streams
from llmquant.quant.grid import QuantScheme
from llmquant.quant.knapsack import Choice, choose
from llmquant.recipe import Recipe, parse_size
from llmquant.report.data import AllocationReport
from llmquant.rules import Rule
from llmquant.run_dir import RunDir

_MIXED, _UNIFORM = "mixed", "uniform"
_TOKENS = 2**12  # that both are measured on

Schemes = Mapping[str, QuantScheme | None]  # by module; None: 16 bit


@dataclass(frozen=True)
class Unit:
    """A stack of linears, and what each scheme for it costs: bits, and nats for each token."""

    specs: Sequence[LinearSpec]
    schemes: Sequence[QuantScheme | None]
    choices: Sequence[Choice]


class Target:
    """What a draft's target size leaves to choose.

    stacks   of every block: those that the recipe's rules leave open
    budget   bits that all quantized linears may take
    fixed    bits of those that are not open
    RecipeError where even the smallest schemes take more.
    """

    def __init__(self, draft: Draft, curvature: CurvaturePass) -> None:
        self._draft, recipe = draft, draft.recipe
        self._view, specs = FORMATS[recipe.format], draft.plan.specs
        bound = {row.spec.module for row in draft.plan.rows if row.spec is not None and row.by_rule}
        self.stacks = [
            [stack for stack in of_block if bound.isdisjoint(spec.module for spec in stack)]
            for of_block in curvature.stacks
        ]
        if not any(self.stacks):
            raise RecipeError(
                option("target_bpw" if recipe.target_size is None else "target_size"),
                "nothing is left to choose: all linears are experts, or decided by rules",
                remedy=f"use {option('bits')} and {option('rules')} alone",
            )
        self.n_weights = sum(spec.shape[0] * spec.shape[1] for spec in specs)
        left_open = {spec.module for of_block in self.stacks for stack in of_block for spec in stack}
        self.fixed = sum(self._view.weight_bits(spec) for spec in specs if spec.module not in left_open)
        if recipe.target_bpw is not None:
            self.budget = int(recipe.target_bpw * self.n_weights)
        else:
            others = 8 * draft.plan.output_bytes - sum(self._view.weight_bits(spec) for spec in specs)
            self.budget = 8 * parse_size("target_size", str(recipe.target_size)) - others
        costs = [min(self._costs(stack)) for of_block in self.stacks for stack in of_block]
        if (missing := self.fixed + sum(costs) - self.budget) > 0:
            raise self._too_small(missing)

    @property
    def more_bytes(self) -> int:
        """That the target allows beyond the recipe's own bits."""
        bits = sum(self._view.weight_bits(spec) for spec in self._draft.plan.specs)
        return max(0, self.budget - bits) // 8

    def schemes(self, stack: Sequence[LinearSpec]) -> list[QuantScheme | None]:
        """Those that a stack may be given; None: 16 bit."""
        return [*fitting(stack, self._draft.candidates), None]

    def _costs(self, stack: Sequence[LinearSpec]) -> list[int]:
        """Bits of a stack in each of its schemes."""
        dense = sum(8 * spec.dtype.itemsize * spec.shape[0] * spec.shape[1] for spec in stack)
        packed = [
            sum(self._view.weight_bits(replace(spec, scheme=scheme)) for spec in stack)
            for scheme in fitting(stack, self._draft.candidates)
        ]
        return [*packed, dense]

    def units(self, run: RunDir) -> list[Unit]:
        """All open stacks, with what the curvature pass has measured of them."""
        found = []
        for index, of_block in enumerate(self.stacks):
            tensors = run.curvature.of(index)
            for stack in of_block:
                losses = tensors[f"{stack[0].module} losses"] * tensors[f"{stack[0].module} left"]
                choices = [Choice(*pair) for pair in zip(self._costs(stack), [*losses.tolist(), 0.0], strict=True)]
                found.append(Unit(stack, self.schemes(stack), choices))
        return found

    def _too_small(self, missing: int) -> RecipeError:
        recipe = self._draft.recipe
        if recipe.target_bpw is not None:
            name, least = "target_bpw", f"{(self.budget + missing) / self.n_weights:.3f}"
        else:
            size = parse_size("target_size", str(recipe.target_size)) - (-missing // 8)
            name, least = "target_size", f"{size} bytes"
        expected = f"at least {least}, which the smallest schemes and all that is not open take"
        return RecipeError(option(name), f"{getattr(recipe, name)}", expected=expected)


def allocate(
    job: Job, run: RunDir, curvature: CurvaturePass, target: Target, log: Progress
) -> tuple[Job, AllocationReport]:
    """The job with a scheme for each linear, within the recipe's target, and what is known of the choice."""
    units, budget = target.units(run), target.budget - target.fixed
    picks = choose([unit.choices for unit in units], budget)
    assert picks is not None  # the target is not too small
    uniform = _best_uniform(units, budget)
    options = {_MIXED: picks} | ({_UNIFORM: uniform} if uniform is not None else {})
    losses = {name: sum(_chosen(units, option)) for name, option in options.items()}
    found = run.allocation
    if found is None:
        by_window = _measured(job, run, curvature, {name: _schemes(units, option) for name, option in options.items()})
        measured = {name: float(kl.mean()) for name, kl in by_window.items()}
        found = {"measured": measured, "kept": _MIXED if _wins(by_window) else _UNIFORM}
        run.keep_allocation(found)
    kept = options[found["kept"]]
    counts = Counter(_said(scheme) for module, scheme in _schemes(units, kept).items())
    rules = _rules(units, kept)
    bits = target.fixed + sum(unit.choices[pick].cost for unit, pick in zip(units, kept, strict=True))
    report = AllocationReport(
        bits_per_weight=bits / target.n_weights,
        linears=dict(sorted(counts.items())),
        rules=tuple(map(str, rules)),
        kept=found["kept"],
        uniform=None if uniform is None else _said(next(iter(_schemes(units, uniform).values()))),
        predicted=losses,
        measured=dict(found["measured"]),
    )
    for name in options:
        log.line(f"allocation: {name}, KL {found['measured'][name]:.5f} on a few windows, {losses[name]:.5f} predicted")
    log.line(
        f"allocation: {found['kept']}, {report.bits_per_weight:.3f} bits per weight: "
        + ", ".join(f"{count} x {name}" for name, count in report.linears.items())
    )
    return _with_rules(job, rules), report


def _best_uniform(units: Sequence[Unit], budget: int) -> list[int] | None:
    """The best scheme that all units can have within the budget; None where there is none."""
    common = set.intersection(*({scheme for scheme in unit.schemes if scheme is not None} for unit in units))
    fits = []
    for scheme in common:
        picks = [list(unit.schemes).index(scheme) for unit in units]
        cost = sum(unit.choices[pick].cost for unit, pick in zip(units, picks, strict=True))
        if cost <= budget:
            fits.append((sum(_chosen(units, picks)), picks))
    return min(fits)[1] if fits else None


def _chosen(units: Sequence[Unit], picks: Sequence[int]) -> list[float]:
    return [unit.choices[pick].loss for unit, pick in zip(units, picks, strict=True)]


def _schemes(units: Sequence[Unit], picks: Sequence[int]) -> dict[str, QuantScheme | None]:
    return {spec.module: unit.schemes[pick] for unit, pick in zip(units, picks, strict=True) for spec in unit.specs}


def _said(scheme: QuantScheme | None) -> str:
    """As in the names of recipes.

    >>> _said(QuantScheme(4, 128)), _said(QuantScheme(8, -1)), _said(None)
    ('W4 g128', 'W8 by row', '16 bit')
    """
    if scheme is None:
        return "16 bit"
    return f"W{scheme.bits} " + ("by row" if scheme.group_size == -1 else f"g{scheme.group_size}")


def _rules(units: Sequence[Unit], picks: Sequence[int]) -> list[Rule]:
    """One for every linear that is not as the recipe's own fields say."""
    rules = []
    for unit, pick in zip(units, picks, strict=True):
        scheme = unit.schemes[pick]
        for spec in unit.specs:
            if scheme is None:
                rules.append(Rule(f"glob:{spec.module}", keep=True))
            elif scheme != spec.scheme:
                rules.append(Rule(f"glob:{spec.module}", bits=scheme.bits, group_size=scheme.group_size))
    return rules


def _with_rules(job: Job, rules: Sequence[Rule]) -> Job:
    recipe: Recipe = replace(job.recipe, rules=(*job.recipe.rules, *rules))
    drawn = planned(recipe, job.options, job.skeleton, job.chosen, SILENT)
    facts = vars(drawn) | {"products": job.products}  # that of the passes before
    return Job(
        **facts,
        calibration=job.calibration,
        evaluation=job.evaluation,
        more_evaluation=job.more_evaluation,
        card=job.card,
    )


def _measured(job: Job, run: RunDir, curvature: CurvaturePass, options: Mapping[str, Schemes]) -> dict[str, Array]:
    """KL(original || quantized) of each of a few windows, nats for each token, where a few others calibrate.

    With a single window it is both.
    """
    assert job.calibration is not None
    ids, length = job.calibration.ids, job.calibration.ids.shape[1]
    n_scored = max(1, min(_TOKENS // length, len(ids) // 2))
    windows = replace(job.calibration, ids=ids[-n_scored:])
    text = replace(job.calibration, ids=ids[: max(1, min(curvature.n_tokens // length, len(ids) - n_scored))])
    names = (ORIGINAL, *options)
    sizes = {f"text, {name}": stream_bytes(job.skeleton, text.n_tokens, job.recipe.seq_len) for name in options}
    sizes |= dict.fromkeys(names, stream_bytes(job.skeleton, windows.n_tokens, job.recipe.seq_len))
    with Streams(sizes, job.options.stream_budget, run.scratch) as streams:
        texts = {name: CalibrationStreams(streams.new(f"text, {name}"), products=job.products) for name in options}
        lanes = Lanes(names, windows, streams)
        job.skeleton.record(windows.batches(), lanes.start)
        for of_one in texts.values():
            job.skeleton.record(text.batches(), of_one.append)
        for block in job.skeleton.blocks:
            felt = curvature.of(run, block)
            specs = [row.spec for row in job.plan.block(block.index) if row.spec is not None]
            with block.loaded():
                lanes.advance(ORIGINAL, block.forward)
                for name, schemes in options.items():
                    chosen = [_with_scheme(spec, schemes) for spec in specs]
                    with block.restored(specs):
                        present = [spec for spec in chosen if spec is not None]
                        quantize_block(block, present, job.recipe, texts[name], curvature=felt)
                        lanes.advance(name, block.forward)
            trim()
        with job.skeleton.head() as logits_of:
            scores = lanes.score(lambda lane, hidden: logits_of(hidden))
    finite = np.logical_and.reduce([score.finite for score in scores.values()])
    return {name: window_means(scores[name].kl, finite) for name in options}


def _wins(by_window: Mapping[str, Array]) -> bool:
    """Whether the mixture is better than the uniform scheme by more than chance: twice the standard error of their
    difference, paired over windows. What wins by less on the calibration text has lost on another: eval/LOG.md."""
    if _UNIFORM not in by_window:
        return True
    difference = by_window[_MIXED] - by_window[_UNIFORM]
    return bool(difference.mean() + 2 * (standard_error(difference) or 0.0) < 0)


def _with_scheme(spec: LinearSpec, schemes: Schemes) -> LinearSpec | None:
    """A linear with the scheme that is tried; None: 16 bit. Those that are not open keep their own."""
    if spec.module not in schemes:
        return spec
    scheme = schemes[spec.module]
    return None if scheme is None else replace(spec, scheme=scheme)

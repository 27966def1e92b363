"""What a report says in words: the verdict, and what deserves a look."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence

from llmquant.lanes.scores import BEFORE, ORIGINAL, OURS
from llmquant.report.data import LaneReport, RunReport
from llmquant.report.ledger import Layer, mostly_dense
from llmquant.report.tables import infinite_perplexity

LABELS = {
    ORIGINAL: "the original",
    OURS: "llmquant",
    "rtn": "plain rounding",
    "bnb-nf4": "bitsandbytes NF4",
    "bnb-int8": "bitsandbytes INT8",
}
_Z95 = 1.96  # standard errors in half of a 95% interval


def verdict(report: RunReport) -> str:
    """One sentence: bits, perplexity before and after, divergence, and how the baselines stand to it.

    Before it another one, where most of the model is as it was: its figures would look like a success.
    """
    bits, dense = _bits(report.bits_per_weight), mostly_dense(report.tensors)
    warning = f"{dense[0].capitalize()}. " if dense else ""
    if report.evaluation is None:
        return f"{warning}{bits} per weight in the quantized layers; quality was not measured (--eval-data none)."
    lanes = report.evaluation.lanes
    before, after = lanes[ORIGINAL], lanes[OURS]
    text = f"{warning}{bits}: {_perplexities(before, after)}, KL {after.kl_mean:.2g}"
    parts = [f"{standing} {' and '.join(names)}" for standing, names in _ranked(lanes).items() if names]
    return ", ".join([text, *parts]) + "."


def _perplexities(before: LaneReport, after: LaneReport) -> str:
    """Perplexity of the original and ours, and the change in percent; of losses where one is infinite."""
    if math.isinf(before.perplexity) or math.isinf(after.perplexity):
        return infinite_perplexity(before, after)
    ratio, interval = 100 * (after.perplexity_ratio - 1), after.perplexity_ratio_ci
    change = f"{ratio:+.1f}%"
    if interval is not None:
        error = 100 * (interval[1] - interval[0]) / (2 * _Z95)
        digits = 1 if error >= 0.05 else 2
        change = f"{ratio:+.{digits}f}% ± {error:.{digits}f}"
    return f"perplexity {before.perplexity:.2f} → {after.perplexity:.2f} ({change})"


def _ranked(lanes: Mapping[str, LaneReport]) -> dict[str, list[str]]:
    """The baselines by how ours stands to them."""
    ranked: dict[str, list[str]] = {"better than": [], "as good as": [], "worse than": []}
    for name, lane in lanes.items():
        if name not in (ORIGINAL, OURS, BEFORE):
            label = f"{LABELS.get(name, name)} at {_bits(lane.bits_per_weight)}"
            ranked[_standing(lanes[OURS], lane)].append(label)
    return ranked


def _bits(value: float) -> str:
    """Halves go up, as readers expect: Python's own rounding would make 4.12 of 4.125.

    >>> _bits(4.125), _bits(4.5)
    ('4.13 bits', '4.50 bits')
    """
    return f"{value + 1e-9:.2f} bits"


def _standing(ours: LaneReport, other: LaneReport) -> str:
    """By mean KL. The errors are taken as independent, which is cautious: both lanes see the same windows."""
    error = _Z95 * ((ours.kl_se or 0.0) ** 2 + (other.kl_se or 0.0) ** 2) ** 0.5
    difference = other.kl_mean - ours.kl_mean
    if abs(difference) <= error:
        return "as good as"
    return "better than" if difference > 0 else "worse than"


def said_of_choices(report: RunReport) -> list[str]:
    """What was chosen where the recipe did not say it, in sentences."""
    said = [f"For {name} auto chose {what}" for name, what in (report.chosen or {}).items()]
    if (found := report.allocation) is not None:
        schemes = ", ".join(f"{count} x {name}" for name, count in found.linears.items())
        names = {"mixed": "a mixture", "uniform": f"{found.uniform} for all"}
        tried = " and ".join(f"{names[name]} had KL {kl:.2g}" for name, kl in found.measured.items())
        said.append(f"For the target size were chosen {schemes}; in a trial on few windows {tried}")
    if (trained := report.recovery) is not None:
        brought = f"KL from {trained.kl_before:.3g} to {trained.kl_after:.3g}" if trained.step else "no better state"
        said.append(
            f"Of {trained.n_steps} steps of training (--recover {report.recipe.get('recover')}), {trained.step} were "
            f"kept, which brought {brought} on {trained.held_out_tokens} tokens left out of it"
        )
    return said


def health(report: RunReport) -> list[str]:
    """What a careful reader would want to know; empty where nothing is unusual."""
    forms = report.model.stored_as or {}
    stored = [
        f"{count} tensors of the original are stored in {form}: figures are against what they stand for."
        for form, count in forms.items()
    ]
    dense = [f"Not quantized: {kinds}." for kinds in mostly_dense(report.tensors)[1:]]
    return [*stored, *dense, *_evaluation_notes(report), *_coverage(report), *_layer_notes(report.layers)]


def _evaluation_notes(report: RunReport) -> list[str]:
    evaluation, calibration = report.evaluation, report.calibration
    if evaluation is None:
        return ["No evaluation: perplexity and divergence were not measured."]
    notes = []
    ours, windows = evaluation.ours, evaluation.n_tokens // evaluation.seq_len
    if windows < 8:
        notes.append(f"Only {windows} evaluation windows: standard errors are rough.")
    if (floor := evaluation.noise_floor) is not None and ours.kl_mean < 2 * floor.kl_mean:
        notes.append(f"The divergence is near the noise of the compute dtype (KL {floor.kl_mean:.2g}).")
    if calibration is not None and _repository(calibration.dataset) == _repository(evaluation.dataset):
        notes.append(
            f"Calibration and evaluation text come from the same dataset ({evaluation.dataset}), from parts that "
            "share next to no runs of text: text of another kind may fare worse."
        )
    for name, lane in evaluation.lanes.items():
        if lane.n_nonfinite:
            notes.append(f"{name}: {lane.n_nonfinite} tokens with NaN or Inf logits were left out.")
    return notes


def _coverage(report: RunReport) -> list[str]:
    """How many calibration tokens the experts saw; empty for a model without experts."""
    if report.calibration is None:
        return []
    widths = {row.of_module: row.shape[-1] for row in report.tensors if row.action == "quantized"}
    experts = [layer for layer in report.layers if re.search(r"\.\d+\..*\.\d+(\.|$)", layer.name)]
    seen = [layer.n_tokens for layer in experts]
    if not seen or min(seen) >= report.calibration.n_tokens:
        return []
    few = sum(layer.n_tokens < widths.get(layer.name, 0) for layer in experts)
    text = (
        f"Experts: of {report.calibration.n_tokens} calibration tokens a linear of an expert saw "
        f"{statistics.median(seen):.0f} (median), at least {min(seen)}"
    )
    if few:
        none = seen.count(0)
        text += f"; {few} of {len(seen)} saw fewer than they have inputs ({none} none) and lean on what the others read"
    return [text + "."]


def _repository(dataset: str) -> str:
    """The dataset without its config, split and column."""
    return dataset.partition(":")[0]


def _layer_notes(layers: Sequence[Layer]) -> list[str]:
    notes = []
    errors = [layer.relative_error for layer in layers if layer.relative_error is not None]
    worse = [layer.name for layer in layers if _worse_than_rounding(layer)]
    if worse:
        notes.append(f"Worse than plain rounding on calibration text: {_some(worse)}.")
    if errors and (limit := 10 * statistics.median(errors)) > 0:
        far = sorted(layer.name for layer in layers if (layer.relative_error or 0) > limit)
        if far:
            notes.append(f"More than ten times the median relative error: {_some(far)}.")
    notes += [f"{layer.name}: {note}" for layer in layers for note in layer.notes]
    return notes if len(notes) <= 30 else [*notes[:30], f"and {len(notes) - 30} more notes in report.json"]


def _worse_than_rounding(layer: Layer) -> bool:
    return layer.loss is not None and layer.rtn_loss is not None and layer.loss > layer.rtn_loss


def _some(names: list[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")

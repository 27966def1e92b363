"""What a report says in words: the verdict, what deserves a look, and the command that makes it again."""

import re
import shlex
import statistics
from typing import Any

from llmquant.lanes.scores import ORIGINAL, OURS
from llmquant.recipe import Recipe, make_recipe

LABELS = {
    ORIGINAL: "the original",
    OURS: "llmquant",
    "rtn": "plain rounding",
    "bnb-nf4": "bitsandbytes NF4",
    "bnb-int8": "bitsandbytes INT8",
}
_Z95 = 1.96  # standard errors in half of a 95% interval


def verdict(report: dict[str, Any]) -> str:
    """One sentence: bits, perplexity before and after, divergence, and how the baselines stand to it."""
    bits = _bits(report["bits_per_weight"])
    if report["evaluation"] is None:
        return f"{bits} per weight in the quantized layers; quality was not measured (--eval-data none)."
    lanes = report["evaluation"]["lanes"]
    before, after = lanes[ORIGINAL], lanes[OURS]
    ratio, interval = 100 * (after["perplexity_ratio"] - 1), after["perplexity_ratio_ci"]
    change = f"{ratio:+.1f}%"
    if interval is not None:
        error = 100 * (interval[1] - interval[0]) / (2 * _Z95)
        digits = 1 if error >= 0.05 else 2
        change = f"{ratio:+.{digits}f}% ± {error:.{digits}f}"
    text = f"{bits}: perplexity {before['perplexity']:.2f} → {after['perplexity']:.2f} ({change}), "
    text += f"KL {after['kl_mean']:.2g}"
    ranked: dict[str, list[str]] = {"better than": [], "as good as": [], "worse than": []}
    for name, lane in lanes.items():
        if name not in (ORIGINAL, OURS):
            label = f"{LABELS.get(name, name)} at {_bits(lane['bits_per_weight'])}"
            ranked[_standing(after, lane)].append(label)
    parts = [f"{standing} {' and '.join(names)}" for standing, names in ranked.items() if names]
    return ", ".join([text, *parts]) + "."


def _bits(value: float) -> str:
    """Halves go up, as readers expect: Python's own rounding would make 4.12 of 4.125.

    >>> _bits(4.125), _bits(4.5)
    ('4.13 bits', '4.50 bits')
    """
    return f"{value + 1e-9:.2f} bits"


def _standing(ours: dict[str, Any], other: dict[str, Any]) -> str:
    """By mean KL. The errors are taken as independent, which is cautious: both lanes see the same windows."""
    error = _Z95 * ((ours["kl_se"] or 0.0) ** 2 + (other["kl_se"] or 0.0) ** 2) ** 0.5
    difference = other["kl_mean"] - ours["kl_mean"]
    if abs(difference) <= error:
        return "as good as"
    return "better than" if difference > 0 else "worse than"


def health(report: dict[str, Any]) -> list[str]:
    """What a careful reader would want to know; empty where nothing is unusual."""
    forms = report["model"].get("stored_as", {})
    stored = [
        f"{count} tensors of the original are stored in {form}: figures are against what they stand for."
        for form, count in forms.items()
    ]
    return [*stored, *_evaluation_notes(report), *_layer_notes(report["layers"])]


def _evaluation_notes(report: dict[str, Any]) -> list[str]:
    evaluation, calibration = report["evaluation"], report["calibration"]
    if evaluation is None:
        return ["No evaluation: perplexity and divergence were not measured."]
    notes = []
    ours, windows = evaluation["lanes"][OURS], evaluation["n_tokens"] // evaluation["seq_len"]
    if windows < 8:
        notes.append(f"Only {windows} evaluation windows: standard errors are rough.")
    if (floor := evaluation["noise_floor"]) is not None and ours["kl_mean"] < 2 * floor["kl_mean"]:
        notes.append(f"The divergence is near the noise of the compute dtype (KL {floor['kl_mean']:.2g}).")
    if calibration is not None and _repository(calibration) == _repository(evaluation):
        notes.append(
            f"Calibration and evaluation text come from the same dataset ({evaluation['dataset']}), from parts that "
            "share next to no runs of text: text of another kind may fare worse."
        )
    for name, lane in evaluation["lanes"].items():
        if lane["n_nonfinite"]:
            notes.append(f"{name}: {lane['n_nonfinite']} tokens with NaN or Inf logits were left out.")
    return notes


def _repository(text: dict[str, Any]) -> str:
    """The dataset without its config, split and column."""
    name: str = text["dataset"].partition(":")[0]
    return name


def _layer_notes(layers: list[dict[str, Any]]) -> list[str]:
    notes = []
    errors = [layer["relative_error"] for layer in layers if layer["relative_error"] is not None]
    worse = [layer["name"] for layer in layers if layer["loss"] is not None and layer["loss"] > layer["rtn_loss"]]
    if worse:
        notes.append(f"Worse than plain rounding on calibration text: {_some(worse)}.")
    if errors and (limit := 10 * statistics.median(errors)) > 0:
        far = sorted((layer for layer in layers if (layer["relative_error"] or 0) > limit), key=lambda x: x["name"])
        if far:
            notes.append(f"More than ten times the median relative error: {_some([x['name'] for x in far])}.")
    notes += [f"{layer['name']}: {note}" for layer in layers for note in layer["notes"]]
    return notes if len(notes) <= 30 else [*notes[:30], f"and {len(notes) - 30} more notes in report.json"]


def _some(names: list[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def place_of(name: str) -> tuple[int | None, str]:
    """Block number of a layer, and its kind: the name after that number, further numbers taken out.

    >>> place_of("model.layers.3.mlp.experts.7.up_proj"), place_of("lm_head")
    ((3, 'mlp.experts.*.up_proj'), (None, 'lm_head'))
    """
    match = re.match(r".*?\.(\d+)\.(.+)", name)
    if match is None:
        return None, name
    return int(match[1]), without_numbers(match[2])


def without_numbers(name: str) -> str:
    """A tensor's name with the numbers of its path taken out: its kind.

    >>> without_numbers("model.layers.10.mlp.experts.3.up_proj.weight")
    'model.layers.*.mlp.experts.*.up_proj.weight'
    """
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def command_of(report: dict[str, Any]) -> str:
    """The command line that makes this report again: the model, its revision, and all that differs from defaults.

    A local folder is given by its name only.
    """
    model = "demo" if report["model"]["id"] == "llmquant/demo" else report["model"]["id"]
    words = ["llmquant", "run", "--model", model]
    if report["model"]["revision"]:
        words += ["--revision", report["model"]["revision"]]
    if report["compute"].get("trust_remote_code"):
        words.append("--trust-remote-code")
    defaults = make_recipe(model).as_dict()
    recipe = dict(report["recipe"])
    if exports := recipe.pop("exports", []):
        recipe["format"] = ",".join([recipe["format"], *exports])
    for name in Recipe.__dataclass_fields__:
        value = recipe.get(name)
        if name in recipe and value != defaults[name]:
            words += _flag(name, value)
    return " ".join(map(shlex.quote, words))


def _flag(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if name == "symmetric":
        return [] if value else ["--asymmetric"]
    if isinstance(value, bool):
        return [flag if value else f"--no-{name.replace('_', '-')}"]
    if isinstance(value, list | tuple):
        return [word for item in value for word in (flag, str(item))]
    return [] if value is None else [flag, str(value)]

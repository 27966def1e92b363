"""report.html: one file, no network, everything in it from report.json.

The template escapes all text: names of tensors, models and datasets are strangers' strings. The page's own script is
the only one that its content security policy lets run.
"""

import base64
import hashlib
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmquant.report import plots
from llmquant.report.command import command_of
from llmquant.report.data import Evaluation, RunReport
from llmquant.report.ledger import Layer, TensorRow
from llmquant.report.tables import compared, describe_evaluation, lanes_table
from llmquant.report.verdict import health, said_of_choices, verdict
from llmquant.source.names import place_of

_FOLDER = Path(__file__).parent
# Hides the rows of the ledger that do not hold the typed text and the chosen action.
_SCRIPT = """
const text = document.getElementById("filter"), action = document.getElementById("action");
const rows = [...document.querySelectorAll("#ledger tbody tr")], count = document.getElementById("count");
function update() {
  const wanted = text.value.toLowerCase();
  let shown = 0;
  for (const row of rows) {
    const fits = row.textContent.toLowerCase().includes(wanted)
      && (!action.value || row.dataset.action === action.value);
    row.hidden = !fits;
    shown += fits;
  }
  count.textContent = shown + " of " + rows.length;
}
text.addEventListener("input", update);
action.addEventListener("change", update);
update();
"""


def make_html(name: str, report: RunReport) -> str:
    """The page of the checkpoint `name`. The same report gives the same bytes."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    return environment.get_template("report.html.jinja").render(
        name=name,
        report=report,
        verdict=verdict(report),
        health=health(report),
        chosen=said_of_choices(report),
        command=command_of(report),
        depth=_depth(report.layers),
        worst=_worst(report.layers),
        ledger=_ledger(report),
        script=_safe(_SCRIPT),
        script_digest=digest,
        **_evaluation(report.evaluation),
    )


def _safe(markup: str) -> Any:
    """Text of our own making that is not to be escaped."""
    from markupsafe import Markup

    return Markup(markup)


def _evaluation(evaluation: Evaluation | None) -> dict[str, Any]:
    if evaluation is None:
        return {"lanes": None}
    lanes, others = evaluation.lanes, compared(evaluation.lanes)
    spread = [["lane", *plots.PERCENTILES.values()]]
    spread += [[name, *(f"{getattr(lane, key):.2g}" for key in plots.PERCENTILES)] for name, lane in others.items()]
    return {
        "lanes": lanes_table(lanes),
        "conditions": describe_evaluation(evaluation),
        "size_plot": _safe(plots.kl_against_size(lanes)),
        "spread": spread,
        "spread_plot": _safe(plots.kl_percentiles(lanes)),
        "lane_legend": plots.legend(list(others)),
    }


def _errors(layers: Sequence[Layer]) -> tuple[str, list[float]]:
    """What is shown as a layer's error, and that of every layer: of outputs where calibration measured all of them,
    else of weights."""
    of_outputs = [layer.relative_error for layer in layers if layer.relative_error is not None]
    if len(of_outputs) == len(layers):
        return "relative output error", of_outputs
    return "relative weight error", [layer.weight_error for layer in layers]


def _depth(layers: Sequence[Layer]) -> dict[str, Any] | None:
    """Error by block and kind. Experts are averaged."""
    label, errors = _errors(layers)
    cells: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for layer, error in zip(layers, errors, strict=True):
        block, kind = place_of(layer.name)
        if block is not None:
            cells[kind][block].append(error)
    if not cells:
        return None
    means = {k: {b: statistics.fmean(cells[k][b]) for b in sorted(cells[k])} for k in sorted(cells)}
    rows = [
        [
            kind,
            f"{statistics.median(by_block.values()):.2e}",
            f"{max(by_block.values()):.2e}",
            str(max(by_block, key=by_block.__getitem__)),
        ]
        for kind, by_block in means.items()
    ]
    return {
        "label": label,
        "plot": _safe(plots.error_by_depth(means, label)),
        "legend": plots.legend(list(means)),
        "rows": [["kind", "median", "largest", "in block"], *rows],
    }


def _worst(layers: Sequence[Layer], count: int = 3) -> list[dict[str, Any]]:
    """The layers of the largest error, with how their weights, codes and scales are spread."""
    labels = {"weights": "weight before quantization", "codes": "code", "scales": "log2 of the scale"}
    ranked = sorted(zip(layers, _errors(layers)[1], strict=True), key=lambda pair: -pair[1])
    return [
        {
            "name": layer.name,
            "error": f"{error:.2e}",
            "plots": [
                _safe(plots.histogram(f"worst{i}-{what}", label, getattr(layer.histograms, what)))
                for what, label in labels.items()
            ],
        }
        for i, (layer, error) in enumerate(ranked[:count])
        if layer.histograms is not None  # reports of earlier versions have none
    ]


def _ledger(report: RunReport) -> list[dict[str, Any]]:
    """A row per tensor of the source, with its layer's error where it was quantized."""
    errors = {layer.name: layer.relative_error for layer in report.layers}
    return [_ledger_row(row, errors.get(row.of_module)) for row in report.tensors]


def _ledger_row(row: TensorRow, error: float | None) -> dict[str, str]:
    what: str = row.action
    if row.action == "quantized":
        what = f"{row.bits} bits, " + ("rows" if row.group_size == -1 else f"groups of {row.group_size}")
    return {
        "name": row.name,
        "action": row.action,
        "what": what,
        "shape": " x ".join(map(str, row.shape)) or "scalar",
        "dtype": row.dtype,
        "error": "" if error is None else f"{error:.2e}",
        "reason": row.reason,
    }

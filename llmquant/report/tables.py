"""The tables of figures, as rows of text: the same for the console, the card and report.html.

The first row is the header. The first lane is what the others are compared with; its own divergence is 0.
"""

import math
from collections.abc import Mapping, Sequence

from llmquant.report.data import Difference, Evaluation, LaneReport


def compared(lanes: Mapping[str, LaneReport]) -> dict[str, LaneReport]:
    """All lanes but the first."""
    return dict(list(lanes.items())[1:])


def lanes_table(lanes: Mapping[str, LaneReport]) -> list[list[str]]:
    """A row per lane. ± is one standard error; `inf` is explained by `describe_evaluation`, which stands below."""
    rows = [["lane", "bits/weight", "MB", "perplexity", "KL (nats)", "KL 99%", "same top"]]
    for position, (name, lane) in enumerate(lanes.items()):
        first = position == 0
        rows.append(
            [
                name,
                f"{lane.bits_per_weight:.3f}",
                f"{lane.bytes / 1e6:.1f}",
                f"{lane.perplexity:.3f}" + ("" if lane.perplexity_se is None else f" ± {lane.perplexity_se:.3f}"),
                "0" if first else _small(lane.kl_mean, lane.kl_se),
                "0" if first else _small(lane.kl_p99),
                f"{100 * lane.same_top:.1f}%",
            ]
        )
    return rows


def differences_table(differences: Sequence[Difference]) -> list[list[str]]:
    """A row for each pair of checkpoints that `compare` scored."""
    rows = [["b - a", "KL difference", "perplexity ratio (95%)"]]
    for row in differences:
        ratio, interval = f"{row.perplexity_ratio:.4f}", row.perplexity_ratio_ci
        rows.append(
            [
                f"{row.b} - {row.a}",
                _small(row.kl_difference, row.kl_difference_se),
                ratio if interval is None else f"{ratio} ({interval[0]:.4f} to {interval[1]:.4f})",
            ]
        )
    return rows


def _small(value: float, se: float | None = None) -> str:
    """A divergence: five decimals, or two digits and an exponent where those would show nothing.

    >>> _small(0.00304, 0.00004), _small(1.23e-5, 7e-8)
    ('0.00304 ± 0.00004', '1.2e-05 ± 7.0e-08')
    """
    digits = ".5f" if abs(value) >= 5e-4 or value == 0 else ".1e"
    return f"{value:{digits}}" + ("" if se is None else f" ± {se:{digits}}")


def describe_evaluation(evaluation: Evaluation) -> str:
    """One line that must stand below every table of figures: which text, and what the figures do not show."""
    revision = f"@{evaluation.revision[:8]}" if evaluation.revision else ""
    parts = [
        f"{evaluation.dataset}{revision}, {evaluation.n_tokens} tokens, windows of {evaluation.seq_len}, "
        f"BOS in {evaluation.bos}, {evaluation.protocol}"
    ]
    if (floor := evaluation.noise_floor) is not None:
        parts.append(f"noise floor of the compute dtype: KL {floor.kl_mean:.5f}")
    for name, lane in evaluation.lanes.items():
        if math.isinf(lane.perplexity):
            parts.append(f"{name}: {infinite_perplexity(lane)}")
        if lane.n_nonfinite:
            parts.append(f"{lane.n_nonfinite} tokens with NaN or Inf logits left out of {name}")
    return "; ".join(parts)


def infinite_perplexity(*lanes: LaneReport) -> str:
    """What is said where one of these lanes has an infinite perplexity: the losses, which are numbers."""
    losses = " → ".join(f"{lane.loss:.2f}" for lane in lanes)
    return f"perplexity is beyond what a float holds (mean loss {losses} nats per token)"

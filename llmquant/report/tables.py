"""The tables of figures, as rows of text: the same for the console, the card and report.html."""

from typing import Any


def compared(lanes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """All lanes but the first, which is what the others are compared with."""
    return dict(list(lanes.items())[1:])


def lanes_table(lanes: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Rows of text, the header first: the same table for the console and the card."""
    rows = [["lane", "bits/weight", "MB", "perplexity", "KL (nats)", "KL 99%", "same top"]]
    for position, (name, lane) in enumerate(lanes.items()):
        first = position == 0
        rows.append(
            [
                name,
                f"{lane['bits_per_weight']:.3f}",
                f"{lane['bytes'] / 1e6:.1f}",
                f"{lane['perplexity']:.3f}" + _plus_minus(lane["perplexity_se"], 3),
                "0" if first else _small(lane["kl_mean"], lane["kl_se"]),
                "0" if first else _small(lane["kl_p99"]),
                f"{100 * lane['same_top']:.1f}%",
            ]
        )
    return rows


def differences_table(differences: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of text for the paired differences of `compare`, the header first."""
    rows = [["b - a", "KL difference", "perplexity ratio (95%)"]]
    for row in differences:
        ratio, interval = f"{row['perplexity_ratio']:.4f}", row["perplexity_ratio_ci"]
        rows.append(
            [
                f"{row['b']} - {row['a']}",
                _small(row["kl_difference"], row["kl_difference_se"]),
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


def _plus_minus(se: float | None, digits: int) -> str:
    return "" if se is None else f" ± {se:.{digits}f}"


def describe_evaluation(evaluation: dict[str, Any]) -> str:
    """One line that says how figures were made; it must stand with every one of them."""
    revision = f"@{evaluation['revision'][:8]}" if evaluation["revision"] else ""
    floor = evaluation.get("noise_floor")
    noise = "" if floor is None else f"; noise floor of the compute dtype: KL {floor['kl_mean']:.5f}"
    for name, lane in evaluation["lanes"].items():
        if lane["n_nonfinite"]:
            noise += f"; {lane['n_nonfinite']} tokens with NaN or Inf logits left out of {name}"
    return (
        f"{evaluation['dataset']}{revision}, {evaluation['n_tokens']} tokens, windows of {evaluation['seq_len']}, "
        f"BOS in {evaluation['bos']}, {evaluation['protocol']}{noise}"
    )

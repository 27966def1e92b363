"""report.json, cost.json and the card: what a run leaves beside the weights."""

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmquant.calibration import Windows
from llmquant.evaluation import Figures
from llmquant.log import silent
from llmquant.memory import peak_rss

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class LayerReport:
    """How well one linear was quantized.

    loss and rtn_loss are mean squared output errors per token, tr(E H E^T), of ours and of plain rounding;
    relative_error is loss / tr(W H W^T). All None without calibration.
    """

    name: str
    loss: float | None
    rtn_loss: float | None
    relative_error: float | None
    weight_error: float  # ||E||^2 / ||W||^2
    bits_per_weight: float
    n_tokens: int
    notes: tuple[str, ...]
    histograms: dict[str, dict[str, Any]]  # of weights, codes and log2 |scale|: `histograms.histograms`

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"notes": list(self.notes)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LayerReport":
        """Inverse of `as_dict`."""
        return cls(**values | {"notes": tuple(values["notes"])})


@dataclass(frozen=True)
class LaneReport:
    """A lane's figures with its size."""

    figures: Figures
    bits_per_weight: float
    bytes: int

    def as_dict(self) -> dict[str, Any]:
        return self.figures.as_dict() | {"bits_per_weight": self.bits_per_weight, "bytes": self.bytes}


@dataclass(frozen=True)
class Report:
    """What `quantize` and `evaluate` return. `data` is report.json, `cost` is cost.json."""

    data: dict[str, Any]
    cost: dict[str, Any]
    out: Path | None = None

    @property
    def lanes(self) -> dict[str, dict[str, Any]]:
        """Figures by lane; empty where evaluation was switched off."""
        evaluation = self.data["evaluation"]
        return {} if evaluation is None else evaluation["lanes"]


@dataclass
class Stopwatch:
    """Seconds by stage; `on_stage` hears of each as it begins."""

    on_stage: Callable[[str], None] = silent
    seconds: dict[str, float] = field(default_factory=dict)
    start: float = field(default_factory=time.perf_counter)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        self.on_stage(name)
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def cost(self) -> dict[str, Any]:
        """Times, memory and machine: all that may differ between two runs of the same job."""
        import torch

        return {
            "schema_version": SCHEMA_VERSION,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "total_seconds": round(time.perf_counter() - self.start, 3),
            "peak_rss_bytes": peak_rss(),
            "threads": torch.get_num_threads(),
            "machine": f"{platform.system()} {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }


def versions() -> dict[str, str]:
    """Versions of what computed the output."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "safetensors")} | {"llmquant": own_version()}


def own_version() -> str:
    from llmquant import __version__

    return __version__


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


def evaluation_report(windows: Windows, lanes: dict[str, LaneReport], floor: Figures | None = None) -> dict[str, Any]:
    """The `evaluation` part of report.json."""
    return {
        "protocol": "texts joined by blank lines, windows without overlap, all tokens but a window's first scored",
        **windows.as_dict(),
        "noise_floor": None if floor is None else floor.as_dict(),
        "lanes": {name: lane.as_dict() for name, lane in lanes.items()},
    }


def describe_evaluation(evaluation: dict[str, Any]) -> str:
    """One line that must stand beside every figure."""
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

"""report.json, cost.json and the card: what a run writes next to the weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmquant.lanes.scores import Figures
from llmquant.text.windows import Windows

SCHEMA_VERSION = 1


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


def evaluation_report(windows: Windows, lanes: dict[str, LaneReport], floor: Figures | None = None) -> dict[str, Any]:
    """The `evaluation` part of report.json."""
    return {
        "protocol": "texts joined by blank lines, windows without overlap, all tokens but a window's first scored",
        **windows.as_dict(),
        "noise_floor": None if floor is None else floor.as_dict(),
        "lanes": {name: lane.as_dict() for name, lane in lanes.items()},
    }

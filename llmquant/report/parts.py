"""The parts of a report that a run, an export and `compare` make alike, from what was computed."""

from collections.abc import Mapping, Sequence
from typing import cast

from llmquant.formats.runtimes import Finding, verdicts
from llmquant.lanes.scores import Figures
from llmquant.plan import Plan
from llmquant.report.data import Evaluation, LaneReport, Runtime, Versions
from llmquant.text.windows import Windows
from llmquant.versions import versions


def runtimes_of(plan: Plan, format_name: str, tried: Sequence[Finding]) -> dict[str, Runtime]:
    """What the lint says of every runtime, for the checkpoint in this format, and what a trial has shown."""
    found = verdicts(plan.specs, format_name, plan.dense_linears, tried)
    return {name: Runtime(facts["version"], facts["opens"], tuple(facts["notes"])) for name, facts in found.items()}


def library_versions(*more: str) -> Versions:
    return cast(Versions, versions(*more))


def evaluation_report(windows: Windows, lanes: Mapping[str, LaneReport], floor: Figures | None = None) -> Evaluation:
    """The `evaluation` part of a report."""
    protocol = "texts joined by blank lines, windows without overlap, all tokens but a window's first scored"
    return Evaluation(protocol=protocol, **windows.as_dict(), noise_floor=floor, lanes=dict(lanes))


def lane_report(found: Figures, bits_per_weight: float, size: int) -> LaneReport:
    """A lane's figures with its size in bytes."""
    return LaneReport(**vars(found), bits_per_weight=bits_per_weight, bytes=size)

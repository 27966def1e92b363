"""What a run found, as its report."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from llmquant.blocks.measure import LayerReport
from llmquant.checkpoint import stored_forms
from llmquant.job import Job
from llmquant.lanes.baselines import BASELINES
from llmquant.lanes.scores import BEFORE, ORIGINAL, OURS, Figures, TokenScores, figures
from llmquant.recipe import Recipe
from llmquant.report.data import (
    SCHEMA_VERSION,
    AllocationReport,
    Compute,
    LaneReport,
    Model,
    OriginalCard,
    RecipeFacts,
    RecoveryReport,
    RunReport,
    TextWindows,
    WeightFile,
)
from llmquant.report.ledger import Layer, TensorRow
from llmquant.report.parts import evaluation_report, lane_report, library_versions, runtimes_of
from llmquant.report.plain import parse


def run_report(
    job: Job,
    asked: Recipe,
    layers: Sequence[LayerReport],
    allocation: AllocationReport | None,
    recovered: RecoveryReport | None,
    lanes: Mapping[str, LaneReport],
    floor: Figures | None,
    files: Mapping[str, Mapping[str, Any]],
) -> RunReport:
    """report.json: nothing in it differs between two runs of the same job on one machine.

    asked   the recipe without the rules that a target size led to
    files   size and digest of every file of weights, by name
    """
    formats = (job.recipe.format, *job.recipe.exports)
    return RunReport(
        schema_version=SCHEMA_VERSION,
        model=Model(
            id=job.source.name,
            revision=job.source.revision,
            card=OriginalCard(**job.card),
            remote_code=tuple(job.source.code),
            stored_as=stored_forms(job.source) or None,
            left_behind=job.source.left_behind or None,
        ),
        versions=library_versions(*job.libraries),
        recipe=cast(RecipeFacts, asked.as_dict()),
        compute=Compute(
            device=job.skeleton.device.type,
            dtype=str(job.skeleton.dtype).removeprefix("torch."),
            products=str(job.products).removeprefix("torch."),
            trust_remote_code=job.source.trust_remote_code,
            parked=job.parked,
        ),
        bits_per_weight=job.plan.bits_per_weight(job.recipe.format),
        calibration=None if job.calibration is None else TextWindows(**job.calibration.as_dict()),
        evaluation=None if job.evaluation is None else evaluation_report(job.evaluation, lanes, floor),
        chosen=dict(job.chosen) or None,
        allocation=allocation,
        recovery=recovered,
        runtimes={name: runtimes_of(job.plan, name, job.openings[name].findings) for name in formats},
        files={name: WeightFile(**facts) for name, facts in files.items()},
        layers=tuple(parse(Layer, layer.as_dict(), layer.name) for layer in layers),
        tensors=_ledger(job, layers),
    )


def _ledger(job: Job, layers: Sequence[LayerReport]) -> tuple[TensorRow, ...]:
    """A row per tensor of the original, with the notes about its layer where it was quantized."""
    notes = {layer.name: list(layer.notes) for layer in layers if layer.notes}
    rows = []
    for row in (*job.plan.rows, *job.output.left_out):
        said = notes.get(row.spec.module) if row.spec is not None else None
        rows.append(parse(TensorRow, row.as_dict() | ({"notes": said} if said else {}), row.name))
    return tuple(rows)


def lane_reports(job: Job, scores: Mapping[str, TokenScores]) -> dict[str, LaneReport]:
    """Figures and sizes of all lanes of a run."""
    return {lane: lane_report(figures(score, scores[ORIGINAL]), *_size(job, lane)) for lane, score in scores.items()}


def _size(job: Job, lane: str) -> tuple[float, int]:
    """Bits per weight of the quantized linears, and bytes of all tensors, of a lane."""
    specs, total = job.plan.specs, job.source.weight_bytes
    dense = sum(part.nbytes for spec in specs for part in job.source.parts(spec.key))
    weights = sum(spec.shape[0] * spec.shape[1] for spec in specs)
    if lane == ORIGINAL:
        return 8 * dense / weights, total
    if lane in (OURS, BEFORE):
        return job.plan.bits_per_weight(job.recipe.format), job.plan.output_bytes
    bits = sum(spec.shape[0] * BASELINES[lane].row_bits(spec.shape[1], spec.scheme) for spec in specs)
    return bits / weights, total - dense + int(bits / 8)

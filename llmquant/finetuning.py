"""`llmquant finetune`: the recovery of a finished checkpoint, whose codes are taken over."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmquant.errors import RecipeError, option
from llmquant.finished import Finished
from llmquant.log import SILENT, Log, progress_of
from llmquant.pipeline import quantize_with
from llmquant.recipe import Recipe, RunOptions, from_mapping
from llmquant.report.data import Report


def finetune(
    checkpoint: str | Path,
    *,
    reference: str | Path | None = None,
    out: str | Path | None = None,
    recover: str = "all",
    max_ram: str = "4GB",
    overwrite: bool = False,
    resume: str = "auto",
    trust_remote_code: bool = False,
    log: Log = SILENT,
    **fields: Any,
) -> Report:
    """Train what is no code in `checkpoint`, which llmquant wrote, and write the result to `out`
    (default ./<name>-recovered).

    reference   the original model (default: what the checkpoint's report names)
    recover     scales, norms (with biases) or all
    fields      of the recipe that are not as in the checkpoint's own: texts, windows, device, dtype
    Raises what `quantize` raises, and RecipeError where the checkpoint is not one of the original.
    """
    options = RunOptions(out, None, max_ram, overwrite, resume, (), trust_remote_code, checkpoint)
    return quantize_with(*as_run(reference, fields | {"recover": recover}, options), progress_of(log))


def as_run(
    reference: str | Path | None, fields: Mapping[str, Any], options: RunOptions
) -> tuple[str | Path, Recipe, RunOptions]:
    """The run that a `finetune` is: its model, recipe and options, whose `codes` are the checkpoint's."""
    assert options.codes is not None
    if fields["recover"] == "off":
        raise RecipeError(option("recover"), "'off'", expected="scales, norms or all")
    finished = Finished(options.codes, trust_remote_code=options.trust_remote_code)
    recipe = from_mapping(finished.recipe | dict(fields))
    if reference is None:
        reference, revision = finished.report.model.id, finished.report.model.revision
        options = replace(options, revision=revision)
    if options.out is None:
        options = replace(options, out=f"{finished.source.name.rpartition('/')[2]}-recovered")
    return reference, recipe, options

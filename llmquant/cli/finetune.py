"""The `finetune` command."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from llmquant.cli import look
from llmquant.cli.console import show_report
from llmquant.cli.options import DATA, DEVICE, RUN_PANEL, Debug, MaxRam, Overwrite, Quiet, Resume, Trust, recipe_option
from llmquant.cli.progress import progress, stoppable
from llmquant.cli.spellings import count
from llmquant.log import calm_libraries
from llmquant.recipe import Recipe, RunOptions

_JOB, _CALIB, _EVAL, _RUN = "What", "Training text", "Evaluation", RUN_PANEL


def finetune(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint that llmquant wrote: a folder or a Hub id")],
    reference: Annotated[
        Optional[str],
        typer.Option(help="The original model (default: what the checkpoint's report names)", rich_help_panel=_JOB),
    ] = None,
    out: Annotated[
        Optional[Path], typer.Option(help="Folder to write [dim]\\[default: ./<name>-recovered]", rich_help_panel=_JOB)
    ] = None,
    recover: Annotated[
        str, typer.Option(help="What is trained: scales, norms (with biases), or all of these", rich_help_panel=_JOB)
    ] = "all",
    calibration: Annotated[
        Optional[str], typer.Option(help=f"Text: {DATA} [dim]\\[default: the checkpoint's own]", rich_help_panel=_CALIB)
    ] = None,
    samples: Annotated[Optional[int], typer.Option(help="Windows", rich_help_panel=_CALIB)] = None,
    seq_len: Annotated[Optional[int], typer.Option(help="Tokens in a window", rich_help_panel=_CALIB)] = None,
    seed: Annotated[Optional[int], typer.Option(help="Chooses the windows", rich_help_panel=_CALIB)] = None,
    eval_data: Annotated[
        Optional[str],
        typer.Option(help="Held-out text, or none [dim]\\[default: the checkpoint's own]", rich_help_panel=_EVAL),
    ] = None,
    eval_tokens: Annotated[
        Optional[str], typer.Option(help="Tokens to score, full, or auto", rich_help_panel=_EVAL)
    ] = None,
    eval_seq_len: Annotated[Optional[int], typer.Option(help="Tokens in a window", rich_help_panel=_EVAL)] = None,
    baselines: Annotated[
        Optional[str],
        recipe_option("More lanes: auto, none, or some of rtn,bnb-nf4,bnb-int8", "baselines", _EVAL),
    ] = None,
    device: Annotated[Optional[str], recipe_option(DEVICE, "device", _RUN)] = None,
    dtype: Annotated[Optional[str], recipe_option("Compute dtype", "dtype", _RUN)] = None,
    max_ram: MaxRam = "4GB",
    trust_remote_code: Trust = False,
    overwrite: Overwrite = False,
    resume: Resume = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done and what it costs", rich_help_panel=_RUN)
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train scales, norms and biases of a finished checkpoint against the original; its codes stay."""
    fields = {
        name: value for name, value in locals().items() if name in Recipe.__dataclass_fields__ and value is not None
    }
    if eval_tokens is not None:
        fields["eval_tokens"] = count(eval_tokens)
    calm_libraries()
    from llmquant.finetuning import as_run
    from llmquant.pipeline import quantize_with

    options = RunOptions(out, None, max_ram, overwrite, resume, (), trust_remote_code, checkpoint)
    model, recipe, options = as_run(reference, fields, options)
    if dry_run:
        return look.show_plan(str(model), recipe, options, as_json=False, timed=False)
    with progress(quiet, False) as log, stoppable():
        report = quantize_with(model, recipe, options, log)
    show_report(report)

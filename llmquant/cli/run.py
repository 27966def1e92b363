"""`llmquant run`: every option of a quantization, and what is checked before it starts."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Optional

import typer

from llmquant.cli import look
from llmquant.cli.console import show_report
from llmquant.cli.options import (
    DATA,
    DEVICE,
    RUN_PANEL,
    MaxRam,
    Overwrite,
    Resume,
    Trust,
    recipe_option,
    recipes_like,
)
from llmquant.cli.progress import progress, stoppable
from llmquant.cli.push import check_login, push_result
from llmquant.cli.spellings import count, strength
from llmquant.errors import RecipeError, option
from llmquant.log import calm_libraries
from llmquant.ranks import Ranks, joined
from llmquant.recipe import Recipe, RunOptions, make_recipe

_JOB, _SOLVER, _CALIB, _EVAL, _RUN = "What", "How codes are chosen", "Calibration", "Evaluation", RUN_PANEL


def run(
    model: Annotated[str, typer.Option(help="demo, a local folder, or a Hub id", rich_help_panel=_JOB)],
    out: Annotated[
        Optional[Path], typer.Option(help="Folder to write [dim]\\[default: ./<name>-W4A16-G128]", rich_help_panel=_JOB)
    ] = None,
    recipe: Annotated[
        Optional[str],
        typer.Option(
            help="A recipe: a .toml file or a name in pipelines/; flags override it",
            rich_help_panel=_JOB,
            autocompletion=recipes_like,
        ),
    ] = None,
    preset: Annotated[
        Optional[str], recipe_option("How much time quality may take; other options override it", "preset", _JOB)
    ] = None,
    method: Annotated[Optional[str], recipe_option("How codes are chosen", "method", _JOB)] = None,
    bits: Annotated[Optional[int], recipe_option("Bits per code", "bits", _JOB)] = None,
    group_size: Annotated[
        Optional[str],
        recipe_option(
            "Weights that share a scale: -1 is a whole row, auto the largest that divides all inputs",
            "group_size",
            _JOB,
        ),
    ] = None,
    target_bpw: Annotated[
        Optional[float],
        typer.Option(
            help="Choose bits and groups for each linear, so that all take so many bits per weight",
            rich_help_panel=_JOB,
        ),
    ] = None,
    target_size: Annotated[
        Optional[str],
        typer.Option(help="The same, so that all tensors take so many bytes: 5GB", rich_help_panel=_JOB),
    ] = None,
    lm_head_bits: Annotated[
        Optional[int], recipe_option("Quantize the head, too (not with --format gptq, awq)", "lm_head_bits", _JOB)
    ] = None,
    embed_bits: Annotated[
        Optional[int],
        recipe_option(
            "Quantize the embedding, and a head that is tied to it (--format gguf, mlx, fake)", "embed_bits", _JOB
        ),
    ] = None,
    asymmetric: Annotated[
        bool,
        typer.Option(
            "--asymmetric", help="A zero point for every group (--format awq, mlx, gguf, fake)", rich_help_panel=_JOB
        ),
    ] = False,
    rule: Annotated[
        Optional[list[str]],
        typer.Option(
            help="For the linears whose name matches: 'down_proj: bits=8, group_size=64' or 'glob:*.0.*: keep'; the "
            "first rule that matches decides; may be repeated",
            rich_help_panel=_JOB,
        ),
    ] = None,
    ignore: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Keep what matches in 16 bit: a regular expression (re: from the start of a name on) or *.down_proj; "
            "several with commas, or repeated",
            rich_help_panel=_JOB,
        ),
    ] = None,
    unfit: Annotated[
        Optional[str],
        recipe_option("What to do with linears that groups do not divide or the format cannot hold", "unfit", _JOB),
    ] = None,
    format: Annotated[
        Optional[str], recipe_option("Output format, or several (compressed-tensors,gguf)", "format", _JOB)
    ] = None,
    calibration: Annotated[
        Optional[str], recipe_option(f"Text: {DATA}; or a mixture a:0.5,b:0.5", "calibration", _CALIB)
    ] = None,
    samples: Annotated[Optional[str], recipe_option("Windows, or auto: what experts need", "samples", _CALIB)] = None,
    seq_len: Annotated[
        Optional[int], recipe_option("Tokens in a window, at most the model's context", "seq_len", _CALIB)
    ] = None,
    seed: Annotated[Optional[int], recipe_option("Chooses the windows", "seed", _CALIB)] = None,
    eval_data: Annotated[
        Optional[str],
        recipe_option(
            f"Held-out text: auto (wikitext2 if the Hub answers, else builtin), {DATA}, or none", "eval_data", _EVAL
        ),
    ] = None,
    eval_tokens: Annotated[
        Optional[str], recipe_option("Tokens to score, full, or auto: as many as KL to 3% takes", "eval_tokens", _EVAL)
    ] = None,
    eval_seq_len: Annotated[Optional[int], recipe_option("Tokens in a window", "eval_seq_len", _EVAL)] = None,
    baselines: Annotated[
        Optional[str],
        recipe_option("Lanes beside ours: auto, none, or some of rtn,bnb-nf4,bnb-int8", "baselines", _EVAL),
    ] = None,
    grid: Annotated[Optional[str], recipe_option("Fit of the scales", "grid", _SOLVER)] = None,
    order: Annotated[Optional[str], recipe_option("Order of the columns", "order", _SOLVER)] = None,
    damp: Annotated[
        Optional[float],
        recipe_option("Damping, a share of mean(diag H) (default: by tokens per input)", "damp", _SOLVER),
    ] = None,
    propagation: Annotated[
        Optional[str],
        recipe_option("Make up for the errors of earlier layers: 0 (off) to 1, or auto", "propagation", _SOLVER),
    ] = None,
    residual: Annotated[
        Optional[float],
        recipe_option(
            "And for those of what a block adds its outputs to: a part of it, 0 (off) to 2", "residual", _SOLVER
        ),
    ] = None,
    refit: Annotated[
        Optional[bool],
        typer.Option(
            "--refit/--no-refit",
            help="Fit the scales, too, in every sweep [dim]\\[default: refit]",
            rich_help_panel=_SOLVER,
            show_default=False,
        ),
    ] = None,
    sweeps: Annotated[
        Optional[int],
        recipe_option(
            "Without curvature: sweeps of coordinate descent (default: 1; 4 below 4 bits and for groups of 32)",
            "sweeps",
            _SOLVER,
        ),
    ] = None,
    curvature: Annotated[
        Optional[str],
        recipe_option(
            "Weigh errors as the model's predictions do, by one more pass (full: or fail where it cannot)",
            "curvature",
            _SOLVER,
        ),
    ] = None,
    recover: Annotated[
        Optional[str],
        recipe_option(
            "Train end to end behind the last block: scales, norms (with biases), or all of these", "recover", _SOLVER
        ),
    ] = None,
    passes: Annotated[
        Optional[str], recipe_option("Hessians after each step of a block, or in one pass per block", "passes", _SOLVER)
    ] = None,
    on_bad_layer: Annotated[
        Optional[str], recipe_option("What to do where a layer cannot be solved", "on_bad_layer", _SOLVER)
    ] = None,
    device: Annotated[Optional[str], recipe_option(DEVICE, "device", _RUN)] = None,
    dtype: Annotated[Optional[str], recipe_option("Compute dtype", "dtype", _RUN)] = None,
    products: Annotated[
        Optional[str],
        recipe_option(
            "Of calibration forwards and Hessians (auto: bfloat16 below 8 bits on CPUs made for it)", "products", _RUN
        ),
    ] = None,
    max_ram: MaxRam = "4GB",
    max_shard_size: Annotated[Optional[str], recipe_option("Largest output file", "max_shard_size", _RUN)] = None,
    revision: Annotated[
        Optional[str], typer.Option(help="Branch, tag or commit on the Hub", rich_help_panel=_RUN)
    ] = None,
    trust_remote_code: Trust = False,
    overwrite: Overwrite = False,
    resume: Resume = "auto",
    runtimes: Annotated[
        Optional[str],
        typer.Option(
            "--for",
            help="Refuse before the work what one of these would not open: "
            "transformers, vllm, sglang, llama.cpp, mlx-lm",
            rich_help_panel=_JOB,
        ),
    ] = None,
    push_to_hub: Annotated[
        Optional[str],
        typer.Option(
            help="Publish the result as owner/name, private; login and name are checked before the work",
            rich_help_panel=_JOB,
        ),
    ] = None,
    rank_timeout: Annotated[
        float,
        typer.Option(help="With torchrun: minutes that a process waits for another one", rich_help_panel=_RUN),
    ] = 120.0,
    rank_sums: Annotated[
        str,
        typer.Option(
            help="With torchrun: add up in the order of the batches (batch: the codes of one process), or each "
            "process's own first (rank: less to send)",
            rich_help_panel=_RUN,
        ),
    ] = "batch",
    timed: Annotated[
        bool,
        typer.Option("--time", help="Of a plan: quantize one block to see how long it takes", rich_help_panel=_RUN),
    ] = False,
    ranks: Annotated[
        int, typer.Option(min=1, help="Of a plan: processes that share the run (torchrun)", rich_help_panel=_RUN)
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, as `llmquant plan` does", rich_help_panel=_RUN)
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Progress as JSON lines on stderr", rich_help_panel=_RUN)
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr", rich_help_panel=_RUN)] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error", rich_help_panel=_RUN)
    ] = False,
) -> None:
    """Quantize a model and write a verified checkpoint with its report."""
    flags = {
        name: value for name, value in locals().items() if name in Recipe.__dataclass_fields__ and value is not None
    }
    if rule:
        flags["rules"] = rule
    if asymmetric:
        flags["symmetric"] = False
    if propagation is not None:
        flags["propagation"] = strength(propagation)
    if eval_tokens is not None:
        flags["eval_tokens"] = count(eval_tokens)
    if group_size is not None:
        flags["group_size"] = count(group_size)
    if samples is not None:
        flags["samples"] = count(samples)
    settings = make_recipe(model, recipe, flags)
    calm_libraries()
    if push_to_hub is not None:
        check_login(push_to_hub)
    targets = tuple(name.strip() for name in runtimes.split(",")) if runtimes else ()
    options = RunOptions(out, revision, max_ram, overwrite, resume, targets, trust_remote_code)
    if timed and not dry_run:
        raise RecipeError(
            option("timed"), "without a plan", remedy=f"llmquant plan --time, or {option('dry_run')} beside it"
        )
    if ranks > 1 and not dry_run:
        remedy = f"torchrun --nproc-per-node {ranks} -m llmquant run ..., or {option('dry_run')} beside it"
        raise RecipeError(option("ranks"), "without a plan", remedy=remedy)
    if rank_sums not in ("batch", "rank"):
        raise RecipeError(option("rank_sums"), repr(rank_sums), expected="batch or rank")
    by_batch = rank_sums == "batch"
    if dry_run:
        shared = replace(options, ranks=Ranks(0, ranks, by_batch))
        return look.show_plan(model, settings, shared, as_json=json, timed=timed)
    from llmquant.pipeline import quantize_on_ranks

    with (
        stoppable(),
        joined(settings.device, rank_timeout, by_batch=by_batch) as own,
        progress(quiet or not own.first, json) as log,
    ):
        report = quantize_on_ranks(model, settings, replace(options, ranks=own), log)
    if report is None:  # of another rank
        return
    show_report(report)
    if push_to_hub is not None and report.out is not None:
        push_result(report.out, push_to_hub, quiet or json)

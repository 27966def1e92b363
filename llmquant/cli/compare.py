"""The `eval` and `compare` commands."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from llmquant.cli.console import show_report
from llmquant.cli.options import DATA, DEVICE, TRUST, Debug, Quiet
from llmquant.cli.progress import progress
from llmquant.cli.spellings import count
from llmquant.errors import OutputError, option
from llmquant.log import calm_libraries
from llmquant.paths import expanded
from llmquant.recipe import Recipe, make_recipe

_DEFAULTS = Recipe()
_Data = Annotated[Optional[str], typer.Option("--data", help=f"Text: {DATA} [dim]\\[default: {_DEFAULTS.eval_data}]")]
_Tokens = Annotated[
    Optional[str],
    typer.Option(
        "--tokens",
        help=f"Tokens to score, full, or auto: as many as KL to 3% takes [dim]\\[default: {_DEFAULTS.eval_tokens}]",
    ),
]
_SeqLen = Annotated[
    Optional[int], typer.Option("--seq-len", help=f"Tokens in a window [dim]\\[default: {_DEFAULTS.eval_seq_len}]")
]
_Trust = Annotated[bool, typer.Option("--trust-remote-code", help=TRUST)]
_Json = Annotated[Optional[Path], typer.Option("--json", help="Also write the figures to this file")]
_Reference = Annotated[Optional[str], typer.Option(help="The original, for divergences")]
_Device = Annotated[Optional[str], typer.Option(help=DEVICE)]
_Dtype = Annotated[Optional[str], typer.Option(help="Compute dtype")]
_MaxRam = Annotated[str, typer.Option(help="What the streams may hold before they go to files")]


def evaluate(
    model: Annotated[str, typer.Option(help="demo, a folder, a GGUF file, or a Hub id: 16 bit or quantized")],
    reference: _Reference = None,
    data: _Data = None,
    tokens: _Tokens = None,
    seq_len: _SeqLen = None,
    device: _Device = None,
    dtype: _Dtype = None,
    max_ram: _MaxRam = "4GB",
    trust_remote_code: _Trust = False,
    json: _Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Perplexity of a checkpoint and its divergence from a reference, streamed block by block."""
    compare([model], reference, data, tokens, seq_len, device, dtype, max_ram, trust_remote_code, json, quiet)


def compare(
    models: Annotated[list[str], typer.Argument(help="Checkpoints: local folders, GGUF files or Hub ids")],
    reference: _Reference = None,
    data: _Data = None,
    tokens: _Tokens = None,
    seq_len: _SeqLen = None,
    device: _Device = None,
    dtype: _Dtype = None,
    max_ram: _MaxRam = "4GB",
    trust_remote_code: _Trust = False,
    json: _Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Several checkpoints in one table, with paired differences."""
    flags = {
        "eval_data": data,
        "eval_tokens": count(tokens),
        "eval_seq_len": seq_len,
        "device": device,
        "dtype": dtype,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    settings = make_recipe(reference or models[0], None, given)
    file = None if json is None else expanded(json, OutputError)
    if file is not None and not file.parent.is_dir():
        raise OutputError(str(file), "no such folder", remedy=f"make it, or choose another {option('json')}")
    from llmquant.comparison import compare as score
    from llmquant.run_dir import write_json_file

    calm_libraries()
    with progress(quiet) as log:
        report = score(
            models,
            reference=reference,
            recipe=settings,
            max_ram=max_ram,
            trust_remote_code=trust_remote_code,
            log=log,
        )
    show_report(report)
    if file is not None:
        write_json_file(file, report.data)

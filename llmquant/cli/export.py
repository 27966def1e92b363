"""The `export` command."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from llmquant.cli.console import answer, say
from llmquant.cli.options import Debug, Quiet
from llmquant.log import SILENT
from llmquant.recipe import CHOICES


def export(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint that llmquant wrote: a folder or a Hub id")],
    format: Annotated[str, typer.Option(help=f"{', '.join(CHOICES['format'])}")],
    out: Annotated[Path, typer.Option(help="Folder to write")],
    gguf_pre: Annotated[
        Optional[str], typer.Option(help="llama.cpp's name of the tokenizer's splitter, where it is not recognised")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest output file")] = "5GB",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings: read it first")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that llmquant wrote")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a finished checkpoint in another format: the same codes and scales, nothing is quantized anew."""
    from llmquant.export import export as convert

    written = convert(
        checkpoint,
        format,
        out,
        gguf_pre=gguf_pre,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        log=SILENT if quiet else say,
    )
    answer(f"wrote {written}")

"""The `push` command, and what `run --push-to-hub` adds to a run."""

import logging
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from llmquant.cli.console import Screen, answer, say
from llmquant.cli.options import Debug, Quiet
from llmquant.errors import LLMQuantError
from llmquant.log import SILENT, Log


def push(
    checkpoint: Annotated[Path, typer.Argument(help="A folder that `llmquant run` or `export` finished")],
    repo: Annotated[str, typer.Option(help="owner/name on the Hub")],
    private: Annotated[
        Optional[bool],
        typer.Option(
            "--private/--public",
            help="Who sees it [dim]\\[default: a new repository is private, a public one is refused]",
            show_default=False,
        ),
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing")] = False,
    tag: Annotated[Optional[str], typer.Option(help="Give the commit this tag")] = None,
    base_model: Annotated[
        Optional[str], typer.Option(help="The original on the Hub, for the card, where a local folder was quantized")
    ] = None,
    keep_card: Annotated[
        bool, typer.Option("--keep-card", help="Publish README.md as it is in the folder, with what you wrote into it")
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Publish a finished checkpoint on the Hub: verified before, compared afterwards, visible all at once."""
    from llmquant.hub.push import push as publish

    log = _log(quiet)
    answer(
        publish(
            *(checkpoint, repo),
            private=private,
            create_pr=create_pr,
            tag=tag,
            base_model=base_model,
            keep_card=keep_card,
            log=log,
        )
    )


def check_login(repo: str) -> None:
    """Before a run: whether what it makes could be published."""
    from llmquant.hub.target import check_target

    check_target(repo)


def push_result(folder: Path, repo: str, quiet: bool) -> None:
    """After a run; where it fails the checkpoint is finished all the same, and a line says how to go on."""
    from llmquant.hub.push import push as publish

    try:
        answer(publish(folder, repo, log=_log(quiet)))
    except LLMQuantError:
        say(f"{folder} is finished; to publish it: llmquant push {folder} --repo {repo}")
        raise


def _log(quiet: bool) -> Log:
    """Lines on stderr; the client's own bars on a terminal only, its notes never."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if quiet or not Screen(sys.stderr).isatty():
        disable_progress_bars()
    return SILENT if quiet else say

"""Panels, help texts, option types and completions that the commands share."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from llmquant.recipe import CHOICES, DEMO_DEFAULTS, Recipe, recipe_folder

MAKE, JUDGE, PUBLISH, LOOK = "Quantize", "Judge", "Publish", "Look"
# Blank lines keep typer from joining the lines.
EXAMPLES = """[bold]Try it[/], offline, in a minute

  llmquant run --model demo

[bold]Look before[/] hours of work

  llmquant plan --model Qwen/Qwen3-8B --bits 4

[bold]Quantize[/] a model of the Hub, or a folder

  llmquant run --model Qwen/Qwen3-8B --bits 4

[bold]Judge[/] finished checkpoints

  llmquant compare ./a-W4A16-G128 ./b-W4A16-G128 --reference ./original

[bold]Publish[/] one, private at first

  llmquant push ./a-W4A16-G128 --repo user/a-W4A16-G128

[bold]Something is wrong[/]

  llmquant doctor
"""
RUN_EXAMPLES = """[bold]On the built-in model[/]

  llmquant run --model demo

[bold]8 bits, from a folder, by a recipe[/]

  llmquant run --model ./checkpoint --recipe w8g128 --out ./checkpoint-int8

[bold]Your own calibration text[/]

  llmquant run --model Qwen/Qwen3-8B --calibration notes.jsonl --samples 256

[bold]Fast and without data[/]

  llmquant run --model ./checkpoint --method rtn --eval-data none

[bold]Keep some layers in 16 bit[/]

  llmquant run --model ./checkpoint --ignore down_proj
"""
TRUST = "Run Python code that the checkpoint brings (auto_map), with all your rights: read it first"
DATA = (
    "builtin, wikitext2, c4, ultrachat, FILE\\[:column] (text, JSON, CSV, Parquet) "
    "or HUB_ID\\[:config\\[:split\\[:column]]]"
)
DEVICE = (
    "cpu, or an accelerator by torch's name for it: cuda\\[:n], mps, xpu, ...; auto: the accelerator if there is one"
)

RUN_PANEL = "Where and with what"
Trust = Annotated[bool, typer.Option("--trust-remote-code", help=TRUST, rich_help_panel=RUN_PANEL)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an output folder that llmquant wrote", rich_help_panel=RUN_PANEL)
]
Resume = Annotated[
    str,
    typer.Option(
        help="Go on with an interrupted run of the same job: auto, required, or never (throw it away)",
        rich_help_panel=RUN_PANEL,
    ),
]
MaxRam = Annotated[
    str,
    typer.Option(help="What the streams of hidden states may hold before they go to files", rich_help_panel=RUN_PANEL),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error")]

_DEFAULTS = Recipe()


def recipe_option(text: str, name: str, panel: str) -> Any:
    """An option that overrides one field of the recipe; its help states the choices and the default."""
    if name in CHOICES:
        text += f": {', '.join(map(str, CHOICES[name]))}"
    default = getattr(_DEFAULTS, name)
    if default not in (None, (), ""):
        text += f" [dim]\\[default: {default}]"
    if name in DEMO_DEFAULTS:
        text += f" [dim]\\[demo: {DEMO_DEFAULTS[name]}]"
    flag = f"--{name.replace('_', '-')}"
    complete = starting_with([str(choice) for choice in CHOICES.get(name, ())])
    return typer.Option(flag, help=text, rich_help_panel=panel, show_default=False, autocompletion=complete)


def starting_with(choices: Sequence[str]) -> Callable[[str], list[str]]:
    """A completion of the shell: those of `choices` that start with what has been typed."""

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete


def recipes_like(incomplete: str) -> list[str]:
    """The completion of --recipe."""
    return starting_with(sorted(path.stem for path in recipe_folder().glob("*.toml")))(incomplete)

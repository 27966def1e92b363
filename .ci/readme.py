"""The parts of README.md that say what the code says: python .ci/readme.py writes them anew, --check only compares.

A part stands between `<!-- generated: NAME -->` and `<!-- end -->`. Figures, between `<!-- figures: REPORT -->` and
`<!-- end -->`, are never written: they must be what that committed report.json says.
"""

import argparse
import io
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import torch
import typer

from llmquant.checkpoint import READERS
from llmquant.cli.app import app
from llmquant.cli.console import show_figures
from llmquant.cli.spellings import ALIASES
from llmquant.formats import LinearSpec
from llmquant.formats import runtimes as lint
from llmquant.formats.facts import FACTS
from llmquant.quant.grid import QuantScheme
from llmquant.report.data import RunReport
from llmquant.report.plain import parse_file

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
MODELS = ROOT / "docs" / "models.md"
PART = re.compile(r"(<!-- (generated|figures): (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def commands() -> str:
    """Every command with the first line of its help."""
    rows = [[f"`{name}`", command.help.strip().splitlines()[0]] for name, command in COMMANDS.items()]
    return table(["command", "what it does"], rows)


def options() -> str:
    """Every option of `run` with other tools' names for it, by the panels of its help."""
    theirs: dict[str, list[str]] = {}
    for alias, (name, *_) in ALIASES.items():
        theirs.setdefault(name, []).append(f"`{alias}`")
    panels: dict[str, list[list[str]]] = {}
    for option in COMMANDS["run"].params:
        names = [*option.opts, *option.secondary_opts]
        also = ", ".join(name for own in names for name in theirs.get(own, ()))
        row = [", ".join(f"`{name}`" for name in names), unmarked(option.help), also]
        panels.setdefault(option.rich_help_panel, []).append(row)
    rows = [row for panel, inside in panels.items() for row in [[f"**{panel}**", "", ""], *inside]]
    return table(["option", "", "also accepted"], rows)


def formats() -> str:
    """What every format holds, by its facts, and which runtimes open it, by the lint's rules."""
    rows = []
    for name, facts in FACTS.items():
        usual = [linear(4, 32 if facts.one_file else 128)]
        open_it = [runtime for runtime, opens in lint.opens(usual, name).items() if opens]
        warned = {finding.runtime for finding in lint.lint(usual, name) if finding.severity == "warns"}
        rows.append(
            [
                f"`{name}`",
                ", ".join(map(str, facts.bits)),
                ", ".join("row" if g == -1 else str(g) for g in facts.groups),
                "yes" if facts.zero_points else "no",
                "yes" if facts.mixes else "no",
                "yes" if name in READERS or facts.dense else "no",
                ", ".join(f"{runtime}*" if runtime in warned else runtime for runtime in open_it),
            ]
        )
    head = ["format", "bits", "groups of", "zero points", "mixed", "`eval` reads it", "opened by"]
    return table(head, rows) + "\n\n\\* with a remark that `plan` prints."


def models() -> str:
    """How many model types pass: the first paragraph of docs/models.md, which a test compares with the outcomes."""
    return MODELS.read_text("utf-8").split("<!-- summary -->\n")[1].partition("\n<!-- end -->")[0]


def linear(bits: int, group_size: int) -> LinearSpec:
    """One linear that no rule about shapes has anything against."""
    scheme = QuantScheme(bits, group_size)
    key = "model.layers.0.mlp.up_proj"
    return LinearSpec(f"{key}.weight", key, "Linear", (4096, 4096), torch.bfloat16, scheme)


def figures(report: str) -> str:
    """The closing table of the run that this report is of."""
    with redirect_stdout(io.StringIO()) as out:
        show_figures(parse_file(RunReport, ROOT / report))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    return "```text\n" + "\n".join(lines) + "\n```"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("<", "\\<") for cell in line) + " |" for line in lines
    )


def unmarked(text: str) -> str:
    """Help text without rich's markup: `[dim]` is dropped, `\\[` is a bracket."""
    return re.sub(r"(?<!\\)\[/?\w+\]", "", text).replace("\\[", "[")


PARTS: dict[str, Callable[[], str]] = {"commands": commands, "options": options, "formats": formats}
if MODELS.exists():
    PARTS["models"] = models


def renewed(text: str) -> tuple[str, list[str]]:
    """README with all generated parts made anew, and the reports whose figures it does not show."""
    wrong: list[str] = []

    def part(match: re.Match[str]) -> str:
        begin, kind, name, body, end = match.groups()
        if kind == "generated":
            return f"{begin}\n{PARTS[name]()}\n\n{end}"
        if body.strip() != figures(name):
            wrong.append(name)
        return match[0]

    return PART.sub(part, text), wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a part is out of date")
    arguments = parser.parse_args()
    text = README.read_text("utf-8")
    new, wrong = renewed(text)
    for name in wrong:
        print(f"README.md: its figures are not those of {name}, which says\n{figures(name)}", file=sys.stderr)
    if arguments.check and new != text:
        print("README.md: generated parts are out of date; run python .ci/readme.py", file=sys.stderr)
    elif new != text:
        README.write_text(new, "utf-8")
    return int(bool(wrong) or (arguments.check and new != text))


if __name__ == "__main__":
    sys.exit(main())

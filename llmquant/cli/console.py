"""Tables and JSON on stdout."""

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from llmquant.report.data import Report


def new_console() -> "Console":
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def print_rows(
    console: "Console", rows: list[list[str]], bold: Callable[[list[str]], bool] = lambda row: False
) -> None:
    """A table of plain text, the header first. Names are strangers' strings: no markup in them is obeyed."""
    from rich.table import Table
    from rich.text import Text

    table = Table(*rows[0], box=None, pad_edge=False)
    for row in rows[1:]:
        table.add_row(*map(Text, row), style="bold" if bold(row) else None)
    console.print(table)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def show_report(report: "Report") -> None:
    """The closing table, on stdout."""
    from rich.console import Console
    from rich.table import Table

    from llmquant.report.tables import describe_evaluation, differences_table, lanes_table

    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    for rows in (lanes_table(report.lanes), differences_table(report.data.get("differences", []))):
        if len(rows) > 1:
            table = Table(*rows[0], box=None, pad_edge=False)
            for column in table.columns[1:]:
                column.justify = "right"
            for row in rows[1:]:
                table.add_row(*row, style="bold" if row[0] == "llmquant" else None)
            console.print(table)
    if report.lanes:
        console.print(f"[dim]on {describe_evaluation(report.data['evaluation'])}; ± is one standard error")
    models = report.data["models"] if "models" in report.data else [report.data["model"]]
    if code := [file for model in models for file in model.get("remote_code", [])]:
        console.print(f"--trust-remote-code: ran {', '.join(code)}", markup=False, soft_wrap=True)
    cost = report.cost
    done = f"wrote {report.out}" if report.out is not None else "done"
    memory = f"peak memory {cost['peak_rss_bytes'] / 1e6:.0f} MB"
    console.print(f"{done} in {cost['total_seconds']:.0f} s, {memory}", soft_wrap=True)

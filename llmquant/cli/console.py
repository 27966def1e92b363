"""What goes to stdout and stderr, in such a way that no finished run fails because it cannot be printed."""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any, cast

from llmquant.errors import OutputError

if TYPE_CHECKING:
    from rich.console import Console

    from llmquant.report.data import CompareReport, Report, RunReport


class Screen:
    """stdout or stderr, for people: what cannot be written there is given up, and the program goes on.

    That is so for a pipe whose reader has gone (`llmquant run ... | head`), a full disk under a log, and a stream that
    was closed or never open. Characters that the stream's encoding does not have are escaped.

    product   what is written is the very thing that was asked for, so a full disk is an OutputError
    """

    def __init__(self, stream: IO[str] | None, *, product: bool = False) -> None:
        self._stream, self._product = stream, product

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self._stream is not None and not getattr(self._stream, "closed", False) and self._stream.isatty()

    def write(self, text: str) -> int:
        try:
            text.encode(self.encoding, getattr(self._stream, "errors", None) or "strict")
        except UnicodeEncodeError:
            text = text.replace("±", "+-").encode(self.encoding, "backslashreplace").decode(self.encoding)
        self._attempt(lambda stream: stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(lambda stream: stream.flush())

    def _attempt(self, call: Callable[[IO[str]], object]) -> None:
        if self._stream is None or getattr(self._stream, "closed", False):
            return
        try:
            call(self._stream)
        except OSError as error:
            # What is still in its buffer goes nowhere, or the interpreter would complain of it at its end.
            with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
            self._stream = None
            if self._product and not isinstance(error, BrokenPipeError):
                raise OutputError("stdout", error.strerror or str(error)) from None


def say(message: str) -> None:
    """A line on stderr."""
    _line(Screen(sys.stderr), message)


def answer(message: str) -> None:
    """A line on stdout."""
    _line(Screen(sys.stdout), message)


def _line(screen: Screen, message: str) -> None:
    screen.write(f"{message}\n")
    screen.flush()


def new_console(width: int = 160, *, product: bool = True) -> "Console":
    """For stdout; `width` is that of a file or a pipe."""
    from rich.console import Console

    screen = Screen(sys.stdout, product=product)
    return Console(file=cast(IO[str], screen), width=None if screen.isatty() else width, highlight=False)


def as_json(value: Any, stream: IO[str] | None, **layout: Any) -> str:
    """JSON for the stream: where that is not UTF-8, in ASCII, which says the same."""
    return json.dumps(value, ensure_ascii=Screen(stream).encoding.lower() not in ("utf-8", "utf8"), **layout)


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
    _line(Screen(sys.stdout, product=True), as_json(value, sys.stdout, indent=2, allow_nan=False))


def show_report(report: "Report") -> None:
    """The closing tables, the code that was run, and what it cost, on stdout."""
    from llmquant.report.data import CompareReport
    from llmquant.report.ledger import mostly_dense

    facts, spent = report.facts, report.spent
    show_figures(facts)
    models = facts.models if isinstance(facts, CompareReport) else (facts.model,)
    console = new_console(100, product=False)
    if not isinstance(facts, CompareReport) and (dense := mostly_dense(facts.tensors)):
        console.print(f"warning: {'; not quantized: '.join(dense)}", style="yellow", markup=False, soft_wrap=True)
    if code := [file for model in models for file in model.remote_code]:
        console.print(f"--trust-remote-code: ran {', '.join(code)}", markup=False, soft_wrap=True)
    done = f"wrote {report.out}" if report.out is not None else "done"
    memory = f"peak memory {spent.peak_rss_bytes / 1e6:.0f} MB"
    console.print(f"{done} in {spent.total_seconds:.0f} s, {memory}", markup=False, soft_wrap=True)


def show_figures(facts: "RunReport | CompareReport") -> None:
    """Tables of the lanes and of their differences, and the text that they were measured on; nothing without lanes."""
    from rich.table import Table
    from rich.text import Text

    from llmquant.report.data import CompareReport
    from llmquant.report.tables import describe_evaluation, differences_table, lanes_table

    if facts.evaluation is None:
        return
    console = new_console(100, product=False)
    differences = facts.differences if isinstance(facts, CompareReport) else ()
    for rows in (lanes_table(facts.evaluation.lanes), differences_table(differences)):
        if len(rows) > 1:
            table = Table(*rows[0], box=None, pad_edge=False)
            for column in table.columns[1:]:
                column.justify = "right"
            for row in rows[1:]:
                table.add_row(*map(Text, row), style="bold" if row[0] == "llmquant" else None)
            console.print(table)
    console.print(Text(f"on {describe_evaluation(facts.evaluation)}; ± is one standard error", style="dim"))

"""What a run says on stderr while it works: a live display, plain lines, JSON lines, or nothing."""

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, cast

from llmquant.cli.console import Screen, as_json, say
from llmquant.errors import Interrupted
from llmquant.log import SILENT, BlockDone, Lines, Progress, scores_line
from llmquant.memory import peak_rss

if TYPE_CHECKING:
    from rich.console import Console


class JsonLines:
    """One JSON object per line: {"event": "stage" | "block" | "scored" | "message" | "done" | "error", ...}."""

    def __init__(self, write: Callable[[str], object] | None = None) -> None:
        self._write = write or say
        self._start = time.perf_counter()

    def say(self, event: str, **facts: Any) -> None:
        facts |= {"elapsed_seconds": round(time.perf_counter() - self._start, 3), "peak_rss_bytes": peak_rss()}
        self._write(as_json({"event": event, **facts}, sys.stderr))

    def line(self, text: str) -> None:
        self.say("message", message=text)

    def stage(self, name: str) -> None:
        self.say("stage", stage=name)

    def block(self, done: BlockDone) -> None:
        seconds, errors = round(done.seconds, 3), dict(done.errors)
        self.say("block", message=done.line, done=done.done, total=done.total, seconds=seconds, relative_errors=errors)

    def scored(self, kl: Mapping[str, float]) -> None:
        self.say("scored", message=scores_line(kl), kl=dict(kl))


class Live:
    """A bar over the blocks with stage, time left and peak memory; other messages scroll by above it."""

    def __init__(self, console: "Console") -> None:
        from rich import progress as bars

        columns = (
            bars.TextColumn("{task.fields[stage]:9}", markup=False),
            bars.BarColumn(bar_width=30),
            bars.TextColumn("{task.fields[blocks]}", markup=False),
            bars.TextColumn("{task.fields[left]}", markup=False),
            bars.TextColumn("{task.fields[errors]}", markup=False),
            bars.TextColumn("{task.fields[memory]}", markup=False),
        )
        self.display = bars.Progress(*columns, console=console, transient=True, refresh_per_second=2)
        self._task = self.display.add_task("", total=None, stage="", blocks="", left="", errors="", memory="")
        self._seconds, self._blocks = 0.0, 0  # of this process: an interrupted run may have done others

    def line(self, text: str) -> None:
        self.display.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stage(self, name: str) -> None:
        self.display.update(self._task, stage=name, memory=_memory())

    def block(self, done: BlockDone) -> None:
        self._seconds, self._blocks = self._seconds + done.seconds, self._blocks + 1
        left = duration(self._seconds / self._blocks * (done.total - done.done))
        self.display.update(
            self._task,
            completed=done.done,
            total=done.total,
            blocks=f"block {done.done}/{done.total}",
            left=f"{left} left for the blocks",
            errors=", ".join(f"{lane} {error:.2%} off" for lane, error in done.errors.items()),
            memory=_memory(),
        )

    def scored(self, kl: Mapping[str, float]) -> None:
        self.line(scores_line(kl))


def _memory() -> str:
    return f"peak {size(peak_rss())}"


@contextmanager
def progress(quiet: bool, as_json: bool = False) -> Iterator[Progress]:
    """The log for a run: nothing, JSON lines, a live display on a terminal, or plain lines."""
    if quiet:
        yield SILENT
    elif as_json:
        yield JsonLines()
    elif Screen(sys.stderr).isatty():
        from rich.console import Console

        console = Console(file=cast(IO[str], Screen(sys.stderr)))
        if console.is_dumb_terminal:
            yield Lines(say)
        else:
            live = Live(console)
            with live.display:
                yield live
    else:
        yield Lines(say)


@contextmanager
def stoppable() -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal end the run by an exception, a second one the process; what is finished
    is kept. A signal that is ignored (nohup) stays ignored."""

    def stop(number: int, frame: object) -> None:
        for each in previous:
            signal.signal(each, signal.SIG_DFL)
        raise Interrupted

    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {each: signal.getsignal(each) for each in ends if signal.getsignal(each) != signal.SIG_IGN}
    for each in previous:
        signal.signal(each, stop)
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def size(count: float) -> str:
    """
    >>> size(716e6), size(141.2e9), size(12)
    ('716 MB', '141.2 GB', '12 bytes')
    """
    for unit, factor, digits in (("GB", 1e9, 1), ("MB", 1e6, 0), ("KB", 1e3, 0)):
        if count >= factor:
            return f"{count / factor:.{digits}f} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """
    >>> duration(49), duration(3000), duration(40000), duration(5e6)
    ('49 s', '50 min', '11.1 h', '58 days')
    """
    for unit, factor, limit, digits in (("s", 1, 120, 0), ("min", 60, 7200, 0), ("h", 3600, 172800, 1)):
        if seconds < limit:
            return f"{seconds / factor:.{digits}f} {unit}"
    return f"{seconds / 86400:.0f} days"

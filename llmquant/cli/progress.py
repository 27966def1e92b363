"""What a run says on stderr while it works: a live display, plain lines, JSON lines, or nothing."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, cast

from llmquant.cli.console import Screen, as_json, say
from llmquant.errors import Interrupted
from llmquant.log import Event, Log, Scored
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

    def __call__(self, message: str) -> None:
        if isinstance(message, Event):
            self.say("block", message=str(message), **message.as_dict())
        elif isinstance(message, Scored):
            self.say("scored", message=str(message), kl=message.kl)
        else:
            self.say("message", message=str(message))

    def stage(self, name: str) -> None:
        self.say("stage", stage=name)


class Live:
    """A bar over the blocks with stage, time left and peak memory; other messages scroll by above it."""

    def __init__(self, console: "Console") -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.fields[stage]:9}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[blocks]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
            TextColumn("{task.fields[errors]}", markup=False),
            TextColumn("{task.fields[memory]}", markup=False),
        )
        self.display = Progress(*columns, console=console, transient=True, refresh_per_second=2)
        self._task = self.display.add_task("", total=None, stage="", blocks="", left="", errors="", memory="")
        self._seconds, self._blocks = 0.0, 0  # of this process: an interrupted run may have done others

    def __call__(self, message: str) -> None:
        if not isinstance(message, Event):
            self.display.console.print(message, markup=False, highlight=False, soft_wrap=True)
            return
        self._seconds, self._blocks = self._seconds + message.seconds, self._blocks + 1
        left = duration(self._seconds / self._blocks * (message.total - message.done))
        self.display.update(
            self._task,
            completed=message.done,
            total=message.total,
            blocks=f"block {message.done}/{message.total}",
            left=f"{left} left for the blocks",
            errors=", ".join(f"{lane} {error:.2%} off" for lane, error in message.errors.items()),
            memory=_memory(),
        )

    def stage(self, name: str) -> None:
        self.display.update(self._task, stage=name, memory=_memory())


def _memory() -> str:
    return f"peak {size(peak_rss())}"


@contextmanager
def progress(quiet: bool, as_json: bool = False) -> Iterator[Log]:
    """The log for a run: nothing, JSON lines, a live display on a terminal, or plain lines."""
    if quiet:
        yield lambda message: None
    elif as_json:
        yield JsonLines()
    elif Screen(sys.stderr).isatty():
        from rich.console import Console

        console = Console(file=cast(IO[str], Screen(sys.stderr)))
        if console.is_dumb_terminal:
            yield say
        else:
            live = Live(console)
            with live.display:
                yield live
    else:
        yield say


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

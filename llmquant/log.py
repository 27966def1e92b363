"""What a run says of itself: a log is any function of a line of text; it may also want to hear of stages."""

from collections.abc import Callable
from typing import Any

Log = Callable[[str], None]


def silent(message: str) -> None:
    """A log that says nothing."""


class Event(str):
    """The line of a finished block, with its numbers for logs that show more than lines."""

    done: int
    total: int
    seconds: float

    def __new__(cls, line: str, *, done: int, total: int, seconds: float) -> "Event":
        event = super().__new__(cls, line)
        event.done, event.total, event.seconds = done, total, seconds
        return event

    def as_dict(self) -> dict[str, Any]:
        return {"done": self.done, "total": self.total, "seconds": round(self.seconds, 3)}


def stages_of(log: Log) -> Callable[[str], None]:
    """Where stages are told: the log's own `stage`, or nowhere."""
    listener: Callable[[str], None] = getattr(log, "stage", silent)
    return listener

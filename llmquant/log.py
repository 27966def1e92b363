"""What a run says of itself: a log is any function of a line of text; it may also want to hear of stages."""

import logging
from collections.abc import Callable
from typing import Any

Log = Callable[[str], None]


def silent(message: str) -> None:
    """A log that says nothing."""


class Event(str):
    """The line of a finished block, with its numbers for logs that show more than lines.

    errors   ||h_lane - h|| / ||h|| of the evaluation's hidden states behind the block, by lane
    """

    done: int
    total: int
    seconds: float
    errors: dict[str, float]

    def __new__(
        cls, line: str, *, done: int, total: int, seconds: float, errors: dict[str, float] | None = None
    ) -> "Event":
        event = super().__new__(cls, line)
        event.done, event.total, event.seconds, event.errors = done, total, seconds, errors or {}
        return event

    def as_dict(self) -> dict[str, Any]:
        return {
            "done": self.done,
            "total": self.total,
            "seconds": round(self.seconds, 3),
            "relative_errors": self.errors,
        }


class Scored(str):
    """The line after the last block, with the mean KL of every lane in nats."""

    kl: dict[str, float]

    def __new__(cls, kl: dict[str, float]) -> "Scored":
        event = super().__new__(cls, "KL: " + ", ".join(f"{lane} {value:.5f}" for lane, value in kl.items()))
        event.kl = kl
        return event


def stages_of(log: Log) -> Callable[[str], None]:
    """Where stages are told: the log's own `stage`, or nowhere."""
    listener: Callable[[str], None] = getattr(log, "stage", silent)
    return listener


def calm_libraries() -> None:
    """Libraries' notes about optional kernels and dataset cards are not about this job."""
    for library in ("bitsandbytes", "huggingface_hub", "datasets"):
        logging.getLogger(library).setLevel(logging.ERROR)

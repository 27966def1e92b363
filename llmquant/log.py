"""What a run says of itself: a log is any function of a line of text; it may also want to hear of stages."""

import logging
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from llmquant.memory import peak_rss

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


@dataclass
class Stopwatch:
    """Seconds by stage; `on_stage` hears of each as it begins."""

    on_stage: Callable[[str], None] = silent
    seconds: dict[str, float] = field(default_factory=dict)
    start: float = field(default_factory=time.perf_counter)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        self.on_stage(name)
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def cost(self) -> dict[str, Any]:
        """Times, memory and machine: all that may differ between two runs of the same job."""
        import torch

        return {
            "schema_version": 1,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "total_seconds": round(time.perf_counter() - self.start, 3),
            "peak_rss_bytes": peak_rss(),
            "threads": torch.get_num_threads(),
            "machine": f"{platform.system()} {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

"""What a run says of itself while it works: `Progress`, and how a plain function of a line becomes one."""

import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from llmquant.memory import peak_rss


@dataclass(frozen=True)
class BlockDone:
    """A finished block: `done` of `total`, in `seconds`.

    line     what it is for people, in one line
    errors   ||h_lane - h|| / ||h|| of the evaluation's hidden states behind the block, by lane
    """

    line: str
    done: int
    total: int
    seconds: float
    errors: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Progress(Protocol):
    """Hears what a run does. Nothing that it does changes the result; an exception that it raises ends the run."""

    def line(self, text: str) -> None:
        """A line for people."""

    def stage(self, name: str) -> None:
        """A stage begins: prepare, embed, quantize, evaluate, ..."""

    def block(self, done: BlockDone) -> None:
        """A block is finished."""

    def scored(self, kl: Mapping[str, float]) -> None:
        """The evaluation is finished: the mean KL of every lane in nats."""


@dataclass(frozen=True)
class Lines:
    """A function of a line as Progress: it gets blocks and scores as lines, and does not hear of stages."""

    write: Callable[[str], object]

    def line(self, text: str) -> None:
        self.write(text)

    def stage(self, name: str) -> None:
        pass

    def block(self, done: BlockDone) -> None:
        self.write(done.line)

    def scored(self, kl: Mapping[str, float]) -> None:
        self.write(scores_line(kl))


Log = Progress | Callable[[str], object]  # what the Python API takes
SILENT: Progress = Lines(lambda text: None)


def progress_of(log: Log) -> Progress:
    """The Progress that was given to the Python API, or one that gives its lines to a plain function.

    >>> progress_of(print).scored({"rtn": 0.125})
    KL: rtn 0.12500
    """
    return log if isinstance(log, Progress) else Lines(log)


def scores_line(kl: Mapping[str, float]) -> str:
    """`Progress.scored` as a line for people."""
    return "KL: " + ", ".join(f"{lane} {value:.5f}" for lane, value in kl.items())


def calm_libraries() -> None:
    """Libraries' notes about optional kernels, dataset cards and caches of fonts are not about this job."""
    for library in ("bitsandbytes", "huggingface_hub", "datasets", "matplotlib"):
        logging.getLogger(library).setLevel(logging.ERROR)


@dataclass
class Stopwatch:
    """Seconds by stage; `on_stage` hears of each as it begins."""

    on_stage: Callable[[str], object] = SILENT.stage
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

"""Child processes for tests whose libraries read their settings from the environment when they are imported.

Importing takes a process seconds, forking it none: `Warm` is a process that imports once; each task is a fork of it.
"""

import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path


class Task:
    """One fork, on its way or at its end."""

    def __init__(self, warm: "Warm", words: list[str], folder: Path) -> None:
        self._warm, self._said = warm, [folder / "said.out", folder / "said.err"]
        self.pid = warm.ask({"words": words, "folder": str(folder), "said": [str(path) for path in self._said]})

    def wait(self) -> tuple[int, str, str]:
        """Its exit code (negative: the signal that killed it), and what it wrote to stdout and stderr."""
        code = self._warm.answer()
        out, err = (path.read_text() for path in self._said)
        return code, out, err


class Warm:
    """The file `script`, which calls `serve_tasks`, in a process with the environment `env`. One task at a time."""

    def __init__(self, script: str, env: dict[str, str]) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([sys.executable, script], env=env, stdin=pipe, stdout=pipe, text=True)

    def task(self, words: list[str], folder: Path) -> Task:
        """A fork that works on `words` in `folder`."""
        return Task(self, words, folder)

    def ask(self, task: dict[str, object]) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0


def serve_tasks(work: Callable[[list[str]], None]) -> None:
    """For every task on stdin: its process on stdout, and its exit code at its end.

    A fork returns from here after its work, and ends as any other process does.
    """
    for line in sys.stdin:
        task = json.loads(line)
        if (pid := os.fork()) == 0:
            for descriptor, path in enumerate([os.devnull, *task["said"]]):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
            sys.stdin = open(os.devnull)  # noqa: SIM115 (what is left of the old one is the parent's)
            os.chdir(task["folder"])
            return work(task["words"])
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def without_pauses() -> None:
    """The client of the Hub waits no second between its attempts; its own view of `time` only."""
    from huggingface_hub.utils import _http

    _http.time = types.SimpleNamespace(**(vars(time) | {"sleep": lambda seconds: None}))  # type: ignore[assignment]

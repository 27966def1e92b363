"""Every error a user can meet, with its exit code.

    LLMQuantError            1
    |-- RecipeError          2   an option, a recipe or a command line that cannot be used
    |-- SolveError           3   a layer that cannot be quantized under the chosen policy
    |-- SourceError          4   the checkpoint is missing, broken or not supported
    |-- CalibrationError     5   the calibration or evaluation text, or its tokenizer
    |-- FormatError          6   the output format or a runtime cannot hold the plan
    |-- OutputError          7   the output folder or the disk
    |-- VerifyError          8   what was written is not what was computed
    |-- ResumeError          9   an interrupted run that cannot be continued
    `-- HubError            10   the Hub refuses to publish, or cannot be reached

A run that Ctrl-C or SIGTERM ended exits with 75; the same command continues it.

The message is one line: `where: got; expected ...; remedy`.
"""

import difflib
import re
from collections.abc import Iterable

# What other libraries put into their messages and nobody should find in a log: tokens, passwords, signed URLs.
_SECRETS = re.compile(r"\bhf_\w{8,}|(?<=://)[^/\s@]+(?=@)|(?<=\?)[^\s'\"<>]*(?:[Ss]ignature|[Tt]oken)=[^\s'\"<>]*")


class LLMQuantError(Exception):
    """Base of all errors that are the caller's to mend; anything else is a bug of ours."""

    exit_code = 1

    def __init__(self, where: str, got: str, *, expected: str = "", remedy: str = "") -> None:
        parts = [f"{where}: {got}", f"expected {expected}" if expected else "", remedy]
        text = _SECRETS.sub("***", " ".join("; ".join(part for part in parts if part).split()))
        super().__init__("".join(char if char.isprintable() else "?" for char in text))


class RecipeError(LLMQuantError):
    exit_code = 2


class SolveError(LLMQuantError):
    exit_code = 3


class SourceError(LLMQuantError):
    exit_code = 4


class CalibrationError(LLMQuantError):
    exit_code = 5


class FormatError(LLMQuantError):
    exit_code = 6


class OutputError(LLMQuantError):
    exit_code = 7


class VerifyError(LLMQuantError):
    exit_code = 8


class ResumeError(LLMQuantError):
    exit_code = 9


class HubError(LLMQuantError):
    exit_code = 10


class Interrupted(BaseException):
    """A signal; like KeyboardInterrupt, nothing that catches errors may catch it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The remedy for a name that is not among `known`."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}"

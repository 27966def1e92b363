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
    |-- HubError            10   the Hub refuses to publish, or cannot be reached
    `-- RankError           11   another process of the run has ended or does not answer (torchrun)

A run that Ctrl-C or SIGTERM ended exits with 75; the same command continues it.

The message is one line: `where: got; expected ...; remedy`. Its parts are attributes, too, for programs that catch it.

An error about an option names its field, by `option`: the name in the recipe or in the Python API. What the option is
called depends on who called, so the name is only put in when the message is read: `str(error)` spells it as `llmquant
run` does, and the command line as the command that was called does (`eval_tokens` is --tokens in `llmquant eval`).
"""

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

# What other libraries put into their messages and nobody should find in a log. A token of the Hub is hf_ and at least
# thirty letters and digits; folders such as hf_backup_final are not.
_SECRETS = re.compile(
    r"hf_[A-Za-z0-9]{30,}"
    r"|(?<=://)[^/\s]+(?=@)"  # user and password in an address
    r"|(?<=\?)[^\s?'\"<>]*(?i:signature|token|credential|policy|password|sig)=[^\s'\"<>]*"  # a signed address
)
# Control characters, so that no text of others is taken for an option.
_OPTION = re.compile("\x02([a-z_]+)\x03")
# Options of `llmquant run` that are not called as their field.
_RENAMED = {"runtimes": "--for", "timed": "--time", "rules": "--rule"}


def option(field: str) -> str:
    """The place of an option's name in the text of an error. Only errors know how to show it."""
    return f"\x02{field}\x03"


def flag(field: str) -> str:
    """An option as `llmquant run` spells it.

    >>> flag("group_size")
    '--group-size'
    """
    return _RENAMED.get(field) or "--" + field.replace("_", "-")


class LLMQuantError(Exception):
    """Base of all errors that are the caller's to mend; anything else is a bug of ours.

    where, got, expected, remedy   the parts of the message; empty where there is nothing to say
    field                          the recipe field or option that the error is about, None where it is about none
    """

    exit_code = 1

    def __init__(self, where: str, got: str, *, expected: str = "", remedy: str = "", field: str | None = None) -> None:
        self._parts = tuple(_SECRETS.sub("***", part) for part in (where, got, expected, remedy))
        self.where, self.got, self.expected, self.remedy = (_shown(part, flag) for part in self._parts)
        named = _OPTION.match(where)
        self.field = field or (named[1] if named else None)
        super().__init__(self.message(flag))

    def message(self, name_of: Callable[[str], str]) -> str:
        """The one line, with every option called by what `name_of` makes of its field."""
        where, got, expected, remedy = self._parts
        parts = [f"{where}: {got}", f"expected {expected}" if expected else "", remedy]
        return _shown("; ".join(part for part in parts if part), name_of)

    def __reduce__(self) -> tuple[Any, ...]:
        # Not by a call of the class: subclasses take other arguments.
        return _restored, (type(self), self.args, self.__dict__)


def _shown(text: str, name_of: Callable[[str], str]) -> str:
    """`text` in one line of printable characters, with the names of its options."""
    line = " ".join(_OPTION.sub(lambda mark: name_of(mark[1]), text).split())
    return "".join(char if char.isprintable() else "?" for char in line)


def _restored(kind: type[LLMQuantError], args: tuple[Any, ...], state: dict[str, Any]) -> LLMQuantError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


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


class RankError(LLMQuantError):
    exit_code = 11


class Interrupted(BaseException):
    """A signal; like KeyboardInterrupt, nothing that catches errors may catch it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The remedy for a name that is not among `known`."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}"

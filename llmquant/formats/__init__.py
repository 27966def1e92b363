"""How bytes lie. A format turns the canonical codes and scales into named tensors and a config, and reads them back.

A new format is one file beside this one, its entry in `facts.py`, and one line in FORMATS of `table.py`. This module
imports neither torch nor a format before one is asked for: the command line reads `facts.py` for `--help`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmquant.formats.base import Format, LinearSpec
    from llmquant.formats.table import FORMATS

__all__ = ["FORMATS", "Format", "LinearSpec"]

_HOME = {"FORMATS": "table", "Format": "base", "LinearSpec": "base"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llmquant.formats' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"llmquant.formats.{_HOME[name]}"), name)

"""Python code that a checkpoint brings along (`auto_map`): which files it is, and whether they may be run.

Only --trust-remote-code on the command line (`trust_remote_code=True` in the API) allows that; no file can. What is run
is what lies in the checkpoint itself: the folder, or the repository at its pinned commit.
"""

import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from llmquant.errors import SourceError

# Files whose auto_map loaders obey.
_NAMING = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
_REFERENCE = re.compile(r"(\w[\w-]*)\.\w+")  # module.Class, a file beside config.json


def code_files(
    name: str, files: Collection[str], read_json: Callable[[str], dict[str, Any]], local: Callable[[str], Path]
) -> tuple[str, ...]:
    """The Python files that the auto_maps of the checkpoint `name` lead to, and those they import. Runs nothing.

    SourceError where one is missing or would come from another repository, whose revision nothing pins.
    """
    wanted = [_module(f"{name}: {file}", r) for file in _NAMING if file in files for r in references(read_json(file))]
    found: dict[str, None] = {}
    while wanted:
        file = wanted.pop()
        if file in found:
            continue
        if file not in files:
            raise SourceError(f"{name}: {file}", "is missing", expected="all code that auto_map leads to")
        found[file] = None
        wanted += [f"{module.replace('.', '/')}.py" for module in _relative_imports(name, file, local(file))]
    return tuple(sorted(found))


def references(config: Any) -> Iterator[Any]:
    """All that auto_maps at any depth of a config name; None (no such class) left out."""
    waiting = [(config, False)]
    while waiting:  # not recursive: strangers nest as deep as they like
        value, named = waiting.pop()
        if isinstance(value, dict):
            waiting += [(item, named or key == "auto_map") for key, item in value.items()]
        elif isinstance(value, list):
            waiting += [(item, named) for item in value]
        elif named and value is not None:
            yield value


def _module(where: str, reference: Any) -> str:
    """The file of a class reference."""
    if isinstance(reference, str) and "--" in reference:
        raise SourceError(
            where,
            f"auto_map names code of another repository ({reference[:80]!r}), whose revision nothing pins",
            remedy="put its files beside config.json, and module.Class without the repository into auto_map",
        )
    match = _REFERENCE.fullmatch(reference) if isinstance(reference, str) else None
    if match is None:
        raise SourceError(where, f"auto_map names {str(reference)[:80]!r}", expected="module.Class")
    return f"{match[1]}.py"


def _relative_imports(name: str, file: str, path: Path) -> list[str]:
    from transformers.dynamic_module_utils import get_relative_imports

    try:
        return sorted(get_relative_imports(path))
    except UnicodeDecodeError:
        raise SourceError(f"{name}: {file}", "is not UTF-8", expected="Python code") from None

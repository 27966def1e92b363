"""Python code that a checkpoint brings along (`auto_map`): which files it is, and whether they may be run.

Only --trust-remote-code on the command line (`trust_remote_code=True` in the API) allows it; no file can. Only files of
the checkpoint itself are run: those in the folder, or in the repository at its pinned commit.
"""

import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from llmquant.errors import SourceError

# The files in which loaders look for an auto_map.
_NAMING = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
_REFERENCE = re.compile(r"(\w[\w-]*)\.\w+")  # module.Class; the module is a file next to config.json


def code_files(
    name: str, files: Collection[str], read_json: Callable[[str], dict[str, Any]], local: Callable[[str], Path]
) -> tuple[str, ...]:
    """The Python files that the auto_maps of the checkpoint `name` point to, and the files that those import.

    Runs nothing. SourceError if a file is missing or belongs to another repository, whose revision nothing pins.
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
    """Every class that an auto_map names, at any depth of a config. None, which stands for no class, is left out."""
    waiting = [(config, False)]
    while waiting:  # without recursion, because a stranger's config may be nested as deep as it likes
        value, named = waiting.pop()
        if isinstance(value, dict):
            waiting += [(item, named or key == "auto_map") for key, item in value.items()]
        elif isinstance(value, list):
            waiting += [(item, named) for item in value]
        elif named and value is not None:
            yield value


def _module(where: str, reference: Any) -> str:
    """The file of a class reference `module.Class`. SourceError for anything else."""
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

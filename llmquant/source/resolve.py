"""What the user names -> a checked checkpoint: the built-in demo, a local folder, or a commit on the Hub."""

import re
from pathlib import Path

from llmquant.demo import DEMO
from llmquant.errors import SourceError
from llmquant.paths import expanded, shown_name
from llmquant.source.base import NAME_THE_ORIGINAL, Source
from llmquant.source.files import INDEX, SINGLE
from llmquant.source.hub import open_hub

_CHECKPOINT = "a checkpoint folder or a Hub id"
_FILES = (".gguf", ".safetensors", ".json")


def open_source(model: str | Path, revision: str | None = None, *, trust_remote_code: bool = False) -> Source:
    """Open `demo`, a local folder, or a Hub id, whose revision is resolved to a commit once.

    With `trust_remote_code` the user allows Python code of the checkpoint to be run; opening it runs none. Only headers
    and side files have been read on return. SourceError where the checkpoint is missing or malformed.
    """
    if str(model) == "demo":
        return Source("llmquant/demo", DEMO)
    path = expanded(model, SourceError)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # a name that no file can have
        raise SourceError(str(model)[:200], f"cannot be read ({error.strerror})", expected=_CHECKPOINT) from None
    if is_file:
        path = _folder_of(path)
    if is_file or is_folder:
        repo, folder = _in_cache(path, revision)
        commit = folder.name if repo else None
        return Source(repo or shown_name(folder.resolve()), folder, commit, trust_remote_code=trust_remote_code)
    if path.is_absolute() or str(model).startswith((".", "~")) or path.suffix.lower() in _FILES:
        raise SourceError(str(model), "no such folder or file", expected=_CHECKPOINT)
    return open_hub(str(model), revision, trust_remote_code)


def _folder_of(file: Path) -> Path:
    """The checkpoint that a file belongs to."""
    if file.suffix.lower() == ".gguf":
        raise SourceError(str(file), "is a GGUF file", expected=_CHECKPOINT, remedy=NAME_THE_ORIGINAL)
    if file.name not in ("config.json", INDEX, SINGLE):
        raise SourceError(str(file), "is a file", expected=_CHECKPOINT, remedy="name the folder in which it lies")
    if not (file.parent / "config.json").is_file():
        raise SourceError(str(file), "has no config.json beside it", expected=_CHECKPOINT)
    return file.parent


def _in_cache(folder: Path, revision: str | None) -> tuple[str, Path]:
    """The repository and the snapshot that a folder of the Hub's cache stands for; ("", folder) for any other.

    Without a `revision` that is the one of the branch main, else the only one.

    SourceError, with what to name, for a folder that is no checkpoint and holds some.
    """
    if (folder / "config.json").is_file():
        return "", folder
    if match := re.fullmatch(r"models--([^/]+)--([^/]+)", folder.resolve().name):
        repo, ref = f"{match[1]}/{match[2]}", folder / "refs" / (revision or "main")
        snapshots = {path.name: path for path in (folder / "snapshots").glob("*")}
        commit = ref.read_text("utf-8", "replace").strip() if ref.is_file() else revision
        if commit in snapshots:
            return repo, snapshots[commit]
        if revision is not None:
            raise SourceError(str(folder), f"holds no revision {revision!r}", remedy=f"name the repository, {repo}")
        if len(snapshots) == 1:
            return repo, next(iter(snapshots.values()))
    inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
    cached = sorted(path.name.removeprefix("models--").replace("--", "/", 1) for path in folder.glob("models--*--*"))
    if named := cached or [f"{folder}/{name}" for name in inside]:
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        got = "is a cache of the Hub" if cached else "no config.json"
        raise SourceError(str(folder), got, expected=_CHECKPOINT, remedy=f"in it: {', '.join(named[:3])}{more}")
    return "", folder

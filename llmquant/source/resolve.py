"""What the user names -> a checked checkpoint: the built-in demo, a local folder, or a commit on the Hub."""

from pathlib import Path

from llmquant.demo import DEMO
from llmquant.errors import SourceError
from llmquant.paths import expanded, shown_name
from llmquant.source.base import NAME_THE_ORIGINAL, Source
from llmquant.source.hub import open_hub

_CHECKPOINT = "a checkpoint folder or a Hub id"


def open_source(model: str | Path, revision: str | None = None, *, trust_remote_code: bool = False) -> Source:
    """Open `demo`, a local folder, or a Hub id, whose revision is resolved to a commit once.

    With `trust_remote_code` the user allows Python code of the checkpoint to be run; opening it runs none. Only headers
    and side files have been read on return. SourceError where the checkpoint is missing or malformed.
    """
    if str(model) == "demo":
        return Source("llmquant/demo", DEMO)
    path = expanded(model, SourceError)
    if path.is_dir():
        return Source(shown_name(path.resolve()), path, trust_remote_code=trust_remote_code)
    if path.is_file() and path.suffix == ".gguf":
        raise SourceError(str(model), "is a GGUF file", expected=_CHECKPOINT, remedy=NAME_THE_ORIGINAL)
    if path.is_absolute() or str(model).startswith((".", "~")) or path.exists():
        raise SourceError(str(model), "no such folder", expected=_CHECKPOINT)
    return open_hub(str(model), revision, trust_remote_code)

"""What the files of a run's state have in common: read back, and held against the journal's hashes."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llmquant.errors import ResumeError, option
from llmquant.run_dir.manifest import sha256


def damage(path: Path, digest: str) -> str:
    """What is wrong with the file whose hash the journal names, or ""."""
    try:
        return "" if sha256(path) == digest else "its SHA-256 differs"
    except OSError as error:
        return error.strerror or str(error)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a state. ResumeError where the file can no longer be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ResumeError(
            str(path), f"cannot be read ({error})", remedy=f"start again with {option('resume')} never"
        ) from None

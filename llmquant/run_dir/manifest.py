"""manifest.json of a finished folder: size and SHA-256 of every file."""

import hashlib
import json
from pathlib import Path
from typing import Any

MANIFEST, COST = "manifest.json", "cost.json"


def is_finished(folder: Path) -> bool:
    """Whether llmquant wrote `folder` and finished it."""
    return (folder / MANIFEST).is_file() and (folder / "report.json").is_file()


def files_in(folder: Path) -> list[str]:
    """Names of all files in `folder` and below it, relative to it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def facts(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_bytes(value: Any) -> bytes:
    """The bytes of a JSON file, as every one of an output is written. Bytes of a file's name that are no UTF-8 are
    escaped, as JSON knows it."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "backslashreplace")

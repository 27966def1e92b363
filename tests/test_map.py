"""CONTRIBUTING.md's map names every module of the package, and nothing that does not exist."""

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
MAP, BESIDE = TEXT[TEXT.index("## The map") :].split("Beside the package:")
FILES = [line.split("|")[1] for line in MAP.splitlines() if line.startswith("| `")]
NAMES = {name for cell in FILES for name in re.findall(r"`([^`]+)`", cell)}


def test_every_module_is_in_the_map() -> None:
    assert [name for name in modules() if not any(covers(entry, name) for entry in NAMES)] == []


def test_everything_in_the_map_exists() -> None:
    assert [entry for entry in sorted(NAMES) if not any(covers(entry, name) for name in modules())] == []
    for folder in re.findall(r"^\| `([^`]+/)` \|", BESIDE, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder


def test_every_folder_of_modules_is_installed() -> None:
    """A test run from the source tree would not miss one that the wheel lacks."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    folders = {Path("llmquant", module).parent for module in modules()}
    assert {".".join(folder.parts) for folder in folders} - set(packages) == set()


def modules() -> list[str]:
    package = ROOT / "llmquant"
    files = [*package.rglob("*.py"), *package.glob("*.jinja")]
    return sorted(str(file.relative_to(package)) for file in files if file.parent.name != "demo")


def covers(entry: str, module: str) -> bool:
    """`grid.py`, `solvers/` or `gguf_*.py`."""
    return module.startswith(entry) if entry.endswith("/") else fnmatch(module, entry)

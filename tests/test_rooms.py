"""The house: imports go down from room to room, never in a circle, and the map in CONTRIBUTING shows every room."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llmquant"
# A room, or a module at the top level, imports from lower ranks only: no exceptions.
RANK = {
    **dict.fromkeys(("errors", "memory", "versions", "demo"), 0),
    **dict.fromkeys(("ahead", "log", "paths", "ranks"), 1),
    "quant": 2,
    "formats": 3,
    "rules": 4,
    "recipe": 5,
    "source": 5,
    **dict.fromkeys(("gguf", "text", "model", "run_dir"), 6),
    "outside": 7,
    "treatments": 8,
    **dict.fromkeys(("checkpoint", "plan", "lanes", "blocks", "coverage"), 9),
    "report": 10,
    "output": 11,
    "finished": 11,
    "draft": 12,
    "job": 13,
    **dict.fromkeys(("hub", "export", "comparison", "result", "hidden", "curvature", "recovery"), 14),
    **dict.fromkeys(("allocation", "scoring"), 15),
    "loop": 16,
    **dict.fromkeys(("pipeline", "preflight"), 17),
    "finetuning": 18,
    "cli": 19,
    **dict.fromkeys(("__init__", "__main__"), 20),
}


@cache
def modules() -> dict[str, Path]:
    """Dotted names below `llmquant`, "" for the package itself; files by name."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(name: str) -> Iterator[tuple[str, list[str]]]:
    """(module, names) of every import from the package, those inside functions and TYPE_CHECKING, too."""
    for node in ast.walk(ast.parse(modules()[name].read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "llmquant":
            assert node.level == 0
            module = (node.module or "").removeprefix("llmquant").removeprefix(".")
            inner = [alias.name for alias in node.names if f"{module}.{alias.name}".lstrip(".") in modules()]
            for leaf in inner:
                yield f"{module}.{leaf}".lstrip("."), []
            if len(inner) < len(node.names):
                yield module, [alias.name for alias in node.names if alias.name not in inner]
        elif isinstance(node, ast.Import):
            assert not any(alias.name.partition(".")[0] == "llmquant" for alias in node.names), name


def room(name: str) -> str:
    return name.partition(".")[0] or "__init__"


def test_every_room_has_a_rank() -> None:
    assert {room(name) for name in modules()} == set(RANK)


@pytest.mark.parametrize("name", modules())
def test_imports_go_down(name: str) -> None:
    for module, _ in imports(name):
        assert room(module) == room(name) or RANK[room(module)] < RANK[room(name)], f"{name} imports {module}"


def test_no_circle_inside_a_room() -> None:
    arrows = {name: {module for module, _ in imports(name) if module != name} for name in modules()}
    while arrows:
        free = [name for name, out in arrows.items() if not out & arrows.keys()]
        assert free, f"a circle among {sorted(arrows)}"
        for name in free:
            del arrows[name]


PLAIN = (
    *(ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.Set, ast.BinOp, ast.UnaryOp),
    *(ast.expr_context, ast.operator, ast.unaryop),
)


def constants(name: str) -> set[str]:
    """Names that a module binds to plain values: texts, numbers, and containers of them."""
    found = set()
    for node in ast.parse(modules()[name].read_text("utf-8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            plain = all(isinstance(part, PLAIN) for part in ast.walk(node.value))
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            found |= {n.id for n in names if plain and isinstance(n, ast.Name)}
    return found


@pytest.mark.parametrize("name", modules())
def test_no_module_is_imported_for_one_constant(name: str) -> None:
    for module, names in imports(name):
        assert len(names) != 1 or names[0] not in constants(module), f"{name} imports {module} for {names[0]}"


def test_the_map_shows_every_room() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    tree = text[text.index("```text\n") :].split("```")[1]
    shown = re.findall(r"^  (\w+(?: \w+)*)  ", tree, re.MULTILINE)
    assert {name for line in shown for name in line.split()} == set(RANK)

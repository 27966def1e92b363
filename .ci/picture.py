"""The house in numbers, from imports and definitions alone: python .ci/picture.py [CHECKOUT]"""

import ast
import io
import sys
import tokenize
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(sys.argv[1] if len(sys.argv) > 1 else ".") / "llmquant"
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in FILES.items()}


def imported(name: str) -> set[str]:
    """Modules of the package that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llmquant"):
            found |= {m if (m := f"{node.module}.{alias.name}") in FILES else node.module for alias in node.names}
    return (found & FILES.keys()) - {name}


ARROWS = {name: imported(name) for name in FILES}


def circle() -> list[str]:
    """The modules of a circle, if there is one."""
    try:
        list(TopologicalSorter(ARROWS).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


@cache
def chain(name: str) -> int:
    return 1 + max(map(chain, ARROWS[name]), default=0)


def signatures() -> list[tuple[int, str]]:
    """(number of parameters, name) of every function, the longest first."""
    found = []
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                inside = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                found.append((sum(arg.arg not in ("self", "cls") for arg in inside), f"{name}.{node.name}"))
    return sorted(found, reverse=True)


def prose_lines(name: str) -> int:
    """Lines of comments and docstrings."""
    lines = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            lines |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    reader = io.StringIO(FILES[name].read_text("utf-8")).readline
    return len(lines | {t.start[0] for t in tokenize.generate_tokens(reader) if t.type == tokenize.COMMENT})


def main() -> None:
    lengths = {name: len(path.read_text("utf-8").splitlines()) for name, path in FILES.items()}
    rooms = [path for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))]
    print(f"{len(FILES)} modules, {len(list(PACKAGE.glob('*.py')))} of them at the top level, in {len(rooms)} rooms")
    ring = circle()
    longest = "in circles" if ring else f"{max(map(chain, FILES))} modules"
    print(f"{sum(map(len, ARROWS.values()))} imports; longest chain {longest}; a circle: {' -> '.join(ring) or 'none'}")
    print("longest signatures:", ", ".join(f"{name} {count}" for count, name in signatures()[:4]))
    print(f"functions with more than six parameters: {sum(count > 6 for count, _ in signatures())}")
    print(f"comments and docstrings: {sum(map(prose_lines, FILES)) / sum(lengths.values()):.1%} of the lines")
    print(f"files above 300 lines: {sum(length > 300 for length in lengths.values())}")


if __name__ == "__main__":
    main()

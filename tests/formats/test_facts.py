"""Facts about formats stand in one place, agree with the code, and can be read without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from linears import spec_of, weight_of

from llmquant.errors import FormatError
from llmquant.formats import FORMATS
from llmquant.formats.facts import FACTS, GROUPS, WIDTHS
from llmquant.output.verify import DECODERS
from llmquant.quant.grid import QuantizedWeight
from llmquant.quant.solvers import SOLVERS
from llmquant.source.layouts import LAYOUTS

PACKAGE = Path(__file__).parents[2] / "llmquant"
every_format = pytest.mark.parametrize("name", FORMATS)
# Who may write a format's name, and why.
ALLOWED = {
    "formats": "the formats",
    "output/verify.py": "independent readers, which take nothing from `formats`",
    "output/check.py": "as verify.py",
    "output/check_files.py": "as verify.py",
    "source/layouts.py": "quant_method in configs that other tools wrote",
    "source/stated.py": "as in layouts.py",
    "gguf": "the room of that format",
    "preflight/doctor.py": "PACKAGES: compressed-tensors is a package, too",
}


def holds(name: str, bits: int, group: int, *, symmetric: bool = True) -> bool:
    try:
        FORMATS[name].check([spec_of(bits, group, (64, 256), symmetric=symmetric, dtype=torch.float32)])
    except FormatError:
        return False
    return True


def test_every_format_has_facts_and_they_are_in_one_order() -> None:
    assert list(FACTS) == list(FORMATS)
    assert all(FORMATS[name].facts is facts for name, facts in FACTS.items())


@every_format
def test_a_format_takes_what_its_facts_say_and_nothing_else(name: str) -> None:
    facts = FACTS[name]
    assert tuple(bits for bits in WIDTHS if holds(name, bits, 64)) == facts.bits
    assert tuple(group for group in GROUPS if holds(name, facts.bits[-1], group)) == facts.groups
    assert tuple(bits for bits in WIDTHS if holds(name, bits, 64, symmetric=False)) == facts.zero_points


@every_format
def test_dense_formats_give_weights_back_and_others_codes(name: str) -> None:
    spec = spec_of(4, 32, (32, 96))
    found = FORMATS[name].read(spec, FORMATS[name].tensors(spec, weight_of(spec)).__getitem__)
    assert isinstance(found, QuantizedWeight) != FACTS[name].dense
    assert (name in DECODERS) != FACTS[name].dense
    assert not FACTS[name].exportable or name in LAYOUTS


def test_names_of_formats_are_written_nowhere_else() -> None:
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        place = file.relative_to(PACKAGE).as_posix()
        if place in ALLOWED or place.partition("/")[0] in ALLOWED:
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            name = node.value if isinstance(node, ast.Constant) else None
            # The solver GPTQ and the format GPTQ have one name.
            solver = name in SOLVERS and (place.startswith("quant/") or place in ("recipe.py", "rules.py"))
            if name in FACTS and not solver:
                found.append(f"{place}:{node.lineno}: {name!r}")
    assert not found


def test_facts_and_recipes_are_read_without_torch() -> None:
    code = "import sys, llmquant.recipe, llmquant.cli.app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"

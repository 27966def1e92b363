"""README: its commands are those that CI runs, its options and recipes exist, its tables and figures are true."""

import re
import runpy
import shlex
from pathlib import Path

from llmquant.cli.app import main
from llmquant.recipe import Recipe, load_recipe, make_recipe, recipe_folder

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PARTS = runpy.run_path(str(ROOT / ".ci" / "readme.py"))


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    return [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]


def test_ci_runs_the_test_command_word_for_word() -> None:
    command = next(line for line in commands() if "pytest" in line)
    assert command in (ROOT / ".ci" / "run").read_text()


def test_every_option_in_the_readme_exists(capsys) -> None:  # type: ignore[no-untyped-def]
    for command in commands():
        _, _, call = command.partition("python -m llmquant ")
        if call:
            words = shlex.split(call)
            assert main([words[0], "--help"]) == 0
            shown = capsys.readouterr().out
            for option in (word for word in words if word.startswith("--")):
                assert option in shown, (option, command)


def test_recipes_load_by_name_and_by_path() -> None:
    files = sorted(recipe_folder().glob("*.toml"))
    assert {file.stem for file in files} >= {"w4g128", "w8g128", "rtn-w4"}
    for file in files:
        assert make_recipe("x", file.stem) == make_recipe("x", file)
    assert make_recipe("x", "w8g128").bits == 8
    assert make_recipe("x", "w8g128", {"bits": 4}).bits == 4
    assert make_recipe("x", "w4g128") == Recipe(group_size=128)
    assert set(load_recipe("rtn-w4")) <= set(Recipe.__dataclass_fields__)


def test_generated_parts_and_figures_are_up_to_date() -> None:
    new, wrong = PARTS["renewed"](README)
    assert new == README, "run python .ci/readme.py"
    assert not wrong
    assert {name for _, kind, name, *_ in PARTS["PART"].findall(README) if kind == "generated"} == set(PARTS["PARTS"])
    assert "<!-- figures: " in README


def test_what_is_out_of_date_is_noticed() -> None:
    stale = README.replace("| `verify` | ", "| `verify` | Perhaps ")
    assert stale != README
    assert PARTS["renewed"](stale) == (README, [])
    report = re.search(r"<!-- figures: (.+?) -->.*?llmquant +4\.1(\d)", README, re.DOTALL)
    assert report is not None
    digit = report.start(2)
    better = README[:digit] + str((int(README[digit]) + 1) % 10) + README[digit + 1 :]
    assert PARTS["renewed"](better) == (better, [report[1]])  # figures are never written


def test_formats_table_against_the_lint() -> None:
    rows = {line.split("`")[1]: line for line in PARTS["formats"]().splitlines() if line.startswith("| `")}
    assert "| 4 | " in rows["awq"]
    assert rows["awq"].split(" | ")[3] == "yes"
    assert rows["mlx"].endswith("| mlx-lm |")
    assert "llama.cpp" in rows["gguf"]
    assert all("llama.cpp" not in line for name, line in rows.items() if name != "gguf")

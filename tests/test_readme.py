"""README's commands are the ones that CI runs, and name options and recipes that exist."""

import re
import shlex
from pathlib import Path

from llmquant.cli import main
from llmquant.recipe import Recipe, load_recipe, make_recipe, recipe_folder

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


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
    assert make_recipe("x", "w4g128") == Recipe()
    assert set(load_recipe("rtn-w4")) <= set(Recipe.__dataclass_fields__)

"""The command line that makes a report's checkpoint again."""

import shlex
from typing import Any

from llmquant.errors import flag
from llmquant.recipe import Recipe, make_recipe
from llmquant.report.data import RunReport


def command_of(report: RunReport) -> str:
    """The command line that makes this checkpoint again: the model, its revision, and all that differs from defaults.

    A local folder is given by its name only.
    """
    model = "demo" if report.model.id == "llmquant/demo" else report.model.id
    words = ["llmquant", "run", "--model", model]
    if report.model.revision:
        words += ["--revision", report.model.revision]
    if report.compute.trust_remote_code:
        words.append("--trust-remote-code")
    defaults = make_recipe(model).as_dict()
    recipe: dict[str, Any] = dict(report.recipe)
    if exports := recipe.pop("exports", []):
        recipe["format"] = ",".join([recipe["format"], *exports])
    for name in Recipe.__dataclass_fields__:
        value = recipe.get(name)
        if name in recipe and value != defaults.get(name):
            words += _flag(name, value)
    return " ".join(map(shlex.quote, words))


def _flag(name: str, value: Any) -> list[str]:
    if name == "symmetric":
        return [] if value else ["--asymmetric"]
    if isinstance(value, bool):
        return [flag(name) if value else f"--no-{name.replace('_', '-')}"]
    if isinstance(value, list | tuple):
        return [word for item in value for word in (flag(name), str(item))]
    return [] if value is None else [flag(name), str(value)]

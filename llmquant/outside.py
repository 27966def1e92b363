"""The matrices outside the blocks that a model runs: its head and its embedding. They stay in 16 bit, unless the recipe
wants them quantized, and a format holds them so."""

from llmquant.errors import FormatError, RecipeError, option
from llmquant.formats.facts import FACTS, formats_that
from llmquant.model.skeleton import Skeleton
from llmquant.quant.grid import QuantScheme
from llmquant.recipe import Recipe
from llmquant.rules import Ignored


def outside(skeleton: Skeleton) -> dict[str, str]:
    """Module -> the option that has it quantized."""
    parts = {
        "lm_head_bits": skeleton.model.get_output_embeddings(),
        "embed_bits": skeleton.model.get_input_embeddings(),
    }
    found = {}
    for name, part in parts.items():
        module = next((path for path, other in skeleton.modules.items() if other is part), None)
        param = f"{module}.weight"
        if module is not None and param in skeleton.weights.names and len(skeleton.weights.shape(param)) == 2:
            found[module] = name
    return found


def refuse_outside(format_name: str, name: str, module: str) -> None:
    """FormatError where a format does not hold such a matrix quantized; `name` is the option's."""
    if name not in FACTS[format_name].outside:
        able = formats_that(lambda facts: name in facts.outside)
        raise FormatError(option(name), f"{format_name} does not hold {module} quantized", expected=" or ".join(able))


def outside_schemes(skeleton: Skeleton, recipe: Recipe) -> dict[str, tuple[QuantScheme | None, str]]:
    """Those that the recipe wants quantized: module -> (scheme, why); None for one that --ignore keeps.

    RecipeError where the model has no such matrix of its own, FormatError where a format does not hold it quantized.
    """
    by_option = {name: module for module, name in outside(skeleton).items()}
    group = recipe.group_size if isinstance(recipe.group_size, int) else -1  # "auto" is being chosen
    found: dict[str, tuple[QuantScheme | None, str]] = {}
    for name in ("lm_head_bits", "embed_bits"):
        if (bits := getattr(recipe, name)) is None:
            continue
        if (module := by_option.get(name)) is None:
            raise RecipeError(option(name), f"{skeleton.where} has no such matrix", remedy="leave it out")
        _refuse_tied(skeleton, name, f"{module}.weight")
        for format_name in recipe.formats:
            refuse_outside(format_name, name, module)
        found[module] = QuantScheme(bits, group, True), f"--{name.replace('_', '-')} {bits}"
        for pattern in recipe.ignore:
            if Ignored(pattern).matches(f"{module}.weight", module):
                found[module] = None, f"--ignore {pattern}"
    return found


def _refuse_tied(skeleton: Skeleton, name: str, param: str) -> None:
    """RecipeError for a head that is the embedding, and for an embedding whose tied head is stored beside it."""
    if (owner := skeleton.weights.tied.get(param)) is not None:
        remedy = f"use {option('embed_bits')}, which is for both"
        raise RecipeError(option(name), f"{param} is tied to {owner}", remedy=remedy)
    twice = [other for other, of in dict(skeleton.model.all_tied_weights_keys).items() if of == param]
    if stored := [other for other in twice if other not in skeleton.weights.tied]:
        raise RecipeError(
            option(name), f"{skeleton.where} holds {param} a second time", remedy=f"leave out {stored[0]}"
        )

"""llmquant: quantize Hugging Face causal LMs block by block, and prove the result.

import llmquant
report = llmquant.quantize("demo", llmquant.make_recipe("demo", flags={"bits": 4}), out="demo-W4")
print(report.lanes["llmquant"]["kl_mean"])
"""

from typing import TYPE_CHECKING, Any

from llmquant import versions

if TYPE_CHECKING:
    from llmquant.comparison import compare, evaluate
    from llmquant.errors import LLMQuantError
    from llmquant.finetuning import finetune
    from llmquant.pipeline import quantize
    from llmquant.recipe import Recipe, make_recipe
    from llmquant.report.data import Report

__version__ = versions.VERSION
__all__ = ["LLMQuantError", "Recipe", "Report", "compare", "evaluate", "finetune", "make_recipe", "quantize"]

_HOME = {
    "LLMQuantError": "errors",
    "compare": "comparison",
    "evaluate": "comparison",
    "finetune": "finetuning",
    "Recipe": "recipe",
    "make_recipe": "recipe",
    "quantize": "pipeline",
    "Report": "report.data",
}


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; `--help` and shell completion should not wait for them.
    if name not in _HOME:
        raise AttributeError(f"module 'llmquant' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"llmquant.{_HOME[name]}"), name)

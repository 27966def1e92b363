"""How codes are chosen. A solver is a pure function, (LayerTask, SolveOptions) -> Solution: it changes no tensor that
it is given, and knows nothing of models, files or recipes.

    rtn      every weight to the nearest level of a plain grid, without any data
    nearest  of a searched grid: for embeddings and heads, which no recipe names a method for
    gptq     with the Hessian of the layer's input: later columns make up for the errors of earlier ones

A new solver is one file and one line in SOLVERS; `tests/quant/test_solvers.py` runs the same tests on every entry.
"""

from collections.abc import Callable

from llmquant.quant.solvers.base import Curvature, LayerTask, Solution, SolveOptions
from llmquant.quant.solvers.gptq import solve_gptq
from llmquant.quant.solvers.rtn import solve_nearest, solve_rtn

Solver = Callable[[LayerTask, SolveOptions], Solution]

SOLVERS: dict[str, Solver] = {"gptq": solve_gptq, "nearest": solve_nearest, "rtn": solve_rtn}
# Solvers that need no Hessian: a run with one of them reads no calibration text and runs no calibration forwards.
DATA_FREE = frozenset({"nearest", "rtn"})
# Solvers that count errors as the model's own predictions weigh them, where that was measured.
CURVED = frozenset({"gptq"})

__all__ = ["CURVED", "DATA_FREE", "SOLVERS", "Curvature", "LayerTask", "Solution", "SolveOptions", "Solver"]

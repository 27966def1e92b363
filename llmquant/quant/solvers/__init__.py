"""How codes are chosen. A solver is a pure function: tensors in, tensors out.

A new solver is one file and one line in SOLVERS.
"""

from collections.abc import Callable

from llmquant.quant.solvers.base import LayerTask, Solution, SolveOptions
from llmquant.quant.solvers.gptq import solve_gptq
from llmquant.quant.solvers.rtn import solve_rtn

Solver = Callable[[LayerTask, SolveOptions], Solution]

SOLVERS: dict[str, Solver] = {"gptq": solve_gptq, "rtn": solve_rtn}
# Solvers that need no Hessian: no calibration text is read and no forward pass is run for them.
DATA_FREE = frozenset({"rtn"})

__all__ = ["DATA_FREE", "SOLVERS", "LayerTask", "Solution", "SolveOptions", "Solver"]

"""The kernels for CPUs, by Numba: machine code for the processor at hand, kept in its cache from run to run.

They take NumPy arrays, and tell the compiler what lets it use the widest instructions: rows lie contiguous in memory,
the innermost loop runs over neighbours, and a product and a sum may be one instruction.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """`function` as machine code."""
    return _made(function, {"contract"})


def compiled_in_any_order(function: Function) -> Function:
    """The same, where sums may be added up in any order: several terms at once."""
    return _made(function, {"contract", "reassoc"})


def _made(function: Function, fastmath: set[str]) -> Function:
    options: dict[str, Any] = {"fastmath": fastmath, "error_model": "numpy", "nogil": True}
    try:
        made: Any = njit(cache=True, **options)(function)
    except RuntimeError:  # there is no folder that its cache can be written to
        made = njit(**options)(function)
    return cast(Function, made)


def array(x: Tensor) -> NDArray[Any]:
    """A tensor of any device as a contiguous array; that of the CPU shares its memory, if it is contiguous."""
    return np.ascontiguousarray(x.detach().cpu().numpy())

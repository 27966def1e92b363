"""The solver's inner loops as Triton kernels, for GPUs.

The solvers do a few numbers at a time, each needing the ones before it. In torch every operator on them is a launch of
some microseconds, and a layer of 4096 x 14336 takes millions. Here one launch does all that needs no other tile
(`tiles.py`), a strip of columns (`descent.py`), or all candidates for the scales (`grids.py`).

Each kernel has a torch version as its oracle, and agrees with it in Triton's interpreter on the CPU
(tests/quant/test_kernels.py). Sums are added up in another order, so a weight between two levels may get the other one.

They run on CUDA and ROCm devices where Triton is installed, as it is with torch's own builds for those. No test of ours
runs on every GPU, and each compiles them anew: so a run first solves a small layer both ways (`solvers/insurance.py`),
and where that differs, says so and goes on without them. A report that names a version of Triton was solved by them.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

MOST_IN_GROUP = 4096  # weights whose scale is searched by a kernel

_refused: set[str] = set()  # types of devices on which they gave something else than torch


def used_for(x: Tensor) -> bool:
    """Whether the kernels take this tensor: float32, on a device that they run on."""
    return x.dtype == torch.float32 and runs_on(x.device)


def runs_on(device: torch.device) -> bool:
    """Whether kernels are used on this device."""
    return device.type == "cuda" and device.type not in _refused and find_spec("triton") is not None


def refuse(device: torch.device) -> None:
    """Use none on devices of this type from now on."""
    _refused.add(device.type)


def allow(device: torch.device) -> None:
    """Use them again."""
    _refused.discard(device.type)

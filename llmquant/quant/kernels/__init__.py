"""The solver's inner loops as Triton kernels, for GPUs.

The solvers do a few numbers at a time, each needing the ones before it. In torch every operator on them is a launch of
some microseconds, and a layer of 4096 x 14336 takes millions. Here one launch does all that needs no other tile
(`tiles.py`), a strip of columns (`descent.py`), or all candidates for the scales (`grids.py`).

Each kernel has a torch version as its oracle, and agrees with it in Triton's interpreter on the CPU
(tests/quant/test_kernels.py). Sums are added up in another order, so a weight between two levels may get the other one.

They run on CUDA and ROCm devices where Triton is installed, as it is with torch's own builds for those. The report says
which were used.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

MOST_IN_GROUP = 4096  # weights whose scale is searched by a kernel


def used_for(x: Tensor) -> bool:
    """Whether the kernels take this tensor: float32, on a device that they run on."""
    return x.dtype == torch.float32 and runs_on(x.device)


def runs_on(device: torch.device) -> bool:
    """Whether there are kernels for this device."""
    return device.type == "cuda" and find_spec("triton") is not None

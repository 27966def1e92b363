"""The solver's inner loops, compiled: by Numba for CPUs, by Triton for GPUs.

What a solver does one weight after another, each needing the ones before it, is a few numbers at a time. As operators
of torch that takes tens of times longer than the arithmetic: some microseconds for each, and a layer has millions. So
three loops are kernels, in two versions with the same arguments:

    round_blocks   codes, each with the feedback of those before it (`solvers/two_sided.py`)
    search         scales, by trying candidates (`grid.py`)
    descend        codes of a group once more, while all others stay (`solvers/refine.py`)

All else, the products of whole matrices above all, is torch. `gpu/` is used for float32 on CUDA and ROCm devices where
Triton is installed, as it is with torch's own builds for them; for other devices numbers go to `cpu/` and back. No test
of ours runs on every GPU, and each compiles kernels anew: so a run first solves a small layer on its GPU and on the CPU
(`solvers/insurance.py`), and where they differ, says so and has the CPU do it. A report names Triton if it was used.

Sums are added up in another order, so a weight between two levels may get the other one of them.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

Grid = tuple[Tensor, Tensor | None]  # scales_OG, zeros_OG

_refused: set[str] = set()  # types of devices on which they gave something else than the CPU
_MOST_IN_GROUP = 4096  # weights whose scale a GPU searches


def round_blocks(
    target_RC: Tensor,
    feedback_CC: Tensor,
    blocks: Sequence[tuple[int, Tensor | None]],
    scales_RG: Tensor,
    zeros_RG: Tensor | None,
    groups_C: Tensor,
    code_range: tuple[int, int],
) -> Tensor:
    """codes_RC, int8: the nearest ones to v_ij, row by row and column by column.

    feedback_CC   U_lj / U_jj above the diagonal, 0 elsewhere
    blocks        number of rows and A_ik / A_ii below the diagonal, 0 elsewhere, of one block of rows after the other;
                  None: these rows know nothing of each other
    groups_C      the group of every column
    """
    given = (target_RC, feedback_CC, blocks, scales_RG, zeros_RG, groups_C, code_range)
    if used_for(target_RC):
        from llmquant.quant.kernels.gpu.tiles import round_blocks as on_gpu

        return on_gpu(*given)
    from llmquant.quant.kernels.cpu.tiles import round_blocks as on_cpu

    return on_cpu(*given)


def search(
    weight_OI: Tensor,
    importance_I: Tensor,
    full_OG: Tensor,
    zeros_OG: Tensor | None,
    code_range: tuple[int, int],
    coarse: Sequence[float],
    fine: Sequence[float],
) -> Grid:
    """The best (scales_OG, zeros_OG) of every group by sum h |e|^2.5.

    full_OG, zeros_OG   what ratios are taken of, and the zeros that the search starts from; None: both signs are tried
    coarse, fine        ratios tried first, and steps around the best of them
    """
    given = (weight_OI, importance_I, full_OG, zeros_OG, code_range, coarse, fine)
    if used_for(weight_OI) and weight_OI.shape[1] // full_OG.shape[1] <= _MOST_IN_GROUP:
        from llmquant.quant.kernels.gpu.grids import search as on_gpu

        return on_gpu(*given)
    from llmquant.quant.kernels.cpu.grids import search as on_cpu

    return on_cpu(*given)


def descend(
    H_gg: Tensor, gradient_gO: Tensor, level_gO: Tensor, scale_O: Tensor, low_O: Tensor, high_O: Tensor
) -> Tensor:
    """step_gO, by s times how far each level moved: c_j <- clip(round(c_j + G_j / (s H_jj)), low, high), one by one.

    level_gO and gradient_gO change in place, G by -H step. low_O and high_O: one bound for each row, or one for all.
    """
    given = (H_gg, gradient_gO, level_gO, scale_O, low_O, high_O)
    if used_for(gradient_gO):
        from llmquant.quant.kernels.gpu.descent import descend as on_gpu

        return on_gpu(*given)
    from llmquant.quant.kernels.cpu.descent import descend as on_cpu

    return on_cpu(*given)


def used_for(x: Tensor) -> bool:
    """Whether the GPU's kernels take this tensor."""
    return x.dtype == torch.float32 and runs_on(x.device)


def runs_on(device: torch.device) -> bool:
    """Whether the GPU's kernels are used on this device."""
    return device.type == "cuda" and device.type not in _refused and find_spec("triton") is not None


def refuse(device: torch.device) -> None:
    """Use none on devices of this type from now on."""
    _refused.add(device.type)


def allow(device: torch.device) -> None:
    """Use them again."""
    _refused.discard(device.type)

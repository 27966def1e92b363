"""An insurance: before the work, one small layer is solved by the kernels of the GPU that will do it, and by the CPU's.

A compiler that makes something else of a kernel would spoil every layer, and nothing behind the solver could tell.
"""

import torch

from llmquant.quant import kernels
from llmquant.quant.grid import QuantScheme
from llmquant.quant.solvers.base import LayerTask, SolveOptions
from llmquant.quant.solvers.gptq import solve_gptq

_TOLERANCE = 0.02  # of the loss: a weight between two levels may get the other one, and its neighbours make up for it


def refuse_wrong_kernels(device: torch.device) -> str:
    """What is wrong with this device's own kernels, which are then not used; "" where they agree with the CPU's."""
    if not kernels.runs_on(device):
        return ""
    try:
        ours = _losses(device)
    except Exception as error:  # whatever a compiler or a driver raises
        kernels.refuse(device)
        return " ".join(f"{type(error).__name__}: {error}".split())[:160]
    kernels.refuse(device)
    theirs = _losses(device)
    if all(abs(a - b) <= _TOLERANCE * b for a, b in zip(ours, theirs, strict=True)):
        kernels.allow(device)
        return ""
    pairs = ", ".join(f"{a:.4g} for {b:.4g}" for a, b in zip(ours, theirs, strict=True))
    return f"losses of a small layer are {pairs}"


def _losses(device: torch.device) -> list[float]:
    """Of a made-up layer: with feedback between rows or without, on both kinds of grid."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = 40, 64

    def correlated(width: int) -> torch.Tensor:
        x = torch.randn(8 * width, width, generator=generator) @ torch.randn(width, width, generator=generator)
        return (x.T @ x / len(x)).to(device)

    weight_OI = torch.randn(rows, columns, generator=generator).to(device)
    H_II, H_OO = correlated(columns), ((torch.arange(rows, device=device), correlated(rows)),)
    options = SolveOptions(sweeps=1, refit=True)
    return [
        float(solve_gptq(LayerTask("", weight_OI, H_II, 8 * columns, scheme, H_OO=curved), options).loss_O.sum())
        for scheme in (QuantScheme(4, 64), QuantScheme(3, 32, symmetric=False))
        for curved in ((), H_OO)
    ]

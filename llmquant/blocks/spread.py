"""A task for the solver, its rows spread over ranks: rows, or the blocks of rows of H_O, know nothing of each other."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmquant.blocks.measure import Found, found
from llmquant.quant.grid import stacked
from llmquant.quant.solvers import SOLVERS, LayerTask, SolveOptions
from llmquant.ranks import ALONE, Ranks

_CPU = torch.device("cpu")


def spread(task: LayerTask, solver: str, options: SolveOptions, ranks: Ranks = ALONE) -> Found:
    """What a solver of SOLVERS finds of `task`, the same on every rank: each factors H, and rounds its own rows."""
    if ranks.alone:
        return found(task, SOLVERS[solver](task, options))
    of_ranks = [_rows_of(task, replace(ranks, rank=rank)) for rank in range(ranks.size)]
    own, part = of_ranks[ranks.rank], None
    if len(own):
        share = _part(task, own, ranks)
        part = found(share, SOLVERS[solver](share, options)).to(_CPU)
    return _merged([part for part in ranks.gathered(part) if part is not None], of_ranks).to(task.weight_OI.device)


def _merged(parts: Sequence[Found], of_ranks: Sequence[Tensor]) -> Found:
    """The parts of all ranks, with the rows in the order of the task."""
    notes = dict.fromkeys(note for part in parts for note in part.notes)
    whole = stacked([part.weight for part in parts]), torch.cat([part.losses_3O for part in parts], 1)
    return Found(*whole, tuple(notes)).rows(torch.cat(list(of_ranks)).argsort().cpu())


def _rows_of(task: LayerTask, ranks: Ranks) -> Tensor:
    """The rows that a rank solves."""
    if task.H_OO:
        return torch.cat([task.H_OO[0][0][:0], *(rows for rows, _ in ranks.share(task.H_OO))])
    return torch.tensor(ranks.share(range(len(task.weight_OI))), dtype=torch.long, device=task.weight_OI.device)


def _part(task: LayerTask, rows: Tensor, ranks: Ranks) -> LayerTask:
    """The task of some rows: those that `_rows_of` gives a rank."""
    blocks, start = [], 0
    for block, H_bb in ranks.share(task.H_OO):
        blocks.append((torch.arange(start, start + len(block), device=block.device), H_bb))
        start += len(block)
    residual_OI = None if task.residual_OI is None else task.residual_OI[rows]
    return replace(task, weight_OI=task.weight_OI[rows], residual_OI=residual_OI, H_OO=tuple(blocks))

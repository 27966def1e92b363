"""Arithmetic of a run, counted from shapes, and how long this machine may take for it.

Counted as 2 FLOPs per multiply-add: forwards of the blocks (attention as if every layer saw its whole window) and the
head, sums of Hessians, factorization, products of the solver. Norms and activations are left out: they are small.
Shapes: O out_features, I in_features, N tokens.
"""

import time
from collections import defaultdict
from dataclasses import dataclass

import torch

from llmquant.formats import LinearSpec
from llmquant.model.skeleton import Skeleton
from llmquant.plan import Plan
from llmquant.quant.solvers.refine import default_sweeps
from llmquant.recipe import Recipe

# Seconds per weight of the grid search and the column loop, which memory bounds, not FLOPs: 2.0e-7 to 3.2e-7 on one
# core, for layers of 512 x 256 to 4096 x 1024. An accelerator has some fifty times the bandwidth; not measured.
_SOLVER_SECONDS, _SOLVER_SECONDS_ACCELERATOR = 2.3e-7, 5e-9
# Seconds per column of a stack of linears: the column loop is a loop of Python.
_COLUMN_SECONDS, _COLUMN_SECONDS_ACCELERATOR = 5e-5, 1e-4
# Seconds per weight to round, pack and verify, whatever the method; measured on one core, 4096 x 4096.
_PACK_SECONDS = 3.5e-8


@dataclass(frozen=True)
class Tokens:
    """How many go through the model, in windows of which length; 0 where there is no calibration or evaluation."""

    calibration: int
    evaluation: int
    seq_len: int
    eval_seq_len: int


@dataclass(frozen=True)
class Work:
    """FLOPs of forwards (compute dtype) and of Hessians and solves (float32); weights in all, and those and the columns
    that a solver goes through."""

    forward_flops: float
    solve_flops: float
    planned: int
    weights: int
    columns: int
    efficiency: float = 0.6  # of a large product's speed, that smaller ones reach on average

    def seconds(self, forward_rate: float, solve_rate: float, device: str) -> dict[str, float]:
        """By part, from FLOP/s of both dtypes."""
        per_weight, per_column = _SOLVER_SECONDS, _COLUMN_SECONDS
        if device != "cpu":
            per_weight, per_column = _SOLVER_SECONDS_ACCELERATOR, _COLUMN_SECONDS_ACCELERATOR
        elementwise = self.weights * per_weight + self.columns * per_column
        return {
            "forwards": self.forward_flops / (forward_rate * self.efficiency),
            "Hessians and solving": self.solve_flops / (solve_rate * self.efficiency) + elementwise,
            "packing and verifying": self.planned * _PACK_SECONDS,
        }


def work_of(plan: Plan, skeleton: Skeleton, recipe: Recipe, tokens: Tokens, n_lanes: int) -> Work:
    """The work of a run with `n_lanes` evaluation lanes."""
    block_weights = sum(skeleton.weights.get(param).numel() for block in skeleton.blocks for param in block.params)
    attention = 2 * len(skeleton.blocks) * skeleton.hidden_size  # multiply-adds per token and position
    drift = recipe.propagation != 0
    order = {name: i for i, (name, _) in enumerate(skeleton.model.named_modules())}
    inputs = _inputs(sorted(plan.specs, key=lambda spec: order[spec.module]))
    # Forwards pause at each step and go on; with one pass per block they are run again with the quantized weights.
    forwards = (1 if recipe.passes == "step" else 2) * (2 if drift else 1)
    calibrated, evaluated = tokens.calibration * forwards, tokens.evaluation * n_lanes
    forward_flops = 2.0 * calibrated * (block_weights + attention * tokens.seq_len)
    forward_flops += 2.0 * evaluated * (block_weights + attention * tokens.eval_seq_len)
    forward_flops += 2.0 * evaluated * skeleton.vocab_size * skeleton.hidden_size
    n_calibration = tokens.calibration
    solve_flops, columns = 0.0, 0
    for rows, width in inputs if n_calibration else ():
        columns += width
        solve_flops += n_calibration * width**2 * (3.0 if drift else 1.0) + width**3 / 3  # half of a symmetric product
        # feedback, loss, plain rounding's loss and energy, half a product each; the drift's two
        solve_flops += rows * width**2 * (4 + (4 if drift else 0))
    for spec in plan.specs if n_calibration else ():
        sweeps = default_sweeps(spec.scheme.bits, spec.scheme.group_size) if recipe.sweeps is None else recipe.sweeps
        solve_flops += spec.shape[0] * spec.shape[1] ** 2 * 2 * sweeps  # a product per sweep
    planned = sum(spec.shape[0] * spec.shape[1] for spec in plan.specs)
    return Work(forward_flops, solve_flops, planned, planned if n_calibration else 0, columns)


def _inputs(specs: list[LinearSpec]) -> list[tuple[int, int]]:
    """(O of all linears that share it, I) of each distinct input, guessed from the order of definition:
    the linears of one module of one width share their input, but the last of several (o_proj, down_proj) reads what
    the others made."""
    by_parent: dict[str, list[LinearSpec]] = defaultdict(list)
    for spec in specs:
        by_parent[spec.module.rpartition(".")[0]].append(spec)
    found: list[tuple[int, int]] = []
    for siblings in by_parent.values():
        *others, last = siblings if len(siblings) > 1 else [siblings[0]]
        shared: dict[int, int] = defaultdict(int)
        for spec in others:
            shared[spec.shape[1]] += spec.shape[0]
        found += [(rows, width) for width, rows in shared.items()] + [last.shape]
    return found


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of a square product on `device`, the best of a few: a fifth of a second on a small CPU."""
    size = size or (1024 if device.type == "cpu" else 8192)
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):  # the first one warms up
        begin = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - begin)
    return 2.0 * size**3 / best

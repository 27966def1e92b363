"""Arithmetic of a run, counted from shapes, and how long this machine may take for it.

Counted as 2 FLOPs per multiply-add: forwards of the blocks (attention as if every layer saw its whole window) and the
head, sums of Hessians, factorization, products of the solver. What is no product counts by the numbers it goes over.
Shapes: O out_features, I in_features, N tokens.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from llmquant.blocks.quantize import strength
from llmquant.curvature import CurvaturePass
from llmquant.draft import Draft
from llmquant.formats import LinearSpec
from llmquant.model.skeleton import Skeleton
from llmquant.plan import Plan
from llmquant.quant.hessian import residual_part
from llmquant.quant.solvers.refine import default_sweeps
from llmquant.recovery import RecoveryPlan

# Seconds per weight of the kernels, which no product is: the grid search and what tiles do entry by entry; on one core,
# for layers of 576 x 1536 to 1024 x 4096, and on an H200 with the compilation of the kernels in it.
_SOLVER_SECONDS, _SOLVER_SECONDS_ACCELERATOR = 8e-8, 5e-9
# Seconds for each number of a token that norms, activations, rotary angles and attention go over in a forward: in a
# block 10 for each hidden unit and 5 for each inner one; on one core, for 256 to 2048 hidden units, and guessed of an
# H200.
_ELEMENT_SECONDS, _ELEMENT_SECONDS_ACCELERATOR = 2e-9, 1e-11
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
    """FLOPs of forwards (compute dtype), of those of the calibration text (its products' dtype), and of Hessians and
    solves (float32); numbers that forwards go over one by one; weights in all, and those that a solver goes through."""

    forward_flops: float
    calibration_flops: float
    solve_flops: float
    elements: float
    planned: int
    weights: int
    efficiency: float = 0.85  # of a large product's speed, that smaller ones reach on average

    @property
    def flops(self) -> float:
        return self.forward_flops + self.calibration_flops + self.solve_flops

    def seconds(self, rates: Mapping[str, float], device: str, threads: int) -> dict[str, float]:
        """By part, from FLOP/s of the dtypes: `forward`, `calibration` and `solve`."""
        cpu = device == "cpu"
        per_weight, per_element = (
            (_SOLVER_SECONDS / threads, _ELEMENT_SECONDS / threads)
            if cpu
            else (_SOLVER_SECONDS_ACCELERATOR, _ELEMENT_SECONDS_ACCELERATOR)
        )
        products = self.forward_flops / rates["forward"] + self.calibration_flops / rates["calibration"]
        return {
            "forwards": products / self.efficiency + self.elements * per_element,
            "Hessians and solving": self.solve_flops / (rates["solve"] * self.efficiency) + self.weights * per_weight,
            "packing and verifying": self.planned * _PACK_SECONDS,
        }


def work_of(
    draft: Draft, curvature: CurvaturePass, recovery: RecoveryPlan, tokens: Tokens, n_lanes: int, n_curvature: int
) -> Work:
    """The work of one rank of a run with `n_lanes` evaluation lanes: of its `tokens`, `n_curvature` of the curvature
    pass, and its part of the rows."""
    n_ranks = draft.options.ranks.size
    plan, skeleton, recipe = draft.plan, draft.skeleton, draft.recipe
    shares = {name: share for block in skeleton.blocks for name, share in block.shares.items()}
    block_weights = sum(
        skeleton.weights.get(param).numel() * shares.get(param.rpartition(".")[0], 1.0)
        for block in skeleton.blocks
        for param in block.params
    )
    attention = 2 * len(skeleton.blocks) * skeleton.hidden_size  # multiply-adds per token and position
    drift = recipe.propagation != 0
    # Forwards pause at each step and go on; with one pass per block they are run again with the quantized weights.
    forwards = (1 if recipe.passes == "step" else 2) * (2 if drift else 1)
    calibrated, evaluated = tokens.calibration * forwards, tokens.evaluation * n_lanes
    if draft.finished is not None:  # codes are taken over
        calibrated = 0
    calibration_flops = 2.0 * calibrated * (block_weights + attention * tokens.seq_len)
    forward_flops = 2.0 * evaluated * (block_weights + attention * tokens.eval_seq_len)
    forward_flops += 2.0 * evaluated * skeleton.vocab_size * skeleton.hidden_size
    # The curvature pass: forwards, and once more with gradients of what they read, which cost as much again.
    calibration_flops += 6.0 * n_curvature * (block_weights + attention * tokens.seq_len)
    forward_flops += 4.0 * n_curvature * skeleton.vocab_size * skeleton.hidden_size
    solve_flops = 1.0 * n_curvature * sum(curvature.entries)  # half of a symmetric product
    # The recovery: the original once; in every step forwards and, by gradients of what is read and of weights, three
    # more; the head of both models, backwards through one. What is held out goes forwards only.
    steps = recovery.n_steps * recovery.n_tokens / max(1, len(recovery.groups))
    held = (recovery.n_steps + 1) * recovery.held_tokens
    once = recovery.n_tokens + recovery.held_tokens
    forward_flops += 2.0 * (once + 4 * steps + held) * (block_weights + attention * tokens.seq_len)
    forward_flops += 2.0 * (3 * steps + 2 * held) * skeleton.vocab_size * skeleton.hidden_size
    n_calibration = 0 if draft.finished is not None else tokens.calibration
    for rows, width, share in _inputs(plan, skeleton) if n_calibration else ():
        moved = drifts(draft, n_calibration, width)
        # Half of a symmetric product, and the drift; the factor.
        solve_flops += n_calibration * share * width**2 * (3.0 if moved else 1.0) + width**3 / 3
        # Feedback, loss, plain rounding's loss and energy, half a product each; the drift's two.
        solve_flops += rows * width**2 * (4 + (4 if moved else 0)) / n_ranks
    adds = {name for block in skeleton.blocks for name in block.adds} if drift and recipe.residual else set()
    for spec in plan.in_blocks if n_calibration else ():
        if spec.module in adds and residual_part(recipe.residual, n_calibration, spec.shape[1]):  # its sum
            solve_flops += 2 * n_calibration * spec.shape[0] * spec.shape[1]
        sweeps = default_sweeps(spec.scheme.bits, spec.scheme.group_size) if recipe.sweeps is None else recipe.sweeps
        solve_flops += spec.shape[0] * spec.shape[1] ** 2 * 2 * sweeps / n_ranks  # a product per sweep
    planned = sum(spec.shape[0] * spec.shape[1] for spec in plan.specs)
    # A target size: the error of every scheme for each token, then two trials of the loop on as many tokens.
    rounds = 3 if draft.candidates else 1
    if draft.candidates:
        calibration_flops += 2.0 * (len(draft.candidates) + 2) * curvature.n_tokens * block_weights
        solve_flops *= rounds
    solved = planned * rounds // n_ranks if n_calibration else 0
    inner = sum(max((spec.shape[0] for spec in _specs(plan, block.index)), default=0) for block in skeleton.blocks)
    a_token = 10.0 * skeleton.hidden_size * len(skeleton.blocks) + 5.0 * inner
    elements = a_token * (calibrated + evaluated + 3 * n_curvature + once + 4 * steps + held)
    return Work(forward_flops, calibration_flops, solve_flops, elements, planned, solved)


def drifts(draft: Draft, n_tokens: int, in_features: int) -> bool:
    """Whether errors are propagated into linears of so many inputs, over so many tokens of text."""
    return strength(draft.recipe, n_tokens, in_features, draft.skeleton.hidden_size) > 0


def _specs(plan: Plan, index: int) -> list[LinearSpec]:
    return [row.spec for row in plan.block(index) if row.spec is not None]


def _inputs(plan: Plan, skeleton: Skeleton) -> Iterator[tuple[int, int, float]]:
    """(O of all linears that share it, I, part of the tokens that reach it) of each distinct input."""
    shapes = {spec.module: spec.shape for spec in plan.specs}
    for block in skeleton.blocks:
        for step in block.steps:
            if members := [name for name in step if name in shapes]:
                rows, width = sum(shapes[name][0] for name in members), shapes[members[0]][1]
                yield rows, width, block.shares.get(members[0], 1.0)


@dataclass(frozen=True)
class Rate:
    """FLOP/s of a square product: `alone` on the machine, and `now`, beside whatever else is at work there."""

    alone: float
    now: float


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> Rate:
    """Of the best of a few products on `device`: a fifth of a second on a small CPU.

    Other programs lengthen what a clock on the wall shows, and not the processor's time that this one gets. An
    accelerator has no such time; there both are the same.
    """
    size = size or (1024 if device.type == "cpu" else 8192)
    a = torch.ones(size, size, device=device, dtype=dtype)
    wall = alone = float("inf")
    for _ in range(4):  # the first one warms up
        begin, began = time.perf_counter(), time.process_time()
        (a @ a)[0, 0].item()  # waits for the device
        wall = min(wall, time.perf_counter() - begin)
        alone = min(alone, (time.process_time() - began) / torch.get_num_threads())
    flops = 2.0 * size**3
    return Rate(flops / min(wall, alone) if device.type == "cpu" else flops / wall, flops / wall)

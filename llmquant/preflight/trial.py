"""`plan --time`: one real block, quantized with few windows of random tokens; what it took, by what it grows with."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.blocks.forwards import CalibrationStreams
from llmquant.blocks.gradients import BlockGradients, curvature_from
from llmquant.blocks.quantize import quantize_block
from llmquant.curvature import CurvaturePass
from llmquant.draft import Draft
from llmquant.preflight.flops import Tokens
from llmquant.quant.solvers import Curvature
from llmquant.recovery import RecoveryPlan
from llmquant.text.windows import Windows, windows_per_batch

_BATCHES = 3  # the longer of two timings; what it takes longer than one batch is the cost of two


@dataclass(frozen=True)
class Trial:
    """Seconds of one block: whatever the calibration (solving, packing), and for a token of each text."""

    solving: float
    calibration_token: float
    evaluation_token: float
    curvature_token: float
    training_token: float

    def seconds(
        self, n_blocks: int, tokens: Tokens, n_lanes: int, n_curvature: int, n_training: int, n_trials: int = 0
    ) -> dict[str, float]:
        """Of all blocks, by part; the first block stands for the others. So many tokens go backwards, too: for the
        curvature, and in all steps of the training, a forward alone counted as the fourth of one. `n_trials` loops on
        the curvature's tokens choose a scheme for each linear."""
        return {
            "curvature": n_blocks * n_curvature * self.curvature_token,
            "allocation": n_blocks * n_trials * (self.solving + n_curvature * self.calibration_token),
            "recovery": n_blocks * n_training * self.training_token,
            "solving": n_blocks * self.solving,
            "calibration": n_blocks * tokens.calibration * self.calibration_token,
            "evaluation": n_blocks * n_lanes * tokens.evaluation * self.evaluation_token,
        }


def try_block(draft: Draft, planned: CurvaturePass, recovery: RecoveryPlan, tokens: Tokens, n_lanes: int) -> Trial:
    """Time block 0. Reads its weights and the embedding, which a Hub source downloads; writes nothing.

    Which tokens does not matter to the clock, so no text and no tokenizer are needed.
    """
    skeleton, recipe, products, calibrated = draft.skeleton, draft.recipe, draft.products, draft.calibrated
    specs = [row.spec for row in draft.plan.block(0) if row.spec is not None]
    stacks = planned.stacks[0]
    curvature: dict[str, Curvature] = {}
    generator = torch.Generator().manual_seed(0)

    def batches(seq_len: int, count: int) -> list[Tensor]:
        shape = (count * windows_per_batch(seq_len), seq_len)
        return Windows(torch.randint(skeleton.vocab_size, shape, generator=generator), "random", None, "none").batches()

    def block_seconds(n_batches: int) -> float:
        """`n_batches` calibration batches through the quantization of the block."""
        streams = None
        if calibrated:
            original = skeleton.new_stream() if recipe.propagation != 0 else None
            streams = CalibrationStreams(skeleton.new_stream(), original, 1 << 62, products)
            skeleton.record(batches(tokens.seq_len, n_batches), streams.append)
        with skeleton.blocks[0].loaded() as block:
            return seconds(lambda: quantize_block(block, specs, recipe, streams, curvature=curvature), skeleton.device)

    def curvature_seconds() -> float:
        """One batch of the curvature pass through the block; what it finds is solved with."""
        batch = skeleton.embed(batches(tokens.seq_len, 1)[0])
        assert isinstance(batch, Tensor)  # parked forwards have no curvature
        with skeleton.blocks[0].loaded() as block:
            sums = BlockGradients(block, stacks, products, draft.candidates)
            sums.through(batch, batch)  # the first one finds its kernels
            took = seconds(lambda: (block.forward(batch, products), sums.through(batch, batch)), skeleton.device)
            curvature.update(curvature_from(sums.tensors(), stacks, block.device))
        return took

    def training_seconds() -> float:
        """One batch forwards and backwards through the block, as a step of the training does it."""
        batch = skeleton.embed(batches(tokens.seq_len, 1)[0])
        assert isinstance(batch, Tensor)  # nor a recovery
        params = [spec.param for spec in specs]
        with skeleton.blocks[0].loaded() as block:
            block.gradients(batch, batch, products, params=params)
            return seconds(
                lambda: (block.forward(batch, products), block.gradients(batch, batch, products, params=params)),
                skeleton.device,
            )

    def lane_seconds() -> float:
        """One evaluation batch through the block."""
        batch = skeleton.embed(batches(tokens.eval_seq_len, 1)[0])
        with skeleton.blocks[0].loaded() as block:
            block.forward(batch)  # the first one finds its kernels
            return seconds(lambda: block.forward(batch), skeleton.device)

    per_batch, backwards = 0.0, curvature_seconds() if stacks else 0.0
    solving = block_seconds(1)
    if calibrated:
        one, several = block_seconds(1), block_seconds(_BATCHES)  # the run before warmed up
        per_batch = max(0.0, (several - one) / (_BATCHES - 1))
        solving = max(0.0, one - per_batch)
    lane = lane_seconds() if n_lanes else 0.0
    training = training_seconds() if recovery.groups else 0.0
    in_batch, in_lane = (windows_per_batch(n) * n for n in (tokens.seq_len, tokens.eval_seq_len))
    return Trial(solving, per_batch / in_batch, lane / in_lane, backwards / in_batch, training / in_batch)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, until `device` is done with it."""
    begin = time.perf_counter()
    work()
    torch.zeros((), device=device).item()  # waits, on every device
    return time.perf_counter() - begin

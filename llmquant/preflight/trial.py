"""`plan --time`: one real block, quantized with few windows of random tokens; what it took, by what it grows with."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.blocks.forwards import CalibrationStreams
from llmquant.blocks.quantize import quantize_block
from llmquant.model.devices import pick_products
from llmquant.model.skeleton import Skeleton
from llmquant.plan import Plan
from llmquant.preflight.flops import Tokens
from llmquant.recipe import Recipe
from llmquant.text.windows import Windows, windows_per_batch

_BATCHES = 3  # the longer of two timings; what it takes longer than one batch is the cost of two


@dataclass(frozen=True)
class Trial:
    """Seconds of one block: whatever the calibration (solving, packing), and for a token of either text."""

    solving: float
    calibration_token: float
    evaluation_token: float

    def seconds(self, n_blocks: int, tokens: Tokens, n_lanes: int) -> dict[str, float]:
        """Of all blocks, by part; the first block stands for the others."""
        return {
            "solving": n_blocks * self.solving,
            "calibration": n_blocks * tokens.calibration * self.calibration_token,
            "evaluation": n_blocks * n_lanes * tokens.evaluation * self.evaluation_token,
        }


def try_block(skeleton: Skeleton, plan: Plan, recipe: Recipe, tokens: Tokens, n_lanes: int) -> Trial:
    """Time block 0. Reads its weights and the embedding, which a Hub source downloads; writes nothing.

    Which tokens does not matter to the clock, so no text and no tokenizer are needed.
    """
    specs = [row.spec for row in plan.block(0) if row.spec is not None]
    calibrated = plan.calibrated
    products = pick_products(recipe.products, skeleton.device, skeleton.dtype, plan.most_bits)
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
            return seconds(lambda: quantize_block(block, specs, recipe, streams), skeleton.device)

    def lane_seconds() -> float:
        """One evaluation batch through the block."""
        batch = skeleton.embed(batches(tokens.eval_seq_len, 1)[0])
        with skeleton.blocks[0].loaded() as block:
            block.forward(batch)  # the first one finds its kernels
            return seconds(lambda: block.forward(batch), skeleton.device)

    per_batch = 0.0
    solving = block_seconds(1)
    if calibrated:
        one, several = block_seconds(1), block_seconds(_BATCHES)  # the run before warmed up
        per_batch = max(0.0, (several - one) / (_BATCHES - 1))
        solving = max(0.0, one - per_batch)
    lane = lane_seconds() if n_lanes else 0.0
    in_batch, in_lane = (windows_per_batch(n) * n for n in (tokens.seq_len, tokens.eval_seq_len))
    return Trial(solving, per_batch / in_batch, lane / in_lane)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, until `device` is done with it."""
    begin = time.perf_counter()
    work()
    torch.zeros((), device=device).item()  # waits, on every device
    return time.perf_counter() - begin

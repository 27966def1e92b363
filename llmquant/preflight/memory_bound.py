"""How much memory a run may take at most, by parts: that of the machine, and that of the accelerator it runs on."""

import math
from collections import Counter
from dataclasses import dataclass

import torch

from llmquant.ahead import n_workers
from llmquant.blocks.forwards import entries_of_experts
from llmquant.curvature import CurvaturePass
from llmquant.draft import Draft
from llmquant.model.streams import lies_on
from llmquant.preflight.flops import Tokens
from llmquant.preflight.shared import sums_of
from llmquant.recovery import RecoveryPlan
from llmquant.text.windows import windows_per_batch

_BASE_BYTES = 600_000_000  # interpreter, torch, transformers, tokenizer
_SOLVED_ALONE = 20  # bytes for each weight: as stored, in float32, its codes, quotients and errors
_BATCHES_ON_THE_WAY = 3  # of a stream in a file: the one at work, the next one, the last one


@dataclass(frozen=True)
class MemoryBound:
    """Bytes by part. `device` is empty where the run computes on the CPU."""

    host: dict[str, int]
    device: dict[str, int]


@dataclass(frozen=True)
class _Sizes:
    """Numbers of elements that a bound is made of."""

    block: int  # parameters of the largest block
    outer: int  # of the largest tensor outside the blocks
    outside: int  # of all tensors outside the blocks
    widest: int  # inputs of the widest linear that wants a Hessian
    experts: int  # Hessians of experts that are summed up at once, and of all together
    activations: int  # that a forward of one batch holds
    batch: int  # hidden states of one batch


def memory_bound(
    draft: Draft, curvature: CurvaturePass, recovery: RecoveryPlan, tokens: Tokens, streams: dict[str, int]
) -> MemoryBound:
    """The bound of a run with these `tokens` and `streams` (name -> bytes).

    On a CPU: base + 2 blocks + 8 bytes x widest input squared + 4 x that by
    the hidden states' width + largest outer tensor + a batch's activations + at most
    --max-ram for streams and paused forwards. On an accelerator weights, Hessians, activations and paused forwards
    are its own, and streams where it has room for them (`streams.lies_on`), else the machine's. Parked forwards lie
    where they compute.
    """
    skeleton, budget = draft.skeleton, draft.options.stream_budget
    sizes, width = _sizes(draft, tokens), skeleton.dtype.itemsize
    in_memory = sum(streams.values()) - draft.spilled_bytes(streams)
    # What a forward holds when it pauses at its last step: residual stream and norm, gate, up and their product; and
    # what attention has added.
    held = tokens.calibration * width * (3 * sizes.widest + 4 * skeleton.hidden_size)
    base, kept = {"base": _BASE_BYTES}, {"streams in memory": in_memory}
    work = {
        "two copies of the largest block": 2 * sizes.block * width,
        "Hessian and drifts of the widest input": 8 * sizes.widest**2 + 4 * sizes.widest * skeleton.hidden_size,
        **({"Hessians of experts": 4 * sizes.experts} if sizes.experts else {}),
        "largest embedding or head": sizes.outer * width,
        "activations of a batch": sizes.activations * width,
    }
    if (n_ranks := draft.options.ranks.size) > 1:  # of a range of rows, and the totals of that range
        n_tokens = n_ranks * tokens.calibration
        told = max((n for block in skeleton.blocks for n in sums_of(draft, block.index, n_tokens)), default=0)
        work["sums of other ranks"] = 4 * told + 4 * told // n_ranks
    if outer := max((math.prod(row.shape) for row in draft.plan.block(None) if row.spec is not None), default=0):
        work["largest of them that is quantized"] = _SOLVED_ALONE * outer
    if entries := max(curvature.entries):  # summed up or solved with; what autograd keeps of a batch
        work |= {
            "curvature of the largest block": 2 * 4 * entries,
            "a batch's activations for gradients": 2 * sizes.activations * width,
        }
    if n_schemes := len(draft.candidates):  # the weights once more, and codes by every scheme
        work["schemes of the largest block"] = (4 + n_schemes) * sizes.block
    if entries := max(recovery.entries):
        in_memory = max(in_memory, min(budget, in_memory + recovery.stream_bytes))
        kept = {"streams in memory": in_memory}
        work |= {
            "gradients of the largest block": 2 * 4 * sizes.block,
            "states of what is trained in it": 2 * 12 * entries,
            "a batch's activations for gradients": 2 * sizes.activations * width,
        }
    paused = {"paused forwards": min(max(0, budget - in_memory), 2 * held) if sizes.widest else 0}
    if draft.parked:
        kept, paused = {}, paused | {"parked forwards": in_memory}
        work["other weights outside the blocks"] = (sizes.outside - sizes.outer) * width
    floor = {}
    if draft.lanes and skeleton.dtype != torch.float32:
        more = _noise_floor(sizes, width) - sum((work | paused).values())
        floor = {"noise floor's pass in float32, beyond the run's own": max(0, more)}
    if skeleton.device.type == "cpu":
        return MemoryBound(base | work | kept | paused | floor, {})
    largest = max((info.numel for info in draft.source.tensors.values()), default=0)
    on_the_way = {
        "largest tensors while they are read": n_workers() * 4 * largest,
        "the next block as it is stored": 4 * sizes.block,
        "batches on their way": _BATCHES_ON_THE_WAY * sizes.batch * width,
    }
    if lies_on(skeleton.device, in_memory).type != "cpu":
        return MemoryBound(base | on_the_way, work | kept | paused | floor)
    return MemoryBound(base | kept | on_the_way, work | paused | floor)


def _sizes(draft: Draft, tokens: Tokens) -> _Sizes:
    skeleton, plan = draft.skeleton, draft.plan
    blocks, outer, outside = Counter[int](), 0, 0
    for name in skeleton.weights.names:
        if name in skeleton.weights.on_demand:
            continue
        count = skeleton.weights.get(name).numel()
        if (block := skeleton.block_of(name)) is not None:
            blocks[block] += count
        else:
            outer, outside = max(outer, count), outside + count
    lengths = [
        n for n, total in ((tokens.seq_len, tokens.calibration), (tokens.eval_seq_len, tokens.evaluation)) if total
    ]
    batch = max((windows_per_batch(n) * n for n in lengths), default=0)
    inner = max(max(spec.shape) for spec in plan.in_blocks)
    return _Sizes(
        block=max(blocks.values()),
        outer=outer,
        outside=outside,
        widest=max(spec.shape[1] for spec in plan.in_blocks) if draft.calibrated and draft.finished is None else 0,
        experts=_experts(draft),
        # Residual stream, norm, attention's inputs and result; gate, up, activation and product.
        activations=batch * (8 * skeleton.hidden_size + 4 * inner),
        batch=batch * skeleton.hidden_size,
    )


def _experts(draft: Draft) -> int:
    """Entries of the Hessians of a layer's experts at a time, and of the one that they lend from."""
    shares = {name for block in draft.skeleton.blocks for name in block.shares}
    widths = [spec.shape[1] for spec in draft.plan.specs if spec.module in shares]
    return entries_of_experts(max(widths)) if widths and draft.calibrated else 0


def _noise_floor(sizes: _Sizes, width: int) -> int:
    """Bytes of `comparison.noise_floor`, which runs when the rest is done: a block in float32 at a time, at the end the
    heads of both models, and no Hessian. Its streams lie in files."""
    return 4 * sizes.block + (4 + width) * sizes.outer + 4 * sizes.activations

"""The curvature pass: before the loop, once forwards and once backwards through the original model, block by block.

    forwards    hidden states in front of every block are kept, in memory within --max-ram, else in files
    head        of every token a label is drawn from the model's own prediction; the gradient of its log-likelihood at
                the last hidden states takes their place
    backwards   from the last block to the first: a block is run again, this time by autograd; that gives the gradients
                at the outputs of its linears, for H_O, and those in front of it, which take the hidden states' place

So one block is in memory at a time, as in the loop. H_O of every block is kept in a file until the block is solved;
an interrupted run goes on with these files, or measures all of them again where the pass was not finished.

Shapes: B batch, T time, D hidden, N tokens, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llmquant.blocks.gradients import BlockGradients, curvature_from
from llmquant.blocks.solve import Curvature
from llmquant.job import Job
from llmquant.log import Progress
from llmquant.memory import trim
from llmquant.model.block import Block
from llmquant.model.streams import Stream, Streams
from llmquant.run_dir import RunDir
from llmquant.text.windows import Windows

_NOTHING = 1e-30  # a probability that no gradient feels
_LOGITS_AT_ONCE = 2**24  # 64 MB in float32, a few times


def measure_curvature(job: Job, run: RunDir, log: Progress) -> None:
    """Keep H_O of every linear that wants it in `run`, unless an interrupted run left it there."""
    windows = curvature_windows(job)
    if windows is None or run.curvature.complete:
        return
    if run.curvature.problem:
        log.line(f"curvature: {run.curvature.problem}; it is measured again")
    blocks = job.skeleton.blocks
    sizes = {f"border {number}": size for number, size in enumerate(job.border_sizes(windows.n_tokens))}
    log.line(f"curvature: {windows.n_tokens} tokens forwards and backwards through {len(blocks)} blocks")
    with Streams(sizes, job.options.stream_budget, run.scratch) as streams:
        borders = [streams.new(name) for name in sizes]
        job.skeleton.record(windows.batches(), borders[0].append)
        # 1. Forwards, and the gradients at the end.
        for block, before, behind in zip(blocks, borders[:-1], borders[1:], strict=True):
            with block.loaded():
                for hidden in before:
                    behind.append(block.forward(hidden, job.products))
            trim()
        _to_gradients(job, borders[-1])
        # 2. Backwards.
        for block in reversed(blocks):
            with block.loaded():
                _backwards(job, run, block, borders[block.index], borders[block.index + 1])
            borders[block.index + 1].close()
            trim()
    run.finish_curvature()


def curvature_windows(job: Job) -> Windows | None:
    """The part of the calibration text that the pass goes through; None where there is no pass."""
    if job.calibration is None or not job.curved:
        return None
    ids = job.calibration.ids
    return Windows(
        ids[: job.curvature_tokens(ids.numel()) // ids.shape[1]],
        job.calibration.dataset,
        job.calibration.revision,
        job.calibration.bos,
    )


def _to_gradients(job: Job, last: Stream) -> None:
    """The gradient of the labels' log-likelihood in the place of the hidden states that the head reads."""
    generator = torch.Generator().manual_seed(job.recipe.seed)
    with job.skeleton.head() as logits_of:
        last.update(lambda hidden: head_gradient(hidden, logits_of, generator))


def head_gradient(hidden: Tensor, logits_of: Callable[[Tensor], Tensor], generator: torch.Generator) -> Tensor:
    """d sum(log p(label)) / d hidden [B, T, D], a label of every token drawn from p = softmax(logits).

    d log p(label) / d logits = onehot(label) - p, so only the head itself is differentiated.
    """
    hidden_ND, parts, start, count = hidden.flatten(0, -2), [], 0, 1
    while start < len(hidden_ND):
        with torch.enable_grad():
            part = hidden_ND[start : start + count].detach().requires_grad_()
            logits_NV = logits_of(part)
        # 1. A label of each token: where the sum of p passes a random number.
        p_NV = logits_NV.detach().softmax(1)
        random_N = torch.rand(len(p_NV), 1, generator=generator).to(p_NV)
        sums_NV = p_NV.cumsum(1)
        label_N = torch.searchsorted(sums_NV, random_N * sums_NV[:, -1:]).clamp_(max=p_NV.shape[1] - 1)
        # 2. Its gradient, through the head. Products of numbers below 1e-38 would take fifty times as long.
        slope_NV = p_NV.masked_fill_(p_NV < _NOTHING, 0).neg_()
        slope_NV.scatter_add_(1, label_N, torch.ones_like(random_N))
        (gradient_ND,) = torch.autograd.grad(logits_NV, part, slope_NV)
        # 3. A token whose logits are not finite has no gradient.
        parts.append(torch.where(torch.isfinite(gradient_ND), gradient_ND, 0))
        start, count = start + count, max(1, _LOGITS_AT_ONCE // p_NV.shape[1])
    return torch.cat(parts).view_as(hidden)


def _backwards(job: Job, run: RunDir, block: Block, before: Stream, behind: Stream) -> None:
    """One block: its H_O into a file, and in `before` gradients in the place of hidden states."""
    sums, gradients = BlockGradients(block, job.curved_stacks(block), job.products), iter(behind)
    before.update(lambda hidden: sums.through(hidden, next(gradients)))
    run.curvature.put(block.index, sums.tensors())


def curvature_of(job: Job, run: RunDir, block: Block) -> dict[str, Curvature]:
    """H_O of the stacks of a block, by the first module of each; empty where there was no pass."""
    if not run.curvature.complete:
        return {}
    return curvature_from(run.curvature.of(block.index), job.curved_stacks(block), block.device)

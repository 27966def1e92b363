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

from llmquant.blocks.solve import Curvature
from llmquant.job import Job
from llmquant.log import Progress
from llmquant.memory import trim
from llmquant.model.block import Block
from llmquant.model.streams import Stream, Streams
from llmquant.quant.curvature import OutputHessian, row_blocks
from llmquant.run_dir import RunDir
from llmquant.text.windows import Windows

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
        # 1. A label of each token; what is not finite has none.
        p_NV = logits_NV.detach().softmax(1)
        finite = torch.isfinite(p_NV).all(1)
        label_N = torch.multinomial(p_NV.cpu().nan_to_num(1.0), 1, generator=generator).to(p_NV.device)
        # 2. Its gradient, through the head.
        slope_NV = p_NV.neg_().scatter_add_(1, label_N, torch.ones_like(label_N, dtype=p_NV.dtype))
        (gradient,) = torch.autograd.grad(logits_NV, part, slope_NV * finite[:, None])
        parts.append(torch.where(torch.isfinite(gradient), gradient, 0))
        start, count = start + count, max(1, _LOGITS_AT_ONCE // p_NV.shape[1])
    return torch.cat(parts).view_as(hidden)


def _backwards(job: Job, run: RunDir, block: Block, before: Stream, behind: Stream) -> None:
    """One block: its H_O into a file, and in `before` gradients in the place of hidden states."""
    stacks = [[spec.module for spec in specs] for specs in job.curved_stacks(block)]
    heights = [[spec.shape[0] for spec in specs] for specs in job.curved_stacks(block)]
    sums = [OutputHessian(each, block.device, job.products) for each in heights]
    gradients = iter(behind)

    def through(hidden: Tensor) -> Tensor:
        modules = [name for names in stacks for name in names]
        entering, at_outputs = block.gradients(hidden, next(gradients), modules, job.products)
        for names, total in zip(stacks, sums, strict=True):
            for parts in zip(*(at_outputs[name] for name in names), strict=True):
                total.add(torch.cat(parts, -1))
        return entering

    before.update(through)
    kept = {names[0]: total.means() for names, total in zip(stacks, sums, strict=True) if total.n_tokens}
    run.curvature.put(
        block.index,
        {
            f"{name}.{number}": part.bfloat16().cpu()
            for name, parts in kept.items()
            for number, part in enumerate(parts)
        },
    )


def curvature_of(job: Job, run: RunDir, block: Block) -> dict[str, Curvature]:
    """H_O of the stacks of a block, by the first module of each; empty where there was no pass."""
    if not run.curvature.complete:
        return {}
    stored, found = run.curvature.of(block.index), dict[str, Curvature]()
    for specs in job.curved_stacks(block):
        rows = row_blocks([spec.shape[0] for spec in specs])
        keys = [f"{specs[0].module}.{number}" for number in range(len(rows))]
        if keys[0] in stored:
            parts = [stored[key].to(block.device, torch.float32) for key in keys]
            found[specs[0].module] = tuple((at.to(block.device), part) for at, part in zip(rows, parts, strict=True))
    return found

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
from dataclasses import replace

import torch
from torch import Tensor

from llmquant.blocks.gradients import BlockGradients, curvature_from, entries_of
from llmquant.blocks.solve import stacks
from llmquant.draft import Draft, stream_bytes
from llmquant.formats import LinearSpec
from llmquant.job import Job
from llmquant.log import Progress
from llmquant.memory import trim
from llmquant.model.block import Block, with_next
from llmquant.model.head import gradient_at_head
from llmquant.model.streams import Stream, Streams, spilled
from llmquant.quant.solvers import CURVED, Curvature
from llmquant.ranks import Sums
from llmquant.run_dir import RunDir
from llmquant.source.names import kinds
from llmquant.text.windows import Windows

_MOST_TOKENS = 2**13  # more take disk and time, and bring nothing: eval/LOG.md


class CurvaturePass:
    """What the pass of a run goes through and takes: nothing where the recipe, the solvers or the model have none.

    stacks     of every block: linears that are solved together, and by their H_O
    n_tokens   of the calibration text, from its beginning
    borders    bytes of the hidden states in front of every block and behind the last one, by the name of their stream
    entries    of H_O in every block
    """

    def __init__(self, draft: Draft, calibration_tokens: int) -> None:
        blocks = draft.skeleton.blocks
        wanted = bool(calibration_tokens) and draft.recipe.curvature != "off" and not draft.parked
        wanted = wanted and draft.finished is None
        self.stacks = [_stacks(draft, block) if wanted else [] for block in blocks]
        window = min(draft.recipe.seq_len, draft.skeleton.context or draft.recipe.seq_len)
        n_windows = min(calibration_tokens // window, max(1, _MOST_TOKENS // window))
        self.n_tokens = n_windows * window if any(self.stacks) else 0
        size = stream_bytes(draft.skeleton, self.n_tokens, draft.recipe.seq_len) if self.n_tokens else 0
        self.borders = {f"border {number}": size for number in range(len(blocks) + 1)}
        self.entries = [sum(entries_of(specs) for specs in of_block) for of_block in self.stacks]
        self._in_files = sum(spilled(self.borders, draft.options.stream_budget).values())

    @property
    def disk_bytes(self) -> int:
        """H_O of all blocks in bfloat16, and the hidden states that memory has no room for."""
        return self._in_files + 2 * sum(self.entries)

    def of(self, run: RunDir, block: Block) -> dict[str, Curvature]:
        """What was measured of a block, by the first module of each stack; empty without a pass."""
        if not self.n_tokens:
            return {}
        return curvature_from(run.curvature.of(block.index), self.stacks[block.index], block.device)


def _stacks(draft: Draft, block: Block) -> list[list[LinearSpec]]:
    """Not those of experts: few tokens reach each, too few for an H_O of its own."""
    specs = {row.spec.module: row.spec for row in draft.plan.block(block.index) if row.spec is not None}
    curved = {name for name, spec in specs.items() if spec.method in CURVED and block.experts_of(name) is None}
    return [stack for names in block.steps for stack in stacks([specs[name] for name in names if name in curved])]


def measure_curvature(job: Job, planned: CurvaturePass, run: RunDir, log: Progress) -> None:
    """Keep H_O of every linear that wants it in `run`, unless an interrupted run left it there."""
    if job.calibration is None or not planned.n_tokens or run.curvature.complete:
        return
    if run.curvature.problem:
        log.line(f"curvature: {run.curvature.problem}; it is measured again")
    blocks, ids, ranks = job.skeleton.blocks, job.calibration.ids, job.options.ranks
    windows = replace(job.calibration, ids=ids[: planned.n_tokens // ids.shape[1]])
    log.line(f"curvature: {windows.n_tokens} tokens forwards and backwards through {len(blocks)} blocks")
    own = windows.share_of(ranks)
    sizes = {name: size * own.n_tokens // windows.n_tokens for name, size in planned.borders.items()}
    with Streams(sizes, job.options.stream_budget, run.scratch, device=job.skeleton.device) as streams:
        borders = [streams.new(name) for name in planned.borders]
        job.skeleton.record(own.batches(), borders[0].append)
        # 1. Forwards, and the gradients at the end.
        for block, then in with_next(blocks):
            with block.loaded(then=then or block):  # the last one is the first backwards
                for hidden in borders[block.index]:
                    borders[block.index + 1].append(block.forward(hidden, job.products))
            trim()
        _to_gradients(job, borders[-1], windows)
        # 2. Backwards.
        unmoved: list[str] = []
        for block, then in with_next(blocks[::-1]):
            with block.loaded(then=then):
                sums = BlockGradients(block, planned.stacks[block.index], job.products, job.candidates)
                told = sums.sums(ranks, -(-len(windows.batches()) // ranks.size))
                _backwards(sums, told, borders[block.index], borders[block.index + 1])
            sums.count_all(ranks)
            if ranks.first:
                run.curvature.put(block.index, sums.tensors())
            unmoved += sums.unmoved
            borders[block.index + 1].close()
            trim()
    if unmoved:
        log.line(f"curvature: no prediction depends on {kinds(unmoved)}; solved without it")
    run.finish_curvature()
    ranks.wait()


def _to_gradients(job: Job, last: Stream, windows: Windows) -> None:
    """The gradient of the labels' log-likelihood in the place of the hidden states that the head reads.

    Every token of the `windows` has its own random number, whichever rank has the token.
    """
    generator = torch.Generator().manual_seed(job.recipe.seed)
    random = [torch.rand(batch.numel(), generator=generator) for batch in windows.batches()]
    of_batch = iter(job.options.ranks.share(random))
    with job.skeleton.head() as logits_of:
        last.update(lambda hidden: head_gradient(hidden, logits_of, next(of_batch)))


def head_gradient(hidden: Tensor, logits_of: Callable[[Tensor], Tensor], random_N: Tensor) -> Tensor:
    """d sum(log p(label)) / d hidden [B, T, D], a label of every token drawn from p = softmax(logits).

    random_N   a number between 0 and 1 of each of the B T tokens, which draws its label

    d log p(label) / d logits = onehot(label) - p.
    """

    def slope(logits_NV: Tensor, tokens: slice) -> Tensor:
        # 1. A label of each token: where the sum of p passes a random number.
        p_NV = logits_NV.softmax(1)
        random_N1 = random_N[tokens, None].to(p_NV)
        sums_NV = p_NV.cumsum(1)
        label_N1 = torch.searchsorted(sums_NV, random_N1 * sums_NV[:, -1:]).clamp_(max=p_NV.shape[1] - 1)
        # 2. Its slope.
        return p_NV.neg_().scatter_add_(1, label_N1, torch.ones_like(random_N1))

    return gradient_at_head(hidden, logits_of, slope)


def _backwards(sums: BlockGradients, told: Sums, before: Stream, behind: Stream) -> None:
    """One block, which is loaded: gradients into its sums, and in `before` in the place of hidden states."""
    gradients = iter(behind)

    def through(hidden: Tensor) -> Tensor:
        entering = sums.through(hidden, next(gradients))
        told.batch()
        return entering

    before.update(through)
    told.finish()

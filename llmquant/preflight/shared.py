"""What several ranks at one run (`ranks.py`) leave to each of them, and what they send each other.

Batches are dealt out one by one, so the rank with most has ceil(batches / R) of them. It sends, for a block,

    (R - 1) / R  x  (4 S (rounds + 1)  +  4 E (rounds of the curvature pass + 1)  +  C)   bytes

    S    entries of the sums of its steps: I^2, as many again for error propagation, O I for the residual
    E    entries of H_O
    C    codes, a byte each
    rounds   as many as that rank has batches; 1 where each rank adds up its own first

Forwards and sums are its batches' part of all; rows are shared, factorizations and packing are not.
"""

from dataclasses import dataclass, replace

from llmquant.curvature import CurvaturePass
from llmquant.draft import Draft
from llmquant.preflight.flops import Tokens, drifts
from llmquant.quant.hessian import residual_part
from llmquant.text.windows import windows_per_batch


@dataclass(frozen=True)
class Sent:
    """Bytes that each rank sends: for the block with most, and in all."""

    block: int
    total: int


def of_busiest(n_tokens: int, seq_len: int, n_ranks: int) -> int:
    """Tokens of the rank that has most of them.

    >>> of_busiest(10 * 2048, 2048, 4), of_busiest(1000, 500, 4)
    (6144, 1000)
    """
    return min(n_tokens, _rounds(n_tokens, seq_len, n_ranks) * windows_per_batch(seq_len) * seq_len)


def tokens_of_busiest(tokens: Tokens, n_ranks: int) -> Tokens:
    """The same of all texts."""
    return replace(
        tokens,
        calibration=of_busiest(tokens.calibration, tokens.seq_len, n_ranks),
        evaluation=of_busiest(tokens.evaluation, tokens.eval_seq_len, n_ranks),
    )


def sent(draft: Draft, curvature: CurvaturePass, tokens: Tokens) -> Sent:
    """By the formula above."""
    ranks, blocks = draft.options.ranks, draft.skeleton.blocks
    rounds = _rounds(tokens.calibration, tokens.seq_len, ranks.size)
    of_curvature = _rounds(curvature.n_tokens, tokens.seq_len, ranks.size)
    if not ranks.by_batch:
        rounds, of_curvature = min(1, rounds), min(1, of_curvature)
    of_blocks = [
        4 * sum(sums_of(draft, block.index, tokens.calibration)) * (rounds + 1)
        + 4 * curvature.entries[block.index] * (of_curvature + 1)
        + sum(row.spec.shape[0] * row.spec.shape[1] for row in draft.plan.block(block.index) if row.spec is not None)
        for block in blocks
    ]
    part = (ranks.size - 1) / ranks.size
    return Sent(int(part * max(of_blocks)), int(part * sum(of_blocks)))


def sums_of(draft: Draft, index: int, n_tokens: int) -> list[int]:
    """Entries of the sums of each step of a block, over so many tokens of text."""
    block, recipe = draft.skeleton.blocks[index], draft.recipe
    shapes = {row.spec.module: row.spec.shape for row in draft.plan.block(index) if row.spec is not None}
    found = []
    for step in block.steps if draft.solves else ():
        if members := [name for name in step if name in shapes]:
            rows, width = shapes[members[0]]
            drift = drifts(draft, n_tokens, width) and block.experts_of(members[0]) is None
            part = residual_part(recipe.residual, n_tokens, width) if drift and members[0] in block.adds else 0.0
            found.append(width**2 * (2 if drift else 1) + rows * width * bool(part))
    return found


def _rounds(n_tokens: int, seq_len: int, n_ranks: int) -> int:
    return -(-n_tokens // (windows_per_batch(seq_len) * seq_len * n_ranks)) if n_tokens else 0

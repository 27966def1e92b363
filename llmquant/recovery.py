"""Recovery: behind the loop, scales, norms and biases are trained end to end; the codes stay.

The loss is KL(original || quantized) of the next token, over the calibration text. Each step takes a part of the text

    forwards    through the quantized blocks as they are now, the hidden states in front of every block kept
    head        the gradient of the loss at the last hidden states takes their place
    backwards   from the last block to the first: a block is run again, by autograd; then what is trained in it is
                changed

so that one block is in memory at a time, as in the loop. Every eighth window is left out of the training: through the
blocks it goes with the others, and the state with the lowest loss on it is what is written. Where that is the first
state, nothing is changed, and the log says so.

States are kept after every step, and an interrupted run goes on behind the last one.

Shapes: B batch, T time, D hidden, N tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from llmquant.blocks.training import BlockTraining
from llmquant.draft import Draft, stream_bytes
from llmquant.formats import LinearSpec
from llmquant.lanes.scores import LOGITS_AT_ONCE, log_probabilities
from llmquant.log import Progress
from llmquant.memory import trim
from llmquant.model.head import gradient_at_head
from llmquant.model.skeleton import LogitsOf
from llmquant.model.streams import Stream, Streams, spilled
from llmquant.model.weights import Value
from llmquant.quant.grid import QuantizedWeight
from llmquant.quant.training import Trained, rate_of
from llmquant.report.data import RecoveryReport
from llmquant.run_dir import RunDir
from llmquant.text.windows import Windows

_HELD_OUT = 8  # every so many windows, one
_STEP_TOKENS = 2**13
# Relative, at its peak: of scales of 4 bits, which are many and whose gradients are mostly noise (twice that for each
# bit less, whose coarser codes leave more to gain), and of norms and biases.
_SCALES_RATE, _VECTORS_RATE = 3e-4, 1e-3
_PASSES = 2  # over the text
_MOMENTS = (" m", " v")  # after the name of what they are of


class RecoveryPlan:
    """What the recovery of a run goes through, and takes: nothing where the recipe wants none.

    groups   windows of every step of one pass over the text
    held     windows that it is judged by
    borders  bytes of the hidden states that are kept during a step, by the name of their stream
    """

    def __init__(self, draft: Draft, calibration_tokens: int) -> None:
        self.draft = draft
        wanted = bool(calibration_tokens) and draft.recipe.recover != "off"
        window = min(draft.recipe.seq_len, draft.skeleton.context or draft.recipe.seq_len)
        n_windows = calibration_tokens // window if wanted else 0
        self.held = range(0, n_windows, _HELD_OUT) if n_windows > 1 else range(0)
        rest = [index for index in range(n_windows) if index not in self.held]
        count = -(-len(rest) * window // _STEP_TOKENS)
        self.groups = [rest[number::count] for number in range(count)]
        self.n_steps = _PASSES * count

        def size(n_windows: int) -> int:
            return stream_bytes(draft.skeleton, n_windows * window, draft.recipe.seq_len)

        blocks = draft.skeleton.blocks
        largest = size(max(map(len, self.groups), default=0)) if self.groups else 0
        self.borders, self.originals = dict[str, int](), dict[str, int]()
        if self.groups:
            self.originals = {f"original {number}": size(len(group)) for number, group in enumerate(self.groups)}
            self.originals["original, held out"] = self.borders["held out"] = size(len(self.held))
            self.borders |= {f"border {number}": largest for number in range(len(blocks) + 1)}
        self.n_tokens = sum(map(len, self.groups)) * window
        self.held_tokens = len(self.held) * window

    @property
    def stream_bytes(self) -> int:
        """Of all hidden states that are kept at a time."""
        return sum((self.originals | self.borders).values())

    @property
    def forwards(self) -> int:
        """Tokens through all blocks, forwards and backwards; a forward alone counts as the fourth of that."""
        if not self.groups:
            return 0
        steps = self.n_steps * self.n_tokens // len(self.groups)
        return steps + (self.n_tokens + (self.n_steps + 2) * self.held_tokens) // 4

    @property
    def disk_bytes(self) -> int:
        """States of three steps, in float32 with two moments each, and hidden states that memory has no room for."""
        in_files = spilled(self.originals | self.borders, self.draft.options.stream_budget) if self.groups else {}
        return 3 * 12 * sum(self.entries) + sum(in_files.values())

    @cached_property
    def entries(self) -> list[int]:
        """Numbers that are trained, of every block."""
        if not self.groups:
            return [0 for _ in self.draft.skeleton.blocks]
        return [
            sum(spec.shape[0] * spec.scheme.groups(spec.shape[1]) for spec in scales_of(self.draft, index))
            + sum(self.draft.skeleton.weights.get(param).numel() for param in vectors_of(self.draft, index))
            for index in range(len(self.draft.skeleton.blocks))
        ]


def scales_of(draft: Draft, index: int) -> list[LinearSpec]:
    """Linears of a block whose scales are trained: not those of experts, nor those that other blocks run with, too."""
    if draft.recipe.recover not in ("scales", "all"):
        return []
    block = draft.skeleton.blocks[index]
    specs = [row.spec for row in draft.plan.block(index) if row.spec is not None]
    return [spec for spec in specs if block.experts_of(spec.module) is None and not _shared(draft, spec.param)]


def vectors_of(draft: Draft, index: int) -> dict[str, torch.dtype]:
    """Norms and biases of a block that are trained, by parameter -> dtype in the checkpoint."""
    if draft.recipe.recover not in ("norms", "all"):
        return {}
    skeleton, found = draft.skeleton, {}
    for row in draft.plan.block(index):
        param = skeleton.param_of.get(row.name)
        if row.spec is not None or param is None or len(row.shape) != 1 or param.startswith(skeleton.idle):
            continue
        dtype: torch.dtype = getattr(torch, row.dtype)
        if isinstance(skeleton.weights.get(param), nn.Parameter) and dtype.is_floating_point:
            found[param] = dtype
    return {param: dtype for param, dtype in found.items() if not _shared(draft, param)}


def _shared(draft: Draft, param: str) -> bool:
    return param in draft.skeleton.weights.borrowers or param in draft.skeleton.weights.tied


class Recovery:
    """Trains what `planned` says, and hands out the blocks as they are afterwards."""

    def __init__(
        self,
        planned: RecoveryPlan,
        windows: Windows | None,
        read: Callable[[LinearSpec], QuantizedWeight],
        instead: Mapping[str, Value],
    ) -> None:
        draft = planned.draft
        self._planned, self._draft, self._windows = planned, draft, windows
        self._instead = instead  # weights outside the blocks, as they are quantized
        self._skeleton = draft.skeleton
        self.blocks = [
            BlockTraining(
                block,
                [row.spec for row in draft.plan.block(block.index) if row.spec is not None],
                {spec.param: spec for spec in scales_of(draft, block.index)},
                vectors_of(draft, block.index),
                draft.recipe.format,
                read,
                draft.products,
            )
            for block in draft.skeleton.blocks
        ]

    def train(self, run: RunDir, budget: int, log: Progress) -> RecoveryReport:
        """All steps that `run` does not have behind it; `budget` is the memory of hidden states, in bytes."""
        planned, files = self._planned, run.recovery
        if files.steps is None:
            for index, block in enumerate(self.blocks):
                files.put(0, index, _tensors(block.start(self._skeleton.weights.read)))
            run.finish_recovery(0, [], done=False)
        assert files.steps is not None
        if not files.done:
            log.line(
                f"recovery: {planned.n_steps} steps of {planned.n_tokens // len(planned.groups)} tokens, judged by "
                f"{planned.held_tokens} others"
            )
            with Streams(planned.originals, budget, run.scratch) as streams:
                originals = {name: streams.new(name) for name in planned.originals}
                self._original(originals)
                spare = max(0, streams.spare_bytes)
                for step in range(files.steps, planned.n_steps + 1):
                    with Streams(planned.borders, spare, run.scratch) as of_step:
                        self._step(step, run, originals, [of_step.new(name) for name in planned.borders], log)
        best = files.best
        if not best:
            log.line("recovery: no step brought the loss down; nothing is changed")
        counts = planned.n_tokens, planned.held_tokens
        return RecoveryReport(planned.n_steps, best, *counts, files.losses[0], files.losses[best])

    def values(self, run: RunDir, step: int, index: int) -> dict[str, Tensor]:
        """What is trained in a block, as it was after a step that is kept: 0, the best or the last one."""
        return _values(run.recovery.of(step, index))

    def _batches(self, windows: Sequence[int]) -> list[Tensor]:
        assert self._windows is not None
        return replace(self._windows, ids=self._windows.ids[list(windows)]).batches()

    def _original(self, streams: Mapping[str, Stream]) -> None:
        """The original's hidden states behind the last block, of all windows."""
        *groups, held = streams.values()
        for stream, windows in zip([*groups, held], [*self._planned.groups, self._planned.held], strict=True):
            self._skeleton.record(self._batches(windows), stream.append)
        for block in self._skeleton.blocks:
            with block.loaded():
                for stream in (*groups, held):
                    stream.update(lambda hidden, block=block: block.forward(hidden, self._draft.products))  # type: ignore[misc]
            trim()

    def _step(
        self, step: int, run: RunDir, originals: Mapping[str, Stream], streams: list[Stream], log: Progress
    ) -> None:
        """Measure the state after `step` steps, and make one more, unless it is the last one."""
        planned, files = self._planned, run.recovery
        *groups, held_original = originals.values()
        held, *borders = streams
        number, last = step % len(groups), step == planned.n_steps
        self._skeleton.record(self._batches(planned.held), held.append, self._instead)
        if not last:
            self._skeleton.record(self._batches(planned.groups[number]), borders[0].append, self._instead)
        # 1. Forwards.
        for index, block in enumerate(self.blocks):
            with block.loaded(_values(files.of(step, index))):
                held.update(block.forward)
                for hidden in borders[index] if not last else ():
                    borders[index + 1].append(block.forward(hidden))
            trim()
        # 2. The loss of this state, and the gradients at the end.
        with self._skeleton.heads(self._instead) as heads:
            loss = _loss(held, held_original, heads, self._skeleton.vocab_size)
            if not last:
                reference, n_tokens = iter(groups[number]), borders[-1].n_tokens
                borders[-1].update(lambda hidden: _to_gradient(hidden, next(reference), heads, n_tokens))
        losses = [*files.losses[:step], loss]
        log.line(f"recovery: step {step}/{planned.n_steps}, KL {loss:.5f}")
        if last:
            return run.finish_recovery(step, losses, done=True)
        # 3. Backwards.
        for index, block in reversed(list(enumerate(self.blocks))):
            state = _state(files.of(step, index))
            with block.loaded({name: trained.value for name, trained in state.items()}):
                gradients = iter(borders[index + 1])
                borders[index].update(lambda hidden: block.backwards(hidden, next(gradients)))  # noqa: B023
                for name, trained in state.items():
                    if name in block.sums:
                        trained.step(block.sums[name], rate_of(step, planned.n_steps, _peak(block, name)), step + 1)
            files.put(step + 1, index, _tensors(state))
            borders[index + 1].close()
            trim()
        run.finish_recovery(step + 1, losses, done=False)
        return None


def _peak(block: BlockTraining, name: str) -> float:
    """The highest rate of what is trained."""
    if name not in block.scales:
        return _VECTORS_RATE
    return _SCALES_RATE * 2.0 ** max(0, 4 - block.scales[name].scheme.bits)


def _to_gradient(hidden: Tensor, original: Tensor, heads: tuple[LogitsOf, LogitsOf], n_tokens: int) -> Tensor:
    """d mean KL(p || q) / d hidden [B, T, D], with p of `original` and q of `hidden`: q - p at the logits, over N.

    heads   of the original and of the quantized model
    """
    original_ND, (of_original, logits_of) = original.flatten(0, -2), heads

    def slope(logits_NV: Tensor, tokens: slice) -> Tensor:
        with torch.no_grad():
            return logits_NV.softmax(1).sub_(of_original(original_ND[tokens]).softmax(1)).div_(n_tokens)

    return gradient_at_head(hidden, logits_of, slope)


def _loss(stream: Stream, original: Stream, heads: tuple[LogitsOf, LogitsOf], vocab_size: int) -> float:
    """Mean KL(p || q) over the tokens, with p of `original` and q of `stream`; those that are not finite left out."""
    total, count, at_once = 0.0, 0, max(1, LOGITS_AT_ONCE // vocab_size)
    for batch in zip(original, stream, strict=True):
        for p_ND, q_ND in zip(*(hidden.flatten(0, -2).split(at_once) for hidden in batch), strict=True):
            p_NV, q_NV = (log_probabilities(head(part)) for head, part in zip(heads, (p_ND, q_ND), strict=True))
            kl_N = torch.sub(p_NV, q_NV).mul_(p_NV.exp_()).sum(1)
            finite = torch.isfinite(kl_N)
            total, count = total + float(kl_N[finite].sum()), count + int(finite.sum())
    return total / count if count else math.inf


def _values(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values in the file of a state."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(_MOMENTS)}


def _state(tensors: Mapping[str, Tensor]) -> dict[str, Trained]:
    return {
        name: Trained(value, *(tensors[name + end] for end in _MOMENTS)) for name, value in _values(tensors).items()
    }


def _tensors(state: Mapping[str, Trained]) -> dict[str, Tensor]:
    """What is kept of a state."""
    parts = {name: (trained.value, trained.m, trained.v) for name, trained in state.items()}
    return {name + end: part for name, of in parts.items() for end, part in zip(("", *_MOMENTS), of, strict=True)}

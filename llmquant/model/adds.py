"""Which linears of a block add their outputs to its hidden states, and times what.

An error of the hidden states that enter a block can be made up for by every linear whose output is added to them. Names
do not tell which those are: some blocks norm or scale an output before they add it, others add attention and MLP at
once. So they are measured, while the probe's forward runs on made-up weights: every linear that could be one answers
random numbers. Where a block is

    leaving = entering + sum_i c_i y_i,    y_i outputs of linears, or of modules that hold experts

least squares finds the c_i, and next to nothing is left over. Where much is left over, the block has none.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.model.block import Block
from llmquant.model.experts import Experts
from llmquant.model.tape import hidden_of, take_hidden

_LEFT_OVER = 0.02  # of the norm of what a block adds: room for bfloat16
_NOTHING = 0.02  # a factor below it


class _OfBlock:
    """What one block's forward adds, while it runs."""

    def __init__(self, block: Block, generator: torch.Generator) -> None:
        self.block, self._generator = block, generator
        self.entering: Tensor | None = None
        self.leaving: Tensor | None = None
        self.outputs: list[tuple[str, Tensor]] = []  # by the linear's name; "" for experts

    def hooks(self) -> Iterator[Any]:
        module = self.block.module
        yield module.register_forward_pre_hook(self._enter, with_kwargs=True)
        yield module.register_forward_hook(self._leave)
        holders = [child for child in module.children() if any(isinstance(m, Experts) for m in child.modules())]
        inside = {inner for holder in holders for inner in holder.modules()}
        for holder in holders:
            yield holder.register_forward_hook(self._keep)
        for name, linear in self.block.linears.items():
            if linear not in inside:
                yield linear.register_forward_hook(partial(self._answer, name))

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.entering = take_hidden(args, kwargs)[0].clone()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.leaving = hidden_of(output)

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._fits(found := hidden_of(output)):
            self.outputs.append(("", found.clone()))

    def _answer(self, name: str, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        """Small and positive numbers, as the made-up weights are."""
        if not self._fits(output):
            return None
        answer = (0.01 + 0.1 * torch.rand(output.shape, generator=self._generator)).to(output)
        self.outputs.append((name, answer.clone()))
        return answer

    def _fits(self, output: Any) -> bool:
        """Some blocks run their linears on all tokens in one row."""
        x = self.entering
        if x is None or not isinstance(output, Tensor):
            return False
        return (output.numel(), output.shape[-1]) == (x.numel(), x.shape[-1])

    def found(self) -> dict[str, float]:
        names = [name for name, _ in self.outputs]
        if self.entering is None or self.leaving is None or self.leaving.shape != self.entering.shape or not names:
            return {}
        added = self.leaving.double().flatten() - self.entering.double().flatten()
        columns = torch.stack([output.double().flatten() for _, output in self.outputs], 1)
        factors = torch.linalg.lstsq(columns, added[:, None]).solution[:, 0]
        left_over = torch.linalg.vector_norm(added - columns @ factors)
        if not left_over <= _LEFT_OVER * torch.linalg.vector_norm(added):  # NaN is not below it either
            return {}
        adds: dict[str, float] = {}
        for name, factor in zip(names, factors.tolist(), strict=True):
            if abs(factor) > _NOTHING:
                if not name:  # what experts add is not known where a later linear is solved
                    break
                adds[name] = 1.0 if abs(factor - 1) < _NOTHING else factor
        return adds if len(set(names)) == len(names) or "" in names else {}


@contextmanager
def finding_adds(blocks: Sequence[Block]) -> Iterator[None]:
    """Fill in `Block.adds` by the forward that is run within it, on made-up weights."""
    generator = torch.Generator().manual_seed(0)
    watched = [_OfBlock(block, generator) for block in blocks]
    handles = [handle for of_block in watched for handle in of_block.hooks()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for of_block in watched:
        of_block.block.adds = of_block.found()

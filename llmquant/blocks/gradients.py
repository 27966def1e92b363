"""One block backwards: gradients at the outputs of its linears, summed up for their solver."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmquant.blocks.solve import Curvature
from llmquant.formats import LinearSpec
from llmquant.model.block import Block
from llmquant.quant.curvature import OutputHessian, row_blocks


class BlockGradients:
    """H_O of the `stacks` of a loaded block: linears that share an input, a scheme and a solver."""

    def __init__(self, block: Block, stacks: Sequence[Sequence[LinearSpec]], products: torch.dtype) -> None:
        self._block, self._stacks, self._products = block, stacks, products
        self._sums = [OutputHessian(_heights(specs), block.device, products) for specs in stacks]

    def through(self, hidden: Tensor, gradient: Tensor) -> Tensor:
        """Add a batch that enters as `hidden` and has this gradient behind the block; its gradient before it."""
        modules = [spec.module for specs in self._stacks for spec in specs]
        entering, at_outputs = self._block.gradients(hidden, gradient, modules, self._products)
        for specs, total in zip(self._stacks, self._sums, strict=True):
            for parts in zip(*(at_outputs[spec.module] for spec in specs), strict=False):
                total.add(torch.cat(parts, -1))
        return entering

    def tensors(self) -> dict[str, Tensor]:
        """H_O by `<first module of the stack>.<number of the block of rows>`, in bfloat16 on the CPU. Call it once."""
        of_stacks = {specs[0].module: total.means() for specs, total in zip(self._stacks, self._sums, strict=True)}
        return {f"{name}.{i}": H_bb.bfloat16().cpu() for name, all_ in of_stacks.items() for i, H_bb in enumerate(all_)}


def curvature_from(
    tensors: dict[str, Tensor], stacks: Sequence[Sequence[LinearSpec]], device: torch.device
) -> dict[str, Curvature]:
    """What the solver takes, by the first module of each stack, from what `BlockGradients.tensors` gave."""
    found = {}
    for specs in stacks:
        first, rows = specs[0].module, row_blocks(_heights(specs))
        of_stack = [tensors[f"{first}.{i}"].to(device, torch.float32) for i in range(len(rows))]
        found[first] = tuple((at.to(device), H_bb) for at, H_bb in zip(rows, of_stack, strict=True))
    return found


def _heights(specs: Sequence[LinearSpec]) -> list[int]:
    return [spec.shape[0] for spec in specs]

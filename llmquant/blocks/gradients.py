"""One block backwards: gradients at the outputs of its linears, summed up for their solver."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmquant.formats import LinearSpec
from llmquant.model.block import Block
from llmquant.quant.curvature import OutputHessian, row_blocks
from llmquant.quant.grid import QuantScheme
from llmquant.quant.sensitivity import Sensitivity, left
from llmquant.quant.solvers import Curvature, SolveOptions
from llmquant.ranks import Ranks, Sums


class BlockGradients:
    """H_O of the `stacks` of a loaded block: linears that share an input, a scheme and a solver.

    schemes   of which one will be chosen for each stack: how much the predictions would feel each is measured, too
    """

    def __init__(
        self,
        block: Block,
        stacks: Sequence[Sequence[LinearSpec]],
        products: torch.dtype,
        schemes: Sequence[QuantScheme] = (),
    ) -> None:
        self._block, self._stacks, self._products = block, stacks, products
        self._sums = [OutputHessian(_heights(specs), block.device, products) for specs in stacks]
        self._felt: list[Sensitivity] = []
        if schemes:
            weights = [torch.cat([block.weight(spec) for spec in specs]) for specs in stacks]
            self._felt = [
                Sensitivity(weight_OI, fitting(specs, schemes), products)
                for weight_OI, specs in zip(weights, stacks, strict=True)
            ]

    def through(self, hidden: Tensor, gradient: Tensor) -> Tensor:
        """Add a batch that enters as `hidden` and has this gradient behind the block; its gradient before it."""
        modules = [spec.module for specs in self._stacks for spec in specs]
        found = self._block.gradients(hidden, gradient, self._products, linears=modules)
        for number, specs in enumerate(self._stacks):
            inputs = found.inputs[specs[0].module]
            for x, *parts in zip(inputs, *(found.at_outputs[spec.module] for spec in specs), strict=False):
                g = torch.cat(parts, -1)
                self._sums[number].add(g)
                if self._felt:
                    self._felt[number].add(x, g)
        return found.entering

    def sums(self, ranks: Ranks, n_rounds: int) -> Sums:
        """What to tell `ranks` of every batch."""
        return Sums(ranks, [tensor for total in self._sums for tensor in total.sums()], n_rounds)

    def count_all(self, ranks: Ranks) -> None:
        """The tokens of all ranks, whose sums are added up."""
        for total in self._sums:
            total.count_all(ranks)

    @property
    def unmoved(self) -> list[str]:
        """The modules of stacks on which no gradient was found."""
        pairs = zip(self._stacks, self._sums, strict=True)
        return [spec.module for specs, total in pairs if not total.n_tokens for spec in specs]

    def tensors(self) -> dict[str, Tensor]:
        """H_O by `<first module of the stack>.<number of the block of rows>`, in bfloat16 on the CPU; not of unmoved
        ones. With schemes, also `<first module> losses` by scheme, and what the solver leaves of them: ` left`. Call
        it once."""
        found = {
            f"{specs[0].module}.{number}": H_bb.bfloat16().cpu()
            for specs, total in zip(self._stacks, self._sums, strict=True)
            if total.n_tokens
            for number, H_bb in enumerate(total.means())
        }
        for specs, felt in zip(self._stacks, self._felt, strict=bool(self._felt)):
            blocks = [found[name].float() for name in found if name.rpartition(".")[0] == specs[0].module]
            remaining = felt.left_by_inputs() * left_by_outputs(blocks)
            losses = torch.tensor(felt.losses(), dtype=torch.float64)
            found[f"{specs[0].module} losses"] = losses
            found[f"{specs[0].module} left"] = torch.tensor(remaining, dtype=torch.float64)
        return found


def curvature_from(
    tensors: Mapping[str, Tensor], stacks: Sequence[Sequence[LinearSpec]], device: torch.device
) -> dict[str, Curvature]:
    """Of each stack, by its first module, the rows and H_O of each block of them, as `BlockGradients.tensors` gave it:
    the solver takes those of one stack at a time in float32."""
    found = {}
    for specs in stacks:
        named = {f"{specs[0].module}.{number}": rows for number, rows in enumerate(row_blocks(_heights(specs)))}
        if named.keys() <= tensors.keys():
            found[specs[0].module] = tuple((rows.to(device), tensors[name].to(device)) for name, rows in named.items())
    return found


def left_by_outputs(blocks: Sequence[Tensor]) -> float:
    """The share of a loss that feedback by the blocks of H_O leaves, by their rows."""
    rows = [len(H_bb) for H_bb in blocks]
    shares = [left(H_bb, SolveOptions().curvature_damp) for H_bb in blocks]
    return sum(n * share for n, share in zip(rows, shares, strict=True)) / max(1, sum(rows)) if rows else 1.0


def fitting(specs: Sequence[LinearSpec], schemes: Sequence[QuantScheme]) -> list[QuantScheme]:
    """Those of `schemes` whose groups divide the inputs of a stack."""
    return [scheme for scheme in schemes if all(scheme.divides(spec.shape[1]) for spec in specs)]


def entries_of(specs: Sequence[LinearSpec]) -> int:
    """Entries of the H_O of a stack."""
    return sum(len(rows) ** 2 for rows in row_blocks(_heights(specs)))


def _heights(specs: Sequence[LinearSpec]) -> list[int]:
    return [spec.shape[0] for spec in specs]

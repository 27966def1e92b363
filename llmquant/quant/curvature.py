"""H_O: which directions of the outputs of linears the model's own predictions depend on.

What. Let g be the gradient of log p(label) at the output of a linear, for one token of the text and a label that is
drawn from the model's own prediction. Then

    H_O = E[g g^T]   [O, O]

is a factor of the Fisher information, which is the Hessian of the KL divergence from the model to itself: an error e in
the output costs about 1/2 e^T H_O e nats. Together with H_I = E[x x^T] it is what `solvers/two_sided.py` minimises.
Linears that share an input have one H_O, in which g is the gradient at all their outputs: an error in a key can be made
up for in a query.

Whose gradients. The product of two averages stands for the average of products, which is right where g and x are
independent. They are not for the few tokens that the rest of a text attends to: in a real model the first token's value
vector may have nine tenths of all of E||g||^2, with an input like no other. Such a token would decide for all others
how their errors are weighed. So every token counts with the direction of its gradient and not with its length:

    H_O = E[g g^T / ||g||^2]

The loss then has no unit, but its minimum does not depend on one. eval/LOG.md has both on a real model.

Wide layers. H_O is kept in blocks of about `_MOST` rows; what lies between blocks counts as 0. A block has its share
of the rows of every linear, so that the gate and the up projection of a neuron are in one.

Source: Tseng et al., Model-Preserving Adaptive Rounding (arXiv 2505.22988); the equal lengths are ours.

Shapes: N tokens, O out_features of all linears that share the input, b rows of a block.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from llmquant.quant.hessian import add_products, mirrored
from llmquant.ranks import Ranks

_MOST = 2048  # rows of a block


def row_blocks(heights: Sequence[int]) -> list[Tensor]:
    """The rows of each block, for linears of these `heights` stacked.

    >>> [block.tolist() for block in row_blocks([3, 1])]
    [[0, 1, 2, 3]]
    >>> [len(block) for block in row_blocks([3000, 3000])]
    [2000, 2000, 2000]
    """
    n, starts = -(-sum(heights) // _MOST), [0, *accumulate(heights)]
    bounds = [[start + height * i // n for i in range(n + 1)] for start, height in zip(starts, heights, strict=False)]
    return [torch.cat([torch.arange(of_one[i], of_one[i + 1]) for of_one in bounds]) for i in range(n)]


class OutputHessian:
    """Running sum of g g^T / ||g||^2 over the tokens of linears that share an input, in blocks of rows.

    heights    rows of each linear
    products   the dtype to which gradients may be rounded before they are multiplied

    Tokens whose gradient is 0 or not finite are left out.

    >>> hessian = OutputHessian([1, 1], torch.device("cpu"))
    >>> hessian.add(torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    >>> [block.tolist() for block in hessian.means()]
    [[[0.5, 0.0], [0.0, 0.5]]]
    """

    def __init__(self, heights: Sequence[int], device: torch.device, products: torch.dtype = torch.float32) -> None:
        self._rows = [rows.to(device) for rows in row_blocks(heights)]
        self._sums = [torch.zeros(len(rows), len(rows), device=device) for rows in self._rows]
        self._products = products
        self.n_tokens = 0

    def add(self, g: Tensor) -> None:
        """Add all tokens of `g` [..., O], the gradients at the outputs, side by side."""
        g_NO = g.reshape(-1, g.shape[-1]).float()
        length_N = g_NO.norm(dim=1)
        counts = torch.isfinite(length_N) & (length_N > 0)
        g_NO = g_NO[counts] / length_N[counts, None]
        for rows, sum_bb in zip(self._rows, self._sums, strict=True):
            add_products(sum_bb, g_NO[:, rows] if len(self._rows) > 1 else g_NO, self._products)
        self.n_tokens += len(g_NO)

    def sums(self) -> list[Tensor]:
        """All that is added up over the tokens."""
        return self._sums

    def count_all(self, ranks: Ranks) -> None:
        """The tokens of all ranks, whose sums are added up."""
        self.n_tokens = sum(ranks.gathered(self.n_tokens))

    def means(self) -> list[Tensor]:
        """H_O by blocks of rows, symmetric to the bit. Divides the sums in place: call this once."""
        return [mirrored(sum_bb).div_(max(1, self.n_tokens)) for sum_bb in self._sums]

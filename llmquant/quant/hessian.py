"""H, all that a solver knows of the calibration text: how it is summed up, damped and factored.

What. A linear layer gets the weight W and should get codes Q that change its output little:

    E ||W x - Q x||^2 = tr((W - Q) H (W - Q)^T),   H = E[x x^T]   [I, I]

So however long the text is, I^2 numbers hold all of it that counts. (H is the Hessian of that loss in any row of Q, up
to a factor of 2, hence the name.) One H serves all linears that share an input: q, k and v, or gate and up.

Which x. The input is taken from the *quantized* model: blocks and steps in front of the layer are quantized already.
Call that input xhat, and x the same input in the original model. H = E[xhat xhat^T], as in GPTQ. Error propagation also
needs C = E[x xhat^T]; the sum kept for it is the drift C - H = E[(x - xhat) xhat^T], which is small, so that rounding
its factors to bfloat16 costs little. Where the output is added to a residual r, the layer can make up for some of the
errors in it: R = E[(r - rhat) xhat^T]   [O, I].

Damping. Few tokens, or inputs that always move together, make H singular or noisy. lambda I is added to it, lambda a
share of mean(diag H). More damping trusts the text less and comes closer to plain rounding.

The factor. H + lambda I = U U^T with U upper triangular. That one Cholesky serves both the feedback of GPTQ and the
division by H of error propagation (`solvers/gptq.py`). GPTQ's own code factors, inverts and factors again.

Sources: Frantar et al., GPTQ (arXiv 2210.17323), section 3, for H and a damping of 1%; that damping grows until the
factorization works, and shrinks with many tokens, is ours.

Shapes: N tokens, I in_features, O out_features, B columns of a block.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmquant.quant.matmul import add_product, matmul, sums_of
from llmquant.ranks import Ranks

# Few tokens per input dimension leave H noisy and need more damping: 0.01, or 0.003 from 8 tokens per dimension on.
_DAMP_FEW, _DAMP_MANY, _MANY = 0.01, 0.003, 8
LENT = 0.25  # tokens per input dimension that an expert is lent, where it reads hidden states, from all of its layer
_DAMP_STEP, _DAMP_TRIES = 3.0, 5  # a failed factorization is tried again with this many times the damping
_COLUMNS = 512  # columns in a block of a symmetric product
_AT_ONCE = 2**22  # entries that `_reverse` moves through one copy


class Hessian:
    """Running sum of xhat xhat^T over the tokens of one input, which one or several linears share.

    With `drift`, also the sum of (x - xhat) xhat^T for error propagation, x the same input in the original model; with
    `residual`, its width O, also that of (r - rhat) xhat^T. Sums take 4 I^2 bytes in float32, the last one 4 O I.
    Tokens with a non-finite entry are left out and counted in `n_excluded`.
    `products` is the dtype to which inputs may be rounded before they are multiplied; sums keep `dtype`.

    >>> hessian = Hessian(2, torch.device("cpu"))
    >>> hessian.add(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
    >>> hessian.mean().tolist()
    [[1.0, 1.0], [1.0, 2.0]]
    """

    def __init__(
        self,
        in_features: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        drift: bool = False,
        residual: int = 0,
        products: torch.dtype = torch.float32,
    ) -> None:
        self.sum_II = torch.zeros(in_features, in_features, dtype=dtype, device=device)
        self.drift_II = torch.zeros_like(self.sum_II) if drift else None
        self.residual_OI = torch.zeros(residual, in_features, dtype=dtype, device=device) if residual else None
        self.products = products
        self.n_tokens = 0
        self.n_excluded = 0
        self.n_lent = 0.0  # tokens' worth of another Hessian in the sum

    def add(self, x: Tensor, original: Tensor | None = None, residual: Tensor | None = None) -> None:
        """Add all tokens of `x` [..., I], the quantized model's input. `original` is the original model's input,
        `residual` [..., O] is r - rhat.

        ValueError where a sum wants one of them and it is missing.
        """
        x_NI = x.reshape(-1, x.shape[-1]).to(self.sum_II.dtype)
        drift_NI = None
        if self.drift_II is not None:
            if original is None:
                raise ValueError("drift needs the original model's input")
            drift_NI = original.reshape(x_NI.shape).to(x_NI.dtype) - x_NI
        rest_NO = None
        if self.residual_OI is not None:
            if residual is None:
                raise ValueError("the sum of residuals needs them")
            rest_NO = residual.reshape(len(x_NI), -1).to(x_NI.dtype)
        # 1. Leave out tokens with NaN or infinity: one of them would spoil the whole sum.
        finite = torch.isfinite((x_NI if drift_NI is None else x_NI + drift_NI).sum(-1))
        if rest_NO is not None:
            finite &= torch.isfinite(rest_NO.sum(-1))
        if not bool(finite.all()):
            self.n_excluded += int((~finite).sum())
            x_NI = x_NI[finite]
            drift_NI = None if drift_NI is None else drift_NI[finite]
            rest_NO = None if rest_NO is None else rest_NO[finite]
        # 2. The differences' sums. A bfloat16 product rounds its result too, far less than its tokens scatter.
        rounded = torch.bfloat16 if (x_NI.dtype, self.products) == (torch.float32, torch.bfloat16) else x_NI.dtype
        for total, difference in ((self.drift_II, drift_NI), (self.residual_OI, rest_NO)):
            if total is not None and difference is not None:
                total += difference.T.to(rounded) @ x_NI.to(rounded)
        # 3. H += xhat xhat^T: only the upper triangle, block column by block column, which halves the work.
        add_products(self.sum_II, x_NI, self.products)
        self.n_tokens += x_NI.shape[0]

    def lend(self, pool: "Hessian", n_tokens: float) -> None:
        """Add `pool`, which should have seen tokens like ours, as if it were `n_tokens` more:

            H <- (N H + n H_pool) / (N + n)

        An expert that few tokens reach has a noisy H, or none. What all experts of its layer read tells more of what it
        will read than plain rounding assumes. Not so for its down projection: each expert has inner dimensions of its
        own, in an order of their own, and the pool's H mixes them up.
        """
        if pool.n_tokens:
            self.sum_II.add_(pool.sum_II, alpha=n_tokens / pool.n_tokens)
            self.n_lent += n_tokens

    def sums(self) -> list[Tensor]:
        """All that is added up over the tokens."""
        return [total for total in (self.sum_II, self.drift_II, self.residual_OI) if total is not None]

    def count_all(self, ranks: Ranks) -> None:
        """The tokens of all ranks, whose sums are added up."""
        counts = ranks.gathered((self.n_tokens, self.n_excluded))
        self.n_tokens, self.n_excluded = (sum(of_ranks) for of_ranks in zip(*counts, strict=True))

    def mean(self) -> Tensor:
        """H_II = sum / N, symmetric to the bit. Divides the sum in place: call this once."""
        return mirrored(self.sum_II).div_(max(1.0, self.n_tokens + self.n_lent))

    def take_drift(self) -> Tensor | None:
        """drift_II = C - H with C = E[x xhat^T]; None without drift. Divides the sum in place and hands it over."""
        drift_II, self.drift_II = self._divided(self.drift_II), None
        return drift_II

    def take_residual(self) -> Tensor | None:
        """R_OI = E[(r - rhat) xhat^T], likewise."""
        residual_OI, self.residual_OI = self._divided(self.residual_OI), None
        return residual_OI

    def _divided(self, total: Tensor | None) -> Tensor | None:
        return None if total is None else total.div_(max(1, self.n_tokens))


def add_products(sum_II: Tensor, x_NI: Tensor, products: torch.dtype) -> None:
    """sum_II += x^T x, the upper triangle only, block column by block column: half of the work."""
    narrow = x_NI.is_cuda and x_NI.dtype == torch.float32 and products != torch.float32
    with sums_of(products):
        x_NI = x_NI.to(products) if narrow else x_NI
        for start in range(0, x_NI.shape[1], _COLUMNS):
            end = start + _COLUMNS
            add_product(sum_II[:end, start:end], x_NI[:, :end].T, x_NI[:, start:end])


def mirrored(sum_II: Tensor) -> Tensor:
    """The upper triangle copied to the lower one, in place: symmetric to the bit."""
    for start in range(0, len(sum_II), _COLUMNS):
        end = start + _COLUMNS
        sum_II[start:end, :start] = sum_II[:start, start:end].T
        diagonal = sum_II[start:end, start:end]
        diagonal.copy_(diagonal.triu() + diagonal.triu(1).T)
    return sum_II


def pooled(hessians: Sequence[Hessian]) -> Hessian:
    """The Hessian of all tokens of all of them. They share their in_features."""
    first = hessians[0]
    pool = Hessian(len(first.sum_II), first.sum_II.device, first.sum_II.dtype, products=first.products)
    for hessian in hessians:
        pool.sum_II += hessian.sum_II
        pool.n_tokens += hessian.n_tokens
    return pool


def quadratic(E_OI: Tensor, H_II: Tensor) -> Tensor:
    """e^T H e for every row e of E, [O]: the loss tr(E H E^T), row by row.

    H is symmetric, so only its upper triangle is multiplied, block column by block column: half of the work.

    >>> quadratic(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0], [1.0, 4.0]])).tolist()
    [23.0]
    """
    loss_O = E_OI.new_zeros(E_OI.shape[0])
    for start in range(0, E_OI.shape[1], _COLUMNS):
        end = start + _COLUMNS
        here_OB = E_OI[:, start:end]
        half_OB = matmul(here_OB, H_II[start:end, start:end])
        if start:  # what lies above the diagonal block stands for its mirror image as well
            half_OB.add_(matmul(E_OI[:, :start], H_II[:start, start:end]), alpha=2)
        loss_O += half_OB.mul_(here_OB).sum(1)
    return loss_O


def default_propagation(n_tokens: int, in_features: int, *, wide: bool = False) -> float:
    """Strength of error propagation: min(r / (r + 3), 0.75), r the tokens per input dimension.

    Few tokens leave noise in C - H, and the full correction would fit it. `wide` inputs, wider than the model's hidden
    states (those of down_proj), need more tokens still: with r below 16 the strength is 0 there. This rule is ours,
    chosen by trial; eval/LOG.md shows the divergence without propagation and with all of it.

    >>> default_propagation(65536, 256), default_propagation(8192, 4096), default_propagation(8192, 4096, wide=True)
    (0.75, 0.4, 0.0)
    """
    ratio = n_tokens / in_features
    return 0.0 if wide and ratio < 16 else min(ratio / (ratio + 3), 0.75)


def residual_part(strength: float, n_tokens: int, in_features: int) -> float:
    """b = strength * r / (r + 16), r the tokens per input dimension: the part of propagation that is for the residual.

    R holds the errors of all that came before, of which these inputs explain little: its noise is larger than the
    drift's. With r below 16 it is left out. By trial, as above.

    >>> residual_part(1.0, 65536, 256), residual_part(1.0, 8192, 1024)
    (0.9411764705882353, 0.0)
    """
    ratio = n_tokens / in_features
    return strength * ratio / (ratio + 16) if ratio >= 16 else 0.0


def default_damp(n_tokens: int, in_features: int) -> float:
    """Damping as a share of mean(diag H): 0.003 from 8 tokens per input dimension on, else 0.01.

    >>> default_damp(65536, 4096), default_damp(8192, 4096)
    (0.003, 0.01)
    """
    return _DAMP_MANY if n_tokens >= _MANY * in_features else _DAMP_FEW


def ridge(mean: float, damp: float) -> float:
    """lambda = damp * mean: what damping adds to the diagonal of an H whose diagonal has this mean. 1 where H is 0."""
    return damp * mean if mean > 0 else 1.0


def factor(H_II: Tensor, damp: float, order: Tensor | None = None) -> tuple[Tensor, float, int] | None:
    """Upper triangular U with H + lambda I = U U^T, lambda = ridge(mean(diag H), damp).

    Returns (U_II, the damp that worked, the number of failed tries). Each failed try triples the damping; None after
    five of them. With `order`, the factor is that of H[order][:, order].

    A dead input (H_jj = 0) has lambda on the diagonal and zeros elsewhere in its row and column. So its weights are
    rounded to nearest and change no others.

    How: LAPACK gives a lower factor, H = L L^T. Applied to H with rows and columns reversed, and reversed again, that
    is the upper one. Memory: H, which is not changed, and one more matrix of its size.

    >>> U_II, _, _ = factor(torch.tensor([[1.25, 0.5], [0.5, 1.0]]), damp=0.0)
    >>> U_II.tolist()
    [[1.0, 0.5], [0.0, 1.0]]
    """
    mean = float(H_II.diagonal().mean())
    if not mean >= 0 or mean == float("inf"):  # also NaN
        return None
    backwards = torch.arange(len(H_II), device=H_II.device).flip(0) if order is None else order.flip(0)
    work_II, info = torch.empty_like(H_II), torch.empty((), dtype=torch.int32, device=H_II.device)
    for tries in range(_DAMP_TRIES):
        # 1. Copy H, reversed (and in `order`), and damp it.
        for start in range(0, len(H_II), _COLUMNS):
            end = start + _COLUMNS
            work_II[start:end] = H_II[backwards[start:end]][:, backwards]
        work_II.diagonal().add_(ridge(mean, damp))
        # 2. The ordinary Cholesky, in place: the transpose lies column by column in memory, as LAPACK wants it.
        lower = work_II.mT
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        # 3. Reverse the factor in place. Some builds return NaN without saying so in `info`.
        if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            _reverse(work_II.view(-1))
            return work_II.mT, damp, tries
        damp *= _DAMP_STEP
    return None


def _reverse(flat: Tensor) -> None:
    """Reverse the order of all entries, in place. For the memory of a matrix that reverses its rows and columns."""
    for start in range(0, len(flat) // 2, _AT_ONCE):
        end = min(start + _AT_ONCE, len(flat) // 2)
        head, tail = flat[start:end], flat[len(flat) - end : len(flat) - start]
        kept = head.flip(0)
        head.copy_(tail.flip(0))
        tail.copy_(kept)

"""H = E[x^ x^^T] of one distinct input x^ of the quantized model, and its factor.

Shapes: N tokens, I in_features.
"""

import torch
from torch import Tensor

from llmquant.quant.matmul import matmul, sums_of

# Few tokens per input dimension leave H noisy: damp it more (METHODS: 0.01, or 0.003 from 8 tokens per dimension).
_DAMP_FEW, _DAMP_MANY, _MANY = 0.01, 0.003, 8
_DAMP_STEP, _DAMP_TRIES = 3.0, 5
_COLUMNS = 512  # in a block of a symmetric product
_AT_ONCE = 2**22  # entries that are moved through a copy


class Hessian:
    """Running sum of x^ x^^T over the tokens of one input that one or several linears share.

    With `drift`, also of (x - x^) x^^T, where x is the same input in the original model: what error propagation
    needs. Memory: 4 * I^2 bytes for each sum. Tokens with a non-finite entry are left out and counted.
    Inputs are rounded to `products` (llmquant.products) before they are multiplied; sums are float32.
    """

    def __init__(
        self,
        in_features: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        drift: bool = False,
        products: torch.dtype = torch.float32,
    ) -> None:
        self.sum_II = torch.zeros(in_features, in_features, dtype=dtype, device=device)
        self.drift_II = torch.zeros_like(self.sum_II) if drift else None
        self.products = products
        self.n_tokens = 0
        self.n_excluded = 0

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """Add all tokens of `x` [..., I], the quantized model's input; `original` is the original model's."""
        x_NI = x.reshape(-1, x.shape[-1]).to(self.sum_II.dtype)
        drift_NI = None
        if self.drift_II is not None:
            if original is None:
                raise ValueError("drift needs the original model's input")
            drift_NI = original.reshape(x_NI.shape).to(x_NI.dtype) - x_NI
        finite = torch.isfinite((x_NI if drift_NI is None else x_NI + drift_NI).sum(-1))
        if not bool(finite.all()):
            self.n_excluded += int((~finite).sum())
            x_NI = x_NI[finite]
            drift_NI = None if drift_NI is None else drift_NI[finite]
        if self.drift_II is not None and drift_NI is not None:
            # Rounding the sum of a batch as well is nothing beside the noise of its tokens.
            rounded = torch.bfloat16 if (x_NI.dtype, self.products) == (torch.float32, torch.bfloat16) else x_NI.dtype
            self.drift_II += drift_NI.T.to(rounded) @ x_NI.to(rounded)
        with sums_of(self.products):  # the upper triangle, block column by block column: about half of the products
            for start in range(0, x_NI.shape[1], _COLUMNS):
                end = start + _COLUMNS
                self.sum_II[:end, start:end].addmm_(x_NI[:, :end].T, x_NI[:, start:end])
        self.n_tokens += x_NI.shape[0]

    def mean(self) -> Tensor:
        """H_II = sum / N, symmetric to the bit. The sum is divided in place, so call this once."""
        for start in range(0, self.sum_II.shape[0], _COLUMNS):
            end = start + _COLUMNS
            self.sum_II[start:end, :start] = self.sum_II[:start, start:end].T
            diagonal = self.sum_II[start:end, start:end]
            diagonal.copy_(diagonal.triu() + diagonal.triu(1).T)
        return self.sum_II.div_(max(1, self.n_tokens))

    def take_drift(self) -> Tensor | None:
        """drift_II = C - H, C = E[x x^^T]; None where no drift was summed. The sum is divided in place and let go."""
        if self.drift_II is None:
            return None
        drift_II, self.drift_II = self.drift_II.div_(max(1, self.n_tokens)), None
        return drift_II


def quadratic(E_OI: Tensor, H_II: Tensor) -> Tensor:
    """e^T H e of every row e of E, [O], H symmetric: the upper triangle by block columns, half of the products.

    >>> quadratic(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0], [1.0, 4.0]])).tolist()
    [23.0]
    """
    loss_O = E_OI.new_zeros(E_OI.shape[0])
    for start in range(0, E_OI.shape[1], _COLUMNS):
        end = start + _COLUMNS
        here_OB = E_OI[:, start:end]
        half_OB = matmul(here_OB, H_II[start:end, start:end])
        if start:
            half_OB.add_(matmul(E_OI[:, :start], H_II[:start, start:end]), alpha=2)
        loss_O += half_OB.mul_(here_OB).sum(1)
    return loss_O


def default_propagation(n_tokens: int, in_features: int, *, wide: bool = False) -> float:
    """Strength of error propagation: min(r / (r + 3), 0.75), r = tokens per input dimension.

    The full correction fits the noise of few tokens. It is 0 for `wide` inputs (wider than the model's hidden
    states) with r below 16.

    >>> default_propagation(65536, 256), default_propagation(8192, 4096), default_propagation(8192, 4096, wide=True)
    (0.75, 0.4, 0.0)
    """
    ratio = n_tokens / in_features
    return 0.0 if wide and ratio < 16 else min(ratio / (ratio + 3), 0.75)


def default_damp(n_tokens: int, in_features: int) -> float:
    """Damping as a share of mean(diag H): 0.003 from 8 tokens per input dimension on, else 0.01."""
    return _DAMP_MANY if n_tokens >= _MANY * in_features else _DAMP_FEW


def ridge(mean: float, damp: float) -> float:
    """lambda, what damping adds to the diagonal of an H whose diagonal has this mean; 1 for an H of zeros."""
    return damp * mean if mean > 0 else 1.0


def factor(H_II: Tensor, damp: float, order: Tensor | None = None) -> tuple[Tensor, float, int] | None:
    """Upper U with H + lambda I = U U^T, lambda = ridge(mean(diag H), damp); the ordinary Cholesky of H reversed.

    Returns (U_II, the damp that worked, failed tries), or None where five tries, each with three times the
    damping, all failed. A dead input (H_jj = 0) gets lambda on its diagonal and nothing beside it, so its
    weights are rounded to nearest and move nothing else. H is not changed; with `order`, the factor is that of
    H[order][:, order]. Two matrices of H's size are alive, H among them: the factor is computed and reversed in place.
    """
    mean = float(H_II.diagonal().mean())
    if not mean >= 0 or mean == float("inf"):  # also NaN
        return None
    backwards = torch.arange(len(H_II), device=H_II.device).flip(0) if order is None else order.flip(0)
    work_II, info = torch.empty_like(H_II), torch.empty((), dtype=torch.int32, device=H_II.device)
    for tries in range(_DAMP_TRIES):
        for start in range(0, len(H_II), _COLUMNS):
            end = start + _COLUMNS
            work_II[start:end] = H_II[backwards[start:end]][:, backwards]
        work_II.diagonal().add_(ridge(mean, damp))
        lower = work_II.mT  # column by column in memory, as LAPACK has it: no copy is made
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        # Some builds return NaN without saying so in `info`.
        if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            _reverse(work_II.view(-1))
            return work_II.mT, damp, tries
        damp *= _DAMP_STEP
    return None


def _reverse(flat: Tensor) -> None:
    """The last entry first, in place. A matrix whose memory this is has its rows and its columns reversed."""
    for start in range(0, len(flat) // 2, _AT_ONCE):
        end = min(start + _AT_ONCE, len(flat) // 2)
        head, tail = flat[start:end], flat[len(flat) - end : len(flat) - start]
        kept = head.flip(0)
        head.copy_(tail.flip(0))
        tail.copy_(kept)

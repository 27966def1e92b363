"""H = E[x x^T] of one distinct input, and its factor.

Shapes: N tokens, I in_features.
"""

import torch
from torch import Tensor

# Few tokens per input dimension leave H noisy: damp it more (METHODS: 0.01, or 0.003 from 8 tokens per dimension).
_DAMP_FEW, _DAMP_MANY, _MANY = 0.01, 0.003, 8
_DAMP_STEP, _DAMP_TRIES = 3.0, 5


class Hessian:
    """Running sum of x x^T over the tokens of one input that one or several linears share.

    Memory: 4 * I^2 bytes. Tokens with a non-finite entry are left out and counted.
    """

    def __init__(self, in_features: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.sum_II = torch.zeros(in_features, in_features, dtype=dtype, device=device)
        self.n_tokens = 0
        self.n_excluded = 0

    def add(self, x: Tensor) -> None:
        """Add all tokens of `x` [..., I]."""
        x_NI = x.reshape(-1, x.shape[-1]).to(self.sum_II.dtype)
        finite = torch.isfinite(x_NI.sum(-1))
        if not bool(finite.all()):
            self.n_excluded += int((~finite).sum())
            x_NI = x_NI[finite]
        self.sum_II.addmm_(x_NI.T, x_NI)
        self.n_tokens += x_NI.shape[0]

    def mean(self) -> Tensor:
        """H_II = sum / N. The sum is divided in place, so call this once."""
        return self.sum_II.div_(max(1, self.n_tokens))


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
    H[order][:, order]. At most three matrices of H's size are alive, H among them.
    """
    mean = float(H_II.diagonal().mean())
    if not mean >= 0 or mean == float("inf"):  # also NaN
        return None
    for tries in range(_DAMP_TRIES):
        reversed_II = H_II.flip(0, 1) if order is None else H_II[order.flip(0)][:, order.flip(0)]
        reversed_II.diagonal().add_(ridge(mean, damp))
        lower, info = torch.linalg.cholesky_ex(reversed_II)
        # Some builds return NaN without saying so in `info`.
        if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            del reversed_II
            return lower.flip(0, 1), damp, tries
        damp *= _DAMP_STEP
    return None

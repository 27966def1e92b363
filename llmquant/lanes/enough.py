"""`--eval-tokens auto`: how much text is enough to know a divergence to 3%.

The mean KL of n windows has a standard error that falls as 1 / sqrt(n). So a first part of the text says how many
windows the aim needs; those are scored, too, and where their error is larger than the first part promised, once more.
"""

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from llmquant.lanes.scores import Array, TokenScores, standard_error
from llmquant.text.windows import Windows

AIM = 0.03  # standard error of KL, as a share of KL
MOST_TOKENS = 2**18  # no more are scored, whatever the error is
FIRST_TOKENS = 2**14  # of the first part, and of as many windows as a standard error can be taken from:
_FIRST_WINDOWS = 16
_MARGIN = 1.1  # more windows than the first part asks for


def first_part(windows: Windows) -> Windows:
    """The windows that are scored in any case."""
    count = max(_FIRST_WINDOWS, FIRST_TOKENS // windows.ids.shape[1])
    return replace(windows, ids=windows.ids[:count])


def windows_to_add(scores: Iterable[TokenScores], n_available: int) -> int:
    """How many of `n_available` windows behind those that were scored the aim needs, for the lane that needs most.

    scores   of the lanes that are compared with the original
    """
    wanted = 0
    for score in scores:
        means = _by_window(score)
        error, mean = standard_error(means), float(means.mean()) if len(means) else 0.0
        if error is not None and math.isfinite(error) and error > AIM * mean > 0:
            wanted = max(wanted, math.ceil(_MARGIN * len(score.kl) * (error / (AIM * mean)) ** 2) - len(score.kl))
    return min(n_available, wanted)


def _by_window(score: TokenScores) -> Array:
    return np.array([row[ok].mean() for row, ok in zip(score.kl, score.finite, strict=True) if ok.any()])

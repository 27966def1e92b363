"""`--eval-tokens auto`: how much text is enough to know a divergence to 3%.

The mean KL of n windows has a standard error that falls as 1 / sqrt(n). So a first part of the text says how many
windows the aim needs; those are scored, too, and where their error is larger than the first part promised, once more.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from llmquant.lanes.scores import TokenScores, joined, standard_error, window_means
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


def scored_enough(
    scores: Mapping[str, TokenScores],
    scored: Windows,
    rest: Windows,
    score: Callable[[Windows], Mapping[str, TokenScores]],
    judged: Sequence[str],
    at_once: int | None,
    say: Callable[[str], None],
) -> tuple[Mapping[str, TokenScores], Windows]:
    """Scores of as much text as the aim takes, and that text.

    scores    of the windows `scored`; `rest` is what follows them
    score     scores of other windows, by lane
    judged    the lanes whose divergence shall be known
    at_once   windows that may be scored in one pass; None: any number
    """
    while count := windows_to_add([scores[lane] for lane in judged], len(rest.ids)):
        count = min(count, at_once or count)
        part, rest = replace(rest, ids=rest.ids[:count]), replace(rest, ids=rest.ids[count:])
        say(f"{part.n_tokens} tokens more, for a KL that is known to {AIM:.0%}")
        scores = joined([scores, score(part)])
        scored = replace(scored, ids=torch.cat([scored.ids, part.ids]))
    return scores, scored


def windows_to_add(scores: Iterable[TokenScores], n_available: int) -> int:
    """How many of `n_available` windows behind those that were scored the aim needs, for the lane that needs most.

    scores   of the lanes that are compared with the original
    """
    wanted = 0
    for score in scores:
        means = window_means(score.kl, score.finite)
        error, mean = standard_error(means), float(means.mean()) if len(means) else 0.0
        if error is not None and math.isfinite(error) and error > AIM * mean > 0:
            wanted = max(wanted, math.ceil(_MARGIN * len(score.kl) * (error / (AIM * mean)) ** 2) - len(score.kl))
    return min(n_available, wanted)

"""Perplexity and KL divergence of several lanes over the same windows of text.

A lane is one version of the weights (original, llmquant, a baseline) with its own stream of hidden states. While a
block is in memory, each lane's stream passes through it once, with that lane's weights. After the last block, each
window goes through the final norm and the head in all lanes at once. Logits are computed for a few tokens at a time,
compared and dropped: a vocabulary of 150,000 would need a gigabyte for 2,048 tokens.

Per token, with p the reference's probabilities and q the lane's:
    nll = -log q(true token)       KL(p || q) = sum_v p_v (log p_v - log q_v)
Tokens of one window depend on each other, so standard errors are taken over the means of windows, not over tokens.

Shapes: B windows of a batch, N tokens, T time, D hidden, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmquant.errors import SolveError, option
from llmquant.memory import SLACK, trim
from llmquant.model.streams import Stream, Streams
from llmquant.ranks import Ranks
from llmquant.text.windows import Windows

ORIGINAL, OURS = "original", "llmquant"  # names of the two lanes of every run,
BEFORE = "before recovery"  # and of a third one, where ours is trained
OF_OURS = (OURS, BEFORE)
Array = NDArray[np.float64]
LOGITS_AT_ONCE = 2**22  # numbers in one chunk of logits: 16 MB in float32


@dataclass(frozen=True)
class TokenScores:
    """Scores of every predicted token, each [windows, T - 1].

    nll          -log probability of the true token, nats
    kl           KL(reference || lane), nats
    same_top     1 where lane and reference have the same top token, else 0
    dp           change of the true token's probability, lane minus reference
    confidence   probability of the lane's own top token
    finite       False where the lane or the reference had NaN or Inf logits
    """

    nll: Array
    kl: Array
    same_top: Array
    dp: Array
    confidence: Array
    finite: NDArray[np.bool_]


# exp(x), infinite where it is beyond what a float holds (x above 709.78). JSON knows no infinity: null there.
Exponential = Annotated[float, "may be infinite"]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """A lane's figures. Standard errors and intervals are over windows; None where there is only one window.

    perplexity is exp(mean loss), its ratio is to the original's. Where the perplexity is infinite, `mean_loss` (nats
    per token) says how bad it is, and the perplexity has no standard error.
    """

    perplexity: Exponential
    perplexity_se: float | None
    perplexity_ratio: Exponential
    perplexity_ratio_ci: tuple[Exponential, Exponential] | None
    kl_mean: float
    kl_se: float | None
    kl_p50: float
    kl_p90: float
    kl_p99: float
    kl_p999: float
    kl_max: float
    same_top: float
    rms_dp: float
    n_nonfinite: int
    mean_loss: float | None = None

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return math.log(self.perplexity) if self.mean_loss is None else self.mean_loss


class Lanes:
    """The evaluation streams of all lanes: `start` them, `advance` them block by block, `score` them at the end."""

    def __init__(self, names: Sequence[str], windows: Windows, streams: Streams) -> None:
        self.windows = windows
        self._chunk = 16  # tokens whose logits are computed at once; set by the vocabulary's size once that is known
        self.streams: dict[str, Stream] = {name: streams.new(name) for name in names}

    def start(self, batch: Any) -> None:
        """Append a batch as it is before the first block, the same for every lane; what `Stream.append` takes."""
        for stream in self.streams.values():
            stream.append(batch)

    def advance(self, name: str, block: Callable[[Any], Any]) -> None:
        """Take one lane's stream through the forward of a block, which holds that lane's weights."""
        self.streams[name].update(block)
        trim(SLACK)

    def _hidden(self) -> list[Iterator[Tensor]]:
        return [stream.hidden() for stream in self.streams.values()]

    def relative_errors(self, tokens: int = 2**14) -> dict[str, float]:
        """||h_lane - h|| / ||h|| of every lane but the first, h the first's hidden states.

        Taken over the first `tokens` tokens only, because streams may lie in files.
        """
        names, seen = list(self.streams), 0
        power, squares = 0.0, dict.fromkeys(names[1:], 0.0)
        for reference, *others in zip(*self._hidden(), strict=True):
            power += float(torch.linalg.vector_norm(reference.float())) ** 2
            for name, hidden in zip(names[1:], others, strict=True):
                squares[name] += float(torch.linalg.vector_norm(hidden.float() - reference.float())) ** 2
            seen += reference.numel() // reference.shape[-1]
            if seen >= tokens:
                break
        return {name: math.sqrt(value / power) if power else 0.0 for name, value in squares.items()}

    def score(self, logits_of: Callable[[str, Tensor], Tensor]) -> dict[str, TokenScores]:
        """Scores of every lane. The first lane is the reference of all divergences.

        `logits_of` (lane, hidden states [N, D]) -> logits [N, V] is called chunk by chunk; one chunk is kept at a time.
        """
        count, seq_len = self.windows.ids.shape
        # Allocated beforehand: small results kept between large temporaries would fragment the heap.
        table = {name: torch.empty(6, count, seq_len - 1, dtype=torch.float64) for name in self.streams}
        position = 0
        for batches in zip(*self._hidden(), strict=True):
            for window in zip(*batches, strict=True):
                hidden = dict(zip(self.streams, window, strict=True))
                self._score_window(hidden, self.windows.ids[position], logits_of, table, position)
                position += 1
        scores = {}
        for name, rows in table.items():
            nll, kl, top, dp, confidence, finite = rows.numpy()
            scores[name] = TokenScores(nll, kl, top, dp, confidence, finite.astype(np.bool_))
        return scores

    def _score_window(
        self,
        hidden: dict[str, Tensor],
        ids_T: Tensor,
        logits_of: Callable[[str, Tensor], Tensor],
        table: dict[str, Tensor],
        position: int,
    ) -> None:
        """Fill table[lane][:, position] with the scores of each token but the first, in the order of TokenScores."""
        start, last = 0, ids_T.numel() - 1
        first = next(iter(hidden))
        while start < last:
            # 1. The reference's log probabilities of a chunk of tokens; position t predicts token t + 1.
            stop = min(start + self._chunk, last)
            reference = log_probabilities(logits_of(first, hidden[first][start:stop]))
            target = ids_T[start + 1 : stop + 1, None].to(reference.device)
            p, best = reference.exp(), reference.max(1)
            p_target, top, zeros = p.gather(1, target)[:, 0], best.indices, torch.zeros(stop - start)
            # 2. Each lane against it; the reference against itself is 0 and not computed.
            for name, lane_hidden in hidden.items():
                lane, kl = reference, zeros.to(p.device)
                if name != first:
                    lane = log_probabilities(logits_of(name, lane_hidden[start:stop]))
                    best, kl = lane.max(1), torch.sub(reference, lane).mul_(p).sum(1)
                nll = -lane.gather(1, target)[:, 0]
                finite = torch.isfinite(nll) & torch.isfinite(kl)
                part = (nll, kl, best.indices == top, (-nll).exp() - p_target, best.values.exp(), finite)
                for row, column in zip(table[name], part, strict=True):
                    row[position, start:stop] = column
            # 3. The next chunk, as large as the vocabulary allows.
            self._chunk = max(1, LOGITS_AT_ONCE // reference.shape[1])
            start = stop


def joined(parts: Sequence[Mapping[str, TokenScores]]) -> dict[str, TokenScores]:
    """The scores of parts of a text that follow each other, by lane."""
    return {
        lane: TokenScores(
            *(np.concatenate(rows) for rows in zip(*(astuple(part[lane]) for part in parts), strict=True))
        )
        for lane in parts[0]
    }


def of_all_ranks(scores: Mapping[str, TokenScores], windows: Windows, ranks: Ranks) -> dict[str, TokenScores]:
    """The scores of all `windows`, from those of every rank's share of them."""
    every = range(len(windows.ids))
    batches = [every[start : start + windows.per_batch] for start in every[:: windows.per_batch]]
    shares = [[n for batch in replace(ranks, rank=rank).share(batches) for n in batch] for rank in range(ranks.size)]
    order = np.argsort([number for share in shares for number in share])
    found = joined(ranks.gathered(scores))
    return {lane: TokenScores(*(rows[order] for rows in astuple(score))) for lane, score in found.items()}


def log_probabilities(logits_NV: Tensor) -> Tensor:
    """log softmax over the vocabulary, in place."""
    return logits_NV.sub_(torch.logsumexp(logits_NV, dim=1, keepdim=True))


def figures(scores: TokenScores, original: TokenScores, seed: int = 0) -> Figures:
    """Figures of a lane. Tokens that are not finite in it or in the original are left out and counted.

    perplexity        exp(mean nll); its standard error is perplexity * se(mean nll) (delta method)
    perplexity_ratio  perplexity over the original's; its interval is the 95% percentile bootstrap of the paired
                      difference of nll, over whole windows

    SolveError where no token is finite.
    """
    finite = scores.finite & original.finite
    kept = [row.any() for row in finite]

    if not any(kept):
        raise SolveError("evaluation", "NaN or Inf logits at every token", remedy=f"try another {option('dtype')}")
    kl = np.sort(scores.kl[finite])
    nll = float(scores.nll[finite].mean())
    nll_se, kl_se = (standard_error(window_means(values, finite)) for values in (scores.nll, scores.kl))
    difference = window_means(scores.nll - original.nll, finite)
    perplexity = exponential(nll)
    perplexity_se = None if nll_se is None else perplexity * nll_se
    p50, p90, p99, p999 = np.quantile(kl, [0.5, 0.9, 0.99, 0.999])
    return Figures(
        perplexity=perplexity,
        perplexity_se=perplexity_se if perplexity_se is not None and math.isfinite(perplexity_se) else None,
        perplexity_ratio=exponential(nll - float(original.nll[finite].mean())),
        perplexity_ratio_ci=bootstrap_ratio(difference, seed),
        kl_mean=float(kl.mean()),
        kl_se=kl_se,
        kl_p50=float(p50),
        kl_p90=float(p90),
        kl_p99=float(p99),
        kl_p999=float(p999),
        kl_max=float(kl[-1]),
        same_top=float(scores.same_top[finite].mean()),
        rms_dp=float(np.sqrt(np.square(scores.dp[finite]).mean())),
        n_nonfinite=int((~finite).sum()),
        mean_loss=nll if math.isinf(perplexity) else None,
    )


def exponential(x: float) -> float:
    """e^x, infinite where that is beyond what a float holds.

    >>> exponential(0.0), exponential(710.0)
    (1.0, inf)
    """
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def window_means(values: Array, finite: NDArray[np.bool_]) -> Array:
    """The mean of every window's finite tokens; windows without one are left out.

    >>> window_means(np.array([[1.0, 3.0], [5.0, 7.0]]), np.array([[True, True], [False, False]])).tolist()
    [2.0]
    """
    return np.array([row[mask].mean() for row, mask in zip(values, finite, strict=True) if mask.any()])


def standard_error(means: Array) -> float | None:
    """Standard error of the mean of `means`, one mean for each window; None for a single window.

    >>> standard_error(np.array([1.0, 3.0]))
    1.0
    """
    return float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None


def bootstrap_ratio(differences: Array, seed: int, resamples: int = 2000) -> tuple[float, float] | None:
    """95% interval of exp(mean difference): `resamples` times, as many windows are drawn with replacement."""
    if len(differences) < 2:
        return None
    picks = np.random.default_rng(seed).integers(0, len(differences), (resamples, len(differences)))
    low, high = np.quantile(differences[picks].mean(1), [0.025, 0.975])
    return exponential(float(low)), exponential(float(high))

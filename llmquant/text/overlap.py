"""Was the evaluation text seen in calibration? Figures on text that the quantizer was fitted to flatter it.

How. Every run of 32 consecutive tokens in the calibration windows is hashed, and so is every run in the evaluation
windows. Evaluation tokens inside a run that both have are counted. A few are normal (quotations, licences); above 1%
the evaluation is refused.

Shapes: n evaluation windows of T tokens, m calibration windows of S tokens.
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmquant.errors import CalibrationError, option

RUN = 32  # tokens in a run; unrelated texts share shorter ones: idioms, licences, addresses
LIMIT = 0.01  # the highest share of evaluation tokens in shared runs; quotations and boilerplate stay below it
_FEWEST_KINDS = 8  # a run counts if it has this many distinct tokens: rows of dots and blank tables are no text
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def refuse_overlap(calibration_ids: Tensor, evaluation_ids: Tensor, names: tuple[str, str]) -> float:
    """`overlap` of the two texts; CalibrationError where it is above 1%. `names`: the texts as the user called them."""
    share = overlap(calibration_ids, evaluation_ids)
    if share > LIMIT:
        raise CalibrationError(
            f"{option('calibration')} {names[0]}, {option('eval_data')} {names[1]}",
            f"{share:.1%} of the evaluation tokens are in the calibration windows",
            expected=f"at most {LIMIT:.0%}",
            remedy="evaluate on text that was not calibrated on: another file, dataset or split",
        )
    return share


def overlap(calibration_ids: Tensor, evaluation_ids: Tensor, run: int = RUN) -> float:
    """Share of the tokens of `evaluation_ids` [n, T] that lie in a run of `run` tokens of `calibration_ids` [m, S].

    Runs are compared by a 64-bit hash. With a million runs on each side, two different ones have the same hash with a
    probability below 1e-7. Windows shorter than a run have none.

    >>> import torch
    >>> ids = torch.arange(80).view(2, 40)
    >>> overlap(ids, torch.cat([ids[:1] + 500, ids[1:]])), overlap(ids, ids + 500)
    (0.5, 0.0)
    """
    evaluation = evaluation_ids.numpy()
    theirs, mine = _hashes(calibration_ids.numpy(), run), _hashes(evaluation, run)
    if not theirs.size or not mine.size:
        return 0.0
    starts = np.isin(mine, theirs) & _varied(evaluation, run)
    # A shared run covers all of its tokens, not only the first.
    covered = np.zeros(evaluation.shape, dtype=np.bool_)
    for offset in range(run):
        covered[:, offset : offset + starts.shape[1]] |= starts
    return float(covered.mean())


def _hashes(ids: NDArray[np.int64], run: int) -> NDArray[np.uint64]:
    """A hash of each run of tokens, [n, T - run + 1]: tokens are mixed, then combined by multiplication modulo 2^64."""
    count = max(0, ids.shape[1] - run + 1)
    mixed = ids.astype(np.uint64) + np.uint64(1)
    mixed *= _FACTOR
    mixed ^= mixed >> np.uint64(29)
    hashes = np.zeros((ids.shape[0], count), dtype=np.uint64)
    for offset in range(run):
        hashes *= _FACTOR
        hashes += mixed[:, offset : offset + count]
        hashes ^= hashes >> np.uint64(32)
    return hashes


def _varied(ids: NDArray[np.int64], run: int) -> NDArray[np.bool_]:
    """Whether each run has enough distinct tokens to be text."""
    runs = np.lib.stride_tricks.sliding_window_view(ids, run, axis=1)
    varied = np.zeros(runs.shape[:2], dtype=np.bool_)
    for row, window in zip(varied, runs, strict=True):  # one window at a time: its sorted runs are `run` times as large
        row[:] = (np.diff(np.sort(window, axis=1), axis=1) != 0).sum(1) + 1 >= min(_FEWEST_KINDS, run)
    return varied

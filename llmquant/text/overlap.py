"""Whether the evaluation text was seen in calibration: runs of tokens that both hold.

Figures on text that the quantizer was fitted to say nothing about other text.
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmquant.errors import CalibrationError

RUN = 32  # tokens; shorter runs are idioms, licences and addresses that unrelated texts share
LIMIT = 0.01  # share of evaluation tokens in shared runs; below it are quotations and boilerplate
_FEWEST_KINDS = 8  # distinct tokens in a run that counts: rows of dots and blank tables are no text
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def refuse_overlap(calibration_ids: Tensor, evaluation_ids: Tensor, names: tuple[str, str]) -> float:
    """The share of evaluation tokens [n, T] that lie in a run of 32 tokens of the calibration windows [m, S].

    CalibrationError where it is above 1%; `names` are the two texts as the user called them.
    """
    share = overlap(calibration_ids, evaluation_ids)
    if share > LIMIT:
        raise CalibrationError(
            f"--calibration {names[0]}, --eval-data {names[1]}",
            f"{share:.1%} of the evaluation tokens are in the calibration windows",
            expected=f"at most {LIMIT:.0%}",
            remedy="evaluate on text that was not calibrated on: another file, dataset or split",
        )
    return share


def overlap(calibration_ids: Tensor, evaluation_ids: Tensor, run: int = RUN) -> float:
    """Share of the tokens of `evaluation_ids` [n, T] in a run of `run` tokens that `calibration_ids` [m, S] holds too.

    Runs are compared by a 64-bit hash; over a million runs on each side two different ones collide with a
    probability below 1e-7. Windows shorter than a run hold none.

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
    covered = np.zeros(evaluation.shape, dtype=np.bool_)
    for offset in range(run):
        covered[:, offset : offset + starts.shape[1]] |= starts
    return float(covered.mean())


def _hashes(ids: NDArray[np.int64], run: int) -> NDArray[np.uint64]:
    """A hash of each run of tokens, [n, T - run + 1]: a polynomial in an odd factor, modulo 2^64, of mixed tokens."""
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
    """Whether each run holds enough distinct tokens to be text."""
    runs = np.lib.stride_tricks.sliding_window_view(ids, run, axis=1)
    varied = np.zeros(runs.shape[:2], dtype=np.bool_)
    for row, window in zip(varied, runs, strict=True):  # window by window: a sorted copy is `run` times as large
        row[:] = (np.diff(np.sort(window, axis=1), axis=1) != 0).sum(1) + 1 >= min(_FEWEST_KINDS, run)
    return varied

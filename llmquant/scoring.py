"""What a run is worth: every lane's scores behind the last block, and with `--eval-tokens auto` those of more text."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmquant.formats import LinearSpec
from llmquant.hidden import HiddenStates
from llmquant.job import Job
from llmquant.lanes.enough import AIM, windows_to_add
from llmquant.lanes.scores import OF_OURS, OURS, TokenScores, joined, of_all_ranks
from llmquant.log import Progress, Stopwatch
from llmquant.memory import trim
from llmquant.model.streams import Streams
from llmquant.model.weights import Value
from llmquant.report.data import LaneReport
from llmquant.report.tables import compared
from llmquant.result import lane_reports
from llmquant.run_dir import RunDir
from llmquant.text.windows import Windows


@dataclass(frozen=True)
class Scoring:
    """Of one run, whose blocks are finished.

    instead     weights outside the blocks as they are quantized, by name
    written     the dequantized weight_OI of a linear, as it lies on the disk
    recovered   our lane through the block of a number, as a recovery has made it; None without one
    """

    job: Job
    run: RunDir
    instead: Mapping[str, Value]
    written: Callable[[LinearSpec], Tensor]
    recovered: Callable[[HiddenStates, int], None] | None
    watch: Stopwatch
    log: Progress

    def go(self, hidden: HiddenStates) -> tuple[dict[str, LaneReport], Windows | None]:
        """All lanes, and the text that they were scored on; `hidden` stands behind the last block."""
        windows = self.job.evaluation
        if windows is None:
            return {}, None
        scores = self._scores(hidden, windows)
        hidden.forget()
        while (more := self._more(scores, windows)) is not None:
            self.log.line(f"--eval-tokens auto: {more.n_tokens} tokens more, for a KL that is known to {AIM:.0%}")
            scores = joined([scores, self._scores_of_more(more)])
            windows = replace(windows, ids=torch.cat([windows.ids, more.ids]))
        reports = lane_reports(self.job, scores)
        self.log.scored({lane: report.kl_mean for lane, report in compared(reports).items()})
        return reports, windows

    def _scores(self, hidden: HiddenStates, windows: Windows) -> dict[str, TokenScores]:
        """Of all `windows`, by lane, from the hidden states behind the last block."""
        assert hidden.lanes is not None
        with self.watch.stage("evaluate"), self.job.skeleton.heads(self.instead) as (original, ours):
            own = hidden.lanes.score(lambda lane, states: (ours if lane in OF_OURS else original)(states))
        return of_all_ranks(own, windows, self.job.options.ranks)

    def _more(self, scores: Mapping[str, TokenScores], scored: Windows) -> Windows | None:
        """Windows that shall be scored besides; None where all have been, or where they are enough."""
        if self.job.more_evaluation is None or self.job.evaluation is None:
            return None
        start = len(scored.ids) - len(self.job.evaluation.ids)
        count = windows_to_add([scores[OURS]], len(self.job.more_evaluation.ids) - start)
        if self.job.parked:  # for which --max-ram has room
            count = min(count, len(self.job.evaluation.ids))
        return replace(scored, ids=self.job.more_evaluation.ids[start : start + count]) if count else None

    def _scores_of_more(self, windows: Windows) -> dict[str, TokenScores]:
        """All lanes on other windows, through the finished blocks once more."""
        job, skeleton = replace(self.job, calibration=None, evaluation=windows), self.job.skeleton
        every = job.stream_sizes(0, windows.share_of(job.options.ranks).n_tokens)
        sizes = {lane: every[lane] for lane in job.lanes}
        parked = sizes if job.parked else ()
        with Streams(sizes, job.options.stream_budget, self.run.scratch, parked, device=skeleton.device) as streams:
            hidden = HiddenStates(job, streams)
            with self.watch.stage("evaluate"):
                hidden.embed(self.instead)
                for block in skeleton.blocks:
                    with block.loaded(then=next(iter(skeleton.blocks[block.index + 1 :]), None)):
                        hidden.replay(block, self.written)
                    if self.recovered is not None:
                        self.recovered(hidden, block.index)
                    trim()
            return self._scores(hidden, windows)

"""What a run is worth: every lane's scores behind the last block, and with `--eval-tokens auto` those of more text."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from llmquant.formats import LinearSpec
from llmquant.hidden import HiddenStates
from llmquant.job import Job
from llmquant.lanes.enough import scored_enough
from llmquant.lanes.scores import OF_OURS, OURS, TokenScores, of_all_ranks
from llmquant.log import Progress, Stopwatch
from llmquant.memory import trim
from llmquant.model.block import with_next
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
        if self.job.more_evaluation is not None:
            parked = len(windows.ids) if self.job.parked else None  # for which --max-ram has room
            more, say = self.job.more_evaluation, lambda text: self.log.line(f"--eval-tokens auto: {text}")
            scores, windows = scored_enough(scores, windows, more, self._scores_of_more, [OURS], parked, say)
        reports = lane_reports(self.job, scores)
        self.log.scored({lane: report.kl_mean for lane, report in compared(reports).items()})
        return reports, windows

    def _scores(self, hidden: HiddenStates, windows: Windows) -> Mapping[str, TokenScores]:
        """Of all `windows`, by lane, from the hidden states behind the last block."""
        assert hidden.lanes is not None
        with self.watch.stage("evaluate"), self.job.skeleton.heads(self.instead) as (original, ours):
            own = hidden.lanes.score(lambda lane, states: (ours if lane in OF_OURS else original)(states))
        return of_all_ranks(own, windows, self.job.options.ranks)

    def _scores_of_more(self, windows: Windows) -> Mapping[str, TokenScores]:
        """All lanes on other windows, through the finished blocks once more."""
        job, skeleton = replace(self.job, calibration=None, evaluation=windows), self.job.skeleton
        every = job.stream_sizes(0, windows.share_of(job.options.ranks).n_tokens)
        sizes = {lane: every[lane] for lane in job.lanes}
        parked = sizes if job.parked else ()
        with Streams(sizes, job.options.stream_budget, self.run.scratch, parked, device=skeleton.device) as streams:
            hidden = HiddenStates(job, streams)
            with self.watch.stage("evaluate"):
                hidden.embed(self.instead)
                for block, then in with_next(skeleton.blocks):
                    with block.loaded(then=then):
                        hidden.replay(block, self.written)
                    if self.recovered is not None:
                        self.recovered(hidden, block.index)
                    trim()
            return self._scores(hidden, windows)

"""A draft with its texts cut into windows: all that is decided before any weight is read. `run` does one."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmquant.ahead import ahead
from llmquant.coverage import enough_batches
from llmquant.draft import Draft, draft
from llmquant.errors import CalibrationError, RecipeError, option
from llmquant.lanes.enough import MOST_TOKENS, first_part
from llmquant.log import Progress
from llmquant.model.skeleton import Skeleton
from llmquant.quant import kernels
from llmquant.ranks import Ranks
from llmquant.recipe import Recipe, RunOptions
from llmquant.source.base import Source
from llmquant.source.card import read_card
from llmquant.source.resolve import open_source
from llmquant.text.overlap import refuse_overlap
from llmquant.text.tokenizer import load_tokenizer
from llmquant.text.windows import Windows, calibration_windows, check_ids, evaluation_windows
from llmquant.versions import versions

_USUAL_SAMPLES = Recipe().most_samples


@dataclass(frozen=True)
class Job(Draft):
    """One quantization, ready to start."""

    calibration: Windows | None
    evaluation: Windows | None
    more_evaluation: Windows | None  # what may be scored behind it, with --eval-tokens auto
    card: dict[str, Any]  # what the original's own card says, by `read_card`

    @property
    def libraries(self) -> tuple[str, ...]:
        """Those that compute the output besides the usual ones."""
        return ("triton",) if self.solves and kernels.runs_on(self.skeleton.device) else ()


def prepare(model: str | Path, recipe: Recipe, options: RunOptions, log: Progress) -> Job:
    """Open, check, plan, and cut the texts; every error that can be known before hours of work is raised here."""
    stored = open_source(model, options.revision, trust_remote_code=options.trust_remote_code)
    drawn = draft(stored, recipe, options, log=log)
    if drawn.finished is not None:
        outside = [row.name for row in drawn.plan.block(None) if row.spec is None]
        drawn.finished.refuse_other_weights(drawn.source, outside)
    calibration, evaluation = windows(drawn, log)
    if calibration is not None and recipe.samples == "auto":
        most, calibration = calibration, as_many_as_needed(drawn, calibration, log)
        if calibration is not most:  # other places of the text
            check_calibration(drawn, calibration, evaluation, log)
    more = None
    if evaluation is not None and recipe.eval_tokens == "auto":
        whole, evaluation = evaluation, first_part(evaluation)
        more = whole.behind(evaluation)
    refuse_idle_ranks(options.ranks, calibration)
    if calibration is not None and (said := said_of_experts(drawn, calibration.n_tokens)):
        log.line(said)
    drawn.refuse_parked(*(0 if text is None else text.n_tokens for text in (calibration, evaluation)))
    return Job(
        **vars(drawn),
        calibration=calibration,
        evaluation=evaluation,
        more_evaluation=more,
        card=read_card(drawn.source, log),
    )


def refuse_idle_ranks(ranks: Ranks, calibration: Windows | None) -> None:
    """RecipeError where some rank would have no calibration text."""
    if calibration is not None and (count := len(calibration.batches())) < ranks.size:
        raise RecipeError(
            f"{ranks.size} ranks",
            f"{count} batches of calibration text",
            expected="one for each rank at least",
            remedy=f"fewer ranks, or more {option('samples')}",
        )


def windows(draft: Draft, log: Progress) -> tuple[Windows | None, Windows | None]:
    """The texts of a draft as token windows (calibration, evaluation); None where it wants none."""
    recipe, skeleton = draft.recipe, draft.skeleton
    calibration = evaluation = None
    if draft.calibrated or draft.lanes:
        tokenizer = load_tokenizer(draft.source)
    if draft.calibrated:
        seq_len = clip_to_context(skeleton, "calibration", recipe.seq_len, log)
        calibration = _most_windows(tokenizer, recipe, seq_len)
    if draft.lanes:
        evaluation = evaluation_text(skeleton, tokenizer, recipe, log)
    check_calibration(draft, calibration, evaluation, log)
    return calibration, evaluation


def check_calibration(draft: Draft, calibration: Windows | None, evaluation: Windows | None, log: Progress) -> None:
    """CalibrationError for ids that the embedding does not have, and where the evaluation text has been seen."""
    if calibration is None:
        return
    check_ids(calibration.ids, draft.skeleton.vocab_size, draft.skeleton.where)
    if evaluation is not None:
        names = draft.recipe.calibration, draft.recipe.eval_data
        if share := refuse_overlap(calibration.ids, evaluation.ids, names):
            log.line(f"evaluation: {share:.2%} of its tokens are in runs that the calibration text holds too")


def _most_windows(tokenizer: object, recipe: Recipe, seq_len: int) -> Windows:
    """The windows that the recipe asks for; with `--samples auto` the most, halved while the text is too short."""
    count = recipe.most_samples
    while True:
        try:
            return calibration_windows(tokenizer, recipe.calibration, count, seq_len, recipe.seed)
        except CalibrationError:
            if recipe.samples != "auto" or count // 2 < _USUAL_SAMPLES:
                raise
            count //= 2


def as_many_as_needed(draft: Draft, most: Windows, log: Progress) -> Windows:
    """`--samples auto`: windows drawn anew, the usual number or as many as experts need; `most` where even they are
    too few."""
    batches = most.batches()
    enough = enough_batches(draft.skeleton, batches)
    count = len(most.ids) if enough is None else max(_USUAL_SAMPLES, enough * len(batches[0]))
    said = "" if enough is not None else ", and one of ten experts or more would need still more"
    log.line(f"--samples auto: {count} windows of {most.ids.shape[1]} tokens{said}")
    if count >= len(most.ids):
        return most
    recipe, tokenizer = draft.recipe, load_tokenizer(draft.source)
    return calibration_windows(tokenizer, recipe.calibration, count, most.ids.shape[1], recipe.seed)


def evaluation_text(skeleton: Skeleton, tokenizer: object, recipe: Recipe, log: Progress) -> Windows:
    """Evaluation windows, within the model's context and vocabulary."""
    seq_len = clip_to_context(skeleton, "evaluation", recipe.eval_seq_len, log)
    if recipe.eval_window < seq_len:
        seq_len = recipe.eval_window
        log.line(f"evaluation: one window of the {seq_len} tokens that are asked for")
    tokens = {"full": None, "auto": MOST_TOKENS}.get(str(recipe.eval_tokens), recipe.eval_tokens)
    assert not isinstance(tokens, str)
    found = evaluation_windows(tokenizer, recipe.eval_data, tokens, seq_len)
    check_ids(found.ids, skeleton.vocab_size, skeleton.where)
    return found


def said_of_experts(draft: Draft, calibration_tokens: int) -> str:
    """What to say where an expert sees fewer tokens, on average, than it has inputs; "" where none does."""
    shares = {name: share for block in draft.skeleton.blocks for name, share in block.shares.items()}
    few = [
        (calibration_tokens * shares[spec.module], spec.shape[1])
        for spec in draft.plan.specs
        if spec.module in shares and calibration_tokens * shares[spec.module] < spec.shape[1]
    ]
    if not few or not calibration_tokens:
        return ""
    seen, width = min(few, key=lambda pair: pair[0] / pair[1])
    return (
        f"experts: about {seen:.0f} of {calibration_tokens} calibration tokens reach each, which has {width} inputs; "
        "more --samples would help"
    )


def clip_to_context(skeleton: Skeleton, what: str, seq_len: int, log: Progress) -> int:
    """`seq_len`, or the model's context where that is shorter, and a line that says so."""
    if skeleton.context is None or seq_len <= skeleton.context:
        return seq_len
    log.line(f"{what}: windows of {seq_len} tokens shortened to the model's context of {skeleton.context}")
    return skeleton.context


def fingerprint(job: Job, weights: str) -> dict[str, str]:
    """All that decides the output, by name, for a run that wants to go on with another's work.

    `weights` is the digest of the local weights. Not in it: on_bad_layer, which changes nothing in blocks that were
    finished, and the number of threads, which a resumed run takes over.
    """
    recipe = {f"recipe.{name}": json.dumps(value) for name, value in job.recipe.as_dict().items()}
    del recipe["recipe.on_bad_layer"]
    side = {file: hashlib.sha256(job.source.local(file).read_bytes()).hexdigest() for file in job.source.side_files()}
    windows = {
        "calibration text": job.calibration,
        "evaluation text": job.evaluation,
        "more evaluation text": job.more_evaluation,
    }
    parts: dict[str, Any] = {
        "model": job.source.name,
        "revision": job.source.revision,
        "weights": weights,
        "config": job.source.config,
        "model card": job.card,
        "side files": side,
        "trust_remote_code": job.source.trust_remote_code,
        "plan": [row.as_dict() for row in job.plan.rows],
        "lanes": job.lanes,
        "versions": versions(*job.libraries),
        "codes": None if job.finished is None else job.finished.source.stored.local("manifest.json").read_text("utf-8"),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "device": job.skeleton.device.type,
        "dtype": str(job.skeleton.dtype),
        "products": str(job.products),
        **{name: None if text is None else text.as_dict() for name, text in windows.items()},
    }
    digests = {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in parts.items()}
    return recipe | digests


def refuse_damaged_weights(source: Source) -> str:
    """Read every local tensor once and refuse NaN and Inf before any long work; the digest of what was read.

    Shards that are still on the Hub are checked as they come, and known by their commit.
    """

    def checked(name: str) -> str:
        tensor = source.read_finite(name)
        if source.revision is not None:
            return ""
        return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()

    names = [name for name in source.tensors if source.is_local(name)]
    found = ahead(checked, names) if source.in_parallel else map(checked, names)
    return hashlib.sha256(json.dumps(dict(zip(names, found, strict=True))).encode()).hexdigest()

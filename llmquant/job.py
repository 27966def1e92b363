"""All that is decided before any weight is read: source, skeleton, plan and token windows of one run."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmquant.checkpoint import open_original
from llmquant.lanes.baselines import pick_baselines
from llmquant.lanes.scores import ORIGINAL, OURS
from llmquant.log import Log
from llmquant.model.devices import pick_device, pick_dtype, pick_products
from llmquant.model.skeleton import Skeleton
from llmquant.output.containers import Output, open_output
from llmquant.plan import Plan, make_plan
from llmquant.quant.solvers import DATA_FREE
from llmquant.recipe import Recipe
from llmquant.source.base import Source
from llmquant.source.card import read_card
from llmquant.text.overlap import refuse_overlap
from llmquant.text.tokenizer import load_tokenizer
from llmquant.text.windows import Windows, calibration_windows, check_ids, evaluation_windows
from llmquant.versions import versions


@dataclass(frozen=True)
class Job:
    """One quantization, ready to start. `lanes` is empty where evaluation is switched off."""

    source: Source
    recipe: Recipe
    skeleton: Skeleton
    plan: Plan
    output: Output
    calibration: Windows | None
    evaluation: Windows | None
    lanes: tuple[str, ...]
    products: torch.dtype  # of calibration forwards and Hessians
    card: dict[str, Any] = field(default_factory=dict)  # what the original's own card says, by `read_card`

    def stream_sizes(self) -> dict[str, int]:
        """Bytes of every stream of hidden states, calibration first: it is read most often."""
        hidden_bytes = self.skeleton.hidden_size * self.skeleton.dtype.itemsize
        sizes = {}
        if self.calibration is not None:
            sizes["calibration"] = self.calibration.n_tokens * hidden_bytes
            if self.recipe.propagation != 0:
                sizes["calibration (original)"] = sizes["calibration"]
        if self.evaluation is not None:
            sizes |= dict.fromkeys(self.lanes, self.evaluation.n_tokens * hidden_bytes)
        return sizes


def fingerprint(job: Job, weights: str) -> dict[str, str]:
    """All that decides the output, by name, for a run that wants to go on with another's work.

    `weights` is the digest of the local weights. Not in it: on_bad_layer, which changes nothing in blocks that were
    finished, and the number of threads, which a resumed run takes over.
    """
    recipe = {f"recipe.{name}": json.dumps(value) for name, value in job.recipe.as_dict().items()}
    del recipe["recipe.on_bad_layer"]
    side = {file: hashlib.sha256(job.source.local(file).read_bytes()).hexdigest() for file in job.source.side_files()}
    windows = {"calibration text": job.calibration, "evaluation text": job.evaluation}
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
        "versions": versions(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "device": job.skeleton.device.type,
        "dtype": str(job.skeleton.dtype),
        "products": str(job.products),
        **{name: None if text is None else text.as_dict() for name, text in windows.items()},
    }
    digests = {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in parts.items()}
    return recipe | digests


def prepare(
    model: str | Path, revision: str | None, recipe: Recipe, log: Log, *, trust_remote_code: bool = False
) -> Job:
    """Open, check and plan; every error that can be known before hours of work is raised here."""
    source = open_original(model, revision, trust_remote_code=trust_remote_code)
    source.announce_code(log)
    device = pick_device(recipe.device)
    skeleton = Skeleton(source, device, pick_dtype(recipe.dtype, device, source))
    products = pick_products(recipe.products, device, skeleton.dtype, recipe.bits)
    output = open_output(recipe.format, source, skeleton, make_plan(source, skeleton, recipe))
    lanes = (ORIGINAL, OURS, *pick_baselines(recipe)) if recipe.eval_data != "none" else ()
    calibration = evaluation = None
    if recipe.method not in DATA_FREE or lanes:
        tokenizer = load_tokenizer(source)
        if recipe.method not in DATA_FREE:
            seq_len = clip_to_context(skeleton, "calibration", recipe.seq_len, log)
            calibration = calibration_windows(tokenizer, recipe.calibration, recipe.samples, seq_len, recipe.seed)
            check_ids(calibration.ids, skeleton.vocab_size, source.name)
        if lanes:
            evaluation = prepare_evaluation(
                skeleton, tokenizer, recipe.eval_data, recipe.eval_tokens, recipe.eval_seq_len, log
            )
    if calibration is not None and evaluation is not None:
        share = refuse_overlap(calibration.ids, evaluation.ids, (recipe.calibration, recipe.eval_data))
        if share:
            log(f"evaluation: {share:.2%} of its tokens are in runs that the calibration text holds too")
    card = read_card(source, log)
    return Job(source, recipe, skeleton, output.plan, output, calibration, evaluation, lanes, products, card)


def prepare_evaluation(
    skeleton: Skeleton, tokenizer: object, data: str, tokens: int | str, seq_len: int, log: Log
) -> Windows:
    """Evaluation windows, within the model's context and vocabulary."""
    seq_len = clip_to_context(skeleton, "evaluation", seq_len, log)
    windows = evaluation_windows(tokenizer, data, None if tokens == "full" else int(tokens), seq_len)
    check_ids(windows.ids, skeleton.vocab_size, skeleton.where)
    return windows


def clip_to_context(skeleton: Skeleton, what: str, seq_len: int, log: Log) -> int:
    """`seq_len`, or the model's context where that is shorter, and a line that says so."""
    if skeleton.context is None or seq_len <= skeleton.context:
        return seq_len
    log(f"{what}: windows of {seq_len} tokens shortened to the model's context of {skeleton.context}")
    return skeleton.context


def refuse_damaged_weights(source: Source) -> str:
    """Read every local tensor once and refuse NaN and Inf before any long work; the digest of what was read.

    Shards that are still on the Hub are checked as they come, and known by their commit.
    """
    digest = hashlib.sha256()
    for name in source.tensors:
        if source.is_local(name):
            tensor = source.read_finite(name)
            if source.revision is None:
                digest.update(name.encode() + b"\0")
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

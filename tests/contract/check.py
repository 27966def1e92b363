"""One type through `llmquant.quantize`, and the verdict on what came out.

    passes      all of the below hold
    elsewhere   transformers has no rule for single experts, and the run is refused unless other runtimes are named;
                with them all of the below hold, but for the opening by transformers
    refused     an LLMQuantError, whose line is the cause
    crash       any other exception: always a bug of ours
    wrong       it ran, and one of the below does not hold: always a bug of ours
    not built   transformers builds no tiny checkpoint of the type, or cannot run its own

What has to hold: `verify` agrees; the class of `architectures`, and that of AutoModelForCausalLM where it is another,
open the output with no key missing or unknown that the original's are not; its logits are those of a dequantized copy
(`reference.py`); the report's perplexity of the original and KL of ours are those of stock; every parameter is the
original's or within the error of 4 bits; routers and towers are untouched; and most of the blocks' parameters are
quantized.
"""

import re
import traceback
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

import llmquant
from contract.build import build, quiet
from contract.reference import Stock, dequantized, divergence, filled, other_class, perplexity, stock
from contract.uploads import UPLOADS
from llmquant.demo import DEMO
from llmquant.errors import LLMQuantError
from llmquant.output.check import verify_folder

WINDOW, TOKENS = 64, 256
FLAGS: dict[str, Any] = {
    **{"bits": 4, "group_size": 32, "samples": 4, "seq_len": WINDOW, "baselines": "none"},
    **{"eval_tokens": TOKENS, "eval_seq_len": WINDOW},
}
SAME_LOGITS = 1e-4  # KL in nats of the opened output to the dequantized copy
LOST = 1.0  # KL to the original that says that something is lost; 4 bits of random weights cost a few hundredths
WEIGHT_ERROR = 0.5  # ||W - W^||^2 / ||W||^2; GPTQ on few tokens costs up to a tenth, other weights cost 2
SHARE = 0.5  # of the blocks' parameters that have to be quantized, at least
KEPT: dict[str, float] = {"evolla": 0.4}  # names of which less is, by a policy that the user is told
_STACK = re.compile(r".*?\.(?=\d+\.)")
_TOWER = re.compile(r"(^|[._])(vision|visual|vit|image|img|audio|speech|sam|dino|depth|mtp)\w*[._]")
_ROUTER = re.compile(r"^(?!.*attn)(?!.*attention).*[._](router|gate)(?!_?(up_?)?proj|_up)[^.]*(\.\w+)*\.weight$")
_ROUTER_ROWS = 64
_RANDOM = re.compile(r"leaves \d+ parameters .*experts?\b.* random|leaves \d+ parameters .*_linear.* random")


@dataclass
class Outcome:
    """What became of one type; `cause` is one line, empty where it passes."""

    name: str
    result: str
    cause: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    trace: list[str] = field(default_factory=list)

    @property
    def is_bug(self) -> bool:
        return self.result in ("crash", "wrong")

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value not in ("", {}, [])}


def check(name: str, folder: Path) -> Outcome:
    """Build `name` (a type, a variant, or one of UPLOADS) below the empty `folder`, quantize it and judge."""
    try:
        source = (UPLOADS[name].make if name in UPLOADS else build)(name, folder / "source")
    except Exception as error:
        return Outcome(name, "not built", _said(error), trace=_trace(error))
    try:
        report = quantized(source, folder / "out")
    except LLMQuantError as error:
        cause = f"{type(error).__name__}: {generic(str(error), source)}"
        if _RANDOM.search(cause):
            return elsewhere(name, source, folder / "out", cause)
        if (folder / "out").exists():
            return Outcome(name, "wrong", f"refused, but there is an output; {cause}")
        return Outcome(name, "refused", cause)
    except Exception as error:
        return Outcome(name, "crash", _said(error) + _also_in_stock(source), trace=_trace(error))
    return judged(name, source, folder / "out", report)


def elsewhere(name: str, source: Path, out: Path, cause: str) -> Outcome:
    """The same for runtimes that know single experts; the report's figures by a model that is put together here."""
    try:
        report = quantized(source, out, runtimes=("vllm",))
    except Exception as error:
        return Outcome(name, "crash", _said(error), trace=_trace(error))
    outcome = judged(name, source, out, report, opens=False)
    return replace(outcome, result="elsewhere", cause=cause) if outcome.result == "passes" else outcome


def quantized(source: Path, out: Path, **options: Any) -> llmquant.Report:
    """The run, on texts that are written beside `out`."""
    calibration, evaluation = texts(out.parent)
    flags = FLAGS | {"calibration": str(calibration), "eval_data": str(evaluation)}
    with quiet():
        recipe, said = llmquant.make_recipe(str(source), flags=flags), list[str]()
        try:
            return llmquant.quantize(source, recipe, out, log=said.append, **options)
        finally:
            out.with_name("log").write_text("\n".join(said), "utf-8")


def judged(name: str, source: Path, out: Path, report: llmquant.Report, *, opens: bool = True) -> Outcome:
    """What stock transformers says of the output. A dequantized copy is written beside it."""
    _, evaluation = texts(out.parent)
    ids = windows(source, evaluation)
    try:
        original = stock(source)
        expected = original.logits(ids)
    except Exception as error:
        return Outcome(name, "not built", f"stock cannot run the original: {_said(error)}", trace=_trace(error))
    judge, trace = _Judge(name, source, out, original, ids), list[str]()
    try:
        judge.problems += _verified(out, source)
        dense = out.with_name("dense")
        wanted = judge.opened(dense) if opens else judge.changed(filled(out, source, dense))[1]
        judge.figured(report, expected, wanted)
    except Exception as error:
        judge.problems.append(_said(error))
        trace = _trace(error)
    return Outcome(name, "wrong" if judge.problems else "passes", "; ".join(judge.problems), judge.figures, trace)


@dataclass
class _Judge:
    """Collects what does not hold, and the figures."""

    name: str
    source: Path
    out: Path
    original: Stock
    ids: Tensor
    problems: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def opened(self, dense: Path) -> Tensor:
        """The logits of the dequantized copy, written to `dense`, which those of the opened output must be."""
        dequantized(self.out, self.source, dense)
        reference = self._reference(dense, self.original, None)
        self.problems += _new_keys("the dequantized copy", reference, self.original)
        changed, wanted = self.changed(reference)
        self._same("the output", stock(self.out), self.original, wanted, changed)
        other, said = other_class(self.source), self.out.with_name("log").read_text("utf-8")
        if other is not None and f"by {other.__name__} it" not in said:
            theirs = stock(self.source, other)
            if not theirs.problems["missing_keys"]:  # else nobody opens the original by it either
                copy, before = self._reference(dense, theirs, other), theirs.parameters()
                named = [name for name, tensor in copy.parameters().items() if not torch.equal(tensor, before[name])]
                what = f"the output by {other.__name__}"
                self._same(what, stock(self.out, other), theirs, copy.logits(self.ids), named)
        return wanted

    def _reference(self, dense: Path, original: Stock, opener: Any) -> Stock:
        """The dequantized copy as transformers opens it; put together by hand where it has a rule for packed experts
        and none for dense ones."""
        copy = stock(dense, opener)
        if _new_keys("", copy, original) and any(
            re.search(r"experts\.\d+\.", key) for key in copy.problems["unexpected_keys"]
        ):
            copy = filled(self.out, self.source, dense.with_name("filled"), opener)
        return copy

    def changed(self, reference: Stock) -> tuple[dict[str, float], Tensor]:
        """Which of its parameters are not the original's, by how much; its logits."""
        changed = dict(self._changed(reference))
        self._judge_weights(changed)
        return changed, reference.logits(self.ids)

    def figured(self, report: llmquant.Report, expected: Tensor, wanted: Tensor) -> None:
        """The report's figures are those of the original's logits `expected` and the output's, `wanted`."""
        kl, ppl = divergence(expected, wanted), perplexity(expected, self.ids)
        self.figures |= {"kl": kl, "perplexity": ppl}
        self._near("perplexity of the original", report.lanes["original"]["perplexity"], ppl, 1e-4 * ppl)
        self._near("KL", report.lanes["llmquant"]["kl_mean"], kl, 0.02 * kl + 2e-6)
        if not 0 < kl < LOST:
            self.problems.append(f"KL to the original is {kl:.3g}")

    def _same(self, what: str, ours: Stock, original: Stock, wanted: Tensor, changed: Collection[str]) -> None:
        """The opened output computes what the dequantized copy does, and its other parameters are the original's."""
        self.problems += _new_keys(what, ours, original)
        theirs = original.parameters()
        odd = [
            name
            for name, tensor in ours.parameters().items()
            if name in theirs and name not in changed and not torch.equal(tensor.float(), theirs[name])
        ]
        if odd:
            self.problems.append(f"{what}: {len(odd)} parameters are not the original's ({odd[0]})")
        away = divergence(wanted, ours.logits(self.ids))
        self.figures["away"] = max(away, self.figures.get("away", 0.0))
        if not away < SAME_LOGITS:
            self.problems.append(f"{what}: KL to the dequantized copy is {away:.3g}")

    def _changed(self, reference: Stock) -> Iterator[tuple[str, float]]:
        """Parameters that are not the original's, each with its error."""
        theirs = self.original.parameters()
        for name, tensor in reference.parameters().items():
            if name not in theirs or tensor.shape != theirs[name].shape:
                self.problems.append(f"the dequantized copy: {name} is none of the original's")
            elif not torch.equal(tensor, theirs[name]):
                yield name, float((tensor - theirs[name]).square().sum() / theirs[name].square().sum())

    def _judge_weights(self, changed: Mapping[str, float]) -> None:
        """What was changed are matrices of the text's blocks, by no more than 4 bits cost; and most of them."""
        params = self.original.parameters()
        far = [name for name, error in changed.items() if not error < WEIGHT_ERROR or params[name].ndim < 2]
        if far:
            self.problems.append(f"{len(far)} weights are not the original's ({far[0]}: error {changed[far[0]]:.3g})")
        routers = [name for name in changed if _ROUTER.search(name) and params[name].shape[0] <= _ROUTER_ROWS]
        if routers:
            self.problems.append(f"{len(routers)} routers are quantized ({routers[0]})")
        if towers := [name for name in changed if _TOWER.search(name)]:
            self.problems.append(f"{len(towers)} weights of towers are quantized ({towers[0]})")
        stacks = tuple({match[0] for name in changed if (match := _STACK.match(name))})
        sizes = {name: parameter.numel() for name, parameter in params.items() if name.startswith(stacks)}
        share = sum(sizes.get(name, 0) for name in changed) / max(1, sum(sizes.values()))
        self.figures["share"] = share
        if share < KEPT.get(self.name, SHARE):
            self.problems.append(f"only {share:.0%} of the blocks' parameters are quantized")

    def _near(self, what: str, reported: float | None, measured: float, tolerance: float) -> None:
        if reported is None or not abs(reported - measured) <= tolerance:
            self.problems.append(f"{what}: {reported} in the report, {measured} in stock")


def _new_keys(what: str, ours: Stock, original: Stock) -> list[str]:
    """Keys that `ours` lacks or does not know, and the original does not lack, too."""
    found = []
    for kind, keys in ours.problems.items():
        new = sorted(keys - original.problems[kind])
        if kind == "unexpected_keys":  # a text class has no use for a tower, whatever its tensors are called
            new = [key for key in new if not _TOWER.search(key)]
        if new:
            found.append(f"{what}: {len(new)} {kind.replace('_', ' ')} ({new[0]})")
    return found


def _verified(out: Path, source: Path) -> list[str]:
    try:
        verify_folder(out, source)
    except LLMQuantError as error:
        return [f"verify: {generic(str(error), source)}"]
    return []


def texts(folder: Path) -> tuple[Path, Path]:
    """Two short texts that share nothing, as files: the built-in ones, whose tokens cost seconds, cut down."""
    found = []
    for file in ("calibration.txt", "heldout.txt"):
        found.append(folder / file)
        found[-1].write_text((DEMO / file).read_text("utf-8")[: 24 * TOKENS], "utf-8")
    return found[0], found[1]


def windows(source: Path, text: Path) -> Tensor:
    """The evaluation windows [n, T], as a user of transformers would cut them."""
    ids = AutoTokenizer.from_pretrained(source)(text.read_text("utf-8"))["input_ids"]
    return torch.tensor(ids[:TOKENS]).view(-1, WINDOW)


def _also_in_stock(source: Path) -> str:
    """Whether transformers cannot run the checkpoint either; that has to be refused all the same."""
    try:
        stock(source).logits(windows(source, source.with_name("heldout.txt")))
    except Exception as error:
        return f" (stock: {_said(error)})"
    return ""


def generic(message: str, source: Path) -> str:
    """A message without this folder and without numbers of layers.

    >>> generic("/tmp/a/source: model.layers.2.mlp: 0.5 odd", Path("/tmp/a/source"))
    'model.layers.N.mlp: 0.5 odd'
    """
    for own in (source, source.with_name("out"), source.with_name("out.partial")):
        message = message.replace(f"{own}: ", "").replace(f"{own}", own.name)
    message = message.removeprefix(f"{source.name}: ")
    return re.sub(r"(?<=[A-Za-z_])(\.\d+)+", lambda numbers: re.sub(r"\d+", "N", numbers[0]), message)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _trace(error: BaseException) -> list[str]:
    """The innermost lines of the traceback."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    return [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]

"""What a run, and `compare`, say of themselves: report.json, cost.json and the report of `compare`, as dataclasses.

Every object of a file is one class, every key one field, in the order of the file; `report/plain.py` says how the two
become one another, and `eval/*.schema.json` say the same to programs in other languages. `result.py` makes that of
a run; the card, the page, the verdict, `export`, `verify` and `push` read it.

`report.json` is the same in two runs of one job on one machine; all that may differ (times, memory) is in `cost.json`.
Divergences are in nats per token.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, NotRequired, TypedDict

from llmquant.formats.facts import FACTS
from llmquant.lanes.scores import ORIGINAL, OURS, Exponential, Figures
from llmquant.report.ledger import Layer, TensorRow
from llmquant.report.plain import parse_file, plain

SCHEMA_VERSION: Final = 1
Bos = Literal["none", "first", "every other"]


@dataclass(frozen=True)
class OriginalCard:
    """What the original's own model card says of itself and holds for the quantized model too (`source/card.py`)."""

    license: str | list[str] | None = None
    license_name: str | list[str] | None = None
    license_link: str | list[str] | None = None
    language: str | list[str] | None = None
    datasets: str | list[str] | None = None
    pipeline_tag: str | list[str] | None = None


@dataclass(frozen=True)
class Model:
    """The original: a Hub id with its revision, or a folder's name.

    remote_code   files of Python code that it brings and that the output holds unchanged
    stored_as     how many of its tensors are not stored dense, by form (FP8, MXFP4)
    left_behind   files of it that the output does not hold, and why
    """

    id: str
    revision: str | None
    card: OriginalCard = OriginalCard()
    remote_code: tuple[str, ...] = ()
    stored_as: dict[str, int] | None = None
    left_behind: dict[str, str] | None = None


class Versions(TypedDict):
    """Of the libraries that computed it; later versions may name more."""

    torch: str
    transformers: str
    safetensors: str
    llmquant: str


class RecipeFacts(TypedDict):
    """The recipe as the version that wrote it had it: names come and go with versions, and all are kept.

    `recipe.Recipe` has the names of this version. `exports`: formats in folders beside the checkpoint's own.
    """

    method: str
    bits: int
    group_size: int
    symmetric: bool
    format: str
    exports: NotRequired[list[str]]
    recover: NotRequired[str]


@dataclass(frozen=True)
class Compute:
    """Where and in which dtypes it was computed.

    products   those of calibration forwards and Hessians
    parked     why forwards were parked: the model's blocks share more than hidden states
    """

    device: str
    dtype: str
    products: str | None = None
    trust_remote_code: bool = False
    parked: str | None = None


@dataclass(frozen=True)
class TextWindows:
    """Which text, cut into which windows. The digest pins the token ids.

    bos   which windows begin with the token that begins a text
    """

    dataset: str
    revision: str | None
    seq_len: int
    n_tokens: int
    bos: Bos
    ids_sha256: str


@dataclass(frozen=True, kw_only=True)
class LaneReport(Figures):
    """A lane's figures with its size: bits per weight of the quantized linears, bytes of all tensors."""

    bits_per_weight: float
    bytes: int


@dataclass(frozen=True)
class Evaluation:
    """Figures of every lane on the same windows. The first lane is what the others are compared with.

    noise_floor   what the compute dtype alone costs: the original in it against the original in float32
    """

    protocol: str
    dataset: str
    revision: str | None
    seq_len: int
    n_tokens: int
    bos: Bos
    ids_sha256: str
    noise_floor: Figures | None
    lanes: dict[str, LaneReport]

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise ValueError(f"windows of {self.seq_len} tokens")

    @property
    def ours(self) -> LaneReport:
        """The lane of the checkpoint that a run wrote."""
        return self.lanes[OURS]

    def with_size(self, bits_per_weight: float, size: int) -> "Evaluation":
        """The same figures, of the same codes and scales in another format."""
        lane = replace(self.ours, bits_per_weight=bits_per_weight, bytes=size)
        return replace(self, lanes=self.lanes | {OURS: lane})


@dataclass(frozen=True)
class AllocationReport:
    """Which schemes were chosen for a target size, and why.

    linears     how many have each scheme
    rules       that say so, behind those of the recipe
    kept        mixed: chosen by linear, which won the trial by more than chance; else uniform
    uniform     the best scheme for all within the target; None: there is none
    predicted   by the curvature: nats for each token, by the same two names
    measured    KL of a trial on a few windows of the calibration text
    """

    bits_per_weight: float
    linears: dict[str, int]
    rules: tuple[str, ...]
    kept: Literal["mixed", "uniform"]
    uniform: str | None
    predicted: dict[str, float]
    measured: dict[str, float]


@dataclass(frozen=True)
class RecoveryReport:
    """The training behind the loop: KL on windows of the calibration text that it did not see, before it and after the
    step that was kept; 0: none was better, and nothing was changed."""

    n_steps: int
    step: int
    n_tokens: int
    held_out_tokens: int
    kl_before: float
    kl_after: float


@dataclass(frozen=True)
class Runtime:
    """What the lint says of one runtime: does it open the checkpoint, and at what price."""

    version: str
    opens: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class WeightFile:
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """report.json of a run or an export.

    chosen          what was chosen where the recipe said auto, in words, by the recipe's names
    allocation      which schemes a target size led to
    recovery        what training brought, where the recipe asked for it
    runtimes        which of them open it, by format, then by runtime
    files           those of weights
    exported_from   the format that was measured, where this checkpoint is an export of it
    """

    schema_version: Literal[1]
    model: Model
    versions: Versions
    recipe: RecipeFacts
    compute: Compute
    bits_per_weight: float
    calibration: TextWindows | None
    evaluation: Evaluation | None
    chosen: dict[str, str] | None = None
    allocation: AllocationReport | None = None
    recovery: RecoveryReport | None = None
    runtimes: dict[str, dict[str, Runtime]] = field(default_factory=dict)
    files: dict[str, WeightFile] = field(default_factory=dict)
    layers: tuple[Layer, ...]
    tensors: tuple[TensorRow, ...]
    exported_from: str | None = None

    def __post_init__(self) -> None:
        if self.evaluation is not None and not {ORIGINAL, OURS} <= self.evaluation.lanes.keys():
            raise ValueError(f"its evaluation has no lane {ORIGINAL} or no lane {OURS}")
        if unknown := {self.recipe["format"], *self.recipe.get("exports", ()), *self.runtimes} - FACTS.keys():
            raise ValueError(f"names a format {sorted(unknown)[0]!r} that this version does not know")


@dataclass(frozen=True)
class ComparedModel:
    """One of the checkpoints that `compare` scored. `parked` as in `Compute`."""

    id: str
    revision: str | None
    remote_code: tuple[str, ...]
    parked: str | None = None


@dataclass(frozen=True)
class Difference:
    """Lane b minus lane a, paired over windows. The interval covers 95%; None where one window is too few."""

    a: str
    b: str
    kl_difference: float
    kl_difference_se: float | None
    perplexity_ratio: Exponential
    perplexity_ratio_ci: tuple[Exponential, Exponential] | None


@dataclass(frozen=True)
class CompareReport:
    """What `llmquant compare --json` writes."""

    schema_version: Literal[1]
    models: tuple[ComparedModel, ...]
    trust_remote_code: bool
    versions: Versions
    evaluation: Evaluation
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class Cost:
    """cost.json: seconds by stage, the largest resident memory, and the machine."""

    schema_version: Literal[1]
    seconds: dict[str, float]
    total_seconds: float
    peak_rss_bytes: int
    threads: int
    machine: str
    finished: str


@dataclass(frozen=True)
class Report:
    """What `quantize`, `evaluate` and `compare` return. `facts` has attributes; `data` is the same as plain data.

    In `data`, as in the file, a perplexity that is beyond what a float holds is None, and `mean_loss` stands beside it.
    """

    facts: RunReport | CompareReport
    spent: Cost
    out: Path | None = None

    @cached_property
    def data(self) -> dict[str, Any]:
        """report.json."""
        found: dict[str, Any] = plain(self.facts)
        return found

    @cached_property
    def cost(self) -> dict[str, Any]:
        """cost.json."""
        found: dict[str, Any] = plain(self.spent)
        return found

    @property
    def lanes(self) -> dict[str, dict[str, Any]]:
        """Figures by lane, as in `data`; empty where evaluation was switched off."""
        evaluation = self.data["evaluation"]
        return {} if evaluation is None else evaluation["lanes"]


def load_report(out: Path) -> Report:
    """The report of a finished folder. VerifyError where it is damaged."""
    return Report(parse_file(RunReport, out / "report.json"), parse_file(Cost, out / "cost.json"), out)

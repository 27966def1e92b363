"""Everything that decides the output: defaults < preset < recipe file < flags, frozen into a Recipe."""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from llmquant.errors import RecipeError, did_you_mean, option
from llmquant.formats.facts import DEFAULT, FACTS, formats_that
from llmquant.paths import expanded
from llmquant.ranks import ALONE, Ranks
from llmquant.rules import SETTINGS, Ignored, Rule, make_rules, split_patterns

# What the small built-in model changes: its context is short and its text fits in seconds.
_MOST_SAMPLES = 512  # windows, where experts decide how many
DEMO_DEFAULTS: dict[str, Any] = {"seq_len": 512, "eval_data": "builtin", "eval_tokens": 32768, "eval_seq_len": 512}

# How much time quality may take: what each preset changes. README has what that costs and brings.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"curvature": "off", "propagation": 0, "sweeps": 0, "passes": "block"},
    "default": {},
    "best": {"recover": "all"},
}

FORMAT_NAMES = tuple(FACTS)
EXPORTABLE = formats_that(lambda facts: facts.exportable)

CHOICES: dict[str, tuple[Any, ...]] = {
    "preset": tuple(PRESETS),
    **{name: SETTINGS[name] for name in ("method", "bits")},
    "group_size": ("auto", *SETTINGS["group_size"]),
    "unfit": ("fail", "keep"),
    "lm_head_bits": (8,),
    "embed_bits": (4, 8),
    "format": FORMAT_NAMES,
    "grid": ("hessian", "absmax"),
    "order": ("descending", "natural"),
    "passes": ("step", "block"),
    "curvature": ("off", "auto", "full"),
    "recover": ("off", "scales", "norms", "all"),
    "on_bad_layer": ("fail", "rtn"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "products": ("auto", "float32", "bfloat16"),
}


@dataclass(frozen=True)
class Recipe:
    """A quantization job. TOML files hold the same names; `llmquant run --help` says what each means."""

    preset: str = "default"  # what PRESETS says stands for all that is not said
    method: str = "gptq"
    bits: int = 4
    group_size: int | str = "auto"  # -1: one group per row; auto: the largest that divides all inputs
    symmetric: bool = True
    rules: tuple[Rule, ...] = ()  # for some of the linears: the first that matches decides, see rules.py
    ignore: tuple[str, ...] = ()
    target_bpw: float | None = None  # bits per weight that the linears may take: bits and groups of each are chosen
    target_size: str | None = None  # or bytes of all tensors
    lm_head_bits: int | None = None  # the head is quantized, too, or
    embed_bits: int | None = None  # the embedding (and a head that is tied to it), in groups of the same size
    unfit: str = "fail"  # what to do with linears that groups do not divide or a format cannot hold
    format: str = DEFAULT
    exports: tuple[str, ...] = ()  # further formats, each written into a folder of its name
    # solver
    grid: str = "hessian"
    order: str = "descending"
    damp: float | None = None  # share of mean(diag H); None: 0.003 from 8 tokens per input dimension on, else 0.01
    propagation: float | str = "auto"  # strength of error propagation, 0 (off) to 1; auto: by tokens per input
    residual: float = 0.67  # part of it, with many tokens, for the errors of what outputs are added to; 0 (off) to 2
    refit: bool = True  # scales, too, in each sweep
    sweeps: int | None = None  # of coordinate descent, without curvature; None: solvers.refine.default_sweeps
    curvature: str = (
        "auto"  # whether errors count as the model's predictions weigh them; auto: where it can be measured
    )
    recover: str = "off"  # what is trained end to end behind the last block: scales, norms and biases, or all of these
    passes: str = "step"  # Hessians after each step of a block, or all in one pass per block
    on_bad_layer: str = "fail"
    # calibration text
    calibration: str = "builtin"
    samples: int | str = 128  # or "auto": from that number on, as many as the experts of the model need
    seq_len: int = 2048
    seed: int = 0
    # evaluation text
    eval_data: str = "auto"
    eval_tokens: int | str = 65536  # or "full", or "auto": as many as KL to 3% takes
    eval_seq_len: int = 2048
    baselines: str = "auto"  # auto | none | a comma-separated list
    # numerics and files
    device: str = "auto"
    dtype: str = "auto"
    products: str = "auto"  # of calibration forwards and Hessians; auto: bfloat16 below 8 bits on CPUs made for it
    max_shard_size: str = "5GB"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", make_rules(self.rules))  # each may be given as a text or a table
        self._check_formats()
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            said = value is not None or getattr(Recipe, name) is not None
            if said and (value not in allowed or isinstance(value, bool)):
                raise RecipeError(option(name), f"{value!r}", expected=f"one of {', '.join(map(str, allowed))}")
        if self.samples != "auto" and (not isinstance(self.samples, int) or self.samples < 1):
            raise RecipeError(option("samples"), f"{self.samples}", expected="auto or a positive number")
        if self.recover != "off" and self.samples == 1:
            raise RecipeError(
                option("samples"), f"1, with {option('recover')} {self.recover}", expected="2 or more: one is left out"
            )
        for name in ("seq_len", "eval_seq_len"):
            if (value := getattr(self, name)) < 2:
                raise RecipeError(option(name), str(value), expected="2 or more tokens in a window")
        if self.sweeps is not None and self.sweeps < 0:
            raise RecipeError(option("sweeps"), str(self.sweeps), expected="0 or more")
        if self.eval_tokens not in ("full", "auto") and (not isinstance(self.eval_tokens, int) or self.eval_tokens < 2):
            raise RecipeError(option("eval_tokens"), f"{self.eval_tokens}", expected="auto, full, or 2 or more tokens")
        if self.damp is not None and not 0 < self.damp < 1:
            raise RecipeError(option("damp"), f"{self.damp}", expected="a share between 0 and 1")
        if self.propagation != "auto" and not (
            isinstance(self.propagation, int | float) and 0 <= self.propagation <= 1
        ):
            raise RecipeError(
                option("propagation"), repr(self.propagation), expected="auto, or a number from 0 (off) to 1"
            )
        if not 0 <= self.residual <= 2:
            raise RecipeError(option("residual"), f"{self.residual}", expected="a number from 0 (off) to 2")
        if not re.fullmatch(r"[a-z]\w*(:\d+)?", self.device):  # whether torch has it is seen when it is picked
            raise RecipeError(option("device"), repr(self.device), expected="auto, cpu, cuda, cuda:N, mps, xpu, ...")
        for pattern in self.ignore:
            Ignored(pattern)
        if self.target_bpw is not None and not 0 < self.target_bpw < 16:
            raise RecipeError(option("target_bpw"), f"{self.target_bpw}", expected="bits, above 0 and below 16")
        if self.target_size is not None:
            parse_size("target_size", self.target_size)
            if self.target_bpw is not None:
                raise RecipeError(option("target_size"), f"beside {option('target_bpw')}", expected="one of them")
        parse_size("max_shard_size", self.max_shard_size)

    def _check_formats(self) -> None:
        if unknown := [name for name in self.exports if name not in FORMAT_NAMES or name == self.format]:
            raise RecipeError(option("format"), repr(unknown[0]), expected=f"other ones of {', '.join(FORMAT_NAMES)}")
        if self.exports and self.format not in EXPORTABLE:
            raise RecipeError(
                option("format"), f"{self.format!r} first", expected=f"one of {', '.join(EXPORTABLE)} first"
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for reports, in the order of the fields; `rules` as texts, and only where there are any."""
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "rules" or self.rules}
        lists = {
            "rules": [str(rule) for rule in self.rules],
            "ignore": list(self.ignore),
            "exports": list(self.exports),
        }
        return plain | {name: value for name, value in lists.items() if name in plain}

    @property
    def formats(self) -> tuple[str, ...]:
        """All that are written, that of the checkpoint first."""
        return (self.format, *self.exports)

    @property
    def eval_window(self) -> int:
        """Tokens in a window of evaluation text: `eval_seq_len`, or all where `eval_tokens` are fewer."""
        return self.eval_seq_len if isinstance(self.eval_tokens, str) else min(self.eval_seq_len, self.eval_tokens)

    @property
    def most_samples(self) -> int:
        """Windows of calibration text, at most."""
        return _MOST_SAMPLES if isinstance(self.samples, str) else self.samples

    @property
    def has_target(self) -> bool:
        """Whether bits and groups are chosen for each linear."""
        return self.target_bpw is not None or self.target_size is not None

    @property
    def scheme_name(self) -> str:
        """As in the names of published checkpoints: W4A16-G128, W8A16-channel; -mixed where rules set other schemes,
        4.5bpw or 5GB where that was the target."""
        if self.has_target:
            return self.target_size or f"{self.target_bpw:g}bpw"
        group = {-1: "channel", "auto": "auto"}.get(self.group_size, f"G{self.group_size}")
        own = {name: getattr(self, name) for name in ("bits", "group_size", "symmetric")}
        mixed = any(own != {name: rule.settings.get(name, value) for name, value in own.items()} for rule in self.rules)
        return f"W{self.bits}A16-{group}" + "-asym" * (not self.symmetric) + "-mixed" * mixed


@dataclass(frozen=True)
class RunOptions:
    """All that a run is told beside its recipe: where the output goes, what may be used, kept and run.

    out       folder to write; None: ./<name>-<scheme>
    revision  branch, tag or commit of a model on the Hub
    max_ram   what the streams of hidden states may hold before they go to files; parked forwards must fit
    resume    continue an interrupted run of the same job: "auto", "required", or "never" (discard it)
    runtimes  that must open the result (names of `formats.runtimes.RUNTIMES`), or FormatError before any work
    trust_remote_code   Python code of the checkpoint may be run (`source/remote_code.py`)
    codes     a finished checkpoint of the same model, whose codes are taken over: nothing is solved
    ranks     the processes that share the work, this one among them
    """

    out: str | Path | None = None
    revision: str | None = None
    max_ram: str = "4GB"
    overwrite: bool = False
    resume: str = "auto"
    runtimes: tuple[str, ...] = ()
    trust_remote_code: bool = False
    codes: str | Path | None = None
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        parse_size("max_ram", self.max_ram)
        if self.resume not in ("auto", "required", "never"):
            raise RecipeError(option("resume"), repr(self.resume), expected="auto, required or never")

    @property
    def stream_budget(self) -> int:
        """`max_ram` in bytes."""
        return parse_size("max_ram", self.max_ram)


def make_recipe(model: str, file: str | Path | None = None, flags: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe for `model`: defaults, then what the preset changes, then the recipe `file` (a path or a name in
    pipelines/), then `flags`. The preset is named by a flag or the file."""
    values: dict[str, Any] = dict(DEMO_DEFAULTS) if model == "demo" else {}
    if file is not None:
        values |= load_recipe(file)
    values |= flags or {}
    return from_mapping(PRESETS.get(values.get("preset", ""), {}) | values)


def from_mapping(values: Mapping[str, Any]) -> Recipe:
    """A Recipe from plain data; unknown names and wrong types are refused."""
    known = {field.name: field for field in fields(Recipe)}
    for name, value in values.items():
        if name == "trust_remote_code":
            raise RecipeError(
                f"recipe: {name}",
                "a recipe cannot allow code to be run",
                remedy=f"give {option('trust_remote_code')} on the command line, once you have read that code",
                field=name,
            )
        if name not in known:
            raise RecipeError(f"recipe: {name}", "unknown key", remedy=did_you_mean(name, known))
        _check_type(name, value)
    values = {name: tuple(value) if name in ("rules", "ignore", "exports") else value for name, value in values.items()}
    if "ignore" in values:
        values["ignore"] = split_patterns(values["ignore"])
    if "," in (names := values.get("format", "")):  # several at once: the first is the checkpoint
        first, *others = (name.strip() for name in names.split(","))
        values |= {"format": first, "exports": tuple(dict.fromkeys(others))}
    return Recipe(**values)


def load_recipe(file: str | Path) -> dict[str, Any]:
    """The keys of a TOML recipe, by path or by the name of a built-in one."""
    path = expanded(file, RecipeError)
    if path.suffix != ".toml":
        path = recipe_folder() / f"{file}.toml"
    if not path.is_file():
        names = sorted(p.stem for p in recipe_folder().glob("*.toml"))
        raise RecipeError(
            option("recipe"), f"no recipe {str(file)!r}", expected=f"a .toml file or one of {', '.join(names)}"
        )
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(str(file), f"not valid TOML ({error})") from None


def recipe_folder() -> Path:
    """pipelines/: package data when installed, the top-level folder in a checkout."""
    installed = Path(__file__).parent / "pipelines"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "pipelines"


_TYPES: dict[str, tuple[type, ...]] = {
    "group_size": (int, str),
    "symmetric": (bool,),
    "refit": (bool,),
    "sweeps": (int, type(None)),
    "damp": (float, int, type(None)),
    "target_bpw": (float, int, type(None)),
    "target_size": (str, type(None)),
    "lm_head_bits": (int, type(None)),
    "embed_bits": (int, type(None)),
    "propagation": (float, int, str),
    "residual": (float, int),
    "ignore": (list, tuple),
    "exports": (list, tuple),
    "rules": (list, tuple),
    "samples": (int, str),
    "eval_tokens": (int, str),
}
_INTEGERS = ("bits", "seq_len", "seed", "eval_seq_len")


def _check_type(name: str, value: Any) -> None:
    wanted: tuple[type, ...] = (int,) if name in _INTEGERS else _TYPES.get(name, (str,))
    expected = " or ".join(kind.__name__ for kind in wanted)
    if not isinstance(value, wanted) or (isinstance(value, bool) and "bool" not in expected):
        raise RecipeError(f"recipe: {name}", f"{value!r}", expected=expected, field=name)
    if isinstance(value, list | tuple) and name != "rules" and not all(isinstance(item, str) for item in value):
        raise RecipeError(f"recipe: {name}", f"{value!r}", expected="a list of texts", field=name)


def parse_size(field: str, text: str) -> int:
    """Bytes of a size such as 5GB, 512MB or 4GiB (decimal units unless written with an i), the value of option `field`.

    >>> parse_size("max_ram", "5GB"), parse_size("max_ram", "1.5MiB")
    (5000000000, 1572864)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise RecipeError(option(field), repr(text), expected="a size such as 512MB, 5GB or 4GiB")
    number, unit, binary = match.groups()
    size = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))
    if size < 1:
        raise RecipeError(option(field), repr(text), expected="a size above zero")
    return size

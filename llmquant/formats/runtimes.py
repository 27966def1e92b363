"""Which runtimes open the result: rules of loaders and kernels, as data, against the linears of a plan.

Every rule names the runtime, the version that it holds for and what it was read from. `refuses`: the runtime does not
open the checkpoint, or computes something else. `warns`: it opens it at a price. What no rule speaks of is open.
The rules of vLLM and SGLang were read in their sources and documentation, not run.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmquant.errors import FormatError, RecipeError, did_you_mean, option
from llmquant.formats import FORMATS, LinearSpec
from llmquant.formats.base import in_block
from llmquant.formats.facts import FACTS, formats_that, fused_sets, is_split_by_inputs

Breaks = Callable[[LinearSpec], bool]

RUNTIMES = {
    "transformers": "5.23",
    "vllm": "0.33",
    "sglang": "0.5",
    "llama.cpp": "xllamacpp 2026.10.11549",
    "mlx-lm": "0.32.2",
}
_MARLIN = "its quantization/utils/marlin_utils.py: supported types, group sizes, verify_marlin_supports_shape"
_WNA16 = "its compressed_tensors/schemes/compressed_tensors_wNa16.py: WNA16_SUPPORTED_TYPES_MAP, and marlin_utils.py"
_PACKED = formats_that(lambda facts: facts.fused)


@dataclass(frozen=True)
class Rule:
    """One constraint of one runtime. `breaks`: the linears that it is about."""

    runtime: str
    formats: tuple[str, ...]
    severity: str  # refuses | warns
    breaks: Breaks
    got: str
    remedy: str
    source: str


@dataclass(frozen=True)
class Finding:
    """A rule that some layers of a plan break."""

    runtime: str
    version: str
    severity: str
    layers: tuple[str, ...]
    got: str
    remedy: str
    source: str

    def __str__(self) -> str:
        more = f" and {len(self.layers) - 1} more" if len(self.layers) > 1 else ""
        where = f" ({self.layers[0]}{more})" if self.layers else ""
        return f"{self.runtime} {self.version} {self.severity}: {self.got}{where}; {self.remedy}"


def _any(spec: LinearSpec) -> bool:
    return True


def _width(*allowed: int) -> Breaks:
    return lambda spec: spec.scheme.bits not in allowed


def _group(*allowed: int) -> Breaks:
    return lambda spec: spec.scheme.group_size not in allowed


def _shape(out_multiple: int, in_multiple: int) -> Breaks:
    return lambda spec: bool(spec.shape[0] % out_multiple or spec.shape[1] % in_multiple)


def _is_expert(spec: LinearSpec) -> bool:
    return re.search(r"\bexperts\.\d+\.", spec.module) is not None


def _odd_expert(spec: LinearSpec) -> bool:
    """An expert whose down projection the fused kernels cannot cut into tiles: F % max(64, group)."""
    group = spec.scheme.group_size
    return _is_expert(spec) and bool(min(spec.shape) % max(64, group))


def _cuts_groups(spec: LinearSpec) -> bool:
    """A linear of which tensor parallelism gives each device a part of the inputs, where half of them would end within
    a group."""
    parts = is_split_by_inputs(spec.module) and spec.scheme.group_size > 0
    return parts and bool(spec.shape[1] % (2 * spec.scheme.group_size))


def _is_head(spec: LinearSpec) -> bool:
    return spec.kind == "Linear" and in_block(spec.module) is None


def _marlin(runtime: str, formats: tuple[str, ...] = _PACKED) -> tuple[Rule, ...]:
    """Both servers run these formats with the same kernels."""
    return (
        Rule(
            runtime,
            formats,
            "refuses",
            _group(-1, 32, 64, 128),
            "a group size without a kernel",
            "use --group-size 32, 64, 128 or -1",
            _MARLIN,
        ),
        Rule(
            runtime,
            formats,
            "warns",
            _shape(64, 128),
            "outputs not a multiple of 64 or inputs not of 128: off the fast kernels, or refused by older versions",
            "keep them in 16 bit with --ignore",
            _MARLIN,
        ),
        Rule(
            runtime,
            formats,
            "warns",
            _cuts_groups,
            "half of its inputs is no multiple of the group: not over several devices (tensor parallelism)",
            "use a smaller --group-size, or -1, where several devices share it",
            "its row-parallel linears: input_size_per_partition % group_size; read, not run",
        ),
        Rule(
            runtime,
            formats,
            "warns",
            _odd_expert,
            "experts whose width is no multiple of 64 and of the group: no fused kernel",
            "use a smaller --group-size",
            "its fused_moe layers for Marlin: F / TP divisible by max(64, group); read, not run",
        ),
    )


RULES: tuple[Rule, ...] = (
    Rule(
        "vllm",
        ("compressed-tensors",),
        "warns",
        _width(4, 8),
        "a width that only its newest versions have a kernel for",
        "use --bits 4 or 8",
        _WNA16,
    ),
    *_marlin("vllm"),
    Rule(
        "vllm",
        ("compressed-tensors",),
        "warns",
        _is_head,
        "a quantized head, which versions before spring 2026 take for a dense one",
        "leave out --lm-head-bits for them",
        "its pull request 37291; read, not run",
    ),
    Rule(
        "vllm",
        ("compressed-tensors", "gptq"),
        "warns",
        lambda spec: spec.scheme.bits == 8,
        "no CPU kernel for 8 bits (GPUs have one)",
        "use --bits 4 for CPUs",
        "its kernels/mixed_precision/cpu.py",
    ),
    Rule("vllm", ("mlx",), "refuses", _any, "mlx is not a format of it", "use --format compressed-tensors", "its docs"),
    Rule(
        "vllm",
        ("gguf",),
        "warns",
        _any,
        "GGUF is experimental there and the tokenizer must be named beside it",
        "use --format compressed-tensors",
        "its documentation of GGUF",
    ),
    Rule(
        "sglang",
        ("compressed-tensors",),
        "refuses",
        _width(4, 8),
        "a width without a kernel",
        "use --bits 4 or 8",
        _WNA16,
    ),
    *_marlin("sglang"),
    Rule(
        "sglang",
        ("compressed-tensors",),
        "refuses",
        _is_head,
        "a quantized head, which it takes for a dense one",
        "leave out --lm-head-bits",
        "its pull request 28130, which is closed; read, not run",
    ),
    Rule(
        "sglang", ("mlx",), "refuses", _any, "mlx is not a format of it", "use --format compressed-tensors", "its docs"
    ),
    Rule(
        "transformers",
        ("gptq",),
        "warns",
        _any,
        "needs optimum and gptqmodel, on the CPU too",
        "use --format compressed-tensors",
        "run with gptqmodel 7.6.0 and optimum 2.3.0",
    ),
    Rule(
        "transformers",
        ("awq",),
        "warns",
        _any,
        "needs gptqmodel, on the CPU too",
        "use --format compressed-tensors where the grid is symmetric",
        "run with gptqmodel 7.6.0",
    ),
    Rule("transformers", ("mlx",), "refuses", _any, "mlx is not a format of it", "export another format", "its docs"),
    Rule(
        "transformers",
        ("gguf",),
        "warns",
        _any,
        "opens it with gguf_file= and unpacks it to dense weights",
        "use --format compressed-tensors",
        "its integrations/ggml.py",
    ),
    Rule(
        "llama.cpp",
        ("compressed-tensors", "gptq", "awq", "mlx", "fake"),
        "refuses",
        _any,
        "opens GGUF only",
        "llmquant export --format gguf",
        "run with that version",
    ),
    Rule(
        "mlx-lm",
        ("compressed-tensors", "gguf"),
        "refuses",
        _any,
        "does not know the layout",
        "llmquant export --format mlx",
        "run with that version: its utils.py renames no packed tensors of Llama",
    ),
    Rule(
        "mlx-lm",
        ("gptq",),
        "refuses",
        _any,
        "does not accept g_idx, which transformers and llama.cpp's converter want",
        "llmquant export --format mlx or awq",
        "run with that version: _transform_awq_weights in its utils.py",
    ),
    Rule(
        "mlx-lm",
        ("mlx", "awq"),
        "warns",
        _is_expert,
        "stacks packed experts of Mixtral, Qwen2-MoE, DeepSeek, OLMoE and GLM-4 as it loads them, not of Qwen3-MoE",
        "open it before you share it",
        "the sanitize of its models; read, not run",
    ),
    Rule(
        "mlx-lm",
        ("awq", "mlx"),
        "refuses",
        _group(32, 64, 128),
        "a group size that MLX does not have",
        "use --group-size 32, 64 or 128",
        "mlx 0.32.4, mx.quantize",
    ),
    Rule(
        "mlx-lm",
        ("awq",),
        "warns",
        lambda spec: not spec.scheme.symmetric,
        "products of zero and scale are rounded to the scale's dtype",
        "use a symmetric grid with --format mlx for exact weights",
        "run with that version: biases.astype(scales.dtype) in its utils.py",
    ),
    Rule(
        "mlx-lm",
        ("mlx",),
        "warns",
        lambda spec: not spec.scheme.symmetric and spec.dtype != torch.float32,
        "products of zero and scale are rounded to the model's dtype (figures of a run count that in)",
        "use a symmetric grid for exact weights",
        "formats/mlx.py",
    ),
)

_SERVERS = ("vllm", "sglang")


def lint(
    specs: Sequence[LinearSpec], format_name: str, dense_linears: Sequence[str] = (), tried: Sequence[Finding] = ()
) -> list[Finding]:
    """What the runtimes have against these linears in this format; nothing: every one of RUNTIMES opens it.

    dense_linears   modules that stay in 16 bit; one of them fused with a quantized one is found, too.
    tried           what no rule knows, but a trial has shown (`output/opens.py`)
    """
    try:
        FORMATS[format_name].check(specs)
    except FormatError as error:
        return [Finding("llmquant", "", "refuses", (), str(error), "see the message", "the format's own check")]
    found = list(tried)
    for rule in RULES:
        layers = tuple(spec.module for spec in specs if rule.breaks(spec)) if format_name in rule.formats else ()
        if layers:
            version = RUNTIMES[rule.runtime]
            found.append(Finding(rule.runtime, version, rule.severity, layers, rule.got, rule.remedy, rule.source))
    if format_name in _PACKED and (mixed := _mixed(specs, dense_linears)):
        found += [
            Finding(
                runtime,
                RUNTIMES[runtime],
                "refuses",
                mixed,
                "linears that it runs as one matrix are quantized differently, or only in part",
                "treat q, k and v alike, and gate and up: widen --ignore, or use one scheme",
                "their model classes: packed_modules_mapping",
            )
            for runtime in _SERVERS
        ]
    if len({spec.scheme for spec in specs}) > 1:
        others = formats_that(lambda facts: bool(facts.mixes) and not facts.one_scheme_in)
        found += [
            Finding(
                runtime,
                RUNTIMES[runtime],
                "refuses",
                (),
                "linears have different schemes, and it takes all for the first",
                f"use one scheme, or --format {', '.join(others)}",
                "its GPTQConfig in utils/quantization_config.py, which has no field for `dynamic`",
            )
            for runtime in FACTS[format_name].one_scheme_in
        ]
    return found


def opens(
    specs: Sequence[LinearSpec], format_name: str, dense_linears: Sequence[str] = (), tried: Sequence[Finding] = ()
) -> dict[str, bool]:
    """For every runtime whether no rule says that it refuses."""
    findings = lint(specs, format_name, dense_linears, tried)
    refused = {finding.runtime for finding in findings if finding.severity == "refuses"}
    return {runtime: not refused & {runtime, "llmquant"} for runtime in RUNTIMES}


def verdicts(
    specs: Sequence[LinearSpec], format_name: str, dense_linears: Sequence[str] = (), tried: Sequence[Finding] = ()
) -> dict[str, dict[str, Any]]:
    """For every runtime, as plain data for a report: its version, whether it opens the result, and at what price."""
    findings = lint(specs, format_name, dense_linears, tried)
    answers = opens(specs, format_name, dense_linears, tried)
    return {
        runtime: {
            "version": version,
            "opens": answers[runtime],
            "notes": [f"{f.got}; {f.remedy}" for f in findings if f.runtime in (runtime, "llmquant")],
        }
        for runtime, version in RUNTIMES.items()
    }


def refuse_runtimes(
    runtimes: Sequence[str],
    specs: Sequence[LinearSpec],
    formats: Mapping[str, Sequence[Finding]],
    dense_linears: Sequence[str] = (),
) -> None:
    """FormatError unless each of `runtimes` opens at least one of the `formats` that a run writes.

    formats   what a trial has shown of each
    RecipeError for a runtime that no rule knows.
    """
    for runtime in runtimes:
        if runtime not in RUNTIMES:
            raise RecipeError(option("runtimes"), repr(runtime), remedy=did_you_mean(runtime, RUNTIMES))
        if not any(opens(specs, name, dense_linears, tried)[runtime] for name, tried in formats.items()):
            found = [f for name, tried in formats.items() for f in lint(specs, name, dense_linears, tried)]
            first = next(f for f in found if f.severity == "refuses" and f.runtime in (runtime, "llmquant"))
            raise FormatError(f"{option('runtimes')} {runtime}", str(first))


def _mixed(specs: Sequence[LinearSpec], dense_linears: Sequence[str]) -> tuple[str, ...]:
    """Members of fused groups whose schemes differ; dense ones count as a scheme of their own."""
    scheme_of = {spec.module: spec.scheme for spec in specs} | dict.fromkeys(dense_linears)
    sets = fused_sets(scheme_of)
    return tuple(name for members in sets if len({scheme_of[name] for name in members}) > 1 for name in members)

"""Rules about runtimes: each fires where it should, and names layers, version and remedy."""

import re

import pytest
from linears import spec_of

from llmquant.formats import FORMATS, LinearSpec
from llmquant.formats.runtimes import RULES, RUNTIMES, lint, opens

GOOD = [spec_of(4, 128, (256, 512), module=f"model.layers.0.mlp.{name}_proj") for name in ("gate", "up", "down")]


def of(runtime: str, specs: list[LinearSpec], name: str, **options: list[str]) -> list[str]:
    return [f.severity for f in lint(specs, name, **options) if f.runtime == runtime]


@pytest.mark.parametrize("name", FORMATS)
def test_where_the_default_scheme_opens(name: str) -> None:
    expected = {
        "compressed-tensors": {"transformers", "vllm", "sglang"},
        "gptq": {"transformers", "vllm", "sglang"},
        "awq": {"transformers", "vllm", "sglang", "mlx-lm"},
        "mlx": {"mlx-lm"},
        "gguf": {"transformers", "vllm", "sglang", "llama.cpp"},
        "fake": {"transformers", "vllm", "sglang", "mlx-lm"},
    }
    assert {runtime for runtime, fine in opens(GOOD, name).items() if fine} == expected[name]


def test_the_default_format_gives_no_warning_where_it_opens() -> None:
    assert {finding.runtime for finding in lint(GOOD, "compressed-tensors")} == {"llama.cpp", "mlx-lm"}


def test_a_finding_says_what_which_and_what_to_do() -> None:
    bad = spec_of(3, 128, (256, 512), module="model.layers.1.mlp.up_proj")
    finding = next(f for f in lint([*GOOD, bad], "compressed-tensors") if f.runtime == "sglang")
    assert finding.layers == ("model.layers.1.mlp.up_proj",)
    assert str(finding) == (
        "sglang 0.5 refuses: a width without a kernel (model.layers.1.mlp.up_proj); use --bits 4 or 8"
    )


def test_kernels_of_the_servers() -> None:
    for runtime in ("vllm", "sglang"):
        assert of(runtime, [spec_of(4, 256, (256, 512))], "compressed-tensors") == ["refuses"]
        assert of(runtime, [spec_of(4, 32, (96, 512))], "gptq") == ["warns"]
        assert of(runtime, [spec_of(4, 32, (64, 96))], "awq") == ["warns"]
        assert of(runtime, [spec_of(4, -1, (64, 128))], "gptq") == []
    assert of("vllm", [spec_of(8, 128, (256, 512))], "compressed-tensors") == ["warns"]


def test_groups_that_tensor_parallelism_would_cut() -> None:
    for runtime in ("vllm", "sglang"):
        cut = spec_of(4, 128, (256, 384), module="model.layers.0.mlp.down_proj")
        assert of(runtime, [cut], "compressed-tensors") == ["warns"]
        for fine in (
            spec_of(4, 64, (256, 384), module="model.layers.0.mlp.down_proj"),
            spec_of(4, -1, (256, 384), module="model.layers.0.mlp.down_proj"),
            spec_of(4, 128, (256, 384), module="model.layers.0.mlp.up_proj"),  # split by its outputs
        ):
            assert of(runtime, [fine], "compressed-tensors") == []


def test_linears_that_servers_fuse_must_be_alike() -> None:
    up = spec_of(4, 128, (256, 512), module="model.layers.0.mlp.up_proj")
    gate = spec_of(8, 128, (256, 512), module="model.layers.0.mlp.gate_proj")
    assert "refuses" in of("vllm", [up, gate], "compressed-tensors")
    assert of("sglang", [up], "compressed-tensors", dense_linears=["model.layers.0.mlp.gate_proj"]) == ["refuses"]
    assert of("sglang", [up], "compressed-tensors", dense_linears=["model.layers.1.mlp.gate_proj"]) == []
    assert of("sglang", [up], "compressed-tensors", dense_linears=["lm_head"]) == []


def test_mlx_lm_and_asymmetric_awq() -> None:
    assert of("mlx-lm", [spec_of(4, 128, (256, 512), symmetric=False)], "awq") == ["warns"]
    assert of("mlx-lm", [spec_of(4, -1, (256, 512))], "awq") == ["refuses"]


def test_what_the_format_itself_refuses_opens_nowhere() -> None:
    specs = [spec_of(3, 32, (32, 96))]
    (finding,) = lint(specs, "gptq")
    assert "3 bits in gptq" in finding.got
    assert not any(opens(specs, "gptq").values())


def test_every_rule_is_complete() -> None:
    for rule in RULES:
        assert rule.runtime in RUNTIMES
        assert set(rule.formats) <= set(FORMATS)
        assert rule.severity in ("refuses", "warns")
        assert rule.got
        assert rule.remedy
        assert rule.source
        assert not re.search(r"https?:", rule.source)

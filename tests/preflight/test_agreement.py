"""`plan` reports a problem exactly where `run` refuses before the work, with the same words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmquant import pipeline
from llmquant.errors import LLMQuantError
from llmquant.pipeline import quantize_with
from llmquant.preflight.estimate import estimate
from llmquant.recipe import CHOICES, RunOptions, make_recipe

TEXT: dict[str, Any] = {"samples": 4, "seq_len": 32, "eval_data": "builtin", "eval_tokens": 128, "eval_seq_len": 64}
FLAGS = st.fixed_dictionaries(
    {"group_size": st.sampled_from([32, 32, 64, -1])},
    optional={
        "method": st.sampled_from(CHOICES["method"]),
        "bits": st.sampled_from(CHOICES["bits"]),
        "symmetric": st.booleans(),
        "format": st.sampled_from([*CHOICES["format"], "compressed-tensors,gguf", "gptq,awq", "awq,mlx"]),
        "ignore": st.sampled_from([["down_proj"], ["q_proj"], ["nowhere"], [".*"]]),
        "dtype": st.sampled_from(CHOICES["dtype"]),
        "products": st.sampled_from(CHOICES["products"]),
        "baselines": st.sampled_from(["none", "rtn", "bnb-nf4,rtn", "bnb-nf5"]),
        "calibration": st.sampled_from(["builtin:0.5,builtin:0.6", "gone.txt"]),
        "samples": st.sampled_from([1, 10**6]),
        "eval_data": st.sampled_from(["none", "gone.jsonl"]),
        "device": st.sampled_from(["cpu", "cuda:99"]),
    },
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "runtimes": st.sampled_from([("vllm",), ("llama.cpp", "transformers"), ("mlx-lm",), ("ollama",)]),
        "overwrite": st.booleans(),
        "max_ram": st.sampled_from(["1KB", "4GB"]),
    },
)


class Working(Exception):  # noqa: N818 (not an error)
    """The run has begun its work."""


@pytest.mark.parametrize("model", ["llama", "gpt2", "tied"])
def test_plan_reports_a_problem_exactly_where_run_refuses(
    model: str, tiny_model: Callable[[str], Path], tmp_path: Path, short_runs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(*arguments: Any) -> None:
        raise Working

    monkeypatch.setattr(pipeline, "measure_curvature", begin)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    folder = "demo" if model == "tied" else str(tiny_model(model))

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(flags=FLAGS, options=OPTIONS, out=st.sampled_from(["out", "out", "full"]))
    def agree(flags: dict[str, Any], options: dict[str, Any], out: str) -> None:
        recipe, told = make_recipe("x", flags=TEXT | flags), RunOptions(tmp_path / out, **options)
        found = estimate(folder, recipe, told)
        problems = [problem for problem in found.problems if problem.blocking]
        with pytest.raises((Working, LLMQuantError)) as ended:
            quantize_with(folder, recipe, told)
        code = getattr(ended.value, "exit_code", 0)
        assert (code in {problem.exit_code for problem in problems}) if code else problems == [], str(ended.value)

    agree()

"""Presets: what stands for all that is not said."""

from collections.abc import Callable
from pathlib import Path

import pytest
from broken import run

from llmquant.errors import RecipeError
from llmquant.recipe import PRESETS, Recipe, make_recipe


def test_flags_and_files_go_before_a_preset(tmp_path: Path) -> None:
    assert make_recipe("x") == make_recipe("x", flags={"preset": "default"}) == Recipe()
    fast = make_recipe("x", flags={"preset": "fast", "sweeps": 2})
    assert (fast.curvature, fast.sweeps, fast.propagation) == ("off", 2, 0)
    (tmp_path / "own.toml").write_text('preset = "fast"\npropagation = 0.5\n')
    own = make_recipe("x", tmp_path / "own.toml")
    assert (own.preset, own.curvature, own.propagation) == ("fast", "off", 0.5)
    best = make_recipe("x", tmp_path / "own.toml", {"preset": "best"})
    assert (best.preset, best.curvature, best.recover, best.propagation) == ("best", "auto", "all", 0.5)
    assert make_recipe("demo", "best").recover == "all"
    assert make_recipe("demo", flags={"preset": "best"}).seq_len == 512


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(RecipeError, match="preset: 'finest'; expected one of fast, default, best"):
        make_recipe("x", flags={"preset": "finest"})


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_and_is_in_the_report(
    preset: str, tiny_model: Callable[[str], Path], tmp_path: Path, short_runs: None
) -> None:
    report = run(tiny_model("llama"), tmp_path / "out", preset=preset, baselines="none", samples=8)
    assert report.data["recipe"]["preset"] == preset
    assert (report.data.get("recovery") is not None) == (preset == "best")

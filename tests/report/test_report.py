"""report.json and cost.json follow their schemas; the card shows their figures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import jsonschema
import pytest
import torch

import llmquant
from llmquant import comparison
from llmquant.comparison import noise_floor
from llmquant.log import Stopwatch
from llmquant.model.skeleton import Skeleton
from llmquant.report.command import command_of
from llmquant.report.tables import describe_evaluation, lanes_table
from llmquant.report.verdict import verdict
from llmquant.source.resolve import open_source
from llmquant.text import corpus
from llmquant.text.corpus import load_text
from llmquant.text.windows import Windows

SCHEMAS = Path(__file__).parents[2] / "eval"
FLAGS = {"group_size": 32, "samples": 4, "seq_len": 32, "eval_tokens": 128, "eval_seq_len": 64}


def check(name: str, value: Any) -> None:
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(value, schema)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"bits": 8},
        {"method": "rtn", "eval_data": "none"},
        {"eval_tokens": 64, "dtype": "bfloat16"},
        {"target_bpw": 4.2, "recover": "norms"},
    ],
)
def test_reports_follow_their_schemas(flags: dict[str, Any], tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    llmquant.quantize(tiny_model("llama"), llmquant.make_recipe("x", flags=FLAGS | flags), out)
    report, cost = (json.loads((out / f"{name}.json").read_text()) for name in ("report", "cost"))
    check("report", report)
    check("cost", cost)
    lanes = [] if report["evaluation"] is None else list(report["evaluation"]["lanes"])
    baseline = "bnb-int8" if flags.get("bits") == 8 else "bnb-nf4"
    ours = ["llmquant", "before recovery"] if "recover" in flags else ["llmquant"]
    assert lanes == ([] if "eval_data" in flags else ["original", *ours, "rtn", baseline])
    assert ("allocation" in report, "recovery" in report) == ("target_bpw" in flags, "recover" in flags)
    if "recover" in flags:
        found = (out / "README.md").read_text() + (out / "report.html").read_text()
        assert found.count("steps of training (--recover norms)") == 2
        assert found.count("For the target size were chosen") == 2
        assert "before recovery at" not in found
    if lanes:
        assert (report["evaluation"]["noise_floor"] is not None) is ("dtype" in flags)


def test_a_report_without_a_figure_is_refused_by_the_schema(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    report = llmquant.quantize(tiny_model("llama"), llmquant.make_recipe("x", flags=FLAGS), tmp_path / "out").data
    del report["evaluation"]["lanes"]["rtn"]["kl_p99"]
    with pytest.raises(jsonschema.ValidationError, match="kl_p99"):
        check("report", report)


def test_the_card_and_the_table_show_the_reports_figures(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    report = llmquant.quantize(tiny_model("llama"), llmquant.make_recipe("x", flags=FLAGS), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for row in lanes_table(report.facts.evaluation.lanes):
        assert "| " + " | ".join(row) + " |" in card
    assert describe_evaluation(report.facts.evaluation) in card
    assert f"**{verdict(report.facts)}**" in card
    assert f"```bash\n{command_of(report.facts)}\n```" in card
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert str(tmp_path) not in card + json.dumps(report.data)


def test_noise_floor_is_the_dtypes_own_divergence(tiny_model: Callable[[str], Path]) -> None:
    source = open_source(tiny_model("llama"))
    windows = Windows(torch.arange(3, 3 + 9 * 32).view(9, 32), "test", None, "none")
    cpu = torch.device("cpu")
    assert noise_floor(source, Skeleton(source, cpu, torch.float32), windows, Stopwatch()) is None
    floor = noise_floor(source, Skeleton(source, cpu, torch.bfloat16), windows, Stopwatch())
    assert floor is not None
    assert 0 < floor.kl_mean < 1e-2


def test_streams_of_the_noise_floor_lie_in_files(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the run, which may fill --max-ram, are still open then."""
    made: list[str] = []
    real = comparison.unnamed_file

    def unnamed_file(name: str) -> BinaryIO:
        made.append(name)
        return real(name)

    monkeypatch.setattr(comparison, "unnamed_file", unnamed_file)
    source = open_source(tiny_model("llama"))
    windows = Windows(torch.arange(3, 3 + 9 * 32).view(9, 32), "test", None, "none")
    noise_floor(source, Skeleton(source, torch.device("cpu"), torch.bfloat16), windows, Stopwatch())
    assert made == ["float32", "compute"]


def test_auto_takes_the_builtin_text_where_no_hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_text("auto", "test", 100).name == "builtin"  # conftest puts the Hub offline
    monkeypatch.setattr(corpus, "_hub_answers", lambda: True)
    monkeypatch.setitem(corpus.DATASETS, "wikitext2", lambda split, limit: corpus.Text("wikitext2", ["x"]))
    assert load_text("auto", "test", 100).name == "wikitext2"


def test_auto_decides_within_five_seconds_where_the_hub_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading
    import time

    from huggingface_hub import HfApi, constants

    released = threading.Event()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "dataset_info", lambda *args, **kwargs: released.wait(30))
    begin = time.monotonic()
    assert corpus._hub_answers(0.2) is False
    assert time.monotonic() - begin < 5
    released.set()


def test_compare_pairs_its_differences(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    original = tiny_model("llama")
    for method in ("gptq", "rtn"):
        llmquant.quantize(
            original,
            llmquant.make_recipe("x", flags=FLAGS | {"method": method, "baselines": "none"}),
            tmp_path / method,
        )
    recipe = llmquant.make_recipe("x", flags=FLAGS)
    report = llmquant.compare([tmp_path / "gptq", tmp_path / "rtn"], reference=original, recipe=recipe)
    assert list(report.lanes) == ["original", "gptq", "rtn"]
    (difference,) = report.data["differences"]
    assert difference["kl_difference"] == pytest.approx(
        report.lanes["rtn"]["kl_mean"] - report.lanes["gptq"]["kl_mean"]
    )
    for method in ("gptq", "rtn"):
        own = json.loads((tmp_path / method / "report.json").read_text())["evaluation"]["lanes"]["llmquant"]
        for figure in ("perplexity", "kl_mean", "kl_max", "same_top", "bits_per_weight"):
            assert report.lanes[method][figure] == pytest.approx(own[figure], rel=1e-6)
    alone = llmquant.evaluate(tmp_path / "rtn", recipe=recipe)
    assert alone.lanes["rtn"]["perplexity"] == report.lanes["rtn"]["perplexity"]

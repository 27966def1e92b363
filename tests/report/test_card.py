"""The model card: read by the Hub's own parser; runtimes, inherited licence, the committed cards of the demo."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from huggingface_hub import ModelCard

import llmquant
from llmquant.export import export
from llmquant.formats import FORMATS
from llmquant.formats.runtimes import RUNTIMES
from llmquant.log import Lines
from llmquant.report.card import make_card
from llmquant.report.data import RunReport
from llmquant.report.plain import parse, parse_file
from llmquant.report.tables import lanes_table
from llmquant.run_dir.manifest import sha256
from llmquant.source.card import read_card
from llmquant.source.resolve import open_source

ROOT = Path(__file__).parents[2]
CARDS = ROOT / "model_cards"
FLAGS = {"samples": 4, "seq_len": 32, "eval_tokens": 128, "eval_seq_len": 64}
SCHEMA = json.loads((ROOT / "eval" / "report.schema.json").read_text())


@pytest.fixture(scope="module")
def finished(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("card") / "tiny-W4"
    llmquant.quantize(tiny_model("llama"), llmquant.make_recipe("x", flags=FLAGS), out)
    return out


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def card_of(name: str, report: dict[str, Any], base_model: str | None = None) -> str:
    return make_card(name, parse(RunReport, report, "report.json"), base_model)


# -- committed cards ---------------------------------------------------------------------------------------
DEMOS = {"demo-w4": "demo-W4A16-G128", "demo-w8": "demo-W8A16-G128"}


@pytest.mark.parametrize("name", DEMOS)
def test_a_committed_card_is_what_its_committed_report_gives(name: str) -> None:
    report = report_of(CARDS / name)
    jsonschema.validate(report, SCHEMA)
    card = (CARDS / name / "README.md").read_text("utf-8")
    assert card == card_of(DEMOS[name], report), "`python tests/report/test_card.py` makes it from its report again"
    for row in lanes_table(parse_file(RunReport, CARDS / name / "report.json").evaluation.lanes):
        assert "| " + " | ".join(row) + " |" in card
    index = ModelCard(card).data.to_dict()["model-index"][0]["results"][0]["metrics"]
    lane = report["evaluation"]["lanes"]["llmquant"]
    values = {metric["type"]: metric["value"] for metric in index}
    assert values["perplexity"] == pytest.approx(lane["perplexity"], rel=1e-5)
    assert values["kl_divergence"] == pytest.approx(lane["kl_mean"], rel=1e-5)


# -- the YAML head -----------------------------------------------------------------------------------------
def test_the_hubs_parser_reads_what_the_report_says(finished: Path) -> None:
    report = report_of(finished) | {"model": {"id": "org/model", "revision": "a" * 40, "card": {"license": "mit"}}}
    report["evaluation"] |= {"dataset": "wikitext2", "revision": "b" * 40}
    report["calibration"] |= {"dataset": "c4", "revision": "c" * 40}
    data = ModelCard(card_of("me/model-W4", report)).data
    assert (data.base_model, data.license, data.pipeline_tag) == ("org/model", "mit", "text-generation")
    assert data.get("base_model_relation") == "quantized"
    assert (data.library_name, data.datasets) == ("transformers", ["allenai/c4"])
    assert data.tags == ["llmquant", "4-bit", "compressed-tensors"]
    assert data.model_name == "me/model-W4"
    assert {result.metric_type for result in data.eval_results} == {"perplexity", "kl_divergence", "same_top_token"}
    result = data.eval_results[0]
    assert (result.dataset_type, result.dataset_config) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert (result.dataset_split, result.dataset_revision) == ("test", "b" * 40)


def test_a_folders_name_is_no_base_model_unless_one_is_named(finished: Path) -> None:
    report = report_of(finished)
    assert ModelCard(card_of("x", report)).data.base_model is None
    assert "base_model_relation" not in card_of("x", report)
    assert ModelCard(card_of("x", report, "org/model")).data.base_model == "org/model"


def test_a_card_without_figures_has_no_index(finished: Path) -> None:
    card = card_of("x", report_of(finished) | {"evaluation": None})
    assert "model-index" not in ModelCard(card).data.to_dict()
    assert "Not measured." in card


def test_strangers_strings_stay_text(finished: Path) -> None:
    evil = "a`</code><script>alert(1)</script>\n---\nlicense: mit\n# x"
    report = report_of(finished)
    report["model"] = {"id": f"org/{evil}", "revision": None, "card": {"license": "gpl: [x]\n"}}
    report["calibration"]["dataset"] = evil
    report["layers"][0]["name"] = evil
    report["layers"][0]["notes"] = [evil]
    card = card_of(evil, report)
    data = ModelCard(card).data
    assert data.license == "gpl: [x]\n"
    body = ModelCard(card).text
    assert "<script>" not in body
    assert not re.search(r"^(---|license: mit)", body, re.MULTILINE)


# -- the body ----------------------------------------------------------------------------------------------
def test_what_auto_chose_stands_in_card_and_ledger(finished: Path) -> None:
    report = report_of(finished)
    jsonschema.validate(report, SCHEMA)
    chosen = "32, the largest of 128, 64, 32 that divides the inputs"
    assert report["chosen"] == {"group_size": chosen}
    assert f"For group_size auto chose {chosen}." in card_of("x", report)
    assert "groups by --group-size auto" in {row["reason"].rpartition(", ")[2] for row in report["tensors"]}
    assert f"group_size auto chose {chosen}" in (finished / "report.html").read_text("utf-8")


def test_hashes_are_those_of_the_files(finished: Path) -> None:
    card, manifest = (finished / "README.md").read_text(), json.loads((finished / "manifest.json").read_text())
    files = sorted(finished.glob("*.safetensors"))
    assert files
    for file in files:
        assert f"| {file.name} | {file.stat().st_size} | `{sha256(file)}` |" in card
        assert manifest["files"][file.name] == report_of(finished)["files"][file.name]


def test_the_snippet_for_transformers_runs_as_it_stands(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished.parent)
    (code,) = re.findall(r"```python\n(.*?)```", (finished / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(code, names)
    assert "history" in capsys.readouterr().out
    assert type(names["model"]).__name__ == "LlamaForCausalLM"


TITLES = {
    "transformers": "transformers",
    "vllm": "vLLM",
    "sglang": "SGLang",
    "llama.cpp": "llama.cpp",
    "mlx-lm": "mlx-lm",
}


@pytest.mark.parametrize("name", ["gptq", "awq", "mlx", "gguf"])
def test_runtimes_have_a_snippet_or_the_reason_why_not(name: str, finished: Path, tmp_path: Path) -> None:
    out = export(finished, name, tmp_path / name)
    card, report = (out / "README.md").read_text(), report_of(out)
    assert list(report["runtimes"]) == [name]
    assert report["recipe"]["format"] in FORMATS
    refused = next((line for line in card.splitlines() if line.startswith("It does not open in")), "")
    for runtime in RUNTIMES:
        facts = report["runtimes"][name][runtime]
        if facts["opens"]:
            assert f"{TITLES[runtime]} {facts['version']} (" not in refused
            assert f"**{TITLES[runtime]}** (" in card or name == "gguf"
        else:
            assert f"**{TITLES[runtime]}** (" not in card
            assert f"{TITLES[runtime]} {facts['version']} (" in refused
    if name == "gguf":
        assert "llama-cli -m gguf/model-Q4_0.gguf" in card
        assert "llama-cli -hf me/x:Q4_0" in card_of("me/x", report)
        assert 'gguf_file="model-Q4_0.gguf"' in card


# -- the original's card -----------------------------------------------------------------------------------
def source_with(readme: str | bytes | None, folder: Path, tiny_model: Callable[[str], Path]) -> Any:
    folder.mkdir(exist_ok=True)
    for file in tiny_model("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if readme is not None:
        (folder / "README.md").write_bytes(readme if isinstance(readme, bytes) else readme.encode())
    return open_source(folder)


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        (None, {}),
        ("# no head", {}),
        ("---\n---\n", {}),
        (
            "---\nlicense: other\nlicense_name: llama9\nlicense_link: LICENSE\nlanguage: [en, de]\ndatasets:\n- a/b\n"
            "model-index: nonsense\ntags: [x]\nbase_model: c/d\n---\n",
            {
                "license": "other",
                "license_name": "llama9",
                "license_link": "LICENSE",
                "language": ["en", "de"],
                "datasets": ["a/b"],
            },
        ),
        ("---\nlicense: no\nlanguage: [1, 2]\npipeline_tag: {a: b}\n---\n", {}),
        (f"---\nlicense: {'x' * 1000}\nlanguage: en\n---\n", {"language": "en"}),
        ("---\nlicense: [\n---\n", None),
        ("---\n- a\n---\n", None),
        (b"\xff\xfe---\nlicense: mit\n---\n", None),
    ],
)
def test_what_is_taken_over(
    readme: str | bytes | None, expected: dict[str, Any] | None, tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    said: list[str] = []
    found = read_card(source_with(readme, tmp_path / "source", tiny_model), Lines(said.append))
    assert found == (expected or {})
    assert bool(said) is (expected is None)
    assert all("the licence is not taken over" in line for line in said)


def test_the_licence_goes_into_card_and_report(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    source_with("---\nlicense: mit\nlanguage: de\n---\n", tmp_path / "source", tiny_model)
    flags = FLAGS | {"method": "rtn", "eval_data": "none"}
    report = llmquant.quantize(tmp_path / "source", llmquant.make_recipe("x", flags=flags), tmp_path / "out").data
    assert report["model"]["card"] == {"license": "mit", "language": "de"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert (ModelCard(card).data.license, ModelCard(card).data.language) == ("mit", "de")
    assert "names no licence" not in card
    del report["model"]["card"]["license"]
    assert "names no licence" in card_of("x", report)


if __name__ == "__main__":
    for folder, title in DEMOS.items():
        (CARDS / folder / "README.md").write_text(card_of(title, report_of(CARDS / folder)), "utf-8")

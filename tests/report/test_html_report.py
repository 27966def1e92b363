"""report.html: whole, self-contained, escaped, with the report's own figures; and the words beside them."""

import copy
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tiny
import typer

import llmquant
from llmquant.cli import app as cli
from llmquant.cli import look
from llmquant.report.command import command_of
from llmquant.report.data import RunReport
from llmquant.report.html import make_html
from llmquant.report.plain import parse
from llmquant.report.tables import lanes_table
from llmquant.report.verdict import health, verdict

pytestmark = pytest.mark.usefixtures("drawn")

FLAGS = {"group_size": 32, "samples": 4, "seq_len": 32, "eval_tokens": 640, "eval_seq_len": 64}
VOID = {"meta", "input", "br", "use", "link"}
EVIL = "x.<script>alert(1)</script>.\"'&$\\alpha$_"


class Page(HTMLParser):
    """Text by the id of the section around it, and all tags; fails where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str | None]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str | None, str] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("id") if tag in ("section", "table") else None))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        section = next((name for _, name in reversed(self.open) if name), None)
        self.text[section] = self.text.get(section, "") + data


def facts_of(report: dict[str, Any]) -> RunReport:
    return parse(RunReport, report, "report.json")


def page_of(name: str, report: dict[str, Any]) -> str:
    return make_html(name, facts_of(report))


@pytest.fixture(scope="module")
def made(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The report and the page of a run."""
    out = tmp_path_factory.mktemp("html") / "out"
    data = llmquant.quantize(tiny_model("llama"), llmquant.make_recipe("x", flags=FLAGS), out).data
    return data, (out / "report.html").read_text()


@pytest.fixture
def report(made: tuple[dict[str, Any], str]) -> dict[str, Any]:
    return made[0]


@pytest.fixture
def text(made: tuple[dict[str, Any], str]) -> str:
    return made[1]


def test_the_page_shows_the_reports_figures(report: dict[str, Any], text: str) -> None:
    page = Page(text)
    assert page.text["verdict"] == verdict(facts_of(report))
    for row in lanes_table(facts_of(report).evaluation.lanes):
        assert all(cell in page.text["lanes"] for cell in row)
    for row in report["tensors"]:
        assert row["name"] in page.text["ledger"]
    for layer in report["layers"]:
        assert f"{layer['relative_error']:.2e}" in page.text["ledger"]
    assert command_of(facts_of(report)) in page.text["provenance"]
    assert report["evaluation"]["ids_sha256"] in page.text["provenance"]
    assert sum(tag == "svg" for tag, _ in page.tags) == 3 + 3 * 3  # and the histograms of three layers


@pytest.mark.parametrize(("name", "flags"), [("gpt2", {"format": "fake"}), ("bloom", {})])
def test_the_ledger_shows_errors_where_the_checkpoint_has_other_names_than_the_model(
    name: str, flags: dict[str, Any], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny.of_base_model(tiny_model(name), tmp_path / name)
    recipe = llmquant.make_recipe("x", flags=FLAGS | {"eval_data": "none"} | flags)
    data = llmquant.quantize(source, recipe, tmp_path / "out").data
    rows = {row["module"]: row["name"] for row in data["tensors"] if row["action"] == "quantized"}
    assert rows.keys() == {layer["name"] for layer in data["layers"]}
    assert all(f"{module}.weight" == f"transformer.{key}" for module, key in rows.items())
    page = page_of("name", data)
    ledger = Page(page).text["ledger"]
    for layer in data["layers"]:
        assert f"{layer['relative_error']:.2e}" in ledger
    shown = re.findall(r'<tr data-action="(\w+)">.*?<td>([^<]*)</td><td>[^<]*</td></tr>', page)
    assert [bool(error) for action, error in shown if action == "quantized"] == [True] * len(rows)
    assert not any(error for action, error in shown if action != "quantized")


def test_the_page_needs_nothing_beside_itself(text: str) -> None:
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "image")
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", text)
    assert "@import" not in text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"(?:url\(|xlink:href=\")#([\w-]+)", text))
    assert used <= set(ids)


def test_nothing_has_a_fixed_width_and_tables_scroll_by_themselves(text: str) -> None:
    style = text[text.index("<style>") : text.index("</style>")]
    assert not re.search(r"(?<![-\w])width:\s*[\d.]+(px|rem|em|vw)", style)
    assert text.count("<table") == text.count('<div class="scroll"><table') + text.count('<div class="scroll tall"')
    assert not any("width" in attributes for tag, attributes in Page(text).tags if tag == "svg")


def test_the_same_report_gives_the_same_bytes(report: dict[str, Any], text: str) -> None:
    assert text == page_of("out", report) == page_of("out", copy.deepcopy(report))
    assert not re.search(r"20\d\d-\d\d-\d\d", text)


def test_strangers_strings_stay_text(report: dict[str, Any], text: str) -> None:
    evil = copy.deepcopy(report)
    evil["model"]["id"] = evil["evaluation"]["dataset"] = evil["tensors"][0]["name"] = EVIL
    evil["layers"][0] |= {"name": f"model.layers.0.{EVIL}", "notes": [EVIL]}
    plain, page = Page(text), Page(page_of(EVIL, evil))
    assert [tag for tag, _ in page.tags].count("script") == [tag for tag, _ in plain.tags].count("script") == 1
    assert EVIL in page.text["ledger"]
    assert EVIL in page.text["health"]


def test_a_report_without_evaluation_or_calibration_has_a_page(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = llmquant.make_recipe("x", flags=FLAGS | {"method": "rtn", "eval_data": "none"})
    llmquant.quantize(tiny_model("llama"), recipe, tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert "quality was not measured" in page.text["verdict"]
    assert "relative weight error" in text
    assert "lanes" not in page.text


def test_the_verdict_compares_by_divergence(report: dict[str, Any]) -> None:
    lane = report["evaluation"]["lanes"]["llmquant"]
    lane = lane | {"perplexity": 8.40, "perplexity_ratio": 1.0108, "perplexity_ratio_ci": [1.0088, 1.0128]}
    lanes = {
        "original": lane | {"perplexity": 8.31, "kl_mean": 0.0, "kl_se": 0.0, "bits_per_weight": 16.0},
        "llmquant": lane | {"kl_mean": 0.012, "kl_se": 0.0002, "bits_per_weight": 4.125},
        "rtn": lane | {"kl_mean": 0.0122, "kl_se": 0.0002, "bits_per_weight": 4.125},
        "bnb-nf4": lane | {"kl_mean": 0.02, "kl_se": None, "bits_per_weight": 4.5},
    }
    measured = report | {"bits_per_weight": 4.125, "evaluation": report["evaluation"] | {"lanes": lanes}}
    assert verdict(facts_of(measured)) == (
        "4.13 bits: perplexity 8.31 → 8.40 (+1.1% ± 0.1), KL 0.012, better than bitsandbytes NF4 at 4.50 bits, "
        "as good as plain rounding at 4.13 bits."
    )


def test_health_names_what_stands_out(report: dict[str, Any]) -> None:
    sick = copy.deepcopy(report)
    sick["layers"][1] |= {"loss": 2.0, "rtn_loss": 1.0, "relative_error": 1e3, "notes": ["3 inputs are zero"]}
    sick["evaluation"]["lanes"]["llmquant"]["n_nonfinite"] = 7
    sick["evaluation"]["n_tokens"] = 128
    notes, name = "\n".join(health(facts_of(sick))), sick["layers"][1]["name"]
    assert f"Worse than plain rounding on calibration text: {name}" in notes
    assert f"More than ten times the median relative error: {name}" in notes
    assert f"{name}: 3 inputs are zero" in notes
    assert "llmquant: 7 tokens with NaN or Inf" in notes
    assert "Only 2 evaluation windows" in notes


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("demo", {"bits": 8}),
        ("demo", {"seq_len": 2048, "eval_data": "wikitext2"}),
        ("owner/name", {"symmetric": False, "format": "fake", "refit": False, "ignore": ["a b$", "--x"]}),
        ("owner/name", {"format": "compressed-tensors,gguf", "group_size": 32, "sweeps": 3}),
        ("owner/name", {"damp": 0.02, "propagation": 0.5, "eval_tokens": "full", "baselines": "rtn"}),
    ],
)
def test_the_command_gives_the_same_recipe(
    model: str, flags: dict[str, Any], report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shlex

    recipe = llmquant.make_recipe(model, flags={"group_size": 128} | flags)  # a report knows what "auto" found
    name = "llmquant/demo" if model == "demo" else model
    made = {"model": {"id": name, "revision": "abc"}, "recipe": recipe.as_dict()}
    command = command_of(facts_of(report | made))
    seen: list[Any] = []

    def show_plan(model: str, recipe: Any, options: Any, **rest: Any) -> None:
        seen.append((model, recipe, options.revision))
        raise typer.Exit(0)

    monkeypatch.setattr(look, "show_plan", show_plan)
    assert cli.main([*shlex.split(command)[1:], "--dry-run"]) == 0
    assert seen == [(model, recipe, "abc")]

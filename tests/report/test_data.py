"""The typed report: the same bytes there and back, the keys of the schemas, one error by name for what does not fit."""

import contextlib
import copy
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints, is_typeddict

import jsonschema
import numpy as np
import pytest
from broken import repaired
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import llmquant
from llmquant.cli.app import main
from llmquant.cli.console import show_report
from llmquant.errors import SourceError, VerifyError
from llmquant.export import export
from llmquant.lanes.scores import TokenScores, figures
from llmquant.report.card import make_card
from llmquant.report.data import Cost, RunReport, load_report
from llmquant.report.html import make_html
from llmquant.report.plain import parse, parse_file, plain
from llmquant.report.verdict import verdict
from llmquant.run_dir.manifest import json_bytes

ROOT = Path(__file__).parents[2]
DEMOS = [ROOT / "model_cards" / name / "report.json" for name in ("demo-w4", "demo-w8")]
FLAGS = {"group_size": 32, "samples": 4, "seq_len": 32, "eval_tokens": 128, "eval_seq_len": 64}


def schema(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "eval" / f"{name}.schema.json").read_text())
    return found


@pytest.fixture(scope="module")
def demo() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DEMOS[0].read_text())
    return found


@pytest.fixture(scope="module")
def finished(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    llmquant.quantize(tiny_model("llama"), llmquant.make_recipe("x", flags=FLAGS | {"eval_data": "builtin"}), out)
    return out


# -- there and back ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("file", DEMOS, ids=lambda file: file.parent.name)
def test_a_committed_report_is_the_same_bytes_there_and_back(file: Path) -> None:
    assert json_bytes(plain(parse_file(RunReport, file))) == file.read_bytes()


def test_reports_and_costs_of_a_run_are_the_same_bytes_there_and_back(finished: Path) -> None:
    found = load_report(finished)
    assert json_bytes(found.data) == (finished / "report.json").read_bytes()
    assert json_bytes(found.cost) == (finished / "cost.json").read_bytes()
    assert found.lanes == found.data["evaluation"]["lanes"]
    assert found.facts.evaluation.lanes["llmquant"].kl_mean == found.lanes["llmquant"]["kl_mean"]


# -- the schemas -------------------------------------------------------------------------------------------
Node = dict[str, Any]


def pairs(kind: Any, node: Node, root: Node, path: str) -> Iterator[tuple[str, Any, Node]]:
    """(path, class, its object in the schema) of all classes inside `kind`."""
    if "$ref" in node:
        node = root["$defs"][node["$ref"].rpartition("/")[2]]
    if get_origin(kind) is UnionType:
        members = [part for part in get_args(kind) if part is not type(None)]
        node = next((part for part in node.get("oneOf", [node]) if part.get("type") != "null"), node)
        kind = members[0]
    if is_dataclass(kind) or is_typeddict(kind):
        yield path, kind, node
        for name, inner in get_type_hints(kind).items():
            if name in node.get("properties", {}):
                yield from pairs(inner, node["properties"][name], root, f"{path}.{name}")
    elif get_origin(kind) is dict:
        yield from pairs(get_args(kind)[1], node.get("additionalProperties", {}), root, f"{path}.*")
    elif get_origin(kind) is tuple:
        yield from pairs(get_args(kind)[0], node.get("items", {}), root, f"{path}[]")


@pytest.mark.parametrize(("kind", "name", "count"), [(RunReport, "report", 20), (Cost, "cost", 1)])
def test_classes_and_schema_name_the_same_keys(kind: Any, name: str, count: int) -> None:
    jsonschema.Draft202012Validator.check_schema(schema(name))
    found = list(pairs(kind, schema(name), schema(name), name))
    for path, inner, node in found:
        if is_typeddict(inner):  # which may hold other keys
            assert set(node["required"]) == inner.__required_keys__, path
        else:
            assert set(node["properties"]) == {f.name for f in fields(inner)}, path
            always = {f.name for f in fields(inner) if f.default is not None}
            assert set(node.get("required", ())) == always, path
    assert len(found) == count


# -- what does not fit -------------------------------------------------------------------------------------
def broken(change: Callable[[dict[str, Any]], Any], report: dict[str, Any]) -> dict[str, Any]:
    damaged = copy.deepcopy(report)
    change(damaged)
    return damaged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("compute"), "r.json: is an earlier version's; quantize or export again: it has no compute"),
        (
            lambda r: r["evaluation"]["lanes"]["rtn"].pop("kl_p99"),
            "r.json: is an earlier version's; quantize or export again: it has no evaluation.lanes.rtn.kl_p99",
        ),
        (lambda r: r["recipe"].pop("format"), "quantize or export again: it has no recipe.format"),
        (lambda r: r.update(model=[]), "r.json: model: a list; expected an object; fetch or make it again"),
        (lambda r: r["tensors"][3].update(shape=[1, "2"]), 'r.json: tensors[3].shape[1]: "2"; expected a whole number'),
        (lambda r: r["tensors"][0].update(action="lost"), 'tensors[0].action: "lost"; expected one of quantized, cop'),
        (lambda r: r["tensors"][0].update(bits=True), "tensors[0].bits: true; expected a whole number"),
        (lambda r: r["layers"][0].update(n_tokens=1.5), "layers[0].n_tokens: 1.5; expected a whole number"),
        (lambda r: r["layers"][0].update(notes=None), "layers[0].notes: null; expected a list"),
        (lambda r: r["layers"][0].update(loss=math.nan), "layers[0].loss: nan; expected a finite number"),
        (
            lambda r: r["compute"].update(mood="good"),
            "compute.mood: a key that this version does not know; use the ver",
        ),
        (lambda r: r.update(schema_version=2), "schema_version: 2; expected one of 1"),
        (lambda r: r["evaluation"]["lanes"].pop("original"), "its evaluation has no lane original or no lane llmquant"),
        (
            lambda r: r["evaluation"]["lanes"]["rtn"].update(perplexity_ratio_ci=[1.0]),
            "evaluation.lanes.rtn.perplexity_ratio_ci: 1 items; expected 2 of them",
        ),
        (
            lambda r: r["tensors"].append(r["tensors"][0] | {"action": "quantized", "bits": 4}),
            "is quantized, without bits, group_size or symmetric",
        ),
    ],
)
def test_a_damaged_report_is_one_error_that_names_the_key(
    change: Callable[[dict[str, Any]], Any], message: str, demo: dict[str, Any]
) -> None:
    with pytest.raises(VerifyError) as caught:
        parse(RunReport, broken(change, demo), "r.json")
    assert message in str(caught.value)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values, of lists only the first item."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, item in inside:
        yield from places(item, (*path, key))


def test_whatever_is_missing_or_of_another_type_no_other_error_comes(demo: dict[str, Any]) -> None:
    """Every key left out, and every value replaced; what is taken has a card and a page."""
    small = copy.deepcopy(demo)
    del small["evaluation"]["lanes"]["bnb-nf4"]
    small["runtimes"] = {name: {"vllm": of["vllm"]} for name, of in small["runtimes"].items()}
    small["tensors"], small["layers"] = small["tensors"][:4], small["layers"][:1]
    taken = 0
    for path in list(places(small))[1:]:
        for value in (MISSING, None, 0, 1.5, "x", [None], {"x": None}):
            damaged = copy.deepcopy(small)
            *parents, last = path
            inner: Any = damaged
            for key in parents:
                inner = inner[key]
            if value is not MISSING:
                inner[last] = value
            elif isinstance(last, str):
                del inner[last]
            with contextlib.suppress(VerifyError):
                facts = parse(RunReport, damaged, "report.json")
                assert make_card("x", facts)
                taken += 1
    assert taken > 100


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"null"])
def test_what_is_no_report_at_all(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(SourceError, match=r"report\.json: (cannot be read|a list; expected|null; expected)"):
        parse_file(RunReport, tmp_path / "report.json", SourceError)


def old(report: dict[str, Any]) -> dict[str, Any]:
    """As the first version wrote it: without what came later."""
    found = copy.deepcopy(report)
    for key in ("card", "remote_code"):
        del found["model"][key]
    for key in ("products", "trust_remote_code"):
        del found["compute"][key]
    for key in ("exports", "products", "refit", "sweeps", "propagation"):
        del found["recipe"][key]
    del found["runtimes"], found["files"]
    for layer in found["layers"]:
        del layer["histograms"]
    return found


def changed(finished: Path, out: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a finished folder with another report.json, which its manifest knows."""
    shutil.copytree(finished, out)
    report = json.loads((out / "report.json").read_text())
    (out / "report.json").write_bytes(json_bytes(change(report) or report))
    repaired(out)
    return out


def test_a_folder_of_the_first_version_is_verified_and_exported(finished: Path, tmp_path: Path) -> None:
    first = changed(finished, tmp_path / "first", old)
    assert main(["verify", str(first)]) == 0
    found = json.loads((export(first, "gptq", tmp_path / "gptq") / "report.json").read_text())
    jsonschema.validate(found, schema("report"))
    assert (found["model"]["card"], found["exported_from"]) == ({}, "compressed-tensors")
    assert "products" not in found["compute"]
    assert main(["verify", str(tmp_path / "gptq")]) == 0


@pytest.mark.parametrize("command", ["verify {}", "export {} --format gptq --out {}-out", "push {} --repo me/x"])
def test_the_commands_name_what_is_wrong_with_a_report(
    command: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = changed(finished, tmp_path / "bad", lambda report: report["model"].update(card=["mit"]))
    assert main(command.replace("{}", str(bad)).split()) in (SourceError.exit_code, VerifyError.exit_code)
    assert "report.json: model.card: a list; expected an object; fetch or make it again" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


# -- a loss above 709, whose exponential is beyond a float -----------------------------------------------------
def scores(nll: Any) -> TokenScores:
    nll = np.asarray(nll, float)
    ones = np.ones_like(nll)
    return TokenScores(nll, 0 * ones, ones, 0 * ones, ones, np.ones(nll.shape, bool))


def test_an_infinite_perplexity_has_a_mean_loss_beside_it() -> None:
    sound, worse, worst = (scores(np.full((3, 4), loss) + np.arange(3)[:, None]) for loss in (1.0, 720.0, 730.0))
    against_sound, against_worse = figures(worst, sound), figures(worst, worse)
    for found in (against_sound, against_worse):
        assert (found.perplexity, found.perplexity_se) == (math.inf, None)
        assert found.loss == found.mean_loss == pytest.approx(731.0)
    assert against_sound.perplexity_ratio == math.inf
    assert against_sound.perplexity_ratio_ci == (math.inf, math.inf)
    assert against_worse.perplexity_ratio == pytest.approx(math.exp(10))
    assert figures(sound, sound).mean_loss is None
    assert figures(sound, sound).loss == pytest.approx(2.0)
    assert "mean_loss" not in plain(figures(sound, sound))
    written = plain(against_sound)
    assert (written["perplexity"], written["perplexity_ratio_ci"]) == (None, [None, None])
    assert parse(type(against_sound), json.loads(json_bytes(written)), "x") == against_sound


def test_a_perplexity_that_a_float_just_holds_may_have_no_standard_error() -> None:
    found = figures(scores([[600.0], [819.0]]), scores([[600.0], [819.0]]))
    assert math.isfinite(found.perplexity)
    assert found.perplexity_se is None
    json_bytes(plain(found))


@pytest.fixture(scope="module")
def hopeless(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is sure of the wrong token: its head times 30,000."""
    folder = tmp_path_factory.mktemp("hopeless") / "model"
    shutil.copytree(tiny_model("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 30_000
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_run_with_an_infinite_perplexity_says_so_everywhere(
    hopeless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "perplexity is beyond what a float holds"
    out = tmp_path / "out"
    found = llmquant.quantize(hopeless, llmquant.make_recipe("x", flags=FLAGS | {"eval_data": "builtin"}), out)
    report = json.loads((out / "report.json").read_text())
    jsonschema.validate(report, schema("report"))
    lane = report["evaluation"]["lanes"]["llmquant"]
    assert (lane["perplexity"], lane["perplexity_se"]) == (None, None)
    assert lane["mean_loss"] > 709.8
    assert load_report(out).facts == found.facts
    show_report(found)
    console = " ".join(capsys.readouterr().out.split())
    assert f"llmquant: {said} (mean loss {lane['mean_loss']:.2f} nats per token)" in console
    assert re.search(r"llmquant .* inf ", console)
    assert f"bits: {said} (mean loss " in verdict(found.facts)
    for page in (make_card("x", found.facts), make_html("x", found.facts)):
        assert page.count(said) >= 1 + len(found.lanes)
        assert verdict(found.facts) in page
    index = ModelCard(make_card("x", found.facts)).data.to_dict()["model-index"][0]["results"][0]["metrics"]
    assert {metric["type"] for metric in index} == {"kl_divergence", "same_top_token"}
    assert main(["verify", str(out), "--source", str(hopeless)]) == 0
    assert main(["export", str(out), "--format", "gptq", "--out", str(tmp_path / "gptq"), "--quiet"]) == 0
    jsonschema.validate(json.loads((tmp_path / "gptq" / "report.json").read_text()), schema("report"))


def test_compare_shows_ratios_that_are_infinite(
    hopeless: Path, tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", str(tiny_model("llama")), str(hopeless), "--reference", str(tiny_model("llama"))]
    flags = ["--data", "builtin", "--tokens", "128", "--seq-len", "32", "--quiet", "--json"]
    assert main([*command, *flags, str(tmp_path / "found.json")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "model - llama" in shown
    assert "inf (inf to inf)" in shown
    assert "model: perplexity is beyond what a float holds" in shown
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["differences"][0]["perplexity_ratio"] is None
    assert found["differences"][0]["perplexity_ratio_ci"] == [None, None]
    assert found["evaluation"]["lanes"]["model"]["mean_loss"] > 709.8

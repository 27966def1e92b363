"""--trust-remote-code: a checkpoint's own code is run on the user's word, and on nothing else."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from broken import repaired
from fake_hub import commit_of, fake_hub
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

import llmquant
from llmquant.checkpoint import open_checkpoint
from llmquant.cli.app import main
from llmquant.errors import FormatError, LLMQuantError, RecipeError, SourceError, VerifyError
from llmquant.job import fingerprint, prepare
from llmquant.log import SILENT
from llmquant.model.skeleton import Skeleton
from llmquant.output.check import verify_folder
from llmquant.recipe import RunOptions, make_recipe
from llmquant.report.command import command_of
from llmquant.report.data import RunReport
from llmquant.report.plain import parse
from llmquant.source.resolve import open_source
from llmquant.text.tokenizer import load_tokenizer

CPU = torch.device("cpu")
FILES = ("configuration_x.py", "modeling_x.py", "parts_x.py", "tokenization_x.py")
CONFIGURATION = """
from transformers import LlamaConfig
class XConfig(LlamaConfig):
    model_type = "x"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_x import XConfig
from .parts_x import FACTOR
with open({sung!r}, "a") as file:
    file.write("x")
class XForCausalLM(LlamaForCausalLM):
    config_class = XConfig
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = FACTOR * output.logits
        return output
"""
TOKENIZATION = """
from transformers import PreTrainedTokenizerFast
class XTokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
RTN = {"method": "rtn", "group_size": 32, "eval_data": "none"}


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers copies code to before it imports it: not the user's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def with_code(llama: Path, folder: Path) -> Path:
    """The Llama `llama` as a model and a tokenizer of their own code, whose logits are three times a Llama's."""
    shutil.copytree(llama, folder)
    sung = str(folder.parent / f"{folder.name} sung")
    texts = (CONFIGURATION, MODELING.format(sung=sung), "FACTOR = 3.0\n", TOKENIZATION)
    for name, text in zip(FILES, texts, strict=True):
        (folder / name).write_text(text)
    (folder / "unused.py").write_text("raise SystemExit\n")
    edit(folder / "config.json", model_type="x", architectures=["XForCausalLM"], auto_map=AUTO_MAP)
    auto_map = {"AutoTokenizer": [None, "tokenization_x.XTokenizer"]}
    edit(folder / "tokenizer_config.json", tokenizer_class="XTokenizer", auto_map=auto_map)
    return folder


def songs(model: Path) -> int:
    path = model.parent / f"{model.name} sung"
    return len(path.read_text()) if path.exists() else 0


@pytest.fixture
def model(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    return with_code(tiny_model("llama"), tmp_path / "own")


@pytest.fixture(scope="module")
def made(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """A model with code, what `run --trust-remote-code` made of it, and how often its code was run for that."""
    folder = tmp_path_factory.mktemp("made")
    own, out = with_code(tiny_model("llama"), folder / "own"), folder / "out"
    options = "--group-size 32 --samples 4 --seq-len 32 --eval-data builtin --eval-tokens 64 --eval-seq-len 32 --quiet"
    assert main(["run", "--model", str(own), "--out", str(out), "--trust-remote-code", *options.split()]) == 0
    return own, out, songs(own)


def test_with_the_flag_the_code_is_run_once_and_named(made: tuple[Path, Path, int]) -> None:
    own, out, times = made
    assert times == 1
    report = json.loads((out / "report.json").read_text())
    jsonschema.validate(report, json.loads((Path(__file__).parents[2] / "eval" / "report.schema.json").read_text()))
    assert report["compute"]["trust_remote_code"] is True
    assert report["model"]["remote_code"] == list(FILES)
    assert "--trust-remote-code" in command_of(parse(RunReport, report, "report.json"))
    card = (out / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert all(f"`{file}`" in card for file in FILES)
    assert json.loads((out / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert sorted(path.name for path in out.glob("*.py")) == list(FILES)
    assert verify_folder(out, own).against == "own"
    assert songs(own) == times, "to verify is not to run"


def test_its_output_is_what_stock_transformers_computes(made: tuple[Path, Path, int]) -> None:
    own, out, _ = made
    stock = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32).eval()
    dense = AutoModelForCausalLM.from_pretrained(own, trust_remote_code=True, dtype=torch.float32).eval()
    assert [type(m).__name__ for m in (stock, dense)] == ["XForCausalLM", "XForCausalLM"]
    stored = open_checkpoint(out)
    packed: dict[str, Any] = stored.packed  # type: ignore[attr-defined]
    ids = torch.arange(2, 34)[None]
    with torch.no_grad():
        original = dense(ids).logits
        for name in packed:
            dense.get_parameter(name).data = stored.read(name)
        wanted, found = dense(ids).logits, stock(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (found - original).abs().max() > 1e-2, "it is quantized"
    assert type(AutoTokenizer.from_pretrained(out, trust_remote_code=True)).__name__ == "XTokenizer"


def test_eval_runs_the_code_of_both_with_the_flag_only(
    made: tuple[Path, Path, int], capsys: pytest.CaptureFixture[str]
) -> None:
    own, out, _ = made
    words = ["eval", "--model", str(out), "--reference", str(own), "--data", "builtin", "--tokens", "64"]
    words += ["--seq-len", "32", "--quiet"]
    assert main(words) == 4
    assert "--trust-remote-code" in capsys.readouterr().err
    assert main([*words, "--trust-remote-code", "--json", str(out.parent / "eval.json")]) == 0
    assert "--trust-remote-code: ran configuration_x.py" in capsys.readouterr().out
    found, report = (json.loads(path.read_text()) for path in (out.parent / "eval.json", out / "report.json"))
    assert found["trust_remote_code"] is True
    assert [row["remote_code"] for row in found["models"]] == [list(FILES), list(FILES)]
    # The same figure as the run's own lane: the reference's code and ours both ran.
    ours, wanted = found["evaluation"]["lanes"]["out"], report["evaluation"]["lanes"]["llmquant"]
    assert ours["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-4)


@pytest.mark.parametrize("command", ["run", "plan"])
def test_without_the_flag_nothing_is_run_and_the_error_names_it(
    command: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--model", str(model), "--out", str(tmp_path / "out"), "--bits", "4"]) == 4
    said = " ".join(capsys.readouterr())
    assert "'x'" in said
    assert "remote code is not run without --trust-remote-code: read it first" in " ".join(said.split())
    assert songs(model) == 0
    assert not (tmp_path / "out").exists()


def test_plan_says_what_it_runs(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", str(model), "--out", str(tmp_path / "out"), "--trust-remote-code", "--group-size", "32"]
    assert main(words) == 0
    assert f"--trust-remote-code: code of own is run: {', '.join(FILES)}" in capsys.readouterr().out
    assert songs(model) == 1


def test_a_tokenizer_with_code_beside_a_known_model(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "known"))
    (folder / "tokenization_x.py").write_text(TOKENIZATION)
    auto_map = {"AutoTokenizer": [None, "tokenization_x.XTokenizer"]}
    edit(folder / "tokenizer_config.json", tokenizer_class="XTokenizer", auto_map=auto_map)
    with pytest.raises(LLMQuantError, match="--trust-remote-code"):
        load_tokenizer(open_source(folder))
    trusted = open_source(folder, trust_remote_code=True)
    assert trusted.code == ("tokenization_x.py",)
    assert type(load_tokenizer(trusted)).__name__ == "XTokenizer"
    assert type(Skeleton(trusted, CPU, torch.float32).model).__name__ == "LlamaForCausalLM"


def test_code_for_a_known_model_type_stays_with_its_checkpoint(tiny_model: Callable[[str], Path], model: Path) -> None:
    edit(model / "config.json", model_type="llama", auto_map={"AutoModelForCausalLM": AUTO_MAP["AutoModelForCausalLM"]})

    def kind(folder: Path, trust: bool) -> str:
        return type(Skeleton(open_source(folder, trust_remote_code=trust), CPU, torch.float32).model).__name__

    assert kind(model, True) == "XForCausalLM"
    assert kind(model, False) == kind(tiny_model("llama"), True) == "LlamaForCausalLM"


@pytest.mark.parametrize("file", ["a recipe", "config.json"])
def test_no_file_can_give_the_users_word(file: str, model: Path, tmp_path: Path) -> None:
    if file == "a recipe":
        (tmp_path / "evil.toml").write_text("bits = 4\ntrust_remote_code = true\n")
        with pytest.raises(RecipeError, match="cannot allow code to be run"):
            make_recipe(str(model), tmp_path / "evil.toml")
        assert main(["run", "--model", str(model), "--recipe", str(tmp_path / "evil.toml")]) == 2
    else:
        edit(model / "config.json", trust_remote_code=True)
        with pytest.raises(SourceError, match="--trust-remote-code"):
            Skeleton(open_source(model), CPU, torch.float32)
    assert songs(model) == 0


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("user/other--modeling_x.XForCausalLM", "another repository"),
        ("missing_x.X", "missing_x.py: is missing"),
        ("../modeling_x.X", "expected module.Class"),
        ("a/modeling_x.X", "expected module.Class"),
        ("modeling_x", "expected module.Class"),
        ("os.path.join", "expected module.Class"),
        (7, "expected module.Class"),
        ({"a": ["user/other--x.X"]}, "another repository"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_code_that_is_not_in_the_checkpoint_is_refused_before_any_is_run(
    reference: Any, said: str, nested: bool, model: Path
) -> None:
    auto_map = {"AutoModel": reference}
    edit(model / "config.json", **({"text": [{"auto_map": auto_map}]} if nested else {"auto_map": AUTO_MAP | auto_map}))
    with pytest.raises(SourceError, match=said):
        open_source(model, trust_remote_code=True)
    assert songs(model) == 0


@pytest.mark.parametrize("depth", [300, 900, 10**5])
def test_a_config_of_many_levels_is_refused_with_the_flag_too(depth: int, model: Path) -> None:
    text = (model / "config.json").read_text().rstrip().removesuffix("}")
    (model / "config.json").write_text(text + ',"a":' + '{"a":' * depth + "0" + "}" * depth + "}")
    with pytest.raises(SourceError, match=r"config\.json"):
        Skeleton(open_source(model, trust_remote_code=True), CPU, torch.float32)
    assert songs(model) == 0


def test_code_through_a_link_out_of_the_checkpoint_is_refused(model: Path, tmp_path: Path) -> None:
    shutil.move(model / "parts_x.py", tmp_path / "parts_x.py")
    (model / "parts_x.py").symlink_to(tmp_path / "parts_x.py")
    with pytest.raises(SourceError, match=r"parts_x\.py: is a link that leads out"):
        open_source(model, trust_remote_code=True)


def test_a_nested_auto_map_is_kept_with_the_flag_and_stripped_without(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "nested"))
    (folder / "part.py").write_text(f"open({str(tmp_path / 'sung')!r}, 'w')\n")
    edit(folder / "config.json", extra={"auto_map": {"AutoModel": "part.Part"}, "trust_remote_code": True})
    for trust in (True, False):
        out = tmp_path / f"out {trust}"
        llmquant.quantize(folder, make_recipe("x", flags=RTN), out, trust_remote_code=trust)
        assert json.loads((out / "config.json").read_text())["extra"] == (
            {"auto_map": {"AutoModel": "part.Part"}} if trust else {}
        )
        assert (out / "part.py").exists() == trust
        verify_folder(out, folder)
    assert not (tmp_path / "sung").exists(), "no loader asked for that class"


def test_the_flag_changes_nothing_where_there_is_no_code(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    said: list[str] = []
    for trust in (True, False):
        out = tmp_path / str(trust) / "out"
        llmquant.quantize(
            tiny_model("llama"), make_recipe("x", flags=RTN), out, trust_remote_code=trust, log=said.append
        )
    assert said.count("--trust-remote-code: llama brings no code of its own") == 1
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "True/out" / name).read_bytes() == (tmp_path / "False/out" / name).read_bytes()


def test_another_flag_or_other_code_is_another_job(model: Path) -> None:
    edit(model / "config.json", model_type="llama")

    def prints(trust: bool) -> dict[str, str]:
        job = prepare(model, make_recipe("x", flags=RTN), RunOptions(trust_remote_code=trust), SILENT)
        return fingerprint(job, "")

    without, trusted = prints(False), prints(True)
    (model / "parts_x.py").write_text("FACTOR = 2.0\n")
    changed = prints(True)
    assert without["trust_remote_code"] != trusted["trust_remote_code"]
    assert [name for name in trusted if trusted[name] != changed[name]] == ["side files"]


@pytest.mark.parametrize("format_name", ["mlx", "compressed-tensors,gguf"])
def test_formats_of_runtimes_that_would_run_another_model_are_refused(
    format_name: str, model: Path, tmp_path: Path
) -> None:
    edit(model / "config.json", model_type="llama")  # they would take it for a Llama
    recipe = make_recipe("x", flags=RTN | {"format": format_name})
    with pytest.raises(FormatError, match="a model of its own code"):
        llmquant.quantize(model, recipe, tmp_path / "out", trust_remote_code=True)


def test_verify_knows_the_code(made: tuple[Path, Path, int], tmp_path: Path) -> None:
    own, out, _ = made
    for name, change, said in (
        ("lost", lambda folder: (folder / "parts_x.py").unlink(), r"parts_x\.py"),
        ("other", lambda folder: (folder / "parts_x.py").write_text("FACTOR = 2.0\n"), r"parts_x\.py"),
        ("untold", untold, "was not told --trust-remote-code"),
    ):
        folder = shutil.copytree(out, tmp_path / name)
        change(folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        if name == "lost":
            del manifest["files"]["parts_x.py"]
            (folder / "manifest.json").write_text(json.dumps(manifest))
        repaired(folder)
        with pytest.raises(VerifyError, match=said):
            verify_folder(folder, own if name == "other" else None)


def untold(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    report["compute"]["trust_remote_code"] = False
    (folder / "report.json").write_text(json.dumps(report))


def test_code_of_a_repository_is_that_of_the_pinned_commit(model: Path, tmp_path: Path) -> None:
    words = ["eval", "--model", "user/own", "--data", "builtin", "--tokens", "64", "--seq-len", "32"]
    clean = {name: value for name, value in os.environ.items() if "proxy" not in name.lower() and name[:3] != "HF_"}
    with fake_hub() as hub:
        hub.repos["user/own"] = model
        env = clean | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf")}
        command = [sys.executable, "-m", "llmquant", *words]
        without = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert (without.returncode, songs(model)) == (4, 0)
        fetched = {request.path.rpartition("/")[2] for request in hub.requests("user/own")}
        assert not fetched & set(FILES), "without the flag it is not even fetched"
        seen = len(hub.log)
        done = subprocess.run([*command, "--trust-remote-code"], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        requests = [request.path for request in hub.log[seen:]]
    assert songs(model) == 1
    commit = commit_of("user/own")
    assert f"--trust-remote-code: code of user/own@{commit[:12]} is run: {', '.join(FILES)}" in done.stderr
    assert all(f"/resolve/{commit}/" in path or "/cdn/" in path for path in requests if "/api/" not in path)
    assert len([path for path in requests if "/api/models/" in path]) == 1, "the revision is resolved once"
    for file in FILES:
        assert any(path.endswith(f"/{commit}/{file}") for path in requests)
    assert not any("unused.py" in path for path in requests)

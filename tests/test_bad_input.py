"""Bad input through the command line: one line on stderr, the exit code of its kind, and nothing written."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, GPT2_ARCHITECTURE, build

import llmquant
from llmquant.cli.app import main
from llmquant.demo import DEMO
from llmquant.output.check import verify_folder
from llmquant.source.files import INDEX, SINGLE
from llmquant.text.corpus import Text, load_text

SMALL = [
    *("--samples", "4", "--seq-len", "32", "--eval-tokens", "64", "--eval-seq-len", "32", "--group-size", "32"),
    *("--calibration", "some.txt", "--eval-data", "other.txt"),
]
RECIPE, SOLVE, SOURCE, TEXT, FORMAT, OUTPUT = 2, 3, 4, 5, 6, 7
Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("bad") / "llama", ARCHITECTURES["llama"])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("bad") / "shards", ARCHITECTURES["llama"], shard="100KB")


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny llama that a test may spoil."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture
def refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., str]]:
    """Runs the command line and returns its line on stderr; fails where anything is written or said beside it."""
    monkeypatch.chdir(tmp_path)
    text = (DEMO / "heldout.txt").read_text("utf-8")
    (tmp_path / "some.txt").write_text(text[:5000], "utf-8")
    (tmp_path / "other.txt").write_text(text[5000:10000], "utf-8")

    def run(code: int, model: str | Path, *options: str, out: str = "out") -> str:
        before = tree(tmp_path)
        capfd.readouterr()
        assert main(["run", "--model", str(model), "--out", out, *SMALL, *options]) == code
        said, errors = capfd.readouterr()
        assert said == ""
        assert errors.startswith("llmquant: ")
        assert errors.endswith("\n")
        assert errors[:-1].isprintable()
        assert tree(tmp_path) == before
        return errors

    return run


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below `folder`."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def edit_json(file: str, **changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))

    return spoil


def edit_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        save_file(tensors | {name: change(tensors[name])}, folder / SINGLE)

    return spoil


def cut(file: str, kept: int) -> Spoil:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:kept])


def remove(*files: str) -> Spoil:
    return lambda folder: [(folder / file).unlink() for file in files]


def both(*spoils: Spoil) -> Spoil:
    return lambda folder: [spoil(folder) for spoil in spoils]


def first_as(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.cat((torch.tensor([value], dtype=tensor.dtype), tensor.flatten()[1:])).view(
        tensor.shape
    )


@pytest.mark.parametrize(
    ("spoil", "code", "said"),
    [
        pytest.param(
            lambda m: (m / SINGLE).rename(m / "pytorch_model.bin"), SOURCE, ["pickle", "pytorch_model.bin"], id="pickle"
        ),
        pytest.param(remove("config.json"), SOURCE, ["no config.json"], id="no-config"),
        pytest.param(remove(SINGLE), SOURCE, ["no safetensors weights"], id="no-weights"),
        pytest.param(cut(SINGLE, -1), SOURCE, [SINGLE, "truncated"], id="truncated"),
        pytest.param(cut(SINGLE, 100), SOURCE, [SINGLE, "truncated"], id="truncated-header"),
        pytest.param(edit_json("config.json", hidden_size=80), SOURCE, ["config.json", "shape"], id="hidden-size"),
        pytest.param(
            edit_json("config.json", vocab_size=511), SOURCE, ["expected [511, 64] by config.json"], id="vocab-size"
        ),
        pytest.param(
            edit_json("config.json", num_hidden_layers=4), SOURCE, ["no weights for", "layers.3"], id="layers"
        ),
        pytest.param(edit_json("config.json", num_attention_heads=0), SOURCE, ["config.json"], id="no-heads"),
        pytest.param(edit_json("config.json", hidden_size="wide"), SOURCE, ["config.json"], id="wrong-type"),
        pytest.param(edit_json("config.json", model_type="bert"), SOURCE, ["model"], id="bert"),
        pytest.param(edit_json("config.json", model_type="t5"), SOURCE, ["'t5'", "no causal LM"], id="t5"),
        pytest.param(
            edit_json("config.json", model_type="evil", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}),
            SOURCE,
            ["'evil'", "remote code is not run"],
            id="remote-code",
        ),
        pytest.param(edit_json("config.json", model_type=None), SOURCE, ["no causal LM"], id="no-model-type"),
        pytest.param(edit_json("config.json", model_type=["llama"]), SOURCE, ["config.json"], id="list-model-type"),
        pytest.param(
            both(
                edit_json("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
                edit_tensor("model.layers.0.mlp.up_proj.weight", lambda t: t.to(torch.int32)),
            ),
            SOURCE,
            ["quantized already (gptq)", "16-bit"],
            id="quantized",
        ),
        pytest.param(
            edit_tensor("model.layers.1.mlp.up_proj.weight", first_as(float("nan"))),
            SOURCE,
            ["model.layers.1.mlp.up_proj.weight: 1 NaN or Inf"],
            id="nan",
        ),
        pytest.param(
            edit_tensor("model.norm.weight", first_as(float("inf"))), SOURCE, ["model.norm.weight: 1 NaN"], id="inf"
        ),
        pytest.param(
            edit_tensor("model.layers.0.mlp.up_proj.weight", lambda t: t.to(torch.int8)),
            SOURCE,
            ["model.layers.0.mlp.up_proj.weight: weights in int8"],
            id="int8-weights",
        ),
        pytest.param(remove("tokenizer.json", "tokenizer_config.json"), TEXT, ["no tokenizer"], id="no-tokenizer"),
        pytest.param(cut("tokenizer.json", 1000), TEXT, ["tokenizer cannot be loaded"], id="cut-tokenizer"),
        pytest.param(remove("tokenizer.json"), TEXT, ["tokenizer cannot be loaded"], id="half-a-tokenizer"),
    ],
)
def test_broken_checkpoint_is_refused(
    model: Path, refused: Callable[..., str], spoil: Spoil, code: int, said: list[str]
) -> None:
    spoil(model)
    message = refused(code, model)
    assert all(part in message for part in said), message


def test_index_that_names_a_missing_file_is_refused(shards: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "model"))
    gone = sorted(copy.glob("*.safetensors"))[1]
    gone.unlink()
    message = refused(SOURCE, copy)
    assert INDEX in message
    assert gone.name in message


def test_truncated_shard_is_refused_by_its_name(shards: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "model"))
    last = sorted(copy.glob("*.safetensors"))[-1]
    cut(last.name, -1)(copy)
    assert last.name in refused(SOURCE, copy)


def test_missing_folder_is_refused(refused: Callable[..., str]) -> None:
    assert "no such folder" in refused(SOURCE, "./nowhere")


def test_tokenizer_of_another_model_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    small = build(tmp_path / "small", ARCHITECTURES["llama"], vocab_size=256)
    message = refused(TEXT, small)
    assert "below the embedding's 256" in message
    assert "another model" in message


def test_conv1d_is_refused_by_name_where_the_format_cannot_hold_it(tmp_path: Path, refused: Callable[..., str]) -> None:
    gpt2 = build(tmp_path / "gpt2", GPT2_ARCHITECTURE)
    message = refused(FORMAT, gpt2)
    assert "Conv1D" in message
    assert "h.0.attn.c_attn" in message
    assert "--format gguf or fake" in message


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        pytest.param("--bits 5", RECIPE, ["--bits: 5", "2, 3, 4, 8"], id="bits"),
        pytest.param("--group-size 48", RECIPE, ["--group-size: 48"], id="group-size"),
        pytest.param("--bitz 4", RECIPE, ["--bitz"], id="unknown-option"),
        pytest.param("--bits four", RECIPE, ["--bits", "integer"], id="bits-as-text"),
        pytest.param("--bits", RECIPE, ["--bits"], id="no-value"),
        pytest.param("--asymmetric", FORMAT, ["asymmetric grid", "or fake"], id="asymmetric"),
        pytest.param("--for llama.cpp", FORMAT, ["--for llama.cpp", "refuses"], id="for"),
        pytest.param("--for vlm", RECIPE, ["--for: 'vlm'", "did you mean vllm?"], id="for-unknown"),
        pytest.param("--method awq", RECIPE, ["--method: 'awq'", "gptq, rtn"], id="method"),
        pytest.param("--format exl2", RECIPE, ["--format: 'exl2'"], id="format"),
        pytest.param("--damp 2", RECIPE, ["--damp"], id="damp"),
        pytest.param("--samples 0", RECIPE, ["--samples"], id="samples"),
        pytest.param("--seq-len 1", RECIPE, ["--seq-len"], id="seq-len"),
        pytest.param("--eval-tokens 1", RECIPE, ["--eval-tokens"], id="eval-tokens"),
        pytest.param("--eval-tokens many", RECIPE, ["--eval-tokens: many"], id="eval-tokens-as-text"),
        pytest.param("--baselines gguf", RECIPE, ["--baselines: 'gguf'"], id="baselines"),
        pytest.param("--device tpu", RECIPE, ["--device: 'tpu'"], id="device"),
        pytest.param("--device meta", RECIPE, ["--device: 'meta'", "expected auto"], id="no-device"),
        pytest.param("--device cuda", RECIPE, ["--device: cuda", "no GPU"], id="no-gpu"),
        pytest.param("--ignore (", RECIPE, ["--ignore: '('", "regular expression"], id="ignore-invalid"),
        pytest.param("--ignore no_such_proj", RECIPE, ["'no_such_proj' matches no tensor"], id="ignore-unused"),
        pytest.param("--ignore _proj", RECIPE, ["no linear is left"], id="ignore-all"),
        pytest.param("--recipe w5", RECIPE, ["no recipe 'w5'", "w4g128"], id="unknown-recipe"),
        pytest.param("--recipe gone.toml", RECIPE, ["no recipe 'gone.toml'"], id="missing-recipe"),
        pytest.param("--max-shard-size big", RECIPE, ["--max-shard-size: 'big'"], id="max-shard-size"),
        pytest.param("--max-ram some", RECIPE, ["--max-ram: 'some'"], id="max-ram"),
        pytest.param("--calibration gone.txt", TEXT, ["gone.txt: no such file"], id="missing-text"),
        pytest.param("--calibration gone.jsonl", TEXT, ["gone.jsonl: no such file"], id="missing-jsonl"),
        pytest.param("--eval-data gone.txt", TEXT, ["gone.txt: no such file"], id="missing-eval-text"),
    ],
)
def test_bad_option_is_refused(
    model: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    options: str,
    code: int,
    said: list[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refused(code, model, *options.split())
    assert all(part in message for part in said), message


@pytest.mark.parametrize(("group_size", "offenders"), [("128", 7), ("64", 1)])
def test_group_size_that_does_not_divide_names_all_kinds_of_offenders(
    model: Path, refused: Callable[..., str], group_size: str, offenders: int
) -> None:
    message = refused(RECIPE, model, "--group-size", group_size)
    assert message.count("3 x model.layers.*.") == offenders
    assert "3 x model.layers.*.mlp.down_proj (96)" in message
    assert ("q_proj" in message) == (group_size == "128")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        pytest.param("x.txt", b"", "no text", id="empty"),
        pytest.param("x.png", b"\x89PNG", "a png file; expected text: models are calibrated", id="a-picture"),
        pytest.param("x.jsonl", b'{"image": "a.png"}\n', "of which image; expected text: models are", id="pictures"),
        pytest.param("x.txt", b" \n\n ", "no text", id="blank"),
        pytest.param("x.txt", b"just a few words", "tokens; expected at least 64", id="short"),
        pytest.param("x.txt", b"\xff\xfe\x00", "not UTF-8", id="not-utf8"),
        pytest.param("x.jsonl", b"this is not JSON\n", "line 1: not a JSON object", id="not-json"),
        pytest.param("x.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not a JSON object", id="cut-json"),
        pytest.param("x.jsonl", b'["text"]\n', "line 1: not a JSON object", id="a-list"),
        pytest.param("x.jsonl", b"[" * 100_000, "line 1: not a JSON object", id="deep-nesting"),
        pytest.param("x.jsonl", b"9" * 5000, "line 1: not a JSON object", id="huge-number"),
        pytest.param("x.jsonl", b'{"text": "\\ud800"}\n', "tokens; expected", id="lone-surrogate"),
        pytest.param("x.jsonl", b"", "no text", id="empty-jsonl"),
        pytest.param("x.jsonl", b"\n\n", "no text", id="blank-jsonl"),
        pytest.param("x.jsonl", b'{"text": "a"}\n\xff\n', "not UTF-8", id="jsonl-not-utf8"),
        pytest.param("x.jsonl", b'{"n": 1}\n', "text column", id="no-text-column"),
        pytest.param("x.jsonl", b'{"a": "x", "b": "y"}\n', "text column", id="two-text-columns"),
        pytest.param("x.jsonl", b'{"text": "a"}\n{"text": null}\n{"n": 1}\n', "tokens; expected", id="null-text"),
    ],
)
@pytest.mark.parametrize("option", ["--calibration", "--eval-data"])
def test_bad_text_is_refused(
    model: Path, tmp_path: Path, refused: Callable[..., str], name: str, content: bytes, said: str, option: str
) -> None:
    (tmp_path / name).write_bytes(content)
    message = refused(TEXT, model, option, name)
    assert name in message
    assert said in message or (option == "--eval-data" and "tokens; expected at least one window" in message)


def test_text_that_is_too_short_for_one_window_says_how_much_is_enough(
    model: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "x.txt").write_text("a few words " * 5)
    assert "tokens; expected at least 33 for 1 windows" in refused(
        TEXT, model, "--calibration", "x.txt", "--samples", "1"
    )


@pytest.mark.parametrize(
    ("rows", "limit", "documents"),
    [
        ([{"id": 1, "text": "a\u2028b", "title": "t"}, {"text": "c"}], 100, ["a\u2028b", "c"]),
        ([{"title": "t", "content": "a"}], 100, ["a"]),
        ([{"n": 1, "body": "a"}], 100, ["a"]),
        ([{"text": "abc"}, {"text": None}, {}, {"text": 7}, {"text": "d"}], 100, ["abc", "d"]),
        ([{"text": "abc"}, {"text": "d"}], 3, ["abc"]),
    ],
)
def test_sound_jsonl_gives_the_strings_of_its_text_column_up_to_the_limit(
    tmp_path: Path, rows: list[dict[str, Any]], limit: int, documents: list[str]
) -> None:
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    assert load_text(str(tmp_path / "x.jsonl"), "train", limit) == Text("x.jsonl", documents)


def test_unknown_key_of_a_recipe_is_refused_with_a_suggestion(
    model: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "my.toml").write_text("bitz = 4\n")
    assert "did you mean bits?" in refused(RECIPE, model, "--recipe", "my.toml")


@pytest.mark.parametrize("content", [b"bits = ", b"\xff", b'bits = "4"', b"symmetric = 1", b"ignore = [1]"])
def test_bad_recipe_file_is_refused(model: Path, tmp_path: Path, refused: Callable[..., str], content: bytes) -> None:
    (tmp_path / "my.toml").write_bytes(content)
    refused(RECIPE, model, "--recipe", "my.toml")


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_foreign_output_folder_stays_as_it_is(
    model: Path, tmp_path: Path, refused: Callable[..., str], options: list[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert "not written by llmquant" in refused(OUTPUT, model, *options)


def test_output_that_is_a_file_stays_as_it_is(model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "out").write_text("a file")
    assert "is a file" in refused(OUTPUT, model, "--overwrite")


def test_output_below_a_file_is_refused(model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "file").write_text("a file")
    refused(OUTPUT, model, out="file/out")


def test_an_output_of_an_impossible_name_is_refused(model: Path, refused: Callable[..., str]) -> None:
    assert "File name too long; choose another --out" in refused(OUTPUT, model, out="y" * 300)


def test_a_folder_for_figures_must_be_there_before_the_work(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "--model", str(model), "--json", str(tmp_path / "gone" / "x.json")]) == OUTPUT
    assert "x.json: no such folder; make it, or choose another --json" in capsys.readouterr().err


@pytest.mark.parametrize("file", [SINGLE, "config.json", "tokenizer.json"])
def test_a_file_without_permission_is_one_line(
    model: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    allowed = os.access  # nothing is forbidden to root, who may run the tests
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != file and allowed(path, mode))
    assert f"model: {file}: cannot be read (Permission denied); check its owner" in refused(SOURCE, model)


def test_an_error_of_the_system_is_one_line(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **options: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", "/mnt/models/a")

    monkeypatch.setattr("llmquant.pipeline.quantize_on_ranks", fails)
    assert main(["run", "--model", str(model)]) == 1
    assert capsys.readouterr().err == "llmquant: /mnt/models/a: Stale file handle\n"


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8", "hqq"])
def test_a_quantization_that_was_left_in_the_config_of_dense_weights_is_said(
    model: Path, tmp_path: Path, method: str
) -> None:
    """As merged QLoRA checkpoints have it."""
    edit_json("config.json", quantization_config={"quant_method": method, "bits": 4})(model)
    said = f"model: config.json tells of a quantization ({method}), but its weights are dense"
    lines: list[str] = []
    flags = {"method": "rtn", "format": "fake", "eval_data": "builtin", "eval_tokens": 64, "eval_seq_len": 32}
    recipe = llmquant.make_recipe("x", flags=flags)
    llmquant.quantize(model, recipe, tmp_path / "out", log=lines.append)
    assert lines.count(said) == 1
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    verify_folder(tmp_path / "out", model)
    lines.clear()
    report = llmquant.evaluate(model, recipe=recipe, log=lines.append)
    assert said in lines
    assert report.lanes["model"]["bits_per_weight"] == 16


def test_a_config_that_asks_for_tuples_is_no_hindrance(model: Path, tmp_path: Path) -> None:
    edit_json("config.json", return_dict=False)(model)
    recipe = llmquant.make_recipe("x", flags={"method": "rtn", "eval_tokens": 64, "eval_seq_len": 32})
    assert llmquant.quantize(model, recipe, tmp_path / "out").lanes["llmquant"]["kl_mean"] > 0


def test_an_error_in_a_models_forward_names_the_module(
    model: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    def fails(self: object, x: object) -> None:
        raise ValueError("gates must be open")

    monkeypatch.setattr(LlamaMLP, "forward", fails)
    message = refused(SOURCE, model)
    assert "cannot be run on text alone, in model.layers.0.mlp (ValueError: gates must be open)" in message


def test_a_strange_partial_folder_stays_as_it_is(model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model.safetensors").write_text("half of it")
    assert "is not a run of this version" in refused(OUTPUT, model)


def test_source_folder_as_output_stays_as_it_is(model: Path, refused: Callable[..., str]) -> None:
    refused(OUTPUT, model, "--overwrite", out=str(model))


def test_full_disk_is_refused_before_the_run(
    model: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "1000 bytes free" in refused(OUTPUT, model)


def test_same_refusals_hold_for_the_data_free_method(model: Path, refused: Callable[..., str]) -> None:
    edit_tensor("model.layers.2.mlp.down_proj.weight", first_as(float("nan")))(model)
    message = refused(SOURCE, model, "--method", "rtn", "--eval-data", "none")
    assert "model.layers.2.mlp.down_proj.weight" in message

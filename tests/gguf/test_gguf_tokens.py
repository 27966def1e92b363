"""What a GGUF file says of special tokens, texts of tokens and chat templates, wherever a checkpoint keeps them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_files import TEXTS, gguf_of, quantized, with_tokenizer
from peers import LlamaCpp
from tiny import ARCHITECTURES, build
from transformers import AutoTokenizer

import llmquant
from llmquant.errors import FormatError
from llmquant.gguf.file import build_gguf
from llmquant.gguf.tokenizer import tokenizer_metadata
from llmquant.output.verify_gguf import read_gguf
from llmquant.preflight.estimate import estimate
from llmquant.source.resolve import open_source

KEY = "tokenizer.ggml."
END = "</s>"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Its tokenizer has three special tokens and names none of them."""
    folder = build(tmp_path / "m", ARCHITECTURES["llama"])
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template"):
        settings.pop(name, None)
    write(folder, "tokenizer_config.json", settings)
    change(folder, "config.json", bos_token_id=None, eos_token_id=None, pad_token_id=None)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def write(folder: Path, file: str, content: Any) -> None:
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(json.dumps(content), "utf-8")


def change(folder: Path, file: str, **keys: Any) -> None:
    write(folder, file, json.loads((folder / file).read_text("utf-8")) | keys)


def metadata(folder: Path) -> dict[str, Any]:
    out = quantized(folder, folder.with_name("q"))
    return dict(read_gguf(gguf_of(out))[0])


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"special_tokens_map.json": {"eos_token": {"content": END}}}, {"eos": END}),
        ({"generation_config.json": {"eos_token_id": 2}}, {"eos": 2}),
        ({"generation_config.json": {"eos_token_id": [2, 0, 5, 5]}}, {"eos": 2, "eot": 0, "eom": 5}),
        ({"config.json": {"eos_token_id": [1, 0]}}, {"eos": 1, "eot": 0}),
        (
            {"tokenizer_config.json": {"eos_token": END}, "generation_config.json": {"eos_token_id": [2, 0]}},
            {"eos": END, "eot": 2, "eom": 0},
        ),
        ({"config.json": {"pad_token_id": -1, "eos_token_id": None, "bos_token_id": 4096}}, {}),
        ({"config.json": {"pad_token_id": 3}}, {"padding": 3}),
    ],
)
def test_special_tokens_are_found_in_every_file(files: dict[str, Any], wanted: dict[str, Any], model: Path) -> None:
    for file, keys in files.items():
        if (model / file).exists():
            change(model, file, **keys)
        else:
            write(model, file, keys)
    found, ids = metadata(model), AutoTokenizer.from_pretrained(model).get_vocab()
    stated = {key[len(KEY) : -len("_token_id")]: i for key, i in found.items() if key.endswith("_token_id")}
    assert stated == {name: ids[token] if isinstance(token, str) else token for name, token in wanted.items()}


@pytest.mark.parametrize("flags", [{}, {"format": "compressed-tensors,gguf"}])
def test_a_list_of_ids_and_a_pad_of_minus_one_do_not_end_a_run_with_a_gguf_file(
    flags: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    change(model, "config.json", pad_token_id=-1, eos_token_id=[1, 2])
    out = quantized(model, tmp_path / "out", **{"format": "gguf"} | flags)
    (file,) = out.rglob("*.gguf")
    assert read_gguf(file)[0][f"{KEY}eos_token_id"] == 1


def test_what_a_file_cannot_hold_is_said_before_the_work(tmp_path: Path) -> None:
    for value in (-1, 2**32, [1, 2**31], [1, "a"], None):
        with pytest.raises(FormatError, match=r"^gguf: some\.key: .*what GGUF can hold"):
            build_gguf("x.gguf", {"some.key": value}, [])


NAMED = [{"name": "default", "template": "A"}, {"name": "tool use", "template": "B"}, {"name": "rag", "template": "C"}]
ALL = {"": "A", ".rag": "C", ".tool_use": "B"}


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"tokenizer_config.json": {"chat_template": "A"}}, {"": "A"}),
        ({"tokenizer_config.json": {"chat_template": NAMED}}, ALL),
        ({"chat_template.json": {"chat_template": "A"}}, {"": "A"}),
        ({"chat_template.jinja": "A", "tokenizer_config.json": {"chat_template": "old"}}, {"": "A"}),
        (
            {
                "chat_template.jinja": "A",
                "additional_chat_templates/tool use.jinja": "B",
                "additional_chat_templates/rag.jinja": "C",
            },
            ALL,
        ),
        ({}, {}),
    ],
)
def test_chat_templates_are_found_in_every_file(files: dict[str, Any], wanted: dict[str, str], model: Path) -> None:
    for file, content in files.items():
        if file.endswith(".jinja"):
            (model / file).parent.mkdir(exist_ok=True)
            (model / file).write_text(content)
        elif (model / file).exists():
            change(model, file, **content)
        else:
            write(model, file, content)
    found = metadata(model)
    key = "tokenizer.chat_template"
    assert {
        name[len(key) :]: text for name, text in found.items() if name.startswith(key) and name[-1] != "s"
    } == wanted
    assert found.get(f"{key}s", []) == [name[1:] for name in sorted(wanted) if name]


def cut_and(*edits: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """Only the first 4,000 tokens: the embedding has more rows, which get texts of their own."""

    def edit(table: dict[str, Any]) -> None:
        model = table["model"]
        model["vocab"] = {token: i for token, i in model["vocab"].items() if i < 4000}
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if "".join(pair) in model["vocab"]]
        for each in edits:
            each(table)

    return edit


def test_a_token_with_the_text_of_a_filled_row_is_no_abort(tmp_path: Path) -> None:
    def add(table: dict[str, Any]) -> None:
        table["added_tokens"].append(dict(table["added_tokens"][0], id=4000, content="[PAD4010]", special=False))

    source = with_tokenizer(tmp_path / "m", cut_and(add))
    file = gguf_of(quantized(source, tmp_path / "q"))
    tokens = read_gguf(file)[0][f"{KEY}tokens"]
    assert len(set(tokens)) == len(tokens) == 4096
    assert (tokens[4000], tokens[4009], tokens[4010]) == ("[PAD4010]", "[PAD4009]", "[PAD4010]_")
    llama, tokenizer = LlamaCpp(file), AutoTokenizer.from_pretrained(source)
    for text in TEXTS:
        assert llama.tokenize(text) == tokenizer(text)["input_ids"], text


def test_an_added_token_that_the_vocabulary_holds_keeps_its_id(tmp_path: Path) -> None:
    def add(table: dict[str, Any]) -> None:
        word = next(token for token, i in table["model"]["vocab"].items() if i == 2000)
        table["added_tokens"].append(dict(table["added_tokens"][0], id=4050, content=word, special=False))

    file = gguf_of(quantized(with_tokenizer(tmp_path / "m", cut_and(add)), tmp_path / "q"))
    tokens = read_gguf(file)[0][f"{KEY}tokens"]
    assert len(set(tokens)) == len(tokens)
    assert tokens[4050] == "[PAD4050]"


def test_a_vocabulary_with_one_text_twice_is_refused(tmp_path: Path) -> None:
    def add(table: dict[str, Any]) -> None:
        first = table["added_tokens"][0]
        table["added_tokens"] += [dict(first, id=4060, content="<a>"), dict(first, id=4061, content="<a>")]

    source = open_source(with_tokenizer(tmp_path / "m", cut_and(add)))
    with pytest.raises(FormatError, match=r"^tokenizer\.json: 2 tokens are '<a>'"):
        tokenizer_metadata(source, 4096, None)


def test_plan_knows_what_the_file_cannot_hold(model: Path) -> None:
    change(model, "config.json", max_position_embeddings=2**33)
    recipe = llmquant.make_recipe("x", flags={"format": "gguf", "eval_data": "none", "method": "rtn", "group_size": 32})
    found = estimate(model, recipe)
    assert [problem.exit_code for problem in found.problems if problem.blocking] == [FormatError.exit_code]

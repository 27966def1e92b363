"""Datasets on the Hub, through the real `datasets` and `huggingface_hub` clients against a fake Hub.

The clients read their endpoint at import, so they run in child processes: this file as a script. A child does a
number of things and writes what it saw as JSON; the tests look at that and at the fake Hub's log.
"""

import gzip
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import FakeHub, Request, commit_of, fake_hub
from warm import without_pauses

from llmquant.errors import CalibrationError
from llmquant.source import hub as hub_module
from llmquant.source.resolve import open_source
from llmquant.text import corpus
from llmquant.text.corpus import load_text
from llmquant.text.tokenizer import leading_bos, load_tokenizer
from llmquant.text.windows import calibration_windows, evaluation_windows

ALL = 10**9
WIKITEXT, C4, TEXTS = "datasets/Salesforce/wikitext", "datasets/allenai/c4", "datasets/user/texts"
ULTRACHAT = "datasets/HuggingFaceH4/ultrachat_200k"
SILENT = "user/silent"  # accepts a connection and never answers
SEQ_LEN, EVAL_TOKENS, SAMPLES = 32, 256, 4
# name: (what load_text is asked, the split, the characters that are enough)
ASKED = {
    "parquet": ("user/texts", "train", ALL),
    "config and split": ("user/texts:second:held", "train", ALL),
    "config, split and column": ("user/texts:second:held:title", "train", ALL),
    "split": ("user/texts::validation", "train", ALL),
    "jsonl": ("user/lines", "train", ALL),
    "jsonl.gz": ("user/zipped:default:train:body", "train", ALL),
    "first row without text": ("user/gaps", "train", ALL),
    "two of three files": ("user/shards", "train", 70),
    "wikitext2 train": ("wikitext2", "train", ALL),
    "wikitext2 test": ("wikitext2", "test", ALL),
    "auto": ("auto", "test", ALL),
    "c4 train": ("c4", "train", 5000),
    "c4 test": ("c4", "test", ALL),
    "ultrachat train": ("ultrachat", "train", ALL),
    "ultrachat test": ("ultrachat", "test", 10),
}
# evaluation text that names no split: the name of what is read, and its first document
EVALUATED = {
    "user/tested": ("user/tested::test", "test 0"),
    "user/tested:::title": ("user/tested::test:title", "title of test 0"),
    "user/texts": ("user/texts::validation", "a/valid text 0"),
    "user/texts:default": ("user/texts:default:validation", "a/valid text 0"),
    "user/texts::train": ("user/texts::train", "a/train-0 text 0"),
    "user/lines": ("user/lines::train", "line 0"),  # it has no other
}
# what load_text is asked: what its message says
REFUSED = {
    "user/unknown": "404 Client Error. Repository Not Found for url",
    "user/texts:nope": "BuilderConfig 'nope' not found. Available: ['default', 'second']",
    "user/texts:second:nope": "Bad split: nope. Available splits: ['held']",
    "user/texts:second:held:nope": "columns ['id', 'text', 'title']; expected a text column",
    "user/texts:second:held:id": "columns ['id', 'text', 'title']; expected a text column",
    "user/ambiguous": "columns ['question', 'answer']; expected a text column",
    "user/no-files": "doesn't contain any data files",
    "user/no-rows": "user/no-rows: no rows in it; choose another dataset or split",
    "Salesforce/wikitext": "Please pick one among the available configs: ['wikitext-103-raw-v1', 'wikitext-2-raw-v1']",
    "user/gated": "is a gated dataset on the Hub",
    "user/broken": "500",
    "user/html": "JSONDecodeError",
    SILENT: "timed out",
    "user/here": "user/here is a local folder",
    "a/b/c": "Repo id must be in the form",
}


def wikitext_rows(config: str, split: str) -> list[str]:
    """Lines as wikitext has them: each ends with a line feed, and every other one is empty."""
    count = {"train": 60, "validation": 3, "test": 40}[split]
    names = ("Robert Boulter", "an English film", "the  <unk>  theatre", "café ” 東京")
    return ["" if n % 2 else f" {config} {split} {n} @-@ {names[n % 4]} , {n * 7919} . \n" for n in range(count)]


# -- what the children do ------------------------------------------------------------------------------
def answer_of(spec: str, split: str, limit: int) -> dict[str, Any]:
    try:
        return load_text(spec, split, limit).__dict__
    except CalibrationError as error:
        return {"refused": str(error)}
    except Exception as error:  # so that one bug does not hide what the child saw elsewhere
        return {"refused": f"{type(error).__name__} escaped: {error}"}


def child_online(folder: Path) -> dict[str, Any]:
    (folder / "user/here").mkdir(parents=True)
    (folder / "user/here/train.jsonl").write_text('{"text": "not of the Hub"}\n')
    os.chdir(folder)
    real = corpus._hub_answers
    corpus._hub_answers = lambda: real(60.0)  # type: ignore[assignment, misc] # a busy machine may need more than 4 s
    answers = {name: answer_of(*asked) for name, asked in ASKED.items()}
    evaluated = {spec: answer_of(spec, "test", 1) for spec in EVALUATED}
    tokenizer = load_tokenizer(open_source("demo"))
    windows = {
        "evaluation": evaluation_windows(tokenizer, "wikitext2", None, SEQ_LEN),
        "head": evaluation_windows(tokenizer, "wikitext2", EVAL_TOKENS, SEQ_LEN),
        "calibration": calibration_windows(tokenizer, "wikitext2", SAMPLES, SEQ_LEN, seed=0),
    }
    refused = {spec: answer_of(spec, "train", ALL) for spec in REFUSED if spec != SILENT}
    hub_module.TIMEOUT = 0.3
    refused[SILENT] = answer_of(SILENT, "train", ALL)
    corpus._WIKITEXT = SILENT
    begin = time.monotonic()
    answers_when_silent = real(0.3)
    return {
        "answers": answers,
        "evaluated": evaluated,
        "refused": {spec: answer.get("refused") for spec, answer in refused.items()},
        "windows": {name: made.as_dict() | {"ids": made.ids.tolist()} for name, made in windows.items()},
        "silent": {"answers": answers_when_silent, "seconds": time.monotonic() - begin},
    }


def child_unreachable(folder: Path) -> dict[str, Any]:
    return {name: answer_of(name, "test", 1000) for name in ("auto", "wikitext2", "c4", "user/texts")}


# -- fixtures ------------------------------------------------------------------------------------------
def run_child(what: str, folder: Path, endpoint: str) -> tuple[dict[str, Any], str]:
    """What `child_<what>` returned in a fresh process, and its stderr."""
    here = Path(__file__).parents[1]
    clean = {name: value for name, value in os.environ.items() if "proxy" not in name.lower() and name[:3] != "HF_"}
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"), "HF_DATASETS_CACHE": str(folder / "hf/sets")}
    settings |= {"HF_TOKEN": "hf_fake", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}  # datasets counts downloads at a third host
    settings["PYTHONPATH"] = os.pathsep.join((str(here.parent), str(here)))
    command = [sys.executable, __file__, what, str(folder)]
    child = subprocess.run(command, env=clean | settings, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    return json.loads((folder / f"{what}.json").read_text()), child.stderr


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as .parquet, .jsonl or .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data, 0) if path.suffix == ".gz" else data)


def write_card(folder: Path, configs: dict[str, dict[str, str]]) -> None:
    """The dataset card, with `configs` as {config: {split: files}} in its head."""
    folder.mkdir(parents=True, exist_ok=True)
    declared = [
        {"config_name": config, "data_files": [{"split": split, "path": files} for split, files in splits.items()]}
        for config, splits in configs.items()
    ]
    (folder / "README.md").write_text(f"---\nlicense: mit\nconfigs: {json.dumps(declared)}\n---\n# A dataset\n")


def write_wikitext(folder: Path) -> Path:
    """As Salesforce/wikitext: parquet files in a folder per config."""
    configs = ("wikitext-103-raw-v1", "wikitext-2-raw-v1")
    splits = ("test", "train", "validation")
    write_card(folder, {config: {split: f"{config}/{split}-*" for split in splits} for config in configs})
    for config in configs:
        for split in splits:
            rows = [{"text": text} for text in wikitext_rows(config, split)]
            write(folder / config / f"{split}-00000-of-00001.parquet", rows)
    return folder


def write_c4(folder: Path) -> Path:
    """As allenai/c4: gzipped lines in a folder per config; the first file, 24 MB, is more than is read at once."""
    write_card(folder, {"en": {split: f"en/c4-{split}.*.json.gz" for split in ("train", "validation")}})
    for split, index, count, size in (("train", 0, 6000, 4000), ("train", 1, 5, 100), ("validation", 0, 7, 100)):
        rows = [{"text": f"{split} {index} {n} " + "c4 " * (size // 3), "url": "u"} for n in range(count)]
        write(folder / "en" / f"c4-{split}.{index:05d}-of-00002.json.gz", rows)
    return folder


def chat(split: str, n: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{split} question {n}"}, {"role": "assistant", "content": "an answer"}]


def write_ultrachat(folder: Path) -> Path:
    """As HuggingFaceH4/ultrachat_200k: a list of messages in each row, splits of its own names."""
    write_card(folder, {"default": {split: f"data/{split}-*" for split in ("train_sft", "test_sft")}})
    for split in ("train_sft", "test_sft"):
        rows = [{"prompt": "p", "messages": chat(split, n)} for n in range(3)]
        write(folder / f"data/{split}-00000-of-00001.parquet", rows)
    return folder


def write_others(folder: Path) -> dict[str, Path]:
    """The repositories of `user`, by their names."""
    texts = folder / "texts"
    write_card(
        texts, {"default": {"train": "a/train*", "validation": "a/valid*"}, "second": {"held": "b/held.parquet"}}
    )
    for file, count in (("a/train-0", 3), ("a/train-1", 2), ("a/valid", 1), ("b/held", 2)):
        rows = [{"id": n, "text": f"{file} text {n}", "title": f"{file} title {n}"} for n in range(count)]
        write(texts / f"{file}.parquet", rows)
    write(folder / "lines/train.jsonl", [{"content": f"line {n}", "title": "t"} for n in range(4)])
    write(folder / "zipped/train.jsonl.gz", [{"body": f"zipped {n}", "title": "t"} for n in range(4)])
    write(folder / "gaps/train.parquet", [{"text": text, "url": "http://x"} for text in (None, "a", None, "b")])
    for index in range(3):
        write(folder / f"shards/train-{index}.jsonl", [{"text": f"shard {index} {n:02}"} for n in range(5)])
    write(folder / "ambiguous/train.jsonl", [{"question": "q", "answer": "a"}])
    write_card(folder / "no-files", {})
    write(folder / "no-rows/train.jsonl", [])
    for split in ("train", "validation", "test"):
        write(
            folder / f"tested/{split}.jsonl",
            [{"text": f"{split} {n}", "title": f"title of {split} {n}"} for n in (0, 1)],
        )
    names = ("tested", "texts", "lines", "zipped", "gaps", "shards", "ambiguous", "no-files", "no-rows")
    return {f"datasets/user/{name}": folder / name for name in names}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="module")
def hub(folder: Path) -> Iterator[FakeHub]:
    with fake_hub() as hub:
        hub.repos = {WIKITEXT: write_wikitext(folder / "wikitext"), C4: write_c4(folder / "c4"), **write_others(folder)}
        hub.repos[ULTRACHAT] = write_ultrachat(folder / "ultrachat")
        for failure in ("gated", "broken", "html", "silent"):
            hub.repos[f"datasets/user/{failure}"] = folder / "lines"
            hub.failures[f"datasets/user/{failure}"] = failure
        hub.repos["datasets/user/here"] = folder / "lines"
        yield hub


@pytest.fixture(scope="module")
def child(hub: FakeHub, folder: Path) -> tuple[dict[str, Any], str]:
    return run_child("online", folder, hub.endpoint)


@pytest.fixture(scope="module")
def online(child: tuple[dict[str, Any], str]) -> dict[str, Any]:
    return child[0]


@pytest.fixture(scope="module")
def unreachable(folder: Path) -> tuple[dict[str, Any], str]:
    with fake_hub() as gone:
        endpoint = gone.endpoint
    return run_child("unreachable", folder, endpoint)


def test_ultrachat_is_read_as_conversations_until_there_is_enough(online: dict[str, Any]) -> None:
    train, test = online["answers"]["ultrachat train"], online["answers"]["ultrachat test"]
    assert [json.loads(document) for document in train["documents"]] == [chat("train_sft", n) for n in range(3)]
    assert [json.loads(document) for document in test["documents"]] == [chat("test_sft", 0)]
    assert train["chats"]
    assert train["name"] == "ultrachat"
    assert len(train["revision"]) == 40


def fetched(hub: FakeHub, repo: str) -> dict[str, int]:
    """The data files of `repo` that were fetched, and how far into each."""
    requests = [r for r in hub.requests(repo) if r.method == "GET" and r.status in (200, 206) and "/api/" not in r.path]
    reached: dict[str, int] = {}
    for request in requests:
        file = re.sub(r"resolve/[0-9a-f]{40}/", "", request.path).partition(f"{repo}/")[2]
        end = int(request.range.rpartition("-")[2]) + 1 if request.range and request.status == 206 else request.sent
        reached[file] = max(reached.get(file, 0), end)
    reached.pop("README.md", None)
    return reached


# -- tests ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("asked", "documents"),
    [
        ("parquet", [*(f"a/train-0 text {n}" for n in range(3)), *(f"a/train-1 text {n}" for n in range(2))]),
        ("config and split", ["b/held text 0", "b/held text 1"]),
        ("config, split and column", ["b/held title 0", "b/held title 1"]),
        ("split", ["a/valid text 0"]),
        ("jsonl", [f"line {n}" for n in range(4)]),
        ("jsonl.gz", [f"zipped {n}" for n in range(4)]),
        ("first row without text", ["a", "b"]),
        ("two of three files", [f"shard {n // 5} {n % 5:02}" for n in range(7)]),
        ("wikitext2 train", wikitext_rows("wikitext-2-raw-v1", "train")),
        ("wikitext2 test", wikitext_rows("wikitext-2-raw-v1", "test")),
        ("auto", wikitext_rows("wikitext-2-raw-v1", "test")),
        ("c4 train", [f"train 0 {n} " + "c4 " * 1333 for n in range(2)]),
        ("c4 test", [f"validation 0 {n} " + "c4 " * 33 for n in range(7)]),
    ],
)
def test_documents_are_the_rows_of_the_asked_config_split_and_column(
    online: dict[str, Any], asked: str, documents: list[str]
) -> None:
    assert online["answers"][asked].get("documents", online["answers"][asked]) == documents


@pytest.mark.parametrize(("spec", "expected"), EVALUATED.items())
def test_evaluation_text_comes_from_a_split_for_it(
    online: dict[str, Any], spec: str, expected: tuple[str, str]
) -> None:
    answer = online["evaluated"][spec]
    assert (answer.get("name", answer), answer.get("documents", [])[:1]) == (expected[0], [expected[1]])


def test_every_dataset_has_its_name_and_its_commit(online: dict[str, Any]) -> None:
    repos = {"wikitext2": WIKITEXT, "auto": WIKITEXT, "c4": C4, "ultrachat": ULTRACHAT}
    for asked, (spec, _, _) in ASKED.items():
        answer = online["answers"][asked]
        assert answer["name"] == ("wikitext2" if spec == "auto" else spec)
        assert answer["revision"] == commit_of(repos.get(spec, f"datasets/{spec.partition(':')[0]}"))


def test_every_request_for_a_file_or_a_listing_is_pinned_to_the_commit(online: dict[str, Any], hub: FakeHub) -> None:
    for repo in (WIKITEXT, C4, TEXTS):
        requests = [r for r in hub.requests(repo) if not r.path.startswith("/cdn/")]
        pinned = [r for r in requests if f"/{commit_of(repo)}" in r.path]
        assert {r.path for r in requests if r not in pinned} == {f"/api/{repo}"}  # how the commit was found
        assert all(any(f"{kind}{commit_of(repo)}" in r.path for r in pinned) for kind in ("/resolve/", "/tree/"))


def test_only_the_files_that_are_needed_are_fetched(online: dict[str, Any], hub: FakeHub) -> None:
    assert set(fetched(hub, "datasets/user/shards")) == {"train-0.jsonl", "train-1.jsonl"}
    assert not any("wikitext-103" in file for file in fetched(hub, WIKITEXT))


def test_large_file_is_fetched_no_further_than_is_needed(online: dict[str, Any], hub: FakeHub, folder: Path) -> None:
    train = "en/c4-train.00000-of-00002.json.gz"
    reached = fetched(hub, C4)
    assert set(reached) == {train, "en/c4-validation.00000-of-00002.json.gz"}
    size = (folder / "c4" / train).stat().st_size
    assert reached[train] < 0.7 * size  # the client reads ten megabytes at once, by requests of five


def test_token_goes_to_the_hub_but_not_to_the_host_of_the_files(online: dict[str, Any], hub: FakeHub) -> None:
    requests: list[Request] = hub.requests(C4)
    assert any(r.path.startswith("/cdn/") for r in requests)
    assert all(r.authorized == (not r.path.startswith("/cdn/")) for r in requests)


def test_evaluation_windows_are_the_ids_of_the_rows_joined_by_blank_lines(online: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(open_source("demo"))
    ids = tokenizer("\n\n".join(wikitext_rows("wikitext-2-raw-v1", "test")))["input_ids"]
    by_hand = [ids[start : start + SEQ_LEN] for start in range(0, len(ids) - SEQ_LEN + 1, SEQ_LEN)]
    assert len(by_hand) > EVAL_TOKENS // SEQ_LEN
    assert online["windows"]["evaluation"]["ids"] == by_hand
    assert online["windows"]["head"]["ids"] == by_hand[: EVAL_TOKENS // SEQ_LEN]


def test_calibration_windows_are_pieces_of_the_rows_joined_by_blank_lines(online: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(open_source("demo"))
    assert leading_bos(tokenizer) is None
    text = "\n\n".join(wikitext_rows("wikitext-2-raw-v1", "train"))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    slots = [ids[start : start + SEQ_LEN] for start in range(0, len(ids) - SEQ_LEN + 1, SEQ_LEN)]
    windows = online["windows"]["calibration"]["ids"]
    assert len(windows) == SAMPLES
    assert all(window in slots for window in windows)
    assert len({tuple(window) for window in windows}) == SAMPLES


def test_windows_name_their_dataset_and_its_commit(online: dict[str, Any]) -> None:
    for made in online["windows"].values():
        assert (made["dataset"], made["revision"]) == ("wikitext2", commit_of(WIKITEXT))
        assert torch.tensor(made["ids"]).shape == (made["n_tokens"] // SEQ_LEN, SEQ_LEN)


@pytest.mark.parametrize(("spec", "said"), REFUSED.items())
def test_what_cannot_be_loaded_is_told_in_one_line(online: dict[str, Any], spec: str, said: str) -> None:
    message = online["refused"][spec]
    assert message is not None
    assert message.startswith(f"{spec}: ")
    assert said in message
    assert "escaped" not in message
    assert message.isprintable()


def test_every_refusal_has_its_own_message(online: dict[str, Any]) -> None:
    alike = "user/texts:second:held:id"  # a column that holds no text is told like one that is missing
    reasons = [message.removeprefix(f"{spec}: ") for spec, message in online["refused"].items() if spec != alike]
    assert len(set(reasons)) == len(reasons)


def test_folder_of_the_same_name_is_refused_without_a_request(online: dict[str, Any], hub: FakeHub) -> None:
    assert online["refused"]["user/here"].startswith("user/here: user/here is a local folder; expected FILE (.txt")
    assert hub.requests("datasets/user/here") == []


def test_silent_hub_counts_as_none_within_the_time_given(online: dict[str, Any]) -> None:
    assert online["silent"]["answers"] is False
    assert online["silent"]["seconds"] < 3


def test_nothing_is_written_to_stderr(child: tuple[Any, str], unreachable: tuple[Any, str]) -> None:
    assert child[1] == ""
    assert unreachable[1] == ""


def test_auto_takes_the_builtin_text_where_no_hub_is(unreachable: tuple[dict[str, Any], str]) -> None:
    answer = unreachable[0]["auto"]
    assert (answer["name"], answer["revision"]) == ("builtin", None)
    assert answer["documents"] == load_text("builtin", "test", 1000).documents


@pytest.mark.parametrize("spec", ["wikitext2", "c4", "user/texts"])
def test_unreachable_hub_is_told_in_one_line(unreachable: tuple[dict[str, Any], str], spec: str) -> None:
    message = unreachable[0][spec]["refused"]
    assert "cannot be loaded (ConnectError: " in message
    assert "check the name and the network, or use builtin" in message
    assert "escaped" not in message
    assert message.isprintable()


if __name__ == "__main__":
    without_pauses()
    _, name, child_folder = sys.argv
    result = {"online": child_online, "unreachable": child_unreachable}[name](Path(child_folder))
    (Path(child_folder) / f"{name}.json").write_text(json.dumps(result))

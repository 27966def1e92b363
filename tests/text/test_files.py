"""Text as people have it in files: every ending, encoding and column that the reader knows, and what it refuses."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from llmquant.demo import DEMO
from llmquant.errors import CalibrationError
from llmquant.source.resolve import open_source
from llmquant.text.corpus import Text, is_file, load_text
from llmquant.text.files import find_file
from llmquant.text.mixture import parse_mixture
from llmquant.text.tokenizer import load_tokenizer
from llmquant.text.windows import calibration_windows, evaluation_windows

ROWS = [{"id": "1", "text": "größe 你"}, {"id": "2", "text": "b\nc"}]
DOCUMENTS = ["größe 你", "b\nc"]


def as_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


LINES, ARRAY = as_lines(ROWS), json.dumps(ROWS, ensure_ascii=False)
CSV = 'id,text\n1,größe 你\n2,"b\nc"\n'
FILES: dict[str, bytes] = {
    "x.jsonl": LINES.encode(),
    "x.JSONL": LINES.encode(),
    "x.ndjson": LINES.encode(),
    "bom.jsonl": LINES.encode("utf-8-sig"),
    "wide.jsonl": LINES.encode("utf-16"),
    "x.jsonl.gz": gzip.compress(LINES.encode()),
    "x.json": ARRAY.encode(),
    "lines.json": LINES.encode(),
    "nested.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "x.json.gz": gzip.compress(ARRAY.encode("utf-8-sig")),
    "x.csv": CSV.encode(),
    "excel.csv": CSV.replace(",", ";").encode("utf-8-sig"),
    "x.tsv": CSV.replace(",", "\t").encode(),
    "x.csv.gz": gzip.compress(CSV.encode()),
    "x.parquet": as_parquet(ROWS),
}
PLAIN: dict[str, bytes] = {
    **{name: "größe 你\n".encode() for name in ("x.txt", "x.TXT", "x.md", "notes", "x.rst")},
    "bom.txt": "größe 你\n".encode("utf-8-sig"),
    "wide.txt": "größe 你\n".encode("utf-16"),
    "x.txt.gz": gzip.compress("größe 你\n".encode()),
}


@pytest.mark.parametrize("name", FILES)
def test_rows_of_a_table(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    assert load_text(str(tmp_path / name), "train", 10**6) == Text(name, DOCUMENTS)
    assert load_text(str(tmp_path / name), "test", 3) == Text(name, DOCUMENTS[:1])
    assert load_text(f"{tmp_path / name}:id", "test", 10**6) == Text(name, ["1", "2"])
    assert is_file(str(tmp_path / name))


@pytest.mark.parametrize("name", PLAIN)
def test_plain_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(PLAIN[name])
    assert load_text(str(tmp_path / name), "train", 10**6) == Text(name, ["größe 你\n"])


def test_a_column_and_a_share_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.csv").write_bytes(FILES["x.csv"])
    Path("a:b.txt").write_text("a")
    assert find_file("x.csv:id") == (Path("x.csv"), "id")
    assert find_file("a:b.txt") == (Path("a:b.txt"), None)
    assert parse_mixture("x.csv:id:0.5,builtin:0.5") == [("x.csv:id", 0.5), ("builtin", 0.5)]
    for spec in ("owner/name", "owner/name:config:train", "wikitext", "gone"):
        assert find_file(spec) is None


MESSAGES = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
CHATS: dict[str, dict[str, Any]] = {
    "messages": {"id": 1, "messages": MESSAGES},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]},
    "Alpaca": {"instruction": "Hi?", "input": "", "output": "Hello."},
    "prompt and response": {"prompt": "Hi?", "response": "Hello."},
    "prompt and completion": {"prompt": "Hi?", "completion": "Hello.", "score": 1},
    "parts": {"messages": [dict(m, content=[{"type": "text", "text": m["content"]}]) for m in MESSAGES]},
}


@pytest.mark.parametrize("kind", CHATS)
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_conversations_in_every_column(kind: str, ending: str, tmp_path: Path) -> None:
    rows, file = [CHATS[kind]] * 3, tmp_path / f"x{ending}"
    content = {".jsonl": as_lines(rows).encode(), ".json": json.dumps(rows).encode(), ".parquet": as_parquet(rows)}
    file.write_bytes(content[ending])
    found = load_text(str(file), "train", 10**6)
    assert found.chats
    assert [json.loads(document) for document in found.documents] == [MESSAGES] * 3
    assert len(load_text(str(file), "train", 10).documents) == 2


def test_an_input_belongs_to_its_instruction_and_roles_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(as_lines([{"instruction": "Add.", "input": "1, 2", "output": "3"}]))
    (document,) = load_text(str(tmp_path / "a.jsonl"), "train", 99).documents
    assert json.loads(document)[0] == {"role": "user", "content": "Add.\n\n1, 2"}
    said = [{"from": "system", "value": "s"}, {"from": "tool", "value": "t"}, {"from": "GPT", "value": "g"}]
    (tmp_path / "b.jsonl").write_text(as_lines([{"conversations": said}]))
    (document,) = load_text(str(tmp_path / "b.jsonl"), "train", 99).documents
    assert [message["role"] for message in json.loads(document)] == ["system", "tool", "assistant"]


def test_conversations_go_through_the_models_chat_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(open_source("demo"))
    text = (DEMO / "heldout.txt").read_text("utf-8")
    rows = [{"instruction": text[at : at + 300], "output": text[at + 300 : at + 600]} for at in range(0, 30000, 600)]
    (tmp_path / "x.jsonl").write_text(as_lines(rows), "utf-8")
    for cut in (
        lambda: calibration_windows(tokenizer, str(tmp_path / "x.jsonl"), 4, 64, seed=0),
        lambda: evaluation_windows(tokenizer, str(tmp_path / "x.jsonl"), 256, 64),
    ):
        tokenizer.chat_template = None
        with pytest.raises(CalibrationError, match="the tokenizer has no chat template"):
            cut()
        tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
        ids = cut().ids
        assert len(ids) == 4
        assert "[user]" in tokenizer.decode(ids.flatten())


WRONG: dict[str, tuple[str, bytes, str]] = {
    "no JSON": ("x.json", b"{", "not valid JSON"),
    "numbers": ("x.json", b"[1, 2]", "an array of int; expected one of objects or texts"),
    "a picture": ("notes", b"\x89PNG\r\n", "not UTF-8 text"),
    "no gzip": ("x.txt.gz", b"plain", "cannot be read"),
    "cut gzip": ("x.txt.gz", gzip.compress(b"abc" * 1000)[:-9], "cannot be read"),
    "spoilt gzip": ("x.txt.gz", gzip.compress(b"abc" * 1000)[:12] + b"\xff" * 20, "cannot be read"),
    "no Parquet": ("x.parquet", b"PAR1 nothing", "not valid Parquet"),
    "half a UTF-16": ("x.txt", b"\xff\xfea", "not UTF-8 text"),
    "no message": ("x.jsonl", b'{"messages": [1]}', "expected a list of messages of text in messages"),
    "pictures": ("x.jsonl", b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "messages of text"),
    "no such column": ("x.csv", b"id,text\n1,a\n", "expected a text column"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_read_is_one_error_about_the_file(what: str, tmp_path: Path) -> None:
    name, content, said = WRONG[what]
    (tmp_path / name).write_bytes(content)
    column = ":other" if what == "no such column" else ""
    with pytest.raises(CalibrationError, match=said) as caught:
        load_text(f"{tmp_path / name}{column}", "train", 10**6)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("wikitext", "did you mean wikitext2\\? else check the name"),
        ("wikitext-103", "did you mean wikitext2\\?"),
        ("pile", "did you mean NeelNanda/pile-10k\\?"),
        ("ultrachat_200k", "did you mean ultrachat\\?"),
        ("x" * 300, "cannot be read \\(File name too long\\); expected a file"),
        (".", "is a local folder"),
        ("gone.md", "gone.md: no such file"),
        ("gone.parquet", "gone.parquet: no such file"),
    ],
)
def test_a_name_that_is_nothing_gets_a_remedy(spec: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*args: object, **options: object) -> Callable[[], None]:
        raise OSError("offline")

    monkeypatch.setattr("llmquant.text.corpus.dataset_commit", offline)
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(CalibrationError, match=said):
        load_text(spec, "train", 100)

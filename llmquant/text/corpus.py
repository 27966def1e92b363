"""A name -> documents: built-in text, files, and datasets of the Hub.

A new dataset is one function and one line in DATASETS.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from llmquant.demo import DEMO
from llmquant.errors import CalibrationError, option
from llmquant.paths import expanded, shown_name
from llmquant.source.hub import dataset_commit

_WIKITEXT = "Salesforce/wikitext"
_MEDIA = frozenset(("image", "images", "audio", "video", "pixel_values"))  # columns that hold them, or names of files
_MEDIA_FILES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".wav", ".mp3", ".flac", ".mp4")


@dataclass(frozen=True)
class Text:
    """Documents, and where they came from.

    revision   the dataset's commit, where it has one
    chats      each document is a JSON list of messages {"role", "content"}; `tokenizer.as_text` makes text of it
    """

    name: str
    documents: list[str]
    revision: str | None = None
    chats: bool = False


def _builtin(split: str, limit: int) -> Text:
    file = "calibration.txt" if split == "train" else "heldout.txt"
    return Text("builtin", [(DEMO / file).read_text("utf-8")])


def _wikitext2(split: str, limit: int) -> Text:
    return _hub_dataset(
        f"{_WIKITEXT}:wikitext-2-raw-v1:" + ("train" if split == "train" else "test"), limit, "wikitext2"
    )


def _c4(split: str, limit: int) -> Text:
    return _hub_dataset("allenai/c4:en:" + ("train" if split == "train" else "validation"), limit, "c4")


def _ultrachat(split: str, limit: int) -> Text:
    """Conversations with an assistant; the model's own chat template makes text of them."""
    spec = "HuggingFaceH4/ultrachat_200k:default:" + ("train_sft" if split == "train" else "test_sft") + ":messages"
    text = _hub_dataset(spec, limit, "ultrachat", _chats)
    return Text(text.name, text.documents, text.revision, chats=True)


def _auto(split: str, limit: int) -> Text:
    """wikitext2 if the Hub answers within a few seconds, else the built-in text."""
    return DATASETS["wikitext2" if _hub_answers() else "builtin"](split, limit)


def _hub_answers(seconds: float = 4.0) -> bool:
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        with suppress(Exception):  # any failure means that the Hub does not answer
            HfApi().dataset_info(_WIKITEXT, timeout=seconds)
            answered.set()

    # In a thread, because the look-up of a host's name has no timeout of its own.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return answered.is_set()


# name -> loader(split, limit): `split` is train or test, `limit` is how many characters are enough.
DATASETS: dict[str, Callable[[str, int], Text]] = {
    "auto": _auto,
    "builtin": _builtin,
    "wikitext2": _wikitext2,
    "c4": _c4,
    "ultrachat": _ultrachat,
}


def is_file(spec: str) -> bool:
    """Whether `spec` names a file, here or missing, and not a dataset."""
    return spec not in DATASETS and spec.endswith((".txt", ".jsonl"))


def load_text(spec: str, split: str, limit: int) -> Text:
    """Text of `spec`: a name in DATASETS, FILE.txt, FILE.jsonl, or HUB_ID[:config[:split[:column]]].

    `split` is "train" or "test", `limit` the number of characters that are enough. A Hub id may name its split itself;
    where it names none, "test" is the dataset's test, else its validation, else its train split, and the name of the
    text says which.
    CalibrationError where the text cannot be loaded.
    """
    if spec in DATASETS:
        return DATASETS[spec](split, limit)
    path = expanded(spec, CalibrationError)
    if path.suffix.lower() in _MEDIA_FILES:
        _refuse_media(spec, f"a {path.suffix[1:].lower()} file")
    if is_file(spec):
        if not path.is_file():
            raise CalibrationError(spec, "no such file")
        try:
            is_text = path.suffix == ".txt"
            documents = [path.read_text("utf-8")] if is_text else list(_column(spec, _jsonl(path), None, limit))
        except UnicodeDecodeError as error:
            raise CalibrationError(spec, f"not UTF-8 text ({error.reason} at byte {error.start})") from None
        return Text(shown_name(path), documents)
    return _hub_dataset(spec, limit, spec, evaluated=split == "test")


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else {}
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise CalibrationError(
                    f"{path}: line {number}", "not a JSON object", expected="one with a text per line"
                )
            if row:
                yield row


def _hub_dataset(
    spec: str,
    limit: int,
    name: str,
    pick: Callable[[str, Any, str | None, int], Iterator[str]] | None = None,
    *,
    evaluated: bool = False,
) -> Text:
    """A dataset of the Hub, streamed: fetches only as many rows as `pick` asks for (default: `_column`).

    `evaluated`: where `spec` names no split, one that is not for training is looked for.
    """
    from datasets import get_dataset_split_names, load_dataset

    repo, config, split, column = (spec.split(":") + [""] * 3)[:4]
    # `datasets` would read this folder in place of the Hub's dataset.
    if repo and expanded(repo, CalibrationError).is_dir():
        raise CalibrationError(
            spec,
            f"{repo} is a local folder",
            expected="FILE.txt, FILE.jsonl or HUB_ID",
            remedy="name a file in it, or run from a folder without it",
        )
    try:
        revision = dataset_commit(repo)
        if evaluated and not split:
            known = get_dataset_split_names(repo, config or None, revision=revision)
            split = next((one for one in ("test", "validation") if one in known), "train")
            name = f"{repo}:{config}:{split}:{column}".rstrip(":")
        rows = load_dataset(repo, config or None, split=split or "train", streaming=True, revision=revision)
        documents = list((pick or _column)(spec, rows, column or None, limit))
    except CalibrationError:
        raise
    except StopIteration:  # `datasets` lets it escape for a JSON file without rows
        raise CalibrationError(spec, "no rows in it", remedy="choose another dataset or split") from None
    except Exception as error:  # `datasets` and its file systems raise dozens of unrelated classes
        # All lines of the message: the first alone often says little ("404 Client Error.", "Config name is missing.").
        brief = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise CalibrationError(
            spec,
            f"cannot be loaded ({brief})",
            expected="builtin, wikitext2, c4, ultrachat, FILE.txt, FILE.jsonl or HUB_ID[:config[:split[:column]]]",
            remedy="check the name and the network, or use builtin",
        ) from error
    return Text(name, documents, revision)


def _refuse_media(where: str, got: str) -> NoReturn:
    raise CalibrationError(
        where,
        got,
        expected="text: models are calibrated and evaluated on text, multimodal ones too",
        remedy=f"another {option('calibration')}, or name a column with text: HUB_ID:config:split:column",
    )


def _column(where: str, rows: Any, column: str | None, limit: int) -> Iterator[str]:
    """Texts of one column of `rows`, until `limit` characters are reached.

    Without a name the column is `text` or `content`, or else the only one that holds text.
    """
    iterator = iter(rows)
    first = next(iterator, None)
    if first is None:
        return
    texts = [name for name, value in first.items() if isinstance(value, str)]
    # Real datasets have rows without text, and the first may be one of them: None counts as text here.
    fitting = {name for name, value in first.items() if isinstance(value, str | None)}
    if column is None:
        texts = [name for name in texts if name not in _MEDIA]  # whose names of files are no text
        column = next((name for name in ("text", "content") if name in fitting), texts[0] if len(texts) == 1 else None)
    if (column is None or column not in fitting) and (media := sorted(_MEDIA & first.keys())):
        _refuse_media(where, f"columns {list(first)}"[:200] + f", of which {', '.join(media)}")
    if column is None or column not in fitting:
        raise CalibrationError(
            where,
            f"columns {list(first)}"[:200],
            expected="a text column",
            remedy="call it `text`, or name it: HUB_ID:config:split:column",
        )
    seen = 0
    for row in chain([first], iterator):
        if seen >= limit:
            return
        if isinstance(document := row.get(column), str):
            seen += len(document)
            yield document.encode("utf-8", "replace").decode()  # JSON may hold lone surrogates, which tokenizers refuse


def _chats(where: str, rows: Any, column: str | None, limit: int) -> Iterator[str]:
    """The messages of each row as JSON, until their contents reach `limit` characters."""
    seen = 0
    for row in rows:
        if seen >= limit:
            return
        messages = row.get(column or "messages")
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        ):
            raise CalibrationError(
                where, f"columns {list(row)}"[:200], expected=f"a list of messages in {column or 'messages'}"
            )
        seen += sum(len(message["content"]) for message in messages)
        yield json.dumps([{"role": m["role"], "content": m["content"]} for m in messages], ensure_ascii=False)

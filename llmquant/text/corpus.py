"""A name -> documents: built-in text, files, and datasets of the Hub.

A new dataset is one function and one line in DATASETS.
"""

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from llmquant.demo import DEMO
from llmquant.errors import CalibrationError, option
from llmquant.paths import shown_name
from llmquant.source.hub import dataset_commit
from llmquant.text.chats import chat_columns, read_chat
from llmquant.text.files import FILES, find_file, read_rows, refuse_folder

_WIKITEXT = "Salesforce/wikitext"
_MEDIA = frozenset(("image", "images", "audio", "video", "pixel_values"))  # columns that hold them, or names of files
_MEDIA_FILES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".wav", ".mp3", ".flac", ".mp4")
# Names without an owner that people know from other tools -> what they mean here.
_SHORT = {
    "wikitext": "wikitext2",
    "wiki": "wikitext2",
    "ultrachat": "ultrachat",
    "pile": "NeelNanda/pile-10k",
    "alpaca": "tatsu-lab/alpaca",
    "openwebtext": "Skylion007/openwebtext",
}


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
    return _hub_dataset(spec, limit, "ultrachat")


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
    return spec not in DATASETS and find_file(spec) is not None


def load_text(spec: str, split: str, limit: int) -> Text:
    """Text of `spec`: a name in DATASETS, FILE[:column] (`text/files.py`), or HUB_ID[:config[:split[:column]]].

    `split` is "train" or "test", `limit` the number of characters that are enough. A Hub id may name its split itself;
    where it names none, "test" is the dataset's test, else its validation, else its train split, and the name of the
    text says which.
    CalibrationError where the text cannot be loaded.
    """
    if spec in DATASETS:
        return DATASETS[spec](split, limit)
    if (suffix := Path(spec).suffix.lower()) in _MEDIA_FILES:
        _refuse_media(spec, f"a {suffix[1:]} file")
    if (file := find_file(spec)) is not None:
        path, column = file
        with closing(read_rows(path)) as rows:
            documents, are_chats = _documents(str(path), rows, column, limit)
        return Text(shown_name(path), documents, chats=are_chats)
    return _hub_dataset(spec, limit, spec, evaluated=split == "test")


def _hub_dataset(spec: str, limit: int, name: str, *, evaluated: bool = False) -> Text:
    """A dataset of the Hub, streamed: fetches only as many rows as `limit` characters need.

    `evaluated`: where `spec` names no split, one that is not for training is looked for.
    """
    from datasets import get_dataset_split_names, load_dataset

    repo, config, split, column = (spec.split(":") + [""] * 3)[:4]
    if repo:
        refuse_folder(spec, repo)
    try:
        revision = dataset_commit(repo)
        if evaluated and not split:
            known = get_dataset_split_names(repo, config or None, revision=revision)
            split = next((one for one in ("test", "validation") if one in known), "train")
            name = f"{repo}:{config}:{split}:{column}".rstrip(":")
        rows = load_dataset(repo, config or None, split=split or "train", streaming=True, revision=revision)
        documents, are_chats = _documents(spec, rows, column or None, limit)
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
            expected=f"builtin, wikitext2, c4, ultrachat, {FILES} or HUB_ID[:config[:split[:column]]]",
            remedy=f"{_suggestion(repo)}check the name and the network, or use builtin",
        ) from error
    return Text(name, documents, revision, chats=are_chats)


def _suggestion(repo: str) -> str:
    """For a short name that is no id of the Hub: what is meant."""
    known = {short: full for short, full in _SHORT.items() if repo.lower().startswith(short)}
    return f"did you mean {known[max(known, key=len)]}? else " if known and "/" not in repo else ""


def _refuse_media(where: str, got: str) -> NoReturn:
    raise CalibrationError(
        where,
        got,
        expected="text: models are calibrated and evaluated on text, multimodal ones too",
        remedy=f"another {option('calibration')}, or name a column with text: HUB_ID:config:split:column",
    )


def _documents(where: str, rows: Iterable[Any], column: str | None, limit: int) -> tuple[list[str], bool]:
    """Documents of `rows` until `limit` characters are reached, and whether they are conversations (see `Text`).

    Without a name the column is `text` or `content`, else that of conversations, else the only one that holds text.
    """
    iterator = iter(rows)
    first = next(iterator, None)
    if first is None:
        return [], False
    rows, column = chain([first], iterator), column or _text_column(first)
    if column is None and (columns := chat_columns(first)):
        return list(_chats(where, rows, columns, limit)), True
    if column is not None and isinstance(first.get(column), list):
        return list(_chats(where, rows, (column,), limit)), True
    return list(_texts(where, rows, first, column, limit)), False


def _text_column(first: dict[str, Any]) -> str | None:
    # Real datasets have rows without text, and the first may be one of them: None counts as text here.
    return next((name for name in ("text", "content") if name in first and isinstance(first[name], str | None)), None)


def _texts(where: str, rows: Iterable[Any], first: dict[str, Any], column: str | None, limit: int) -> Iterator[str]:
    if column is None:
        # Names of pictures and sounds are no text.
        texts = [name for name, value in first.items() if isinstance(value, str) and name not in _MEDIA]
        column = texts[0] if len(texts) == 1 else None
    fits = column is not None and column in first and isinstance(first[column], str | None)
    if not fits and (media := sorted(_MEDIA & first.keys())):
        _refuse_media(where, f"columns {list(first)}"[:200] + f", of which {', '.join(media)}")
    if column is None or not fits:
        raise CalibrationError(
            where,
            f"columns {list(first)}"[:200],
            expected="a text column, or messages",
            remedy="call it `text`, or name it: FILE:column, HUB_ID:config:split:column",
        )
    seen = 0
    for row in rows:
        if seen >= limit:
            return
        if isinstance(document := row.get(column), str):
            seen += len(document)
            yield document.encode("utf-8", "replace").decode()  # JSON may hold lone surrogates, which tokenizers refuse


def _chats(where: str, rows: Iterable[Any], columns: tuple[str, ...], limit: int) -> Iterator[str]:
    """The messages of each row as JSON, until their contents reach `limit` characters."""
    seen = 0
    for row in rows:
        if seen >= limit:
            return
        if (chat := read_chat(row, columns)) is None:
            raise CalibrationError(
                where, f"columns {list(row)}"[:200], expected=f"a list of messages of text in {', '.join(columns)}"
            )
        seen += sum(len(message["content"]) for message in chat)
        yield json.dumps(chat, ensure_ascii=False).encode("utf-8", "replace").decode()

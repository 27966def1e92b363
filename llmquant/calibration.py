"""Text -> fixed token windows, for calibration and for evaluation."""

import hashlib
import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import CalibrationError
from llmquant.mixture import parse_mixture, split_samples
from llmquant.remote_code import remedy
from llmquant.source import DEMO, TIMEOUT, Source

BATCH_TOKENS = 2048  # that go through a block at once
_WIKITEXT = "Salesforce/wikitext"


@dataclass(frozen=True)
class Text:
    """Documents, and where they came from. `revision` is the dataset's commit, where it has one.

    `chats`: each document is a JSON list of messages {"role", "content"}, for `as_text`.
    """

    name: str
    documents: list[str]
    revision: str | None = None
    chats: bool = False


@dataclass(frozen=True)
class Windows:
    """Token windows ids [n, T] (int64) and how they were made."""

    ids: Tensor
    dataset: str
    revision: str | None
    bos: str  # which windows start with the BOS token: "none", "first" or "every other"

    @property
    def n_tokens(self) -> int:
        return self.ids.numel()

    def as_dict(self) -> dict[str, Any]:
        """What a report says of them; the digest pins the token ids."""
        return {
            "dataset": self.dataset,
            "revision": self.revision,
            "seq_len": self.ids.shape[1],
            "n_tokens": self.n_tokens,
            "bos": self.bos,
            "ids_sha256": hashlib.sha256(self.ids.numpy().tobytes()).hexdigest(),
        }

    def batches(self, tokens: int = BATCH_TOKENS) -> list[Tensor]:
        """Groups of windows [B, T] of about `tokens` tokens each."""
        return list(torch.split(self.ids, max(1, tokens // self.ids.shape[1])))


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
    """Conversations of an assistant; the model's own chat template makes text of them."""
    spec = "HuggingFaceH4/ultrachat_200k:default:" + ("train_sft" if split == "train" else "test_sft") + ":messages"
    text = _hub_dataset(spec, limit, "ultrachat", _chats)
    return Text(text.name, text.documents, text.revision, chats=True)


def _auto(split: str, limit: int) -> Text:
    """wikitext2 where the Hub answers within five seconds, else the built-in text."""
    return DATASETS["wikitext2" if _hub_answers() else "builtin"](split, limit)


def _hub_answers(seconds: float = 4.0) -> bool:
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        with suppress(Exception):  # any failure means no
            HfApi().dataset_info(_WIKITEXT, timeout=seconds)
            answered.set()

    # A thread, because looking a name up has no timeout of its own.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return answered.is_set()


# name -> loader(split, limit): `split` is train or test, `limit` the number of characters that are enough.
DATASETS: dict[str, Callable[[str, int], Text]] = {
    "auto": _auto,
    "builtin": _builtin,
    "wikitext2": _wikitext2,
    "c4": _c4,
    "ultrachat": _ultrachat,
}


def load_text(spec: str, split: str, limit: int) -> Text:
    """Text of `spec`: a name in DATASETS, FILE.txt, FILE.jsonl, or HUB_ID[:config[:split[:column]]]."""
    if spec in DATASETS:
        return DATASETS[spec](split, limit)
    path = Path(spec).expanduser()
    if path.suffix in (".txt", ".jsonl"):
        if not path.is_file():
            raise CalibrationError(spec, "no such file")
        try:
            is_text = path.suffix == ".txt"
            documents = [path.read_text("utf-8")] if is_text else list(_column(spec, _jsonl(path), None, limit))
        except UnicodeDecodeError as error:
            raise CalibrationError(spec, f"not UTF-8 text ({error.reason} at byte {error.start})") from None
        return Text(path.name, documents)
    return _hub_dataset(spec, limit, spec)


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
    spec: str, limit: int, name: str, pick: Callable[[str, Any, str | None, int], Iterator[str]] | None = None
) -> Text:
    """A dataset of the Hub, streamed: only as many rows are fetched as `pick` (a column's text) asks for."""
    from datasets import load_dataset
    from huggingface_hub import HfApi

    repo, config, split, column = (spec.split(":") + [""] * 3)[:4]
    if repo and Path(repo).is_dir():  # datasets would read it in place of the Hub's
        raise CalibrationError(
            spec,
            f"{repo} is a local folder",
            expected="FILE.txt, FILE.jsonl or HUB_ID",
            remedy="name a file in it, or run from a folder without it",
        )
    try:
        revision = HfApi().dataset_info(repo, timeout=TIMEOUT).sha
        rows = load_dataset(repo, config or None, split=split or "train", streaming=True, revision=revision)
        documents = list((pick or _column)(spec, rows, column or None, limit))
    except CalibrationError:
        raise
    except StopIteration:  # what datasets lets escape for a JSON file without a row
        raise CalibrationError(spec, "no rows in it", remedy="choose another dataset or split") from None
    except Exception as error:  # datasets and its file systems raise dozens of unrelated classes
        # all lines: the first alone often says nothing ("404 Client Error.", "Config name is missing.")
        brief = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise CalibrationError(
            spec,
            f"cannot be loaded ({brief})",
            expected="builtin, wikitext2, c4, ultrachat, FILE.txt, FILE.jsonl or HUB_ID[:config[:split[:column]]]",
            remedy="check the name and the network, or use builtin",
        ) from error
    return Text(name, documents, revision)


def _column(where: str, rows: Any, column: str | None, limit: int) -> Iterator[str]:
    """The text column of `rows`, until `limit` characters are reached. Unnamed: `text`, `content`, or the only one."""
    iterator = iter(rows)
    first = next(iterator, None)
    if first is None:
        return
    texts = [name for name, value in first.items() if isinstance(value, str)]
    # Some rows of real datasets have no text, and the first may be one of them.
    fitting = {name for name, value in first.items() if isinstance(value, str | None)}
    if column is None:
        column = next((name for name in ("text", "content") if name in fitting), texts[0] if len(texts) == 1 else None)
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
            yield document.encode("utf-8", "replace").decode()  # JSON may hold lone surrogates; tokenizers refuse them


def _chats(where: str, rows: Any, column: str | None, limit: int) -> Iterator[str]:
    """The messages of `rows` as JSON, until their contents reach `limit` characters."""
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


def as_text(tokenizer: Any, text: Text) -> str:
    """All documents joined by blank lines; conversations through the tokenizer's own chat template.

    The template is a stranger's program: transformers runs it in jinja2's ImmutableSandboxedEnvironment, and what the
    sandbox forbids, or the template gets wrong, is a CalibrationError.
    """
    if not text.chats:
        return "\n\n".join(text.documents)
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            text.name, "the tokenizer has no chat template", remedy="use a text such as wikitext2, or an instruct model"
        )
    from jinja2 import TemplateError

    try:
        chats = [tokenizer.apply_chat_template(json.loads(chat), tokenize=False) for chat in text.documents]
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
        brief = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise CalibrationError(
            text.name, f"the model's chat template fails ({brief})", remedy="use a text such as wikitext2"
        ) from error
    return "\n\n".join(chats)


def has_tokenizer(source: Source) -> bool:
    return any(file.startswith(("tokenizer", "vocab", "spiece", "sentencepiece")) for file in source.side_files())


def load_tokenizer(source: Source) -> Any:
    """The checkpoint's own tokenizer."""
    from transformers import AutoTokenizer

    if not has_tokenizer(source):
        raise CalibrationError(
            source.name,
            "no tokenizer",
            expected="tokenizer files beside the weights",
            remedy="add them, or use --method rtn --eval-data none",
        )
    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=bool(source.code))
    except Exception as error:  # tokenizers raise bare Exception
        brief = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        if "trust_remote_code" in str(error) and not source.code:
            raise CalibrationError(
                source.name,
                "its tokenizer is code of its own, which is not run",
                expected="a tokenizer that transformers knows",
                remedy=f"{remedy(source, 'tokenizer_config.json')}; else convert it to tokenizer.json, or use "
                "--method rtn --eval-data none",
            ) from None
        raise CalibrationError(
            source.name,
            f"its tokenizer cannot be loaded ({brief})",
            remedy="its files are incomplete or damaged, or need a newer transformers",
        ) from error


def tokenize_pieces(tokenizer: Any, text: str, size: int = 2**16) -> Tensor:
    """Token ids [N] of a long text without special tokens, line by line in pieces of about `size` characters.

    A tokenizer keeps hundreds of bytes per token of one call; pieces keep that small.
    """
    ids, piece, length = [], [], 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        length += len(line)
        if length >= size:
            ids.append(tokenize(tokenizer, "".join(piece), special=False))
            piece, length = [], 0
    return torch.cat([*ids, tokenize(tokenizer, "".join(piece), special=False)])


def tokenize(tokenizer: Any, text: str, *, special: bool) -> Tensor:
    """Token ids [N] of one text in one tokenizer call."""
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def leading_bos(tokenizer: Any) -> int | None:
    """The BOS id, if this tokenizer starts every text with it."""
    first = tokenizer("a")["input_ids"][:1]
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and first == [bos] else None


def check_ids(ids: Tensor, vocab_size: int, where: str) -> None:
    if ids.numel() and int(ids.max()) >= vocab_size:
        raise CalibrationError(
            where,
            f"token id {int(ids.max())}",
            expected=f"ids below the embedding's {vocab_size}",
            remedy="the tokenizer belongs to another model",
        )


def calibration_windows(tokenizer: Any, spec: str, samples: int, seq_len: int, seed: int) -> Windows:
    """`samples` windows of `seq_len` tokens of the text (or a mixture `a:0.5,b:0.5` of texts), chosen by `seed`.

    Windows are drawn without overlap; where the text has room for at least half of them, they are spread evenly
    and overlap. Where the tokenizer starts texts with BOS, so does every other window: models lean on their
    first token, and text from the middle of a document alone would never show it.
    """
    parts = parse_mixture(spec)
    counts = split_samples(parts, samples)
    drawn = [_draw(tokenizer, name, n, seq_len, seed) for (name, _), n in zip(parts, counts, strict=True)]
    windows = torch.cat([ids for ids, _ in drawn])
    bos = leading_bos(tokenizer)
    if bos is not None:
        windows[::2, 1:] = windows[::2, :-1].clone()
        windows[::2, 0] = bos
    revisions = [text.revision for _, text in drawn]
    return Windows(
        windows,
        drawn[0][1].name
        if len(drawn) == 1
        else ",".join(f"{t.name}:{n}" for (_, t), n in zip(drawn, counts, strict=True)),
        ",".join(map(str, revisions)) if any(revisions) else None,
        "none" if bos is None else "every other",
    )


def _draw(tokenizer: Any, spec: str, samples: int, seq_len: int, seed: int) -> tuple[Tensor, Text]:
    """Windows [samples, T] of one text."""
    # Characters that surely hold enough tokens: eight per token, and twice that to choose from.
    text = load_text(spec, "train", samples * seq_len * 16)
    joined = as_text(tokenizer, text)
    if not joined.strip():
        raise CalibrationError(spec, "no text in it", remedy="choose another --calibration")
    ids = tokenize_pieces(tokenizer, joined)
    n_slots, enough = ids.numel() // seq_len, max(seq_len + 1, samples * seq_len // 2)
    if n_slots >= samples:
        starts = sorted(slot * seq_len for slot in random.Random(seed).sample(range(n_slots), samples))
    elif ids.numel() >= enough:
        starts = [int(x) for x in torch.linspace(0, ids.numel() - seq_len, samples, dtype=torch.float64)]
    else:
        raise CalibrationError(
            spec,
            f"{ids.numel()} tokens",
            expected=f"at least {enough} for {samples} windows of {seq_len}",
            remedy="use fewer --samples, a shorter --seq-len or more text",
        )
    return torch.stack([ids[start : start + seq_len] for start in starts]), text


def evaluation_windows(tokenizer: Any, spec: str, max_tokens: int | None, seq_len: int) -> Windows:
    """The GPTQ-style protocol: texts joined by blank lines, one tokenizer call, windows without overlap, no tail.

    At most `max_tokens` tokens (None: the whole text).
    """
    text = load_text(spec, "test", 10**12 if max_tokens is None else max_tokens * 16)
    joined = as_text(tokenizer, text)
    # Six characters a token are nearly always enough, and the ids of a text's head are the head of its ids.
    head = joined if max_tokens is None else joined[: 6 * max_tokens]
    ids = tokenize(tokenizer, head, special=True)
    if max_tokens is not None and ids.numel() < max_tokens + seq_len and len(head) < len(joined):
        ids = tokenize(tokenizer, joined, special=True)
    count = ids.numel() // seq_len
    if max_tokens is not None:
        count = min(count, max_tokens // seq_len)
    if count == 0:
        raise CalibrationError(
            spec, f"{ids.numel()} tokens", expected=f"at least one window of {seq_len}", remedy="more evaluation text"
        )
    bos = leading_bos(tokenizer)
    return Windows(
        ids[: count * seq_len].view(count, seq_len), text.name, text.revision, "none" if bos is None else "first"
    )

"""The checkpoint's own tokenizer: documents -> one text -> token ids."""

import json
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import CalibrationError
from llmquant.source.base import Source
from llmquant.text.corpus import Text

_WITHOUT = "`llmquant run --method rtn --eval-data none` needs none"
_TEKKEN = "tekken.json"  # Mistral's own form, which the package mistral-common reads
_VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.model"}


def has_tokenizer(source: Source) -> bool:
    beginnings = ("tokenizer", "vocab", "spiece", "sentencepiece", _TEKKEN)
    return any(file.startswith(beginnings) for file in source.side_files())


def load_tokenizer(source: Source) -> Any:
    """The checkpoint's own tokenizer. CalibrationError where it has none that can be loaded."""
    from transformers import AutoTokenizer, MistralCommonBackend

    if (own := source.tokenizer()) is not None:
        return own
    if not has_tokenizer(source):
        raise CalibrationError(
            source.name,
            "no tokenizer",
            expected="tokenizer files beside the weights",
            remedy=f"add them; {_WITHOUT}",
        )
    only_tekken = _TEKKEN in source.files() and not _VOCABULARIES.intersection(source.files())
    if only_tekken and find_spec("mistral_common") is None:
        raise CalibrationError(
            source.name,
            f"its tokenizer is {_TEKKEN}",
            expected="tokenizer.json, or the package that reads it",
            remedy="pip install mistral-common",
        )
    try:
        if only_tekken:
            return MistralCommonBackend.from_pretrained(source.folder)
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=bool(source.code))
    except UnicodeEncodeError:
        raise CalibrationError(
            source.name, "its path is not UTF-8, and tokenizers opens no other", remedy="rename the folder"
        ) from None
    except Exception as error:  # tokenizers raise bare Exception
        brief = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        if "trust_remote_code" in str(error) and not source.code:
            raise CalibrationError(
                source.name,
                "its tokenizer is code of its own, which is not run",
                expected="a tokenizer that transformers knows",
                remedy=f"{source.code_remedy('tokenizer_config.json')}; else convert it to tokenizer.json; {_WITHOUT}",
            ) from None
        raise CalibrationError(
            source.name,
            f"its tokenizer cannot be loaded ({brief})",
            remedy="its files are incomplete or damaged, or need a newer transformers",
        ) from error


def as_text(tokenizer: Any, text: Text) -> str:
    """All documents joined by blank lines. The tokenizer's own chat template makes text of conversations.

    The template is a program by a stranger. transformers runs it in jinja2's ImmutableSandboxedEnvironment; if the
    sandbox stops it, or it fails, that is a CalibrationError.
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


def tokenize_pieces(tokenizer: Any, text: str, size: int = 2**16) -> Tensor:
    """Token ids [N] of a long text without special tokens, in pieces of whole lines and about `size` characters.

    Pieces keep memory small: a tokenizer holds hundreds of bytes for each token of one call.
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
    """Token ids [N] of one text, from one call of the tokenizer; `special`: with the special tokens that it adds."""
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def leading_bos(tokenizer: Any) -> int | None:
    """The id of BOS if this tokenizer begins every text with it, else None."""
    first = tokenizer("a")["input_ids"][:1]
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and first == [bos] else None

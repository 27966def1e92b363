"""GGUF metadata -> a tokenizer of transformers: the inverse of `gguf/tokenizer.py`.

It is used for a file that is scored without a reference, and splits and merges as llama.cpp does. A splitter that is
not known here is refused, never guessed.
"""

from collections.abc import Mapping
from typing import Any

from llmquant.errors import CalibrationError, option
from llmquant.gguf.tokenizer import BYTE_LEVEL, CONTROL, USER_DEFINED

_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "gpt2": "gpt-2"}
_KEY = "tokenizer.ggml."
_REMEDY = f"name the original with {option('reference')}: its tokenizer is taken then"


def tokenizer_of(metadata: Mapping[str, Any], where: str) -> Any:
    """A tokenizer of transformers. CalibrationError if the metadata holds none, or one that is not known."""
    from transformers import PreTrainedTokenizerFast

    kind, tokens = metadata.get(f"{_KEY}model"), metadata.get(f"{_KEY}tokens")
    if kind not in ("gpt2", "llama") or not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens):
        raise CalibrationError(
            where, f"a tokenizer of kind {str(kind)[:40]!r}", expected="gpt2 or llama", remedy=_REMEDY
        )
    special = {name: _token(metadata, tokens, key) for name, key in _SPECIAL.items()}
    try:
        backend = _byte_level(metadata, tokens, where) if kind == "gpt2" else _sentencepiece(metadata, tokens, special)
        _add_tokens(backend, metadata, tokens)
        _add_ends(backend, metadata, special)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    except CalibrationError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        brief = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        raise CalibrationError(where, f"its tokenizer cannot be built ({brief})", remedy=_REMEDY) from error
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _token(metadata: Mapping[str, Any], tokens: list[str], key: str) -> str | None:
    index = metadata.get(f"{_KEY}{key}_token_id")
    return tokens[index] if isinstance(index, int) and 0 <= index < len(tokens) else None


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], where: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = str(metadata.get(f"{_KEY}pre"))
    known = {name: parts for parts, name in reversed(BYTE_LEVEL.items())}
    if (name := _ALIASES.get(pre, pre)) not in known:
        raise CalibrationError(where, f"the splitter {pre[:40]!r}", expected=" or ".join(known), remedy=_REMEDY)
    normalizer, steps, ignore_merges = known[name]
    merges = [tuple(merge.split(" ")) for merge in metadata[f"{_KEY}merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
    if normalizer is not None:
        backend.normalizer = getattr(normalizers, normalizer)()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step == "ByteLevel regex")
            if step.startswith("ByteLevel")
            else pre_tokenizers.Split(Regex(step), "isolated")
            for step in steps
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], special: Mapping[str, str | None]) -> Any:
    """llama.cpp joins the pair whose result has the highest score; transformers wants merges, made from the scores."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers.tokenization_utils_base import generate_merges

    scores = dict(zip(tokens, metadata[f"{_KEY}scores"], strict=True))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = generate_merges(vocabulary, scores)
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=special["unk_token"], byte_fallback=True, fuse_unk=True)
    )
    space = [normalizers.Prepend("\u2581")] if metadata.get(f"{_KEY}add_space_prefix", True) else []
    backend.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _add_tokens(backend: Any, metadata: Mapping[str, Any], tokens: list[str]) -> None:
    """Add control tokens and user-defined tokens, which are never split."""
    from tokenizers import AddedToken

    types = metadata.get(f"{_KEY}token_type") or []
    for kind in (CONTROL, USER_DEFINED):
        special = kind == CONTROL
        own = [
            AddedToken(token, normalized=False, special=special)
            for token, its in zip(tokens, types, strict=False)
            if its == kind
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(own)


def _add_ends(backend: Any, metadata: Mapping[str, Any], special: Mapping[str, str | None]) -> None:
    """Put BOS before a text and EOS after it if the file says so; if it says nothing, do as llama.cpp does."""
    from tokenizers.processors import TemplateProcessing

    pre = str(metadata.get(f"{_KEY}pre"))
    starts = metadata[f"{_KEY}model"] == "llama" or _ALIASES.get(pre, pre) == "llama-bpe"
    bos = special["bos_token"] if metadata.get(f"{_KEY}add_bos_token", starts) else None
    eos = special["eos_token"] if metadata.get(f"{_KEY}add_eos_token", False) else None
    around = [token for token in (bos, eos) if token is not None]
    if around:
        single = " ".join(part for part in (bos, "$A", eos) if part is not None)
        ids = [(token, backend.token_to_id(token)) for token in dict.fromkeys(around)]
        backend.post_processor = TemplateProcessing(single=single, special_tokens=ids)

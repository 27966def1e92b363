"""tokenizer.json -> GGUF metadata. A tokenizer whose structure is not recognised is refused.

llama.cpp does not run tokenizer.json. It splits text by code of its own, which a name selects (`tokenizer.ggml.pre`).
The name is found here by comparing the pre-tokenizer's steps with known ones. A vocabulary with byte fallback and
without a byte-level step is SentencePiece's ("llama"); its scores are minus the ranks of the merges.
"""

import json
import re
from collections import Counter
from typing import Any

from llmquant.errors import FormatError, option
from llmquant.source.base import Source

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEMPLATES = "additional_chat_templates/"
# (normalizer, pre-tokenizer steps, ignore_merges) -> pre
BYTE_LEVEL: dict[tuple[str | None, tuple[str, ...], bool], str] = {
    (None, ("ByteLevel regex",), False): "gpt-2",
    (None, (_WORDS + r"\p{N}{1,3}" + _REST, "ByteLevel"), True): "llama-bpe",
    ("NFC", (_WORDS + r"\p{N}" + _REST, "ByteLevel"), False): "qwen2",
    (None, (_WORDS + r"\p{N}" + _REST, "ByteLevel"), False): "qwen2",
}


def tokenizer_metadata(source: Source, vocab_size: int, pre: str | None) -> dict[str, Any]:
    """The entries `tokenizer.*`. `pre` names llama.cpp's splitter; without it the name is found by the structure.

    FormatError for a tokenizer that is not recognised.
    """
    table = _json(source, "tokenizer.json")
    settings = _json(source, "tokenizer_config.json") if "tokenizer_config.json" in source.files() else {}
    model = table.get("model") or {}
    kind = model.get("type", "BPE" if "merges" in model else None)  # GPT-2's own file does not say it
    if kind != "BPE":
        raise FormatError("tokenizer.json", f"a {kind} model", expected="BPE", remedy=f"use another {option('format')}")
    steps = _steps(table)
    byte_level = any(step.startswith("ByteLevel") for step in steps)
    tokens, types = _tokens(table, model, vocab_size)
    meta: dict[str, Any] = {"tokenizer.ggml.model": "gpt2" if byte_level else "llama"}
    if byte_level:
        meta["tokenizer.ggml.pre"] = pre or _recognise(table, steps, model)
        meta |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
        meta["tokenizer.ggml.merges"] = [" ".join(_pair(merge)) for merge in model["merges"]]
    else:
        space = _sentencepiece_space(table, model, steps, named=pre is not None)
        meta["tokenizer.ggml.pre"] = pre or "default"
        meta |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": _scores(tokens, model)}
        meta |= {"tokenizer.ggml.token_type": types, "tokenizer.ggml.add_space_prefix": space}
    return meta | _special(source, table, settings, tokens)


def _json(source: Source, file: str) -> dict[str, Any]:
    if file not in source.files():
        raise FormatError(
            source.name, f"no {file}", expected="a fast tokenizer", remedy=f"use another {option('format')}"
        )
    loaded: dict[str, Any] = json.loads(source.local(file).read_text("utf-8"))
    return loaded


def _steps(table: dict[str, Any]) -> tuple[str, ...]:
    """One word for each step of the pre-tokenizer: its pattern, `ByteLevel`, `ByteLevel regex`, or the step's type."""
    whole = table.get("pre_tokenizer") or {"type": "Sequence", "pretokenizers": []}
    steps = []
    for step in whole["pretokenizers"] if whole["type"] == "Sequence" else [whole]:
        if step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            steps.append("ByteLevel regex" if step.get("use_regex", True) else "ByteLevel")
        elif step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            steps.append(step["pattern"].get("Regex", "a string"))
        else:
            steps.append(step["type"] + " with options")
    return tuple(steps)


def _recognise(table: dict[str, Any], steps: tuple[str, ...], model: dict[str, Any]) -> str:
    normalizer = (table.get("normalizer") or {}).get("type")
    known = BYTE_LEVEL.get((normalizer, steps, bool(model.get("ignore_merges"))))
    if known is None:
        raise FormatError(
            "tokenizer.json",
            f"a byte-level BPE that is not known (normalizer {normalizer}, steps {', '.join(steps)[:120]})",
            expected=f"one of {', '.join(dict.fromkeys(BYTE_LEVEL.values()))}",
            remedy="name llama.cpp's splitter with export --gguf-pre, and compare token ids",
        )
    return known


def _sentencepiece_space(table: dict[str, Any], model: dict[str, Any], steps: tuple[str, ...], *, named: bool) -> bool:
    """Whether a space is put before the text. FormatError for steps that SentencePiece does not have."""
    normalizer = table.get("normalizer") or {}
    parts = normalizer.get("normalizers", [normalizer] if normalizer else [])
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prepends = {"type": "Prepend", "prepend": "\u2581"}
    metaspace = table.get("pre_tokenizer") or {}
    if model.get("byte_fallback"):
        if parts == [prepends, replaces] and not steps:
            return True
        if parts == [replaces] and (not steps or metaspace.get("pattern") == {"String": " "}):
            return False
        if not parts and metaspace.get("type") == "Metaspace" and metaspace.get("split") is False:
            if (scheme := metaspace.get("prepend_scheme")) != "never" and not named:
                raise FormatError(
                    "tokenizer.json",
                    f"Metaspace, prepend_scheme {scheme!r}: llama.cpp's ids differ where a text begins with a space",
                    remedy="accept that with export --gguf-pre default",
                )
            return bool(scheme != "never")
    raise FormatError(
        "tokenizer.json",
        "neither a byte-level BPE nor one of SentencePiece's",
        expected="a ByteLevel step, or byte fallback with spaces as \u2581",
        remedy=f"use another {option('format')}",
    )


def _tokens(table: dict[str, Any], model: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Tokens and their types, by id. Ids below `vocab_size` without a token are marked as unused.

    Texts are unique, else llama.cpp ends with an abort: an added token with the text of another is that token, as in
    transformers.
    """
    types = [UNUSED] * vocab_size
    added = {model["vocab"].get(item["content"], item["id"]): item for item in table.get("added_tokens", [])}
    named = {index: text for text, index in model["vocab"].items()} | {i: item["content"] for i, item in added.items()}
    if (largest := max(named)) >= vocab_size:
        raise FormatError(
            "tokenizer.json", f"a token {largest}", expected=f"ids below the {vocab_size} rows of the embedding"
        )
    taken = set(named.values())
    if len(taken) < len(named):
        twice, count = Counter(named.values()).most_common(1)[0]
        raise FormatError("tokenizer.json", f"{count} tokens are {twice!r}", expected="one of each")
    tokens = [_unlike(f"[PAD{i}]", taken) for i in range(vocab_size)]
    for index, text in named.items():
        tokens[index] = text
        if index in added:
            types[index] = CONTROL if added[index].get("special") else USER_DEFINED
        elif model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[index] = BYTE
        else:
            types[index] = NORMAL
        if text == model.get("unk_token"):
            types[index] = UNKNOWN
    return tokens, types


def _unlike(text: str, taken: set[str]) -> str:
    return _unlike(f"{text}_", taken) if text in taken else text


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _scores(tokens: list[str], model: dict[str, Any]) -> list[float]:
    """Scores from ranks: SentencePiece first joins the pair with the highest score, BPE that with the lowest rank."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(_pair(merge)), rank)
    return [-float(ranks.get(token, len(model["merges"]))) for token in tokens]


def _special(source: Source, table: dict[str, Any], settings: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    ids = {token: index for index, token in enumerate(tokens)}
    meta: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if found := _ids_of(name, source, settings, ids):
            meta[f"tokenizer.ggml.{key}_token_id"] = found[0]
    # llama.cpp ends a generation at these, too.
    for key, index in zip(("eot", "eom"), _ids_of("eos", source, settings, ids)[1:], strict=False):
        meta[f"tokenizer.ggml.{key}_token_id"] = index
    first, last = _template(table)
    # Always written, because llama.cpp switches them on by itself for some splitters.
    for flag, token, key in (("add_bos_token", first, "bos"), ("add_eos_token", last, "eos")):
        meta[f"tokenizer.ggml.{flag}"] = token is not None
        if token is not None and ids.get(token) != meta.get(f"tokenizer.ggml.{key}_token_id"):
            raise FormatError("tokenizer.json", f"adds {token!r}", expected=f"the {key} token, which llama.cpp can add")
    return meta | _chat_templates(source, settings)


def _ids_of(name: str, source: Source, settings: dict[str, Any], ids: dict[str, int]) -> list[int]:
    """The ids of a special token, first that which the tokenizer names, then those at which a model stops.

    Of the files that may say it: tokenizer_config.json, special_tokens_map.json (texts), generation_config.json,
    config.json (ids, one or several; -1 stands for none).
    """
    found: list[Any] = []
    for said in (settings, _side(source, "special_tokens_map.json")):
        text = said.get(f"{name}_token")
        found.append(ids.get(text.get("content") if isinstance(text, dict) else text))  # type: ignore[arg-type]
    for said in (_side(source, "generation_config.json"), source.config):
        value = said.get(f"{name}_token_id")
        found += value if isinstance(value, list) else [value]
    return list(dict.fromkeys(index for index in found if type(index) is int and 0 <= index < len(ids)))


def _side(source: Source, file: str) -> dict[str, Any]:
    """A JSON file of the checkpoint; {} where it has none."""
    return source.json(file) if file in source.files() else {}


def _template(table: dict[str, Any]) -> tuple[str | None, str | None]:
    """The special tokens that the post-processor puts before and after a text; None where there is none."""
    whole = table.get("post_processor") or {}
    for part in whole.get("processors", [whole]):
        if part.get("type") == "TemplateProcessing":
            single = [next(iter(piece.items())) for piece in part["single"]]
            text = [kind for kind, _ in single].index("Sequence")
            before, after = single[:text], single[text + 1 :]
            if len(before) > 1 or len(after) > 1:
                raise FormatError("tokenizer.json", "several special tokens around a text", expected="one at most")
            return (before[0][1]["id"] if before else None), (after[0][1]["id"] if after else None)
        if part.get("type") not in (None, "ByteLevel"):
            raise FormatError("tokenizer.json", f"post-processor {part['type']}", expected="TemplateProcessing")
    return None, None


def _chat_templates(source: Source, settings: dict[str, Any]) -> dict[str, Any]:
    """The default template, and others by name: from files of their own, else from tokenizer_config.json."""
    files, found = source.files(), dict[str, Any]()
    told = settings.get("chat_template") or _side(source, "chat_template.json").get("chat_template")
    if isinstance(told, list):
        found = {str(entry.get("name")): entry.get("template") for entry in told if isinstance(entry, dict)}
    elif isinstance(told, str):
        found = {"default": told}
    own = {"default": "chat_template.jinja"} if "chat_template.jinja" in files else {}
    own |= {
        file[len(_TEMPLATES) : -len(".jinja")]: file
        for file in files
        if re.fullmatch(_TEMPLATES + r"[^/]+\.jinja", file)
    }
    found |= {name: source.local(file).read_text("utf-8") for name, file in own.items()}
    named = {re.sub(r"\W", "_", name, flags=re.ASCII): text for name, text in found.items() if isinstance(text, str)}
    default = named.pop("default", None)
    meta: dict[str, Any] = {} if default is None else {"tokenizer.chat_template": default}
    if named:
        meta["tokenizer.chat_templates"] = sorted(named)
    return meta | {f"tokenizer.chat_template.{name}": named[name] for name in sorted(named)}

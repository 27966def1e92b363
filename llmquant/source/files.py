"""Which files of a checkpoint hold its weights, which go along with the output, and which stay behind.

Weights are what stock transformers would load, in its order: the file that `transformers_weights` of the config names,
model.safetensors, the shards of the index; then, as a download without its index leaves them, a complete set of
numbered shards. Beside them goes along what is data, small and of use to a loader: tokenizer, templates, processors,
licences. Everything else is listed with the reason why it is not in the output.
"""

import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from llmquant.errors import SourceError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_NAMED = "transformers_weights"  # the key of a config
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_SAID = 3  # files of one kind in a line of the log
_POINTER = b"version https://git-lfs.github.com/spec/"
_LONGEST_POINTER = 1024

_LICENCE = re.compile(
    r"[^/]*(licen[cs]e|notice|use[-_]policy|copying|copyright)[^/]*|licen[cs]es?/[^/]*", re.IGNORECASE
)
# What no loader of a tokenizer or template works without. A link out of the checkpoint in its place is an error.
_NEEDED = re.compile(
    r"(tokenizer[^/]*\.(json|model[^/]*)|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|[^/]*\.(model|tiktoken)|generation_config\.json|chat_template\.(jinja|json)"
    r"|additional_chat_templates/[^/]*\.jinja)"
)
# Data that some loader reads: configs of processors and of other libraries, templates.
_USEFUL = re.compile(r"[^/]*\.(json|jinja)|\d_\w+/config\.json")
_MOST_BYTES = 8 * 2**20  # of a file that is only useful
# What a run writes itself, or what speaks of weights that it does not write.
_ANEW = re.compile(
    r"config\.json|README\.md|(report|cost|manifest)\.json|report\.html|[^/]*\.index\.json|"
    r"(quantize|quant|hf_quant|quantization)_config\.json|adapter_config\.json"
)
# Records of a training and of its evaluation.
_TRAINING = re.compile(r"(trainer_state|training_args|(all|train|eval|test|predict)_results|dataset_infos?)\.json")
_USELESS = "of no use to a loader"
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|gguf|onnx|onnx_data|h5|msgpack|tflite|npz|mlmodel)")
_CODE = re.compile(r"(?!__init__\.py$).*\.(py|ipynb|sh|js|so|dll|exe)")  # but what makes a folder a package


def weight_files(where: str, files: Collection[str], config: dict[str, Any]) -> str | list[str]:
    """The index, or the files that hold the weights where none is read. SourceError where there are none.

    >>> weight_files("m", ["model.safetensors", "model.safetensors.index.json"], {})
    ['model.safetensors']
    """
    if (named := config.get(_NAMED)) is not None:
        if (
            not isinstance(named, str)
            or named not in files
            or not named.endswith((".safetensors", ".safetensors.index.json"))
        ):
            raise SourceError(f"{where}: config.json: {_NAMED}", f"names {str(named)[:80]!r}", expected="weights there")
        return named if named.endswith(".json") else [named]
    if SINGLE in files:
        return [SINGLE]
    if INDEX in files:
        return INDEX
    if shards := {file: match for file in sorted(files) if (match := _SHARD.fullmatch(file))}:
        wanted = max(int(match[2]) for match in shards.values())
        if len(shards) != wanted or any(int(match[2]) != wanted for match in shards.values()):
            raise SourceError(
                where, f"{len(shards)} shards and no {INDEX}", expected=f"all {wanted}", remedy="download it again"
            )
        return list(shards)
    raise _no_weights(where, sorted(files))


def _no_weights(where: str, files: list[str]) -> SourceError:
    expected = f"{SINGLE} or {INDEX}"
    if "adapter_config.json" in files:
        return SourceError(
            where,
            "is an adapter without the model's own weights",
            remedy="merge it (peft: merge_and_unload), save that",
        )
    if others := [file for file in files if file.endswith(".safetensors")]:
        return SourceError(
            where,
            f"its weights lie in {others[0]!r}, where transformers does not look",
            expected=expected,
            remedy=f"rename it, or name it in config.json as {_NAMED}",
        )
    pickles = [file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    return SourceError(
        where,
        f"only pickle weights ({pickles[0]!r})" if pickles else "no safetensors weights",
        expected=expected,
        remedy="use a revision with safetensors; pickles are never loaded",
    )


def refuse_pointer(path: Path, where: str) -> None:
    """SourceError where `path` is the short text that git leaves in the place of a large file."""
    if path.stat().st_size > _LONGEST_POINTER:
        return
    with path.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise SourceError(where, "is a git-LFS pointer, not the file itself", remedy="fetch it: git lfs pull")


def is_licence(file: str) -> bool:
    """Whether a file says under which terms the model may be used."""
    return bool(_LICENCE.fullmatch(file)) and not _CODE.fullmatch(file)


def sort_out(
    files: Iterable[str], weights: Collection[str], code: Collection[str], size: Callable[[str], int | None]
) -> tuple[list[str], dict[str, str]]:
    """The files that go along with the output, and why others of the checkpoint do not. Hidden files are not named.

    weights   files that hold the checkpoint's tensors
    code      files of Python code that may be run
    size      bytes of a file; None where it is a link out of the checkpoint
    """
    along, behind = [], {}
    for file in files:
        if file in weights or _ANEW.fullmatch(file) or any(part.startswith(".") for part in file.split("/")):
            continue
        if file in code:
            along.append(file)
        elif why := _why_behind(file, size):
            behind[file] = why
        else:
            along.append(file)
    return along, behind


def _why_behind(file: str, size: Callable[[str], int | None]) -> str:
    if _NEEDED.fullmatch(file):
        return ""
    if _WEIGHTS.fullmatch(file):
        return "weights that are not loaded"
    if _CODE.fullmatch(file):
        return "code"
    if _TRAINING.fullmatch(file):
        return "a record of the training"
    if is_licence(file):
        return ""
    if not _USEFUL.fullmatch(file):
        return _USELESS
    if (nbytes := size(file)) is None:
        return "a link that leads out of the checkpoint"
    return f"{nbytes / 1e6:.0f} MB" if nbytes > _MOST_BYTES else ""


def said_of_left(behind: dict[str, str]) -> str:
    """What the log says of files that stay behind and that somebody may miss; "" where there are none.

    >>> said_of_left({"a.bin": "weights that are not loaded", "b.py": "code"})
    'left behind: a.bin (weights that are not loaded), b.py (code)'
    """
    by_reason: dict[str, list[str]] = {}
    for file, reason in behind.items():
        if reason == _USELESS:
            continue
        by_reason.setdefault(reason, []).append(file)
    said = []
    for reason, files in by_reason.items():
        more = f" and {len(files) - _SAID} more" if len(files) > _SAID else ""
        said.append(f"{', '.join(files[:_SAID])}{more} ({reason})")
    return f"left behind: {', '.join(said)}" if said else ""

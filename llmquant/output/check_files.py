"""The files of a finished folder: those of its manifest, those of the original, and a config that fits the ledger.

The ledger of report.json says what was quantized and how; config.json is what loaders are told of it.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmquant.errors import SourceError, VerifyError, option
from llmquant.formats.base import in_block
from llmquant.formats.facts import FACTS
from llmquant.output.told import check_schemes
from llmquant.report.ledger import TensorRow
from llmquant.run_dir.manifest import COST, MANIFEST, sha256
from llmquant.source.base import Source
from llmquant.source.files import is_licence
from llmquant.source.remote_code import code_files, references

CARD = "README.md"
_AGAIN = "fetch or make it again"
# What desktops and editors leave, and what people put beside a model; without _WORDS, which tokenizers read.
_HARMLESS = re.compile(
    r"(.*/)?(\.[^/]*(/.*)?|Thumbs\.db|desktop\.ini|[^/]*(~|\.(md|txt|log|pdf|html|csv|bak|orig|swp|png|jpe?g|gif|svg|webp)))",
    re.IGNORECASE,
)
_WORDS = re.compile(r"(.*/)?(vocab|merges)[^/]*")
# Files of an output that are neither weights nor the original's.
_OURS = {"config.json", "model.safetensors.index.json", CARD, "report.json", "report.html", COST, MANIFEST}
# How the ledger begins to say why a linear was left dense.
_KEPT = ("--ignore ", "rule ", "router or gate", "narrow linear", "small, and ")
_UNFIT = "(--unfit keep)"  # or how it ends
_NO_LINEAR = re.compile(r"embed|norm|wte|wpe", re.IGNORECASE)
# The list of linears that stay dense, by format; without it, loaders expect all of them to be quantized.
_DENSE_LISTS = {"compressed-tensors": "ignore", "awq": "modules_to_not_convert"}


def read_json(root: Path, name: str) -> dict[str, Any]:
    """A JSON file of a finished folder; VerifyError where it cannot be read."""
    try:
        found: dict[str, Any] = json.loads((root / name).read_bytes())
    except (OSError, ValueError) as error:
        raise VerifyError(str(root / name), f"cannot be read ({error})", expected="a folder llmquant wrote") from None
    return found


def read_manifest(root: Path) -> dict[str, Any]:
    """manifest.json of a finished folder: a table of files and one of tensors, or VerifyError."""
    found = read_json(root, MANIFEST)
    tables = [found.get(key) for key in ("files", "tensors")] if isinstance(found, dict) else [None]
    if not all(isinstance(table, dict) for table in tables) or not all(
        isinstance(entry, dict) for entry in found["files"].values()
    ):
        raise VerifyError(
            str(root / MANIFEST), "has no tables of files and tensors", expected="what llmquant writes there"
        )
    return found


def is_harmless(file: str) -> bool:
    """Whether no loader reads a file that somebody put beside a checkpoint: notes, pictures, what desktops leave.

    >>> [is_harmless(f) for f in (".DS_Store", "Thumbs.db", "notes.md", "extra.safetensors", "vocab.txt", "x.py")]
    [True, True, True, False, False, False]
    """
    return file not in _OURS and bool(_HARMLESS.fullmatch(file)) and not _WORDS.fullmatch(file)


@dataclass(frozen=True)
class Files:
    """The files of a finished folder.

    added          the run did not write them, and no loader reads them
    card_changed   somebody wrote into the card: that is everybody's right, and no part of the model
    """

    manifest: dict[str, Any]
    added: tuple[str, ...]
    card_changed: bool


def verify_files(root: Path) -> Files:
    """VerifyError unless the files in `root` are those of its manifest, byte for byte.

    Of cost.json, which differs from run to run, the manifest has no hash: it must be there, and so must the card. What
    no loader reads may lie beside them.
    """
    manifest = read_manifest(root)
    table: dict[str, dict[str, Any]] = manifest["files"]
    present = set(_files_in(root)) - {MANIFEST}
    added = {name for name in present - table.keys() if is_harmless(name)}
    if odd := sorted((present ^ table.keys()) - added):
        got, remedy = ("is missing", _AGAIN) if odd[0] in table else ("is not in the manifest", "move it elsewhere")
        raise VerifyError(odd[0], got, remedy=remedy)
    for name, entry in table.items():
        if name in (COST, CARD):
            continue
        if (size := (root / name).stat().st_size) != entry.get("bytes"):
            raise VerifyError(name, f"{size} bytes", expected=str(entry.get("bytes")), remedy=_AGAIN)
        if sha256(root / name) != entry.get("sha256"):
            raise VerifyError(name, "its bytes have changed", remedy=_AGAIN)
    card_changed = CARD in table and sha256(root / CARD) != table[CARD].get("sha256")
    return Files(manifest, tuple(sorted(added)), card_changed)


def _files_in(root: Path) -> list[str]:
    """Names of all files, but for what a download from the Hub leaves."""
    names = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
    return [name for name in names if not name.startswith((".git", ".cache/"))]


def check_config(root: Path, format_name: str, rows: Sequence[TensorRow]) -> None:
    """What loaders are told fits the ledger: bits, group sizes, and which linears stay dense."""
    config = read_json(root, "config.json")
    told = {key: config[key] for key in ("quantization_config", "quantization") if config.get(key)}
    if FACTS[format_name].dense:
        if told:
            raise VerifyError("config.json", "tells of a quantization", expected=f"none, as in format {format_name}")
        return
    # mlx-lm reads the second, the Hub shows the first.
    for key in ("quantization_config", "quantization") if format_name == "mlx" else ("quantization_config",):
        if not isinstance(told.get(key), dict):
            raise VerifyError("config.json", "says nothing of the quantization", expected=key)
    for table in told.values():
        _check_told(table, format_name, rows)


def _check_told(told: Any, format_name: str, rows: Sequence[TensorRow]) -> None:
    schemes = {row.scheme for row in rows if row.scheme is not None}
    bits, sizes = {scheme.bits for scheme in schemes}, {scheme.group_size for scheme in schemes}
    right, entries = {"bits": bits, "num_bits": bits, "group_size": sizes}, list(_entries(told))
    for name, value in entries:
        if name in right and value not in right[name]:
            raise VerifyError(f"config.json: {name}", str(value), expected=" or ".join(map(str, sorted(right[name]))))
    if not {"bits", "num_bits"} & {name for name, _ in entries}:
        raise VerifyError("config.json", "does not say how many bits", expected=" or ".join(map(str, sorted(bits))))
    try:
        check_schemes(told, rows)
    except (KeyError, TypeError, AttributeError, re.error) as error:
        raise VerifyError("config.json: quantization_config", f"cannot be read ({error!r})") from None
    if format_name in _DENSE_LISTS:
        listed = told.get(_DENSE_LISTS[format_name]) or []
        dense = [row for row in rows if _stays_dense(row, FACTS[format_name].patterns)]
        _check_ignored(f"config.json: {_DENSE_LISTS[format_name]}", listed, rows, dense)
    if format_name == "gptq":
        _check_kept("config.json: modules_in_block_to_quantize", told.get("modules_in_block_to_quantize"), rows)


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Names and values at all levels of a config."""
    for name, item in value.items() if isinstance(value, dict) else ():
        yield name, item
        yield from _entries(item)


def _stays_dense(row: TensorRow, everywhere: bool) -> bool:
    """Whether this is the weight of a linear that was left as it was, by what the ledger says.

    everywhere   those that may be one of another class, too
    """
    other = row.reason.startswith("not a parameter") and len(row.shape) == 2 and not _NO_LINEAR.search(row.name)
    said = row.reason.startswith("outside the decoder blocks (Linear)") or _is_kept(row)
    return row.name.endswith(".weight") and (said or (everywhere and other))


def _is_kept(row: TensorRow) -> bool:
    return row.reason.startswith(_KEPT) or row.reason.endswith(_UNFIT)


def _check_ignored(where: str, listed: list[str], rows: Sequence[TensorRow], dense: Sequence[TensorRow]) -> None:
    """The list names every linear that was left dense, and none that was quantized: by its name, or by a pattern.

    Modules may be named otherwise in the model than in the checkpoint: before the path of a quantized one; a dense one,
    if its last part is in no name of the list, may stand there as one whose last part is in no row.
    """
    try:
        patterns = [re.compile(name.removeprefix("re:")) for name in listed if name.startswith("re:")]
    except re.error as error:
        raise VerifyError(where, f"cannot be read ({error})") from None
    ignored = [name for name in listed if not name.startswith("re:")]
    for row in rows:
        if row.action == "quantized":
            module = row.of_module
            same = (
                n for n in ignored if n == module or n.endswith(f".{module}") or ("." in n and module.endswith(f".{n}"))
            )
            if any(same) or any(pattern.match(module) for pattern in patterns):
                raise VerifyError(where, f"names {module}, which is quantized")
    leaves = {name.rpartition(".")[2] for name in ignored}
    modules = [row.of_module for row in dense if not any(pattern.match(row.of_module) for pattern in patterns)]
    unnamed = [module for module in modules if module.rpartition(".")[2] not in leaves]
    known = {row.name.removesuffix(".weight").rpartition(".")[2] for row in rows}
    if len(unnamed) > len([name for name in ignored if name.rpartition(".")[2] not in known]):
        raise VerifyError(where, f"does not name {unnamed[0]}, which is not quantized")


def _check_kept(where: str, listed: Any, rows: Sequence[TensorRow]) -> None:
    """The list names the linears of a block that were quantized; without one, none was left dense."""
    dense = [row.name for row in rows if row.action == "copied" and _is_kept(row)]
    quantized = {inner[1] for row in rows if row.action == "quantized" and (inner := in_block(row.of_module))}
    if listed is None and dense:
        raise VerifyError(where, f"is missing, and {dense[0]} is not quantized")
    if listed is not None and (odd := sorted({name for names in listed for name in names} ^ quantized)):
        raise VerifyError(where, f"{'does not name' if odd[0] in quantized else 'names'} {odd[0]}")


def check_code(root: Path, trusted: bool) -> None:
    """Loaders are led to code by the user's word only, and then all of it is there."""
    if trusted:
        try:
            files = {path.name for path in root.iterdir()}
            code_files(root.name, files, lambda file: read_json(root, file), lambda file: root / file)
        except SourceError as error:
            raise VerifyError(str(root), error.message(option)) from None
    elif any(references(read_json(root, "config.json"))):
        raise VerifyError(
            "config.json", f"names code (auto_map), and the run was not told {option('trust_remote_code')}"
        )


def check_beside(root: Path, format_name: str, source: Source, exports: Sequence[str] = ()) -> None:
    """Side files and config are the original's, and there is nothing else, but for the folders of `exports`."""
    gguf = format_name == "gguf"  # which has no other files that a loader reads
    wanted = [file for file in source.side_files() if not gguf or is_licence(file)]
    for file in wanted:
        if not (root / file).is_file() or sha256(root / file) != sha256(source.local(file)):
            raise VerifyError(file, f"is not that of {source.name}")
    files = [name for name in _files_in(root) if name.partition("/")[0] not in exports]
    weights = ".gguf" if gguf else ".safetensors"
    known = {*wanted, *_OURS}
    if odd := sorted(n for n in files if n not in known and not n.endswith(weights) and not is_harmless(n)):
        raise VerifyError(odd[0], f"is not in {source.name}", remedy="move it elsewhere")
    if not gguf:
        _check_same(read_json(root, "config.json"), source, flat=format_name == "mlx")


def _check_same(config: dict[str, Any], source: Source, *, flat: bool) -> None:
    """`flat`: rope is at the top, too, where mlx-lm looks for it."""
    wanted = dict(source.safe_config)
    if flat and isinstance(rope := wanted.get("rope_parameters"), dict):
        wanted = {"rope_theta": rope.get("rope_theta"), "rope_scaling": rope} | wanted
        wanted = {name: value for name, value in wanted.items() if name in config or name in source.safe_config}
    for name in sorted((config.keys() | wanted.keys()) - {"quantization_config", "quantization"}):
        if name not in wanted or config.get(name) != wanted[name]:
            expected = str(wanted[name])[:80] if name in wanted else ""
            raise VerifyError(f"config.json: {name}", "is not that of the original", expected=expected)

"""Is a finished folder still what was computed? `llmquant verify`: manifest, key set, codes and scales, side files.

The bytes are read by the NumPy readers of `output/verify.py` and `output/verify_gguf.py`, which share no code with
what wrote them.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmquant.checkpoint import open_original
from llmquant.errors import SourceError, VerifyError, option
from llmquant.formats import DENSE, FORMATS, LinearSpec
from llmquant.log import SILENT, Log, progress_of
from llmquant.output.verify import DECODERS, Decoded, Place, digest, read_places
from llmquant.output.verify_gguf import ROPE, gguf_places
from llmquant.paths import expanded
from llmquant.quant.grid import QuantScheme
from llmquant.run_dir.manifest import COST, MANIFEST, sha256
from llmquant.source.base import Source
from llmquant.source.remote_code import code_files, references

OLD_REPORT = "the report is of an older version and does not say which layer has their weights"


@dataclass(frozen=True)
class Checked:
    """What was found to be in order.

    against        the original that tensors were compared with
    not_compared   tensors that could not be compared with it: how many, by reason
    """

    files: int
    quantized: int
    copied: int
    against: str | None
    not_compared: dict[str, int]


def verify_folder(folder: str | Path, original: str | Path | None = None, log: Log = SILENT) -> Checked:
    """VerifyError unless everything in `folder` is what the run that wrote it computed.

    With `original` also: side files, config and copied tensors equal the original's, and every quantized tensor is as
    far from it as the report says (||W - W^||^2 / ||W||^2, to one part in a thousand).
    """
    root = expanded(folder, VerifyError)
    n_files, manifest = verify_files(root), read_json(root, MANIFEST)
    progress_of(log).line(f"{n_files} files are those of the manifest")
    report = read_json(root, "report.json")
    format_name = report["recipe"]["format"]
    trusted = bool(report["compute"].get("trust_remote_code"))
    source = None if original is None else open_original(original, trust_remote_code=trusted)  # runs nothing
    places = gguf_places(root) if format_name == "gguf" else read_places(root)
    known, expected = manifest["tensors"], set[str]()
    errors = {layer["name"]: layer["weight_error"] for layer in report["layers"]}
    not_compared = Counter[str]()
    rows = report["tensors"] if format_name != "gguf" else _rows_of_gguf(report["tensors"], known, places)
    for row in rows:
        spec = _spec(row)
        names = {row["name"]} if spec is None else set(FORMATS[format_name].layout(spec))
        if missing := sorted(names - places.keys()):
            raise VerifyError(missing[0], "is missing", expected=f"all tensors of {row['name']}")
        expected |= names
        _check_row(row, spec, places, format_name, known)
        if source is not None and row["name"] != ROPE:
            if spec is None:
                _check_copied(row["name"], places[row["name"]], format_name, source)
            elif (said := _said(row, errors)) is None:
                not_compared[OLD_REPORT] += 1
            else:
                _check_quantized(spec, places, format_name, source, said)
    if odd := sorted(places.keys() - expected):
        raise VerifyError(odd[0], "is in no row of the report's ledger")
    if source is not None:
        _check_ledger(source, {row["name"] for row in report["tensors"]} - {ROPE})
    if format_name != "gguf":  # which has no other files that a loader reads
        _check_code(root, trusted)
        check_config(root, format_name, report["tensors"])
        if source is not None:
            _check_beside(root, source)
    quantized = sum(row["action"] == "quantized" for row in rows)
    against = None if source is None else source.name
    return Checked(n_files, quantized, len(rows) - quantized, against, dict(not_compared))


def _rows_of_gguf(rows: list[dict[str, Any]], known: dict[str, str], places: dict[str, Place]) -> list[dict[str, Any]]:
    """The ledger of what is in a GGUF file: without a tied head; with the factors of rope, which an export computes."""
    kept = [row for row in rows if row["name"] in known]
    if ROPE in known and ROPE in places and all(row["name"] != ROPE for row in kept):
        kept.append({"name": ROPE, "action": "copied", "shape": list(places[ROPE].shape)})
    return kept


def read_json(root: Path, name: str) -> dict[str, Any]:
    """A JSON file of a finished folder; VerifyError where it cannot be read."""
    try:
        found: dict[str, Any] = json.loads((root / name).read_bytes())
    except (OSError, ValueError) as error:
        raise VerifyError(str(root / name), f"cannot be read ({error})", expected="a folder llmquant wrote") from None
    return found


def verify_files(root: Path) -> int:
    """VerifyError unless the files in `root` are those of its manifest, byte for byte; how many they are."""
    table: dict[str, dict[str, Any]] = read_json(root, MANIFEST)["files"]
    present = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} - {MANIFEST}
    hidden = {name for name in present if name.startswith((".git", ".cache/"))}  # what a download leaves
    if odd := sorted((present - hidden) ^ table.keys()):
        raise VerifyError(odd[0], "is not in the manifest" if odd[0] in present else "is missing")
    for name, entry in table.items():
        if name == COST:
            continue
        if (size := (root / name).stat().st_size) != entry["bytes"]:
            raise VerifyError(name, f"{size} bytes", expected=str(entry["bytes"]))
        if sha256(root / name) != entry["sha256"]:
            raise VerifyError(name, "its bytes have changed", remedy="fetch or make it again")
    return len(table)


def _spec(row: dict[str, Any]) -> LinearSpec | None:
    """What the decoder needs of a quantized row. A Conv1D's shape is the stored one."""
    if row["action"] != "quantized":
        return None
    scheme = QuantScheme(row["bits"], row["group_size"], row["symmetric"])
    rows, columns = row["shape"]
    module = row["name"].removesuffix(".weight")
    return LinearSpec(row["name"], module, "Linear", (rows, columns), getattr(torch, row["dtype"]), scheme)


def _check_row(
    row: dict[str, Any], spec: LinearSpec | None, places: dict[str, Place], format_name: str, known: dict[str, str]
) -> None:
    """Shape, range and finiteness, and the digest that was taken when the tensor was computed."""
    name = row["name"]
    if spec is None or format_name in DENSE:
        place = places[name]
        if list(place.shape) != row["shape"]:
            raise VerifyError(name, f"shape {list(place.shape)}", expected=str(row["shape"]))
        if place.dtype in ("F32", "F16", "BF16") and not np.isfinite(place.floats()).all():
            raise VerifyError(name, "holds NaN or Inf")
        found = digest(place.raw())
    else:
        decoded = DECODERS[format_name](spec, places)
        _check_range(spec, decoded)
        found = digest(*decoded)
    if known.get(name) != found:
        raise VerifyError(name, "does not decode to what was computed", remedy="do not use this checkpoint")


def _check_range(spec: LinearSpec, decoded: Decoded) -> None:
    codes, scales, *_ = decoded
    low, high = int(codes.min()), int(codes.max())
    if low < spec.scheme.code_min or high > spec.scheme.code_max:
        raise VerifyError(spec.key, f"codes {low}..{high}", expected=f"{spec.scheme.code_min}..{spec.scheme.code_max}")
    if not np.isfinite(scales).all() or (scales == 0).any():
        raise VerifyError(spec.key, "a scale is zero or not finite")


def _original(name: str, source: Source) -> Tensor:
    if name not in source.tensors:
        raise VerifyError(name, f"is not in {source.name}", remedy="name the original that it was made from")
    return source.read(name)


def _check_copied(name: str, place: Place, format_name: str, source: Source) -> None:
    mine = _original(name, source).contiguous()
    same = digest(mine.reshape(-1).view(torch.uint8).numpy()) == digest(place.raw())
    if format_name == "gguf" and len(place.shape) == 1:  # vectors in float32
        one = np.float32(source.config.get("model_type") == "gemma2" and "norm" in name)
        same = np.array_equal(mine.float().numpy() + one, place.floats())
    if not same:
        raise VerifyError(name, f"is not that of {source.name}")


def _said(row: dict[str, Any], errors: dict[str, float]) -> float | None:
    """The error of a weight by the report's row of its layer; None where an old report does not name the layer."""
    if (module := row.get("module", row["name"].removesuffix(".weight"))) in errors:
        return errors[module]
    if "module" in row:
        raise VerifyError(row["name"], f"layer {module} is not among the report's", expected="its error")
    return None


def _check_quantized(spec: LinearSpec, places: dict[str, Place], format_name: str, source: Source, said: float) -> None:
    weight = _original(spec.key, source).float()
    error = _square(weight - torch.from_numpy(_as_loaded(spec, places, format_name))) / (_square(weight) or 1.0)
    if not abs(error - said) <= 1e-3 * max(said, 1e-9):  # NaN is not within it either
        raise VerifyError(spec.key, f"relative error {error:.3e} against {source.name}", expected=f"{said:.3e}")


def _square(weight: Tensor) -> float:
    return float(weight.double().square().sum())


def _as_loaded(spec: LinearSpec, places: dict[str, Place], format_name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """weight_OI as a loader computes it; MLX adds a bias, which may be rounded, where others subtract a zero."""
    if format_name in DENSE:
        return places[spec.key].floats()
    codes, scales, *zeros = DECODERS[format_name](spec, places)
    groups = codes.astype(np.float32).reshape(*scales.shape, -1)
    if format_name == "mlx":
        biases = places[f"{spec.prefix}biases"].floats()[..., None]
        groups = (groups + np.float32(2 ** (spec.scheme.bits - 1))) * scales[..., None] + biases
    else:
        groups = (groups - zeros[0].astype(np.float32)[..., None] if zeros else groups) * scales[..., None]
    dense: np.ndarray[Any, np.dtype[np.float32]] = groups.reshape(codes.shape)
    return dense


def check_config(root: Path, format_name: str, rows: list[dict[str, Any]]) -> None:
    """What loaders are told fits the ledger: bits, group sizes, and which linears stay dense."""
    config = read_json(root, "config.json")
    if format_name in DENSE:
        return
    told = config.get("quantization_config") or config.get("quantization")
    if not told:
        raise VerifyError("config.json", "says nothing of the quantization", expected="quantization_config")
    quantized = [row for row in rows if row["action"] == "quantized"]
    right = {"bits": {row["bits"] for row in quantized}, "group_size": {row["group_size"] for row in quantized}}
    right["num_bits"] = right["bits"]
    for name, value in _entries(told):
        if name in right and value is not None and value not in right[name]:
            raise VerifyError(f"config.json: {name}", str(value), expected=" or ".join(map(str, sorted(right[name]))))
        if name in ("ignore", "modules_to_not_convert"):
            _check_ignored(f"config.json: {name}", value, rows)


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Names and values at all levels of a config."""
    for name, item in value.items() if isinstance(value, dict) else ():
        yield name, item
        yield from _entries(item)


def _check_ignored(where: str, ignored: list[str], rows: list[dict[str, Any]]) -> None:
    """The list names every linear that was left dense, and none that was quantized.

    Modules may be named otherwise in the model than in the checkpoint: before the path of a quantized one; a dense one,
    if its last part is in no name of the list, may stand there as one whose last part is in no row.
    """
    leaves = {name.rpartition(".")[2] for name in ignored}
    unnamed: list[str] = []
    for row in rows:
        module = row["name"].removesuffix(".weight")
        same = (
            n for n in ignored if n == module or n.endswith(f".{module}") or ("." in n and module.endswith(f".{n}"))
        )
        if row["action"] == "quantized" and any(same):
            raise VerifyError(where, f"names {module}, which is quantized")
        dense = row["reason"].startswith(("outside the decoder blocks (Linear)", "--ignore"))
        if dense and row["name"].endswith(".weight") and module.rpartition(".")[2] not in leaves:
            unnamed.append(module)
    known = {row["name"].removesuffix(".weight").rpartition(".")[2] for row in rows}
    if len(unnamed) > len([name for name in ignored if name.rpartition(".")[2] not in known]):
        raise VerifyError(where, f"does not name {unnamed[0]}, which is not quantized")


def _check_code(root: Path, trusted: bool) -> None:
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


def _check_ledger(source: Source, names: set[str]) -> None:
    if odd := sorted(names ^ source.tensors.keys()):
        raise VerifyError(odd[0], f"is {'not' if odd[0] in names else 'only'} in {source.name}")


def _check_beside(root: Path, source: Source) -> None:
    """Side files and config are the original's."""
    for file in source.side_files():
        if not (root / file).is_file() or sha256(root / file) != sha256(source.local(file)):
            raise VerifyError(file, f"is not that of {source.name}")
    config = read_json(root, "config.json")
    for name, value in source.safe_config.items():
        if config.get(name) != value:
            raise VerifyError(f"config.json: {name}", "is not that of the original", expected=str(value)[:80])

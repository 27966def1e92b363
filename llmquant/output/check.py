"""Is a finished folder still what was computed? `llmquant verify`: manifest, key set, codes and scales, side files.

The bytes are read by the NumPy readers of `output/verify.py` and `output/verify_gguf.py`, which share no code with
what wrote them. Without the original, the manifest's digests are the judge; with it, its tensors, its config and the
errors in the report are, too. Every tensor is compared, or counted in `Checked.not_compared` with the reason.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmquant.checkpoint import open_original
from llmquant.errors import VerifyError
from llmquant.formats import FORMATS, LinearSpec
from llmquant.formats.base import in_block
from llmquant.formats.facts import FACTS
from llmquant.log import SILENT, Log, progress_of
from llmquant.model.meta import open_model
from llmquant.output.check_files import check_beside, check_code, check_config, read_json, verify_files
from llmquant.output.gguf_spec import ROPE, Expected, Order
from llmquant.output.verify import DECODERS, Decoded, Place, digest, read_places
from llmquant.output.verify_gguf import check_header, in_checkpoint, read_gguf
from llmquant.paths import expanded
from llmquant.report.data import RunReport
from llmquant.report.ledger import Layer, TensorRow
from llmquant.report.plain import parse_file
from llmquant.source.base import Source

TRAINED = "trained after it was quantized (--recover): neither the original's nor as far from it as a layer's row says"
OLD_REPORT = "the report is of an older version and does not say which layer has their weights"


@dataclass(frozen=True)
class Checked:
    """What was found to be in order.

    against        the original that tensors were compared with
    not_compared   rows of the ledger that were not compared with anything: how many, by reason
    exports        folders of other formats in it, whose tensors were compared with its own
    added          files that the run did not write and no loader reads
    card_changed   somebody wrote into README.md
    """

    files: int
    quantized: int
    copied: int
    against: str | None
    not_compared: dict[str, int]
    exports: tuple[str, ...]
    added: tuple[str, ...]
    card_changed: bool


def verify_folder(folder: str | Path, original: str | Path | None = None, log: Log = SILENT) -> Checked:
    """VerifyError unless everything in `folder` is what the run that wrote it computed.

    With `original` also: side files, config and copied tensors equal the original's, and every quantized tensor is as
    far from it as the report says (||W - W^||^2 / ||W||^2, to one part in a thousand).
    """
    root = expanded(folder, VerifyError)
    files, report = verify_files(root), parse_file(RunReport, root / "report.json")
    n_files, digests = len(files.manifest["files"]), files.manifest["tensors"]
    progress_of(log).line(f"{n_files} files are those of the manifest")
    trusted, format_name = report.compute.trust_remote_code, report.recipe["format"]
    source = None if original is None else open_original(original, trust_remote_code=trusted)  # runs nothing
    exports = tuple(report.recipe.get("exports", ()))
    main = Container(root, format_name, report.tensors, digests)
    main.check()
    main.check_files(trusted, source, exports)
    if source is not None:
        trained = "off" if report.recovery is None else report.recipe.get("recover", "off")
        main.check_original(source, report.layers, trained, trusted=trusted)
    for name in exports:
        beside = Container(root / name, name, report.tensors, digests)
        beside.check(main)
        beside.check_files(trusted, source)
        progress_of(log).line(f"{name}/ holds the same weights")
    quantized = sum(row.action == "quantized" for row in main.rows)
    against = None if source is None else source.name
    return Checked(
        *(n_files, quantized, len(main.rows) - quantized, against, dict(main.not_compared), exports),
        added=files.added,
        card_changed=files.card_changed,
    )


@dataclass
class Container:
    """The weights in one folder. `ledger` has a row for every tensor of the checkpoint, `rows` for those that are here.

    places    stored tensors, those of GGUF by their names in the checkpoint
    digests   of the tensors when they were computed, by the manifest
    """

    root: Path
    format_name: str
    ledger: Sequence[TensorRow]
    digests: Mapping[str, str]
    rows: list[TensorRow] = field(init=False)
    places: dict[str, Place] = field(init=False)
    not_compared: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if self.format_name != "gguf":
            self.rows, self.places = list(self.ledger), read_places(self.root)
            return
        files = sorted(self.root.glob("*.gguf"))
        if len(files) != 1:
            raise VerifyError(str(self.root), f"holds {len(files)} GGUF files", expected="one")
        self.file = files[0]
        self.metadata, self.stored = read_gguf(self.file)
        self.order = Order.of_file(self.file.name, self.metadata)
        keys = [row.name for row in self.ledger]
        self.places = in_checkpoint(self.file.name, self.stored, dict.fromkeys([*keys, ROPE]), self.order)
        self.rows = [row for row in self.ledger if self._is_here(row)]
        if ROPE in self.places and ROPE not in keys:  # which an export computes
            place = self.places[ROPE]
            self.rows.append(TensorRow(ROPE, "copied", "computed from the config", place.dtype, place.shape))

    def _is_here(self, row: TensorRow) -> bool:
        """Whether the GGUF file holds the tensor: all but a tied head, and what llama.cpp has no name for."""
        if (name := row.name) in self.places:
            return True
        stored = self.order.stored_name(name)
        if row.action == "quantized" or stored not in (None, "output.weight"):
            raise VerifyError(f"{self.file.name}: {name}", "is missing", expected=f"a tensor {stored}")
        why = "llama.cpp has no such tensor" if stored is None else "tied to the embedding"
        self.not_compared[f"left out of the GGUF file ({why})"] += 1
        return False

    def check(self, main: "Container | None" = None) -> None:
        """All tensors of the ledger, no other ones, and each as it was computed.

        main   the folder's own container, where this is an export beside it
        """
        expected = set[str]()
        for row in self.rows:
            spec = _spec(row, transposed=self._is_transposed(row))
            names = {row.name} if spec is None else set(FORMATS[self.format_name].layout(spec))
            if missing := sorted(names - self.places.keys()):
                raise VerifyError(missing[0], "is missing", expected=f"all tensors of {row.name}")
            expected |= names
            self._check_row(row, spec, self._digest_of(row, spec, main))
        if odd := sorted(self.places.keys() - expected):
            raise VerifyError(odd[0], "is in no row of the report's ledger")
        if odd := sorted(self.digests.keys() - {row.name for row in (self.rows if main is None else main.rows)}):
            raise VerifyError(odd[0], "is in the manifest and in no row of the report's ledger")
        if main is not None and self.format_name == "gguf":
            self._check_header(read_json(main.root, "config.json"))

    def _digest_of(self, row: TensorRow, spec: LinearSpec | None, main: "Container | None") -> str | None:
        """What the tensor must decode to: the same in all formats, but for vectors in GGUF, which are in float32, and
        for dense weights beside packed ones."""
        name = row.name
        if main is not None and spec is not None and FACTS[self.format_name].dense > FACTS[main.format_name].dense:
            dense = torch.from_numpy(main._as_loaded(spec)).to(spec.dtype)
            return digest(dense.reshape(-1).view(torch.uint8).numpy())
        if main is None or self.format_name != "gguf" or spec is not None:
            return self.digests.get(name)
        if name == ROPE:  # by `_check_header`
            return digest(self.places[name].raw())
        vector = len(row.shape) == 1
        return (
            digest(self.order.as_stored(name, torch.from_numpy(main.places[name].floats())).numpy())
            if vector
            else self.digests.get(name)
        )

    def _check_row(self, row: TensorRow, spec: LinearSpec | None, expected: str | None) -> None:
        """Shape, range and finiteness, and the digest that was taken when the tensor was computed."""
        name = row.name
        if spec is None or FACTS[self.format_name].dense:
            place = self.places[name]
            if place.shape != (shape := row.shape[::-1] if self._is_transposed(row) else row.shape):
                raise VerifyError(name, f"shape {list(place.shape)}", expected=str(list(shape)))
            if not place.is_finite():
                raise VerifyError(name, "holds NaN or Inf")
            found = digest(place.raw())
        else:
            decoded = DECODERS[self.format_name](spec, self.places)
            _check_range(spec, decoded)
            found = digest(*decoded)
        if expected != found:
            raise VerifyError(name, "does not decode to what was computed", remedy="do not use this checkpoint")

    def _is_transposed(self, row: TensorRow) -> bool:
        """Whether a weight lies here the other way round than in the checkpoint: that of a Conv1D in GGUF."""
        return self.format_name == "gguf" and self.order.is_transposed(row.name)

    def _check_header(self, config: Mapping[str, Any]) -> None:
        specs = [spec for row in self.rows if (spec := _spec(row)) is not None]
        check_header(Expected(self.file.name, config), self.metadata, self.stored, specs)

    def check_files(self, trusted: bool, source: Source | None, exports: tuple[str, ...] = ()) -> None:
        """Config, code and side files; the header of a GGUF file, which is its config."""
        if self.format_name != "gguf":
            check_code(self.root, trusted)
            check_config(self.root, self.format_name, self.ledger)
        elif source is not None:
            self._check_header(source.config)
        if source is not None:
            check_beside(self.root, self.format_name, source, exports)

    def check_original(
        self, source: Source, layers: Sequence[Layer], trained: str = "off", *, trusted: bool = False
    ) -> None:
        """The tensors of the ledger are those of the original, and each is as far from it as the report says.

        trained   what a recovery may have changed since: scales, norms (with biases), all
        """
        names = {row.name for row in self.ledger} - {ROPE}
        if names - source.tensors.keys() and not trusted:  # experts one by one, or merged as the model holds them
            source = open_model(source, torch.float32).source.listed(names)
        if odd := sorted(names ^ source.tensors.keys()):
            raise VerifyError(
                odd[0],
                f"is {'only' if odd[0] in source.tensors else 'not'} in {source.name}",
                remedy="name the original that it was made from",
            )
        errors = {layer.name: layer.weight_error for layer in layers}
        for row in self.rows:
            if row.name == ROPE:  # by `_check_header`
                continue
            spec = _spec(row, transposed=self._is_transposed(row))
            if spec is None:
                same = self._is_original(row.name, source)
                if not same and not (trained in ("norms", "all") and len(row.shape) == 1):
                    raise VerifyError(row.name, f"is not that of {source.name}")
                if not same:
                    self.not_compared[TRAINED] += 1
            elif trained in ("scales", "all") and in_block(spec.module) is not None:
                self.not_compared[TRAINED] += 1
            elif (said := _said(row, errors)) is None:
                self.not_compared[OLD_REPORT] += 1
            else:
                self._check_quantized(spec, source, said)

    def _is_original(self, name: str, source: Source) -> bool:
        mine = source.read(name)
        if self.format_name == "gguf":
            mine = self.order.as_stored(name, mine)
        return digest(mine.contiguous().reshape(-1).view(torch.uint8).numpy()) == digest(self.places[name].raw())

    def _check_quantized(self, spec: LinearSpec, source: Source, said: float) -> None:
        weight = source.read(spec.key).float()
        weight, dense = weight.T if spec.transposed else weight, torch.from_numpy(self._as_loaded(spec))
        error = _square(weight - dense) / (_square(weight) or 1.0)
        if not abs(error - said) <= 1e-3 * max(said, 1e-9):  # NaN is not within it either
            raise VerifyError(spec.key, f"relative error {error:.3e} against {source.name}", expected=f"{said:.3e}")

    def _as_loaded(self, spec: LinearSpec) -> np.ndarray[Any, np.dtype[np.float32]]:
        """weight_OI as a loader computes it; MLX adds a bias, which may be rounded, where others subtract a zero."""
        if FACTS[self.format_name].dense:
            return self.places[spec.key].floats()
        codes, scales, *zeros = DECODERS[self.format_name](spec, self.places)
        groups = codes.astype(np.float32).reshape(*scales.shape, -1)
        if self.format_name == "mlx":
            biases = self.places[f"{spec.prefix}biases"].floats()[..., None]
            groups = (groups + np.float32(2 ** (spec.scheme.bits - 1))) * scales[..., None] + biases
        else:
            groups = (groups - zeros[0].astype(np.float32)[..., None] if zeros else groups) * scales[..., None]
        dense: np.ndarray[Any, np.dtype[np.float32]] = groups.reshape(codes.shape)
        return dense


def _spec(row: TensorRow, *, transposed: bool = False) -> LinearSpec | None:
    """What the decoder needs of a quantized row. A Conv1D's shape is the stored one."""
    if row.scheme is None:
        return None
    (rows, columns), module = row.shape[::-1] if transposed else row.shape, row.name.removesuffix(".weight")
    kind = "Conv1D" if transposed else "Linear"
    return LinearSpec(row.name, module, kind, (rows, columns), getattr(torch, row.dtype), row.scheme)


def _check_range(spec: LinearSpec, decoded: Decoded) -> None:
    codes, scales, *_ = decoded
    group = spec.scheme.group(spec.shape[1])
    if codes.shape != spec.shape or scales.size * group != codes.size:
        got = f"{codes.shape[0]} x {codes.shape[1]} codes with {scales.size} scales"
        raise VerifyError(spec.key, got, expected=f"{spec.shape[0]} x {spec.shape[1]}, groups of {group}")
    low, high = int(codes.min()), int(codes.max())
    if low < spec.scheme.code_min or high > spec.scheme.code_max:
        raise VerifyError(spec.key, f"codes {low}..{high}", expected=f"{spec.scheme.code_min}..{spec.scheme.code_max}")
    if not np.isfinite(scales).all() or (scales == 0).any():
        raise VerifyError(spec.key, "a scale is zero or not finite")


def _said(row: TensorRow, errors: Mapping[str, float]) -> float | None:
    """The error of a weight by the report's row of its layer; None where an old report does not name the layer."""
    if (module := row.of_module) in errors:
        return errors[module]
    if row.module is not None:
        raise VerifyError(row.name, f"layer {module} is not among the report's", expected="its error")
    return None


def _square(weight: Tensor) -> float:
    return float(weight.double().square().sum())

"""Any checkpoint we can read, as dense weights: 16-bit ones as they are, quantized ones tensor by tensor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import SourceError
from llmquant.packing import unpack_rows
from llmquant.safetensors_header import TensorInfo
from llmquant.source import Source, open_source

_PACKED, _SCALE, _SHAPE = "weight_packed", "weight_scale", "weight_shape"


def open_checkpoint(model: str | Path, revision: str | None = None) -> Source:
    """`open_source`, with a reader in between where the checkpoint is quantized. SourceError names unknown formats."""
    source = open_source(model, revision)
    config = source.config.get("quantization_config")
    if not config:
        return source
    method = config.get("quant_method") if isinstance(config, dict) else None
    if method not in READERS:
        raise SourceError(source.name, f"is quantized with {method!r}", expected=f"16 bit or {', '.join(READERS)}")
    return READERS[method](source, config)


class PackedSource(Source):
    """A compressed-tensors checkpoint (pack-quantized, symmetric) seen as a dense one.

    Width and group of each linear follow from its shapes, so any number of config groups can be read:
    bits = 32 * words / in_features, group = in_features / scales in a row.
    """

    def __init__(self, stored: Source, config: dict[str, Any]) -> None:
        # Not Source.__init__: files were listed and checked by `stored`.
        self._stored = stored
        self.name, self.revision, self.folder = stored.name, stored.revision, stored.folder
        self.config = {key: value for key, value in stored.config.items() if key != "quantization_config"}
        if config.get("format") != "pack-quantized":
            raise SourceError(
                stored.name, f"compressed-tensors format {config.get('format')!r}", expected="pack-quantized"
            )
        self.packed: dict[str, tuple[str, int]] = {}  # dense name -> prefix of the stored names, bits
        self.tensors = self._dense_view()

    def _dense_view(self) -> dict[str, TensorInfo]:
        view: dict[str, TensorInfo] = {}
        for name, info in self._stored.tensors.items():
            prefix, _, leaf = name.rpartition(".")
            if leaf == _PACKED:
                dense = f"{prefix}.weight"
                shape = self._shape(prefix)
                self.packed[dense] = (prefix, self._bits(prefix, shape))
                view[dense] = TensorInfo(
                    dense, info.file, self._stored.tensors[f"{prefix}.{_SCALE}"].dtype, shape, 0, 0
                )
            elif f"{prefix}.{_PACKED}" not in self._stored.tensors or leaf == "bias":
                view[name] = info
        return view

    def _shape(self, prefix: str) -> tuple[int, int]:
        for part in (_SCALE, _SHAPE):
            if f"{prefix}.{part}" not in self._stored.tensors:
                raise SourceError(f"{self.name}: {prefix}", f"no {part} beside {_PACKED}")
        if f"{prefix}.weight_zero_point" in self._stored.tensors or f"{prefix}.weight_g_idx" in self._stored.tensors:
            raise SourceError(
                f"{self.name}: {prefix}", "an asymmetric or reordered layer", expected="symmetric pack-quantized"
            )
        rows, columns = (int(x) for x in self._stored.read(f"{prefix}.{_SHAPE}").tolist())
        return rows, columns

    def _bits(self, prefix: str, shape: tuple[int, int]) -> int:
        packed, scale = self._stored.tensors[f"{prefix}.{_PACKED}"], self._stored.tensors[f"{prefix}.{_SCALE}"]
        rows, columns = shape
        bits = 32 * packed.shape[1] // columns if columns > 0 else 0
        fits = 2 <= bits <= 8 and packed.shape == (rows, -(-columns * bits // 32))
        if not fits or len(scale.shape) != 2 or scale.shape[0] != rows or columns % scale.shape[1]:
            raise SourceError(
                f"{self.name}: {prefix}",
                f"packed {packed.shape}, scales {scale.shape}",
                expected=f"a packing of {shape}",
            )
        return bits

    @property
    def weight_bytes(self) -> int:
        return self._stored.weight_bytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of codes and scales by the number of weights they stand for."""
        parts = [
            self._stored.tensors[f"{p}.{part}"].nbytes for p, _ in self.packed.values() for part in (_PACKED, _SCALE)
        ]
        return 8 * sum(parts) / sum(self.tensors[name].numel for name in self.packed)

    def read(self, name: str) -> Tensor:
        """A dense weight_OI in float32 for packed tensors; others as stored."""
        if name not in self.packed:
            return self._stored.read(name)
        prefix, bits = self.packed[name]
        codes = unpack_rows(self._stored.read(f"{prefix}.{_PACKED}"), bits, self.tensors[name].shape[1])
        scales = self._stored.read(f"{prefix}.{_SCALE}").float()
        signed = (codes.to(torch.int16) - (1 << (bits - 1))).float()
        return signed.view(*scales.shape, -1).mul_(scales[..., None]).view(self.tensors[name].shape)

    def files(self) -> list[str]:
        return self._stored.files()

    def local(self, file: str) -> Path:
        return self._stored.local(file)


READERS: dict[str, Callable[[Source, dict[str, Any]], Source]] = {"compressed-tensors": PackedSource}


def bits_per_weight(source: Source) -> float:
    """Measured bits of the quantized linears, scales included; of all weights where nothing is quantized."""
    if isinstance(source, PackedSource):
        return source.bits_per_weight
    return 8 * source.weight_bytes / sum(info.numel for info in source.tensors.values())

"""Any checkpoint we can read, as dense weights: 16-bit ones as they are, quantized ones tensor by tensor."""

from pathlib import Path
from typing import Any

from torch import Tensor

from llmquant.errors import SourceError
from llmquant.packed import LAYOUTS, PackedLinear
from llmquant.safetensors_header import TensorInfo
from llmquant.source import Source, open_source


def open_checkpoint(model: str | Path, revision: str | None = None) -> Source:
    """`open_source`, with a reader in between where the checkpoint is quantized. SourceError names unknown formats."""
    source = open_source(model, revision)
    config = source.config.get("quantization_config") or source.config.get("quantization")
    if not config:
        return source
    method = config.get("quant_method") if isinstance(config, dict) else None
    if method is None and isinstance(config, dict) and {"group_size", "bits"} <= config.keys():
        method = "mlx"  # mlx-lm names no method
    if method not in LAYOUTS:
        raise SourceError(source.name, f"is quantized with {method!r}", expected=f"16 bit or {', '.join(LAYOUTS)}")
    return PackedSource(source, method, config)


class PackedSource(Source):
    """A quantized checkpoint seen as a dense one; `packed` holds its packed linears by the names of their weights."""

    def __init__(self, stored: Source, method: str, config: dict[str, Any]) -> None:
        # Not Source.__init__: files were listed and checked by `stored`.
        self.stored, self.method = stored, method
        self.name, self.revision, self.folder = stored.name, stored.revision, stored.folder
        left_out = ("quantization_config", "quantization")
        self.config = {key: value for key, value in stored.config.items() if key not in left_out}
        try:
            self.packed: dict[str, PackedLinear] = LAYOUTS[method](stored.tensors, config, stored.read)
        except SourceError as error:
            raise SourceError(stored.name, str(error)) from None
        self.tensors = self._dense_view()

    def _dense_view(self) -> dict[str, TensorInfo]:
        parts = {part for linear in self.packed.values() for part in linear.parts}
        view = {name: info for name, info in self.stored.tensors.items() if name not in parts}
        for name, linear in self.packed.items():
            if name in view:
                raise SourceError(f"{self.name}: {name}", "is there dense and packed")
            file = self.stored.tensors[linear.parts[0]].file
            view[name] = TensorInfo(name, file, linear.dtype, linear.shape, 0, 0)
        return view

    @property
    def weight_bytes(self) -> int:
        return self.stored.weight_bytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of codes, scales and zeros by the number of weights they stand for."""
        parts = [part for linear in self.packed.values() for part in linear.parts]
        bits = sum(8 * self.stored.tensors[part].nbytes for part in parts if not part.endswith("weight_shape"))
        return bits / sum(self.tensors[name].numel for name in self.packed)

    def read(self, name: str) -> Tensor:
        """A dense weight_OI in float32 for packed tensors; others as stored."""
        return self.packed[name].dense(self.stored.read) if name in self.packed else self.stored.read(name)

    def files(self) -> list[str]:
        return self.stored.files()

    def local(self, file: str) -> Path:
        return self.stored.local(file)


def bits_per_weight(source: Source) -> float:
    """Measured bits of the quantized linears, scales included; of all weights where nothing is quantized."""
    if isinstance(source, PackedSource):
        return source.bits_per_weight
    return 8 * source.weight_bytes / sum(info.numel for info in source.tensors.values())

"""Any checkpoint we can read, as dense weights: 16-bit ones as they are, quantized ones tensor by tensor."""

from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from llmquant.errors import SourceError, option
from llmquant.gguf.blocks import METHOD, gguf
from llmquant.gguf.source import open_gguf_file, open_gguf_of
from llmquant.log import Progress
from llmquant.source.base import OnlyGGUFError, Source
from llmquant.source.config import told_quantization, without_quantization
from llmquant.source.header import TensorInfo
from llmquant.source.layouts import LAYOUTS, PackedLinear
from llmquant.source.resolve import open_source
from llmquant.source.small_floats import SMALL_FLOATS
from llmquant.source.stated import not_applied, unnamed
from llmquant.source.wrapped import WrappedSource

READERS = {**LAYOUTS, METHOD: gguf}


def open_checkpoint(model: str | Path, revision: str | None = None, *, trust_remote_code: bool = False) -> Source:
    """`open_source`, with a reader in between where the checkpoint is quantized. SourceError names unknown formats.

    `model` may be a GGUF file, too, or a folder or a repository of the Hub that holds one and no safetensors weights.
    """
    if (source := open_gguf_file(model)) is None:
        try:
            source = open_source(model, revision, trust_remote_code=trust_remote_code)
        except OnlyGGUFError as found:
            source = open_gguf_of(found)
    method = method_of(source)
    if method is None:
        return source
    if method not in READERS and method not in SMALL_FLOATS:
        known = ", ".join({name.partition(" ")[0]: None for name in (*READERS, *SMALL_FLOATS)})
        raise SourceError(source.name, f"is quantized with {method!r}", expected=f"16 bit or {known}")
    return PackedSource(source, method)


def open_original(model: str | Path, revision: str | None = None, *, trust_remote_code: bool = False) -> Source:
    """What a run can start from: 16-bit weights, or FP8 and MXFP4, which become dense as they are read.

    SourceError for integer codes and the like: what was lost there is lost.
    """
    return as_original(open_source(model, revision, trust_remote_code=trust_remote_code))


def as_original(source: Source) -> Source:
    """`open_original` of a checkpoint that is open."""
    method = method_of(source)
    if method is None:
        return source
    if method not in SMALL_FLOATS:
        raise SourceError(
            source.name,
            f"is quantized already ({method})",
            expected="16-bit, FP8 or MXFP4 weights",
            remedy="name the checkpoint that it was made from",
        )
    return PackedSource(source, method)


def method_of(source: Source) -> str | None:
    """How `source` is quantized by its config: a key of READERS or SMALL_FLOATS, or an unknown name; None: not."""
    if not (config := told_quantization(source.config)):
        return None
    method = config.get("quant_method")
    if method is None:
        method = unnamed(config)
    exact = f"{method} {config.get('format')}"
    return exact if exact in SMALL_FLOATS else str(method or "unknown method")


class PackedSource(WrappedSource):
    """A quantized checkpoint seen as a dense one; `packed` holds its packed linears by the names of their weights."""

    def __init__(self, stored: Source, method: str) -> None:
        super().__init__(stored)
        self.method = method
        self.config = without_quantization(stored.config)
        self.packed: dict[str, PackedLinear] = self._packed(stored.config)
        self.tensors = self._dense_view()

    def _packed(self, config: dict[str, Any]) -> dict[str, PackedLinear]:
        try:
            if self.method in SMALL_FLOATS:
                return SMALL_FLOATS[self.method](self.stored.tensors, config, self.stored.read)
            return READERS[self.method](self.stored.tensors, told_quantization(config), self.stored.read)
        except SourceError as error:
            raise SourceError(self.stored.name, error.message(option)) from None

    def _dense_view(self) -> dict[str, TensorInfo]:
        parts = {part for linear in self.packed.values() for part in linear.parts}
        view = {name: info for name, info in self.stored.tensors.items() if name not in parts}
        for name, linear in self.packed.items():
            if name in view:
                raise SourceError(f"{self.name}: {name}", "is there dense and packed")
            file = self.stored.tensors[linear.parts[0]].file
            view[name] = TensorInfo(name, file, linear.dtype, linear.shape, 0, 0)
        return view

    def announce(self, log: Progress) -> None:
        super().announce(log)
        doubtful = next((linear.said for linear in self.packed.values() if linear.said is not None), None)
        if doubtful is not None and (said := doubtful(self.stored.read)):
            log.line(f"{self.name}: {said}")
        if beside := not_applied(told_quantization(self.stored.config)):
            log.line(f"{self.name}: not applied, its figures are those of the weights alone: {', '.join(beside)}")

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of codes, scales and zeros by the number of weights they stand for."""
        parts = [part for linear in self.packed.values() for part in linear.parts]
        bits = sum(8 * self.stored.tensors[part].nbytes for part in parts if not part.endswith("weight_shape"))
        return bits / sum(self.tensors[name].numel for name in self.packed)

    def stored_as(self, name: str) -> str | None:
        return f"{self.method} ({self.packed[name].form})" if name in self.packed else None

    def parts(self, name: str) -> list[TensorInfo]:
        names = self.packed[name].parts if name in self.packed else (name,)
        return [self.stored.tensors[part] for part in names]

    def read(self, name: str) -> Tensor:
        """A dense weight_OI for packed tensors, in float32 where it was a grid; others as stored."""
        return self.packed[name].dense(self.stored.read) if name in self.packed else self.stored.read(name)

    def read_entry(self, name: str, index: int) -> Tensor:
        if name not in self.packed:
            return self.stored.read_entry(name, index)
        if len(self.packed[name].shape) < 3:
            return self.read(name)[index]
        return self.packed[name].dense(lambda part: self.stored.read_entry(part, index)[None])[0]


def stored_forms(source: Source) -> dict[str, int]:
    """The packed forms that tensors of `source` are read from, and how many of each; empty for a dense checkpoint."""
    return dict(Counter(form for name in source.tensors if (form := source.stored_as(name)) is not None))


def bits_per_weight(source: Source) -> float:
    """Measured bits of the quantized linears, scales included; of all weights where nothing is quantized."""
    source = source.as_stored()
    if isinstance(source, PackedSource):
        return source.bits_per_weight
    return 8 * source.weight_bytes / sum(info.numel for info in source.tensors.values())

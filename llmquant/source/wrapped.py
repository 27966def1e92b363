"""A checkpoint seen through another one: some of its tensors are computed from stored ones as they are read."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.source.base import Source
from llmquant.source.header import TensorInfo


class WrappedSource(Source):
    """All of `stored`, but for `tensors`, `parts` and `read`, which a subclass makes."""

    in_parallel = False

    def __init__(self, stored: Source) -> None:
        # Not Source.__init__: files were listed and checked by `stored`.
        self.stored = stored
        self.name, self.revision, self.folder = stored.name, stored.revision, stored.folder
        self.trust_remote_code, self.code, self.config = stored.trust_remote_code, stored.code, stored.config
        self.untied, self.left_over = stored.untied, stored.left_over

    @abstractmethod
    def parts(self, name: str) -> list[TensorInfo]:
        """The stored tensors that `name` is read from."""

    @property
    def weight_bytes(self) -> int:
        return self.stored.weight_bytes

    def files(self) -> list[str]:
        return self.stored.files()

    def local(self, file: str) -> Path:
        return self.stored.local(file)

    def size_of(self, file: str) -> int | None:
        return self.stored.size_of(file)

    def tokenizer(self) -> Any:
        return self.stored.tokenizer()

    def is_local(self, name: str) -> bool:
        return all(self.stored.is_local(part.name) for part in self.parts(name))

    def prefetch(self, names: Iterable[str]) -> None:
        self.stored.prefetch(part.name for name in names for part in self.parts(name))

    def download_bytes(self) -> int:
        return self.stored.download_bytes()


@dataclass(frozen=True)
class Derived:
    """A tensor that the checkpoint holds as a part of another one, or in several.

    parts    names of the tensors that it is made of
    origin   what the ledger says of it
    read     makes it, from the source that holds the parts
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    origin: str
    read: Callable[[Source], Tensor]


class DerivedSource(WrappedSource):
    """A checkpoint with `derived` tensors in the place of their parts.

    `whole` names parts that are listed as they are stored; what is derived from them can be read all the same.
    """

    def __init__(self, stored: Source, derived: Mapping[str, Derived], whole: frozenset[str] = frozenset()) -> None:
        super().__init__(stored)
        self._derived = derived
        replaced = {part for tensor in derived.values() for part in tensor.parts} - whole
        self.tensors = {name: info for name, info in stored.tensors.items() if name not in replaced}
        for name, tensor in derived.items():
            if not whole.issuperset(tensor.parts):
                file = stored.tensors[tensor.parts[0]].file
                self.tensors[name] = TensorInfo(name, file, tensor.dtype, tensor.shape, 0, 0)

    def as_stored(self) -> Source:
        return self.stored

    def listed(self, names: Iterable[str]) -> Source:
        """The same checkpoint, where parts that are among `names` are listed as they are stored."""
        return DerivedSource(self.stored, self._derived, frozenset(self.slices.keys() & set(names)))

    @property
    def slices(self) -> dict[str, list[str]]:
        """Stored tensors that several derived ones are parts of (all experts in one): name -> their names."""
        found: dict[str, list[str]] = {}
        for name, tensor in self._derived.items():
            for part in tensor.parts:
                found.setdefault(part, []).append(name)
        return {part: names for part, names in found.items() if len(names) > 1}

    def parts(self, name: str) -> list[TensorInfo]:
        return [info for part in self.made_of(name) for info in self.stored.parts(part)]

    def made_of(self, name: str) -> tuple[str, ...]:
        return self._derived[name].parts if name in self._derived else (name,)

    def stored_as(self, name: str) -> str | None:
        return self.stored.stored_as(self._derived[name].parts[0] if name in self._derived else name)

    def origin(self, name: str) -> str:
        return self._derived[name].origin if name in self._derived else ""

    def read(self, name: str) -> Tensor:
        return self._derived[name].read(self.stored) if name in self._derived else self.stored.read(name)

    def read_entry(self, name: str, index: int) -> Tensor:
        return self.read(name)[index] if name in self._derived else self.stored.read_entry(name, index)

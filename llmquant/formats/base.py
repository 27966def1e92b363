"""The interface of a format."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llmquant.grid import QuantizedWeight, QuantScheme

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # tensor name -> dtype and shape


@dataclass(frozen=True)
class LinearSpec:
    """One linear that is to be quantized.

    key        its weight's name in the checkpoint, ending in `.weight`
    module     its name in the model
    kind       class of the module: Linear, a subclass of it, or Conv1D
    shape      (out_features, in_features), whatever the checkpoint's own layout
    dtype      of the weight in the checkpoint; scales are stored in it
    """

    key: str
    module: str
    kind: str
    shape: tuple[int, int]
    dtype: torch.dtype
    scheme: QuantScheme

    @property
    def transposed(self) -> bool:
        """Whether the checkpoint holds the weight as [in_features, out_features]."""
        return self.kind == "Conv1D"

    @property
    def prefix(self) -> str:
        return self.key.removesuffix("weight")


class Format(Protocol):
    """A view of the canonical form."""

    def check(self, specs: Sequence[LinearSpec]) -> None:
        """FormatError where the format cannot hold these linears; called before any work."""

    def layout(self, spec: LinearSpec) -> Layout:
        """Names, dtypes and shapes of the tensors that `tensors` will give for this linear."""

    def tensors(self, spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors of one linear."""

    def config(self, specs: Sequence[LinearSpec], dense_linears: Sequence[str]) -> dict[str, Any]:
        """Entries for config.json. `dense_linears`: module names of all linears that stay as they are."""

    def weight_bits(self, spec: LinearSpec) -> int:
        """Stored bits of the weight: codes, scales and zeros."""

    def read(self, spec: LinearSpec, read: Callable[[str], Tensor]) -> QuantizedWeight | Tensor:
        """Inverse of `tensors`, from a reader of stored tensors by name; a dense weight_OI where nothing is packed."""

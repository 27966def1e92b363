"""fake: the dequantized weights, dense, in the checkpoint's own dtype and layout. For research; it saves no bytes."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from llmquant.formats.base import Format, Layout, LinearSpec
from llmquant.quant.grid import QuantizedWeight


class Fake(Format):
    name = "fake"

    def layout(self, spec: LinearSpec) -> Layout:
        return {spec.key: (spec.dtype, spec.shape[::-1] if spec.transposed else spec.shape)}

    def tensors(self, spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
        dense = weight.dequantize(spec.dtype)
        return {spec.key: dense.T.contiguous() if spec.transposed else dense}

    def loaded(self, spec: LinearSpec, weight: QuantizedWeight) -> Tensor:
        return weight.dequantize(spec.dtype).float()

    def config(self, specs: Sequence[LinearSpec], dense_linears: Sequence[str]) -> dict[str, Any]:
        return {}

    def read(self, spec: LinearSpec, read: Callable[[str], Tensor]) -> Tensor:
        dense = read(spec.key)
        return dense.T if spec.transposed else dense

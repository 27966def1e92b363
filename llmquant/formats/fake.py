"""fake: the dequantized weights, dense, in the checkpoint's own dtype and layout. For research; it saves no bytes."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from llmquant.formats.base import Layout, LinearSpec
from llmquant.quant.grid import QuantizedWeight


class Fake:
    def check(self, specs: Sequence[LinearSpec]) -> None:
        """Holds anything."""

    def layout(self, spec: LinearSpec) -> Layout:
        return {spec.key: (spec.dtype, spec.shape[::-1] if spec.transposed else spec.shape)}

    def tensors(self, spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
        dense = weight.dequantize(spec.dtype)
        return {spec.key: dense.T.contiguous() if spec.transposed else dense}

    def weight_bits(self, spec: LinearSpec) -> int:
        return spec.shape[0] * spec.shape[1] * 8 * spec.dtype.itemsize

    def loaded(self, spec: LinearSpec, weight: QuantizedWeight) -> Tensor:
        return weight.dequantize(spec.dtype).float()

    def config(self, specs: Sequence[LinearSpec], dense_linears: Sequence[str]) -> dict[str, Any]:
        return {}

    def read(self, spec: LinearSpec, read: Callable[[str], Tensor]) -> Tensor:
        dense = read(spec.key)
        return dense.T if spec.transposed else dense

"""MLX, affine: opened by mlx-lm.

For a weight [N, K] of b bits in groups of g: weight uint32 [N, K b / 32], codes u = q + 2^(b-1) from the lowest bit up
along K; scales s and biases -2^(b-1) s, [N, K / g], in the model's dtype: w = u s + bias. The bias of a symmetric grid
is a power of two times the scale, hence exact; an asymmetric grid's is not, and is refused.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import FormatError
from llmquant.formats.base import Layout, LinearSpec, require_plain, signed, unsigned
from llmquant.grid import QuantizedWeight
from llmquant.packing import pack_rows, unpack_rows


class MLX:
    def check(self, specs: Sequence[LinearSpec]) -> None:
        require_plain("mlx", specs, bits=(2, 3, 4, 8), in_multiple=32, out_multiple=1, one_scheme=False)
        for spec in specs:
            if spec.scheme.group_size not in (32, 64, 128):
                raise FormatError(
                    spec.module,
                    f"group size {spec.scheme.group_size} in mlx",
                    expected="32, 64 or 128",
                    remedy="change --group-size",
                )

    def layout(self, spec: LinearSpec) -> Layout:
        (rows, columns), groups = spec.shape, spec.scheme.groups(spec.shape[1])
        return {
            f"{spec.prefix}weight": (torch.uint32, (rows, columns * spec.scheme.bits // 32)),
            f"{spec.prefix}scales": (spec.dtype, (rows, groups)),
            f"{spec.prefix}biases": (spec.dtype, (rows, groups)),
        }

    def tensors(self, spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
        biases = (weight.scales_OG * -(2 ** (spec.scheme.bits - 1))).to(spec.dtype)
        if not bool(torch.isfinite(biases).all()):
            raise FormatError(
                spec.module, "a scale whose bias overflows fp16", remedy="use --format compressed-tensors"
            )
        return {
            f"{spec.prefix}weight": pack_rows(unsigned(weight), spec.scheme.bits).view(torch.uint32),
            f"{spec.prefix}scales": weight.scales_OG.to(spec.dtype),
            f"{spec.prefix}biases": biases,
        }

    def weight_bits(self, spec: LinearSpec) -> int:
        return sum(8 * dtype.itemsize * torch.Size(shape).numel() for dtype, shape in self.layout(spec).values())

    def config(self, specs: Sequence[LinearSpec], dense_linears: Sequence[str]) -> dict[str, Any]:
        first = specs[0].scheme
        table: dict[str, Any] = {"group_size": first.group_size, "bits": first.bits, "mode": "affine"}
        for spec in specs:
            if spec.scheme != first:
                table[spec.module] = {"group_size": spec.scheme.group_size, "bits": spec.scheme.bits}
        # mlx-lm reads the first, the Hub shows the second; a linear without scales stays dense by itself.
        return {"quantization": table, "quantization_config": table}

    def read(self, spec: LinearSpec, read: Callable[[str], Tensor]) -> QuantizedWeight:
        codes = unpack_rows(read(f"{spec.prefix}weight").view(torch.int32), spec.scheme.bits, spec.shape[1])
        return QuantizedWeight(signed(codes, spec.scheme.bits), read(f"{spec.prefix}scales").float(), spec.scheme)

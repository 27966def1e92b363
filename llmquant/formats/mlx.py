"""MLX, affine: opened by mlx-lm.

For a weight [N, K] of b bits in groups of g: weight uint32 [N, K b / 32], codes u = q + 2^(b-1) from the lowest bit up
along K; scales s and biases -2^(b-1) s, [N, K / g], in the model's dtype: w = u s + bias. The bias of a symmetric grid
is a power of two times the scale, hence exact. An asymmetric grid's is -(z + 2^(b-1)) s, rounded to the model's dtype:
exact in float32, off by at most (2^b - 1) / 256 steps in bfloat16, by an eighth of that in float16. At 8 bits and
bfloat16 that would be a whole step, and is refused.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import FormatError, option
from llmquant.formats.base import Format, Layout, LinearSpec, commonest, from_minima, signed, unsigned
from llmquant.formats.packing import pack_rows, unpack_rows
from llmquant.quant.grid import QuantizedWeight


class MLX(Format):
    name = "mlx"

    def check(self, specs: Sequence[LinearSpec]) -> None:
        super().check(specs)
        for spec in specs:
            if (spec.scheme.bits, spec.scheme.symmetric, spec.dtype) == (8, False, torch.bfloat16):
                raise FormatError(
                    spec.module,
                    "an asymmetric grid of 8 bits in mlx, whose bias bfloat16 would round by up to a step",
                    expected="a symmetric grid, or 4 bits",
                    remedy=f"leave {option('asymmetric')} out",
                )

    def layout(self, spec: LinearSpec) -> Layout:
        (rows, columns), groups = spec.shape, spec.scheme.groups(spec.shape[1])
        return {
            f"{spec.prefix}weight": (torch.uint32, (rows, columns * spec.scheme.bits // 32)),
            f"{spec.prefix}scales": (spec.dtype, (rows, groups)),
            f"{spec.prefix}biases": (spec.dtype, (rows, groups)),
        }

    def tensors(self, spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
        biases = _biases(spec, weight)
        if not bool(torch.isfinite(biases).all()):
            raise FormatError(
                spec.module, "a scale whose bias overflows fp16", remedy=f"use {option('format')} compressed-tensors"
            )
        return {
            f"{spec.prefix}weight": pack_rows(unsigned(weight), spec.scheme.bits).view(torch.uint32),
            f"{spec.prefix}scales": weight.scales_OG.to(spec.dtype),
            f"{spec.prefix}biases": biases,
        }

    def loaded(self, spec: LinearSpec, weight: QuantizedWeight) -> Tensor:
        return weight.dequantize() if weight.zeros_OG is None else from_minima(weight, _biases(spec, weight).float())

    def config(self, specs: Sequence[LinearSpec], dense_linears: Sequence[str]) -> dict[str, Any]:
        usual = commonest(specs)
        table: dict[str, Any] = {"group_size": usual.group_size, "bits": usual.bits, "mode": "affine"}
        for spec in specs:
            if (spec.scheme.group_size, spec.scheme.bits) != (usual.group_size, usual.bits):
                table[spec.module] = {"group_size": spec.scheme.group_size, "bits": spec.scheme.bits}
        # mlx-lm reads the first, the Hub shows the second; a linear without scales stays dense by itself.
        return {"quantization": table, "quantization_config": table}

    def model_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """With `rope_theta` and `rope_scaling` at its top, where mlx-lm 0.32 looks for them in most models.

        transformers 5 saves them under rope_parameters only, and mlx-lm would then silently take its own default.
        """
        rope = config.get("rope_parameters")
        if not isinstance(rope, dict) or "rope_theta" not in rope:
            return config
        scaled = rope.get("rope_type", "default") != "default"
        flat = {"rope_theta": rope["rope_theta"]} | ({"rope_scaling": rope} if scaled else {})
        return flat | config

    def read(self, spec: LinearSpec, read: Callable[[str], Tensor]) -> QuantizedWeight:
        codes = unpack_rows(read(f"{spec.prefix}weight").view(torch.int32), spec.scheme.bits, spec.shape[1])
        scales, zeros = read(f"{spec.prefix}scales").float(), None
        if not spec.scheme.symmetric:  # a bias is rounded by an eighth of a step at most
            zeros = (-read(f"{spec.prefix}biases").float() / scales).round() - 2 ** (spec.scheme.bits - 1)
            zeros = zeros.to(torch.int8)
        return QuantizedWeight(signed(codes, spec.scheme.bits), scales, spec.scheme, zeros)


def _biases(spec: LinearSpec, weight: QuantizedWeight) -> Tensor:
    zeros = 0 if weight.zeros_OG is None else weight.zeros_OG.float()
    biases: Tensor = (weight.scales_OG * -(zeros + 2 ** (spec.scheme.bits - 1))).to(spec.dtype)
    return biases

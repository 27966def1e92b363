"""GGUF blocks of llama.cpp: Q4_0, Q4_1 and Q8_0, 32 weights of a row each. The file around them: gguf/file.py.

Q4_0  fp16 d, 16 bytes: weight j in the low half of byte j, weight j + 16 in the high half; w = d (u - 8)
Q4_1  fp16 d, fp16 m, 16 bytes likewise; w = d u + m
Q8_0  fp16 d, 32 int8; w = d q
Q4_0 and Q8_0 hold symmetric grids of 4 and 8 bits exactly, scales of either sign, in any group of whole blocks.
Q4_1 holds asymmetric 4-bit grids: d and the codes exactly, m = -(z + 8) d rounded to fp16.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import FormatError, option
from llmquant.formats.base import Format, Layout, LinearSpec, from_minima, signed, unsigned
from llmquant.quant.grid import QuantizedWeight, QuantScheme

BLOCK = 32
_KINDS = {(4, True): "Q4_0", (4, False): "Q4_1", (8, True): "Q8_0"}
_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


def kind_of(scheme: QuantScheme) -> str:
    """Name of the block type that holds the scheme."""
    return _KINDS[scheme.bits, scheme.symmetric]


class GGUF(Format):
    """The blocks of one linear as uint8 [out_features, bytes of a row], under the weight's own name."""

    name = "gguf"

    def layout(self, spec: LinearSpec) -> Layout:
        rows, columns = spec.shape
        return {spec.key: (torch.uint8, (rows, columns // BLOCK * _BYTES[kind_of(spec.scheme)]))}

    def tensors(self, spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
        rows, columns = spec.shape
        blocks = columns // BLOCK
        d = weight.scales_OG.repeat_interleave(blocks // weight.scales_OG.shape[1], dim=1)
        parts = [_bytes(d)]
        if weight.zeros_OG is not None:
            m = _minima(weight)
            if not bool(torch.isfinite(m).all()):
                raise FormatError(spec.module, "a minimum that overflows fp16", remedy=f"use {option('format')} awq")
            parts.append(_bytes(m.repeat_interleave(blocks // m.shape[1], dim=1)))
        if spec.scheme.bits == 8:
            parts.append(weight.codes_OI.view(rows, blocks, BLOCK).view(torch.uint8))
        else:
            codes = unsigned(weight).view(rows, blocks, 2, BLOCK // 2)
            parts.append(codes[:, :, 0] | codes[:, :, 1] << 4)
        return {spec.key: torch.cat(parts, dim=-1).view(rows, -1)}

    def weight_bits(self, spec: LinearSpec) -> int:
        return sum(8 * torch.Size(shape).numel() for _, shape in self.layout(spec).values())

    def loaded(self, spec: LinearSpec, weight: QuantizedWeight) -> Tensor:
        return weight.dequantize() if weight.zeros_OG is None else from_minima(weight, _minima(weight).float())

    def config(self, specs: Sequence[LinearSpec], dense_linears: Sequence[str]) -> dict[str, Any]:
        return {}

    def read(self, spec: LinearSpec, read: Callable[[str], Tensor]) -> QuantizedWeight:
        (rows, columns), groups = spec.shape, spec.scheme.groups(spec.shape[1])
        blocks = read(spec.key).view(rows, columns // BLOCK, -1)
        first = blocks[:, :: columns // BLOCK // groups]  # the first block of each group has its scale
        scales = first[..., :2].contiguous().view(torch.float16).float()[..., 0]
        if spec.scheme.bits == 8:
            return QuantizedWeight(blocks[..., 2:].contiguous().view(torch.int8).view(spec.shape), scales, spec.scheme)
        octets = blocks[..., -BLOCK // 2 :]
        codes = signed(torch.cat([octets & 15, octets >> 4], dim=-1).view(spec.shape), 4)
        if spec.scheme.symmetric:
            return QuantizedWeight(codes, scales, spec.scheme)
        m = first[..., 2:4].contiguous().view(torch.float16).float()[..., 0]
        return QuantizedWeight(codes, scales, spec.scheme, ((-m / scales).round() - 8).to(torch.int8))


def _minima(weight: QuantizedWeight) -> Tensor:
    """m_OG = -(z + 8) d, fp16."""
    assert weight.zeros_OG is not None
    return (-(weight.zeros_OG.float() + 8) * weight.scales_OG).half()


def _bytes(numbers_OB: Tensor) -> Tensor:
    """fp16 numbers as their bytes, uint8 [O, B, 2]."""
    return numbers_OB.half().contiguous()[..., None].view(torch.uint8)

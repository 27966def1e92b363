"""AWQ, version gemm, 4 bit, symmetric or asymmetric: opened by transformers (gptqmodel), vLLM, SGLang and mlx-lm.

For a weight [N, K] in groups of g (layout of AutoAWQ): qweight int32 [K, N / 8], codes q + 8 along N, eight to a word
from the lowest bit up in the order 0 2 4 6 1 3 5 7; qzeros int32 [K / g, N / 8], zeros z + 8 in the same order, always
written; scales [K / g, N].
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import SourceError
from llmquant.formats.base import Format, Layout, LinearSpec, half_dtype, signed, unsigned
from llmquant.formats.packing import pack_rows, unpack_rows
from llmquant.quant.grid import QuantizedWeight

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds column ORDER[i] of its eight


class AWQ(Format):
    name = "awq"

    def layout(self, spec: LinearSpec) -> Layout:
        rows, columns = spec.shape
        groups = spec.scheme.groups(columns)
        return {
            f"{spec.prefix}qweight": (torch.int32, (columns, rows // 8)),
            f"{spec.prefix}qzeros": (torch.int32, (groups, rows // 8)),
            f"{spec.prefix}scales": (half_dtype(spec), (groups, rows)),
        }

    def tensors(self, spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
        zeros = weight.zeros_OG if weight.zeros_OG is not None else torch.zeros_like(weight.scales_OG)
        return {
            f"{spec.prefix}qweight": _pack(unsigned(weight).T),
            f"{spec.prefix}qzeros": _pack((zeros.T.short() + 8).to(torch.uint8)),
            f"{spec.prefix}scales": weight.scales_OG.T.contiguous().to(half_dtype(spec)),
        }

    def config(self, specs: Sequence[LinearSpec], dense_linears: Sequence[str]) -> dict[str, Any]:
        return {
            "quantization_config": {
                "quant_method": "awq",
                "version": "gemm",
                "bits": 4,
                "group_size": specs[0].scheme.group_size,
                "zero_point": True,
                "modules_to_not_convert": list(dense_linears),
            }
        }

    def read(self, spec: LinearSpec, read: Callable[[str], Tensor]) -> QuantizedWeight:
        codes, zeros = (signed(unpack_awq(read(f"{spec.prefix}{part}")).T, 4) for part in ("qweight", "qzeros"))
        scales = read(f"{spec.prefix}scales").T.float().contiguous()
        if spec.scheme.symmetric and bool(zeros.any()):
            raise SourceError(spec.key, "zero points in a layer that is said to be symmetric")
        return QuantizedWeight(
            codes.contiguous(), scales, spec.scheme, None if spec.scheme.symmetric else zeros.contiguous()
        )


def _pack(codes_RN: Tensor) -> Tensor:
    rows = codes_RN.shape[0]
    return pack_rows(codes_RN.reshape(rows, -1, 8)[..., list(ORDER)].reshape(rows, -1), 4)


def unpack_awq(words: Tensor) -> Tensor:
    """int32 [R, N / 8] -> codes 0..15, uint8 [R, N].

    >>> unpack_awq(torch.tensor([[0x75316420]], dtype=torch.int32)).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    rows, count = words.shape[0], words.shape[1] * 8
    stored = unpack_rows(words, 4, count).view(rows, -1, 8)
    codes = torch.empty_like(stored)
    codes[..., list(ORDER)] = stored
    return codes.view(rows, -1)

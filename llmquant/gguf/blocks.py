"""Blocks of GGUF -> grids or dense weights. Q4_0, Q4_1 and Q8_0 are read here, all other types by the package gguf.

A block is 32 weights of a row: fp16 numbers at its head, then the codes.

    Q4_0   w = d (u - 8), u of 4 bits          Q8_0   w = d q, q int8
    Q4_1   w = d u + m, u of 4 bits

Source: ggml's ggml-quants.c. Shapes: O out_features, I in_features, B blocks of a row, b bytes of a row or of a block.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import SourceError
from llmquant.gguf.gpt2 import is_conv1d
from llmquant.source.layouts import Grid, PackedLinear, Read, Tensors

METHOD = "gguf"  # the quant_method that `source.py` gives what it opens
BLOCK = 32  # weights in the blocks of Q4_0, Q4_1 and Q8_0
_GRIDS = {"Q4_0": 4, "Q8_0": 8}


def gguf(tensors: Tensors, config: dict[str, Any], read: Read) -> dict[str, PackedLinear]:
    """Every tensor that `config["shapes"]` names, stored in blocks of the type `config["types"][name]`.

    Q4_0 and Q8_0 are symmetric grids with one scale per block. The others have only a dense view: the minimum of a Q4_1
    block need not be a multiple of its scale, and the types of the package have scales of scales.
    """
    found: dict[str, PackedLinear] = {}
    for name, kind in config["types"].items():
        shape, dtype = tuple(config["shapes"][name]), torch.float16
        prefix = name.rpartition(".")[0]
        if kind in _GRIDS:
            found[name] = _grid(name, prefix, kind, shape, dtype)
        else:
            dense = partial(_dense, name, kind, shape)
            found[name] = PackedLinear(prefix, shape, dtype, 0, 0, False, (name,), None, dense, kind)
        if is_conv1d(name):
            found[name] = _transposed(found[name])
    return found


def _dense(name: str, kind: str, shape: tuple[int, ...], read: Read) -> Tensor:
    return (_q4_1(read(name)) if kind == "Q4_1" else _by_package(name, kind, read(name))).view(shape)


def _transposed(linear: PackedLinear) -> PackedLinear:
    """With the dense view of a Conv1D, [I, O]."""
    shape, rows = linear.shape[::-1], linear.dense
    return replace(linear, shape=shape, group_size=BLOCK, dense=lambda read: rows(read).T.contiguous())


def _grid(name: str, prefix: str, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> PackedLinear:
    def grid(read: Read) -> Grid:
        scales_OB, body_OBb = _split(read(name), kind)
        codes = body_OBb.view(torch.int8) if kind == "Q8_0" else _nibbles(body_OBb).view(torch.int8) - 8
        return Grid(codes.reshape(codes.shape[0], -1), scales_OB[..., 0])

    bits, n_groups = _GRIDS[kind], shape[-1] // BLOCK
    return PackedLinear(
        prefix, shape, dtype, bits, n_groups, True, (name,), grid, lambda read: grid(read).dense().view(shape)
    )


def _split(rows_Ob: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The fp16 numbers at the head of each block, [O, B, 1 or 2], and the bytes of the codes, [O, B, 16 or 32]."""
    head, body = {"Q4_0": (2, 16), "Q4_1": (4, 16), "Q8_0": (2, 32)}[kind]
    blocks = rows_Ob.reshape(rows_Ob.shape[:-1].numel(), -1, head + body)
    return blocks[..., :head].contiguous().view(torch.float16), blocks[..., head:].contiguous()


def _nibbles(body_OBb: Tensor) -> Tensor:
    """Codes of 4 bits. The low halves of the bytes hold the first half of a block, the high halves the second."""
    return torch.cat([body_OBb & 15, body_OBb >> 4], dim=-1)


def _q4_1(rows_Ob: Tensor) -> Tensor:
    """w = d u + m, float32."""
    head_OB2, body = _split(rows_Ob, "Q4_1")
    d, m = head_OB2.float().unbind(-1)
    return _nibbles(body).float().mul_(d[..., None]).add_(m[..., None])


def _by_package(name: str, kind: str, rows_Ob: Tensor) -> Tensor:
    try:
        from gguf import GGMLQuantizationType, quants
    except ModuleNotFoundError:
        raise SourceError(
            name, f"is stored as {kind}, which the package gguf unpacks", remedy="pip install gguf"
        ) from None
    try:
        return torch.from_numpy(quants.dequantize(rows_Ob.numpy(), GGMLQuantizationType[kind]))
    except (KeyError, NotImplementedError):
        raise SourceError(
            name, f"is stored as {kind}, which the installed package gguf cannot unpack", remedy="pip install -U gguf"
        ) from None

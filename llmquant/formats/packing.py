"""Codes <-> dense little-endian bit streams in int32 words, any width from 2 to 8 bits.

Shapes: R rows, K codes in a row, words = ceil(K * bits / 32).
"""

import math

import torch
from torch import Tensor


def pack_rows(codes_RK: Tensor, bits: int) -> Tensor:
    """Unsigned codes (uint8) -> int32 [R, words]: code i of a row takes bits i*bits .. i*bits + bits - 1.

    >>> hex(pack_rows(torch.arange(8, dtype=torch.uint8)[None], 4).item())
    '0x76543210'
    """
    rows, count = codes_RK.shape
    words = math.ceil(count * bits / 32)
    padded = torch.nn.functional.pad(codes_RK, (0, -count % 32))
    # Eight codes fill exactly `bits` bytes, whatever the width.
    eights = padded.view(rows, -1, 8).long()
    packed = torch.zeros(eights.shape[:2], dtype=torch.int64, device=codes_RK.device)
    for i in range(8):
        packed |= eights[..., i] << (bits * i)
    octets = packed[..., None].view(torch.uint8)[..., :bits].contiguous()
    return octets.view(rows, -1).view(torch.int32)[:, :words].contiguous()


def unpack_rows(words_RW: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_rows`: the first `count` codes of each row, uint8.

    >>> unpack_rows(torch.tensor([[0x76543210]], dtype=torch.int32), 4, 8).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    rows = words_RW.shape[0]
    octets = words_RW.contiguous().view(torch.uint8)
    octets = torch.nn.functional.pad(octets, (0, -octets.shape[1] % bits)).view(rows, -1, bits)
    packed = torch.nn.functional.pad(octets, (0, 8 - bits)).contiguous().view(torch.int64)
    codes = torch.stack([(packed >> (bits * i)) & (2**bits - 1) for i in range(8)], dim=-1)
    return codes.view(rows, -1)[:, :count].to(torch.uint8)

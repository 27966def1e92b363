"""Which numbers a scale may be: bf16 ones of a range, rounded before codes are chosen (`grid.py` says why)."""

import torch
from torch import Tensor

# Every bf16 number in this range is exact in fp16 too, so one canonical scale serves every format: 65280 is the largest
# bf16 number below fp16's 65504, and the last bit of a bf16 number near 2^-17 is 2^-24, fp16's smallest number.
SCALE_MIN, SCALE_MAX = 2.0**-17, 65280.0


def round_scales(scales: Tensor) -> Tensor:
    """`scales` rounded to bf16, with magnitudes clipped to [2^-17, 65280]. Sign, shape and float dtype are kept.

    >>> round_scales(torch.tensor([0.1, -1e-9, 1e9])).tolist()
    [0.10009765625, -7.62939453125e-06, 65280.0]
    """
    magnitude = scales.abs().clamp(SCALE_MIN, SCALE_MAX).bfloat16().to(scales.dtype)
    return torch.where(scales < 0, -magnitude, magnitude)

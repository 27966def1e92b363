"""Rounding, as torch does it, inside of kernels."""

import triton
import triton.language as tl

from llmquant.quant.scales import SCALE_MAX, SCALE_MIN

_LEAST, _MOST = tl.constexpr(SCALE_MIN), tl.constexpr(SCALE_MAX)
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: no fraction survives beside it, and halves go to even


@triton.jit
def level_of(v, scale, low, high):
    """clip(round(v / scale), low, high), halves to even; the bounds are whole numbers."""
    level = tl.minimum(tl.maximum(tl.div_rn(v, scale), low), high)
    return (level + _MAGIC) - _MAGIC


@triton.jit
def round_scale(scale):
    """`quant.scales.round_scales`: a bf16 number of 2^-17 to 65280, halves to even, with its sign."""
    magnitude = tl.minimum(tl.maximum(tl.abs(scale), _LEAST), _MOST)
    bits = magnitude.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    magnitude = bits.to(tl.float32, bitcast=True)
    return tl.where(scale < 0, -magnitude, magnitude)

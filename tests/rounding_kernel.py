"""A kernel that only rounds; import it where kernels may be imported (`quant/test_kernels.py`)."""

import triton
import triton.language as tl

from llmquant.quant.kernels.gpu.numbers import level_of, round_scale


@triton.jit
def rounded(x, levels, scales, N: tl.constexpr):
    at = tl.arange(0, N)
    value = tl.load(x + at)
    tl.store(levels + at, level_of(value, 0.5, -8.0, 7.0))
    tl.store(scales + at, round_scale(value))

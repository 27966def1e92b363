"""Linears and canonical weights for tests of formats."""

import torch
from torch import Tensor

from llmquant.formats import LinearSpec
from llmquant.quant.grid import QuantizedWeight, QuantScheme, round_scales


def spec_of(
    bits: int = 4,
    group: int = 32,
    shape: tuple[int, int] = (6, 96),
    *,
    kind: str = "Linear",
    dtype: torch.dtype = torch.bfloat16,
    module: str = "model.layers.0.mlp.up_proj",
    symmetric: bool = True,
) -> LinearSpec:
    return LinearSpec(f"{module}.weight", module, kind, shape, dtype, QuantScheme(bits, group, symmetric))


def weight_of(spec: LinearSpec, seed: int = 0) -> QuantizedWeight:
    """A random canonical weight with scales of both signs over the whole range."""
    generator = torch.Generator().manual_seed(seed)
    low, high = spec.scheme.code_min, spec.scheme.code_max + 1
    codes = torch.randint(low, high, spec.shape, generator=generator, dtype=torch.int8)
    groups = (spec.shape[0], spec.scheme.groups(spec.shape[1]))
    scales = torch.randn(groups, generator=generator) * 4.0 ** torch.randint(-12, 3, groups, generator=generator)
    zeros = None if spec.scheme.symmetric else torch.randint(low, high, groups, generator=generator, dtype=torch.int8)
    return QuantizedWeight(codes, round_scales(scales), spec.scheme, zeros)


def counting(rows: int, columns: int) -> Tensor:
    """Codes that tell rows and columns apart: (row + 3 column) mod 16 - 8."""
    grid = torch.arange(rows)[:, None] + 3 * torch.arange(columns)
    return (grid % 16 - 8).to(torch.int8)

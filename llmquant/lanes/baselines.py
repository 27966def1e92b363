"""Other ways to quantize the same weights, evaluated in the same pass as ours.

A new baseline is one function and one line in BASELINES. Shapes: O out_features, I in_features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llmquant.errors import RecipeError, option
from llmquant.formats import LinearSpec
from llmquant.model.block import Block
from llmquant.model.weights import Value
from llmquant.quant.grid import QuantScheme
from llmquant.quant.solvers.rtn import round_to_nearest
from llmquant.recipe import Recipe
from llmquant.source.layouts import from_table


@dataclass(frozen=True)
class Baseline:
    """One baseline.

    label      what reports call it
    apply      (weight_OI, scheme) -> the weight quantized and dequantized, in the dtype it came in
    row_bits   (in_features, scheme) -> stored bits of one row, scales and zero points included
    """

    label: str
    apply: Callable[[Tensor, QuantScheme], Tensor]
    row_bits: Callable[[int, QuantScheme], float]


def _bnb_nf4(weight_OI: Tensor, scheme: QuantScheme) -> Tensor:
    """bitsandbytes' NF4: blocks of 64, float32 absmax, no double quantization. Its own codes and scales, decoded here.

    Why here: where rows are not whole blocks, the CPU code of bitsandbytes 0.50.2 uses the scales of wrong blocks
    (three times the error at 96 inputs). This decodes what the format means.
    """
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(weight_OI.contiguous(), blocksize=64, quant_type="nf4", compress_statistics=False)
    dense = from_table(packed, state.code, state.absmax, 64)[: weight_OI.numel()]
    return dense.view_as(weight_OI).to(weight_OI.dtype)


def _bnb_int8(weight_OI: Tensor, scheme: QuantScheme) -> Tensor:
    """bitsandbytes' INT8, one scale per row. Weights only, whereas `load_in_8bit` quantizes activations too."""
    import bitsandbytes.functional as bnb

    # Its kernel takes float16; load_in_8bit converts to it as well.
    codes, row_scales, _ = bnb.int8_vectorwise_quant(weight_OI.to(torch.float16).contiguous())
    dense: Tensor = codes.float() * (row_scales.float() / 127)[:, None]
    return dense.to(weight_OI.dtype)


BASELINES: dict[str, Baseline] = {
    "rtn": Baseline(
        "round to nearest, absmax groups, bf16 scales",
        round_to_nearest,
        lambda n, s: n * s.bits + (16 if s.symmetric else 16 + s.bits) * s.groups(n),
    ),
    "bnb-nf4": Baseline("bitsandbytes NF4, blocks of 64, float32 absmax", _bnb_nf4, lambda n, s: n * 4 + 32 * n / 64),
    "bnb-int8": Baseline("bitsandbytes INT8 by rows, weights only", _bnb_int8, lambda n, s: n * 8 + 32),
}


def dequantized(name: str, block: Block, specs: Sequence[LinearSpec]) -> dict[str, Value]:
    """What the baseline `name` makes of a loaded block's linears, for `Block.holding`."""
    return {spec.param: block.changed(spec, partial(_apply, name, spec.scheme)) for spec in specs}


def _apply(name: str, scheme: QuantScheme, weight_OI: Tensor) -> Tensor:
    return BASELINES[name].apply(weight_OI, scheme)


def default_baselines(bits: float) -> tuple[str, ...]:
    """rtn, and bitsandbytes at its width that is nearest to `bits`."""
    return ("rtn", "bnb-nf4") if bits < 6 else ("rtn", "bnb-int8")


def pick_baselines(recipe: Recipe, bits: float) -> tuple[str, ...]:
    """Names of the baseline lanes: `auto`, `none` or a comma-separated list. `bits` of our codes, on average."""
    if recipe.baselines == "auto":
        return default_baselines(bits)
    names = () if recipe.baselines == "none" else tuple(name.strip() for name in recipe.baselines.split(","))
    if unknown := [name for name in names if name not in BASELINES]:
        raise RecipeError(
            option("baselines"), repr(unknown[0]), expected=f"auto, none or some of {', '.join(BASELINES)}"
        )
    return tuple(dict.fromkeys(names))

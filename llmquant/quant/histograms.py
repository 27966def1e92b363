"""How the numbers of one quantized linear are spread: what report.html draws of the worst layers."""

from typing import Any

import torch
from torch import Tensor

from llmquant.quant.grid import QuantizedWeight

WEIGHT_BINS, SCALE_BINS = 41, 24


def histograms(weight_OI: Tensor, quantized: QuantizedWeight) -> dict[str, dict[str, Any]]:
    """Counts of the weights before quantization, of the codes, and of log2 |scale|; bins are equal, from low to high.

    Weights from -m to m, m = max |w|; one bin per code, whose edges lie halfway between codes.
    """
    largest = max(abs(float(end)) for end in weight_OI.aminmax())
    low, high = quantized.scheme.code_min, quantized.scheme.code_max
    from_zero = quantized.codes_OI.flatten().view(torch.uint8) - low % 256  # wraps round
    codes = torch.bincount(from_zero, minlength=high - low + 1)
    return {
        "weights": _counted(weight_OI, -largest, largest, WEIGHT_BINS),
        "codes": {"low": low - 0.5, "high": high + 0.5, "counts": codes.tolist()},
        "scales": _log_counted(quantized.scales_OG),
    }


def _log_counted(scales_OG: Tensor) -> dict[str, Any]:
    powers = scales_OG.abs().log2()
    return _counted(powers, float(powers.min()), float(powers.max()), SCALE_BINS)


def _counted(values: Tensor, low: float, high: float, bins: int) -> dict[str, Any]:
    if high <= low:  # all alike
        low, high = low - 0.5, high + 0.5
    counts = torch.histc(values.float(), bins, low, high)
    return {"low": low, "high": high, "counts": [int(count) for count in counts.tolist()]}

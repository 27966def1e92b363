"""How the numbers of one quantized linear are spread: report.html draws these histograms for its worst layers.

They show at a glance what went wrong. Weights: a few outliers far from all others stretch the grid. Codes: a pile at
either end means clipping, a lone peak at 0 a scale that is too large. Scales: groups whose scales differ by powers of
two, which one scale per row could not serve.

Shapes: O out_features, I in_features, G groups in a row.
"""

from typing import Any

import torch
from torch import Tensor

from llmquant.quant.grid import QuantizedWeight

WEIGHT_BINS, SCALE_BINS = 41, 24


def histograms(weight_OI: Tensor, quantized: QuantizedWeight) -> dict[str, dict[str, Any]]:
    """Counts of the weights before quantization, of the codes, and of log2 |scale|, in equal bins from low to high.

    Weights are counted from -m to m, m = max |w|. Each code has a bin of its own, with edges halfway between codes.

    >>> from llmquant.quant.grid import QuantScheme
    >>> weight_OI, scheme = torch.tensor([[0.9, -2.1]]), QuantScheme(2, -1)
    >>> codes_OI = torch.tensor([[1, -2]], dtype=torch.int8)
    >>> histograms(weight_OI, QuantizedWeight(codes_OI, torch.ones(1, 1), scheme))["codes"]
    {'low': -2.5, 'high': 1.5, 'counts': [1, 0, 0, 1]}
    """
    largest = max(abs(float(end)) for end in weight_OI.aminmax())
    low, high = quantized.scheme.code_min, quantized.scheme.code_max
    from_zero = quantized.codes_OI.flatten().view(torch.uint8) - low % 256  # code - low: bytes wrap round
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
    if high <= low:  # all values are equal
        low, high = low - 0.5, high + 0.5
    counts = torch.histc(values.float(), bins, low, high)
    return {"low": low, "high": high, "counts": [int(count) for count in counts.tolist()]}

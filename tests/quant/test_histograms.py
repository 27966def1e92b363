"""Histograms of layers: every number counted once, in its bin; and on the page for the worst layers."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from linears import spec_of, weight_of

import llmquant
from llmquant.quant.histograms import histograms


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_number_is_counted_in_its_bin(bits: int) -> None:
    spec = spec_of(bits, 32, (64, 96), module="m")
    quantized, weight = weight_of(spec), torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    found = histograms(weight, quantized)
    expected = {"weights": weight, "codes": quantized.codes_OI, "scales": quantized.scales_OG.abs().log2()}
    for name, values in expected.items():
        part = found[name]
        counts, _ = np.histogram(values.numpy(), bins=len(part["counts"]), range=(part["low"], part["high"]))
        assert part["counts"] == pytest.approx(counts.tolist(), abs=2)  # a number on an edge may fall either way
        assert sum(part["counts"]) == values.numel()
    codes, counts = quantized.codes_OI.unique(return_counts=True)
    assert {c: n for c, n in enumerate(found["codes"]["counts"], -(2 ** (bits - 1))) if n} == dict(
        zip(codes.tolist(), counts.tolist(), strict=True)
    )


def test_all_alike_is_one_bin() -> None:
    spec = spec_of(4, 32, (4, 32), module="m")
    quantized = weight_of(spec)
    quantized.scales_OG.fill_(0.5)
    found = histograms(torch.zeros(4, 32), quantized)
    assert sum(n > 0 for n in found["weights"]["counts"]) == sum(n > 0 for n in found["scales"]["counts"]) == 1


@pytest.mark.usefixtures("drawn")
def test_the_page_draws_the_three_worst_layers(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = llmquant.make_recipe("x", flags={"group_size": 32, "method": "rtn", "eval_data": "none"})
    llmquant.quantize(tiny_model("llama"), recipe, tmp_path / "out")
    layers = json.loads((tmp_path / "out" / "report.json").read_text())["layers"]
    worst = sorted(layers, key=lambda layer: -layer["weight_error"])[:3]
    page = (tmp_path / "out" / "report.html").read_text()
    section = page.partition('<section id="worst">')[2].partition("</section>")[0]
    places = [section.index(f"<code>{layer['name']}</code>") for layer in worst]
    assert places == sorted(places)
    assert section.count("<svg") == 9
    assert all(label in section for label in ("weight before quantization", "log2 of the scale"))

"""Figures against plain loops and NumPy."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import llmquant
from llmquant.errors import SolveError
from llmquant.lanes.baselines import BASELINES
from llmquant.lanes.scores import Lanes, TokenScores, bootstrap_ratio, figures, standard_error
from llmquant.model.streams import Streams
from llmquant.quant.grid import QuantScheme
from llmquant.report.parts import evaluation_report, lane_report
from llmquant.report.tables import describe_evaluation
from llmquant.text.windows import Windows

W4 = QuantScheme(4, 32)


def scores(nll: Any, kl: Any, finite: Any = None) -> TokenScores:
    nll, kl = np.asarray(nll, float), np.asarray(kl, float)
    finite = np.ones(nll.shape, bool) if finite is None else np.asarray(finite)
    return TokenScores(nll, kl, np.ones_like(nll), np.zeros_like(nll), np.ones_like(nll), finite)


def score_lanes(logits: dict[str, torch.Tensor], ids: torch.Tensor) -> dict[str, TokenScores]:
    """Score given logits [W, T, V] as if they were hidden states: the head is the identity."""
    windows = Windows(ids, "none", None, "none")
    with Streams({}, 10**9, lambda name: pytest.fail("no file needed")) as streams:
        lanes = Lanes(tuple(logits), windows, streams)
        for name, values in logits.items():
            lanes.streams[name].append(values)
        return lanes.score(lambda lane, hidden: hidden.clone())


def test_scores_equal_a_direct_computation() -> None:
    generator = torch.Generator().manual_seed(0)
    original, lane = torch.randn(2, 3, 40, 50, generator=generator).mul(3)
    ids = torch.randint(0, 50, (3, 40), generator=generator)
    found = score_lanes({"original": original, "lane": lane}, ids)
    p, q = original[:, :-1].double().softmax(-1), lane[:, :-1].double().softmax(-1)
    target = ids[:, 1:, None]
    np.testing.assert_allclose(found["lane"].kl, (p * (p / q).log()).sum(-1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["lane"].nll, -q.gather(2, target)[..., 0].log(), rtol=1e-5)
    np.testing.assert_array_equal(found["lane"].same_top, p.argmax(-1) == q.argmax(-1))
    np.testing.assert_allclose(found["lane"].dp, (q - p).gather(2, target)[..., 0], atol=1e-6)
    np.testing.assert_allclose(found["lane"].confidence, q.max(-1).values, rtol=1e-5)
    assert not found["original"].kl.any()
    assert found["original"].same_top.all()


def test_a_lane_with_the_originals_weights_has_no_divergence_at_all() -> None:
    logits = torch.randn(2, 30, 64, generator=torch.Generator().manual_seed(1))
    found = score_lanes({"original": logits, "copy": logits.clone()}, torch.zeros(2, 30, dtype=torch.long))
    assert figures(found["copy"], found["original"]).kl_max == 0.0


def test_tokens_that_are_not_finite_are_counted_and_left_out() -> None:
    generator = torch.Generator().manual_seed(2)
    original = torch.randn(2, 10, 20, generator=generator)
    broken = original + 0.1 * torch.randn(2, 10, 20, generator=generator)
    broken[0, 3, 5] = math.nan
    broken[1, 7, 2] = math.inf
    found = score_lanes({"original": original, "lane": broken}, torch.zeros(2, 10, dtype=torch.long))
    result = figures(found["lane"], found["original"])
    assert result.n_nonfinite == 2
    keep = found["lane"].finite
    assert keep.sum() == 16
    assert result.kl_mean == pytest.approx(found["lane"].kl[keep].mean())
    assert math.isfinite(result.perplexity)
    with pytest.raises(SolveError, match="every token"):
        figures(scores([[math.nan]], [[math.nan]], [[False]]), found["original"])


def test_tokens_that_are_not_finite_are_shown_beside_the_figures() -> None:
    sound = figures(scores([[1.0]], [[0.0]]), scores([[1.0]], [[0.0]]))
    lanes = {"original": lane_report(sound, 16.0, 1), "llmquant": lane_report(replace(sound, n_nonfinite=3), 4.0, 1)}
    windows = Windows(torch.zeros(1, 4, dtype=torch.long), "text", None, "none")
    shown = describe_evaluation(evaluation_report(windows, lanes))
    assert shown.endswith("; 3 tokens with NaN or Inf logits left out of llmquant")


def test_figures_equal_numpy() -> None:
    rng = np.random.default_rng(0)
    nll, base, kl = rng.gamma(2, 1, (8, 50)), rng.gamma(2, 1, (8, 50)), rng.gamma(1, 0.01, (8, 50))
    result = figures(scores(nll, kl), scores(base, 0 * kl))
    assert result.perplexity == pytest.approx(np.exp(nll.mean()))
    assert result.perplexity_se == pytest.approx(np.exp(nll.mean()) * nll.mean(1).std(ddof=1) / 8**0.5)
    assert result.perplexity_ratio == pytest.approx(np.exp(nll.mean() - base.mean()))
    quantiles = [result.kl_p50, result.kl_p90, result.kl_p99, result.kl_p999, result.kl_max]
    np.testing.assert_allclose(quantiles, np.quantile(kl, [0.5, 0.9, 0.99, 0.999, 1.0]))
    assert result.kl_se == pytest.approx(kl.mean(1).std(ddof=1) / 8**0.5)


def test_the_paired_interval_covers_the_truth_and_is_narrower_than_unpaired() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        differences = rng.normal(0.01, 0.02, 40)
        interval = bootstrap_ratio(differences, seed, resamples=400)
        assert interval is not None
        covered += interval[0] <= math.exp(0.01) <= interval[1]
    assert 180 <= covered <= 200
    assert standard_error(np.array([1.0])) is None
    assert bootstrap_ratio(np.array([1.0]), 0) is None


def test_lanes_of_one_run_equal_separate_runs(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    flags = {"group_size": 32, "method": "rtn", "eval_tokens": 256, "eval_seq_len": 64}
    together = llmquant.quantize(
        tiny_model("llama"),
        llmquant.make_recipe("x", flags=flags | {"baselines": "rtn,bnb-nf4,bnb-int8"}),
        tmp_path / "a",
    )
    assert list(together.lanes) == ["original", "llmquant", "rtn", "bnb-nf4", "bnb-int8"]
    figures_of = {k: v for k, v in together.lanes["rtn"].items() if k not in ("bytes", "bits_per_weight")}
    assert figures_of == {k: v for k, v in together.lanes["llmquant"].items() if k in figures_of}
    for name in ("rtn", "bnb-nf4", "bnb-int8"):
        alone = llmquant.quantize(
            tiny_model("llama"), llmquant.make_recipe("x", flags=flags | {"baselines": name}), tmp_path / name
        )
        assert alone.lanes[name] == together.lanes[name]


def test_bitsandbytes_lanes_hold_the_weights_of_load_in_4bit(tiny_model: Callable[[str], Path]) -> None:
    import bitsandbytes.functional as bnb
    from transformers import BitsAndBytesConfig

    folder = tiny_model("llama")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False)
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in dense.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear) and module.in_features % 64 == 0:
            weight = loaded.model.layers.get_submodule(name).weight
            theirs = bnb.dequantize_4bit(weight.data, weight.quant_state)
            ours = BASELINES["bnb-nf4"].apply(module.weight.data, W4)
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7, msg=name)


def test_bitsandbytes_int8_lane_is_their_rowwise_kernel() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(3)).bfloat16().float()
    ours = BASELINES["bnb-int8"].apply(weight, W4)
    half = weight.half().float()
    scale = half.abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(ours, (half / scale).round() * scale, rtol=0, atol=float(scale.max()) * 0.51)
    assert (ours - weight).abs().max() <= scale.max() * 0.51


def test_the_rtn_lane_never_searches_its_grid() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(4))
    scale = (weight.view(4, 2, 32).abs().amax(-1, keepdim=True) / 7.5).bfloat16().float()
    expected = ((weight.view(4, 2, 32) / scale).round().clamp(-8, 7) * scale).view(4, 64)
    assert torch.equal(BASELINES["rtn"].apply(weight, W4), expected)


@pytest.mark.parametrize("shape", [(64, 128), (96, 96), (64, 80), (8, 172)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_the_nearest_number_of_its_table_whatever_the_width(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """In float64, block by block of the flattened weight; bitsandbytes' own CPU decoder fails at 80 and 96 inputs."""
    import bitsandbytes.functional as bnb

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    table = bnb.get_4bit_type("nf4", device="cpu").double()
    flat = weight.double().flatten()
    absmax = torch.stack([block.abs().max() for block in flat.split(64)]).repeat_interleave(64)[: len(flat)]
    nearest = table[((flat / absmax)[:, None] - table).abs().argmin(1)] * absmax
    found = BASELINES["bnb-nf4"].apply(weight, W4)
    assert found.dtype == dtype
    rtol = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7}[dtype]  # an exact half may be rounded either way
    torch.testing.assert_close(found.double().flatten(), nearest, rtol=rtol, atol=1e-6)

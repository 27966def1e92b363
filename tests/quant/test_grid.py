"""The grid: canonical scales, nearest codes, the scale search and the checks of the canonical form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmquant.quant.grid import (
    SCALE_MAX,
    SCALE_MIN,
    QuantizedWeight,
    QuantScheme,
    absmax_scales,
    minmax_grid,
    quantize_to_grid,
    round_scales,
    search_grid,
)

few = settings(max_examples=60, deadline=None)
floats = st.floats(width=32, allow_nan=False)
bit_widths = pytest.mark.parametrize("bits", [2, 3, 4, 8])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weighted_error(weight_OI: Tensor, scales_OG: Tensor, importance_I: Tensor, scheme: QuantScheme) -> Tensor:
    """The error that search_grid minimises, [O, G], in float64."""
    rows, groups = scales_OG.shape
    codes_OI = quantize_to_grid(weight_OI, scales_OG, scheme)
    product = codes_OI.view(rows, groups, -1).double() * scales_OG.double()[..., None]
    error = (product - weight_OI.double().view(rows, groups, -1)).abs() ** 2.5
    return (error * importance_I.double().view(groups, -1)).sum(-1)


# -- scales --------------------------------------------------------------------------------------------
@few
@given(st.lists(floats, min_size=1, max_size=20))
def test_rounded_scales_are_bf16_in_range_idempotent_and_exact_in_fp16(values: list[float]) -> None:
    scales = round_scales(torch.tensor(values))
    assert torch.equal(scales, scales.bfloat16().float())
    assert torch.equal(scales, scales.half().float())
    assert torch.equal(scales, round_scales(scales))
    assert bool(((scales.abs() >= SCALE_MIN) & (scales.abs() <= SCALE_MAX)).all())
    assert torch.equal(scales < 0, torch.tensor(values) < 0)


@few
@given(st.floats(SCALE_MIN, SCALE_MAX, width=32))
def test_a_scale_in_range_goes_to_the_nearest_bf16_number(value: float) -> None:
    rounded = round_scales(torch.tensor([value]))
    assert torch.equal(rounded, torch.tensor([value]).bfloat16().float())
    assert rounded.item() == pytest.approx(value, rel=2**-8)


def test_the_range_ends_at_bf16_numbers_that_fp16_holds() -> None:
    ends = torch.tensor([SCALE_MIN, SCALE_MAX])
    assert torch.equal(ends, ends.bfloat16().float())
    assert torch.equal(ends, ends.half().float())
    assert torch.isinf(torch.nextafter(ends[1].bfloat16(), torch.tensor(torch.inf).bfloat16()).half())


def test_round_scales_keeps_shape_and_float_dtype() -> None:
    for dtype in (torch.float32, torch.float64):
        assert round_scales(torch.ones(3, 2, dtype=dtype)).dtype == dtype
    assert round_scales(torch.ones(3, 2)).shape == (3, 2)


# -- codes ---------------------------------------------------------------------------------------------
@bit_widths
@pytest.mark.parametrize("group", [8, -1])
def test_codes_are_the_nearest_of_all_codes(bits: int, group: int) -> None:
    scheme = QuantScheme(bits, group)
    weight = randn(6, 32, seed=bits) * 3
    scales = round_scales(randn(6, scheme.groups(32), seed=bits + 1) * 2 / 2**bits)
    codes = quantize_to_grid(weight, scales, scheme)
    step = scales.double().repeat_interleave(scheme.group(32), dim=1)
    all_codes = torch.arange(scheme.code_min, scheme.code_max + 1)
    every_error = (all_codes * step[..., None] - weight.double()[..., None]).abs()
    error = (codes * step - weight.double()).abs()
    assert codes.dtype == torch.int8
    assert bool((error <= every_error.amin(-1) + 1e-6 * step.abs() * 2**bits).all())


def test_halves_go_to_the_even_code() -> None:
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert quantize_to_grid(weight, torch.ones(1, 1), QuantScheme(4, -1)).tolist() == [[0, 2, 2, 0, -2, -2]]


def test_a_negative_scale_uses_the_extra_code_for_the_largest_positive_weight() -> None:
    weight = torch.tensor([[8.0, -7.0, -8.0]])
    assert quantize_to_grid(weight, -torch.ones(1, 1), QuantScheme(4, -1)).tolist() == [[-8, 7, 7]]


# -- absmax --------------------------------------------------------------------------------------------
@bit_widths
def test_absmax_scale_is_absmax_over_half_the_codes_less_a_half(bits: int) -> None:
    weight = randn(5, 24)
    scales = absmax_scales(weight, QuantScheme(bits, 8))
    for row in range(5):
        for group in range(3):
            largest = max(abs(x) for x in weight[row, 8 * group : 8 * group + 8].tolist())
            assert scales[row, group] == torch.tensor(largest / (2 ** (bits - 1) - 0.5)).bfloat16().float()


@bit_widths
def test_absmax_error_is_at_most_half_a_step(bits: int) -> None:
    scheme = QuantScheme(bits, 16)
    weight = randn(20, 64)
    scales = absmax_scales(weight, scheme)
    error = QuantizedWeight(quantize_to_grid(weight, scales, scheme), scales, scheme).dequantize() - weight
    # bf16 may round the scale down by 2^-9: the ends of the grid then lie that much too low.
    slack = 0.5 + 2 ** (bits - 1) * 2**-8
    assert bool((error.view(20, 4, 16).abs() <= slack * scales[..., None]).all())


# -- asymmetric grids ----------------------------------------------------------------------------------
def asymmetric_error(weight: Tensor, scales: Tensor, zeros: Tensor, importance: Tensor, scheme: QuantScheme) -> Tensor:
    quantized = QuantizedWeight(quantize_to_grid(weight, scales, scheme, zeros), scales.float(), scheme, zeros)
    error = (quantized.dequantize(weight.dtype) - weight).abs() ** 2.5 * importance
    return error.view(*scales.shape, -1).sum(-1)


@bit_widths
@pytest.mark.parametrize("shift", [-3.0, 0.0, 0.7, 3.0])
def test_the_minmax_grid_reaches_both_ends_and_holds_zero_exactly(bits: int, shift: float) -> None:
    weight, scheme = randn(20, 32) + shift, QuantScheme(bits, 16, symmetric=False)
    weight[:, 3] = 0
    scales, zeros = minmax_grid(weight, scheme)
    quantized = QuantizedWeight(quantize_to_grid(weight, scales, scheme, zeros), scales, scheme, zeros)
    error = (quantized.dequantize() - weight).view(20, 2, 16).abs()
    assert not quantized.dequantize()[:, 3].any()
    # one step: half for rounding the weight, half for rounding the zero; and what bf16 takes from the scale
    assert bool((error <= (1 + 2**bits * 2**-8) * scales[..., None]).all())


@bit_widths
@pytest.mark.parametrize("group", [16, -1])
def test_the_asymmetric_search_is_never_worse_than_minmax_or_a_brute_force_of_its_candidates(
    bits: int, group: int
) -> None:
    scheme = QuantScheme(bits, group, symmetric=False)
    weight = randn(40, 64, seed=bits).double() + 0.5
    importance = torch.rand(64, dtype=torch.float64) + 0.01
    scales, zeros = search_grid(weight, importance, scheme)
    assert zeros is not None
    found = asymmetric_error(weight, scales, zeros, importance, scheme)
    full, middle = minmax_grid(weight, scheme)
    for ratio in (0.4, 0.65, 0.9, 1.0):
        for step in (-1, 0, 1):
            zero = (middle + step).clamp(scheme.code_min, scheme.code_max)
            other = asymmetric_error(weight, round_scales(full * ratio), zero, importance, scheme)
            assert bool((found <= other * (1 + 1e-9)).all()), (ratio, step)


def test_a_zero_point_helps_shifted_weights() -> None:
    weight, importance = randn(50, 64) + 2.0, torch.ones(64)
    scheme = QuantScheme(4, 32, symmetric=False)
    scales, zeros = search_grid(weight, importance, scheme)
    assert zeros is not None
    shifted = asymmetric_error(weight, scales, zeros, importance, scheme).sum()
    plain = weighted_error(
        weight, search_scales(weight, importance, QuantScheme(4, 32)), importance, QuantScheme(4, 32)
    )
    assert shifted < 0.5 * plain.sum()


def test_the_canonical_form_wants_zeros_for_asymmetric_grids_only() -> None:
    codes, scales = torch.zeros(2, 8, dtype=torch.int8), torch.ones(2, 2)
    zeros, scheme = torch.full((2, 2), 3, dtype=torch.int8), QuantScheme(3, 4, symmetric=False)
    assert QuantizedWeight(codes, scales, scheme, zeros).dequantize().tolist() == [[-3.0] * 8] * 2
    with pytest.raises(ValueError, match="asymmetric"):
        QuantizedWeight(codes, scales, scheme)
    with pytest.raises(ValueError, match="asymmetric"):
        QuantizedWeight(codes, scales, QuantScheme(3, 4), zeros)
    with pytest.raises(ValueError, match=r"zeros torch.int8 \(2, 1\)"):
        QuantizedWeight(codes, scales, scheme, zeros[:, :1])
    with pytest.raises(ValueError, match=r"zeros torch.int64"):
        QuantizedWeight(codes, scales, scheme, zeros.long())
    with pytest.raises(ValueError, match=r"zeros 4\.\.4 outside"):
        QuantizedWeight(codes, scales, scheme, zeros + 1)


# -- search --------------------------------------------------------------------------------------------
def search_scales(weight: Tensor, importance: Tensor, scheme: QuantScheme) -> Tensor:
    return search_grid(weight, importance, scheme)[0]


def slow_search(weight: Tensor, importance: Tensor, bits: int) -> float:
    """search_grid for one group, one candidate at a time, in float32."""
    full = weight.abs().max() / 2 ** (bits - 1)
    best_error, best_scale, best_ratio = torch.inf, 0.0, torch.tensor(1.0)

    def judge(ratio: Tensor) -> None:
        nonlocal best_error, best_scale, best_ratio
        scale = (full * ratio).abs().clamp(2**-17, 65280).bfloat16().float() * ratio.sign()
        error = 0.0
        for w, h in zip(weight, importance, strict=True):
            code = (w / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            error += float(h * (code * scale - w).abs() ** 2.5)
        if error < best_error:
            best_error, best_scale, best_ratio = error, float(scale), ratio

    plain = 2 ** (bits - 1) / (2 ** (bits - 1) - 0.5)
    for ratio in (*(percent / 100 for percent in range(40, 115, 5)), plain):
        for sign in (1, -1):
            judge(torch.tensor(sign * ratio))
    centre = best_ratio
    for step in (-0.0375, -0.025, -0.0125, 0.0125, 0.025, 0.0375):
        judge(centre.sign() * (centre.abs() + step))
    return best_scale


@bit_widths
def test_search_equals_a_slow_loop_over_groups(bits: int) -> None:
    weight, importance = randn(4, 24, seed=bits), randn(24, seed=9).square() + 0.01
    scales = search_scales(weight, importance, QuantScheme(bits, 8))
    for row in range(4):
        for group in range(3):
            part = slice(8 * group, 8 * group + 8)
            assert float(scales[row, group]) == slow_search(weight[row, part], importance[part], bits), (row, group)


def test_every_row_is_searched_for_itself_in_any_chunk_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmquant.quant.grid._COARSE", (0.8, 1.0))  # a chunk is large: few candidates
    monkeypatch.setattr("llmquant.quant.grid._FINE", (0.0125,))
    weight, importance, scheme = randn(32772, 64).double(), torch.rand(64) + 0.1, QuantScheme(4, 64)
    whole = search_scales(weight, importance, scheme)  # chunks of 32768 rows
    for rows in (slice(0, 1), slice(100, 105), slice(32766, 32772)):
        assert torch.equal(whole[rows], search_scales(weight[rows], importance, scheme))


@bit_widths
@pytest.mark.parametrize("group", [4, 32, -1])
def test_search_is_never_worse_than_absmax_or_any_coarse_candidate_of_either_sign(bits: int, group: int) -> None:
    scheme = QuantScheme(bits, group)
    weight, importance = randn(50, 64, seed=bits).double(), torch.rand(64, dtype=torch.float64) + 0.01
    found = weighted_error(weight, search_scales(weight, importance, scheme), importance, scheme)
    full = weight.view(50, scheme.groups(64), -1).abs().amax(-1) / 2 ** (bits - 1)
    for ratio in (0.4, 0.55, 0.7, 0.85, 1.0, 1.1, -0.4, -0.55, -0.7, -0.85, -1.0, -1.1):
        other = weighted_error(weight, round_scales(full * ratio), importance, scheme)
        assert bool((found <= other * (1 + 1e-9)).all()), ratio
    plain = weighted_error(weight, absmax_scales(weight, scheme), importance, scheme)
    assert bool((found <= plain * (1 + 1e-9)).all())


@bit_widths
@pytest.mark.parametrize("group", [32, 128])
def test_search_beats_absmax_scales_on_the_sum_of_many_groups(bits: int, group: int) -> None:
    scheme = QuantScheme(bits, group)
    weight, importance = randn(200, 128, seed=bits), torch.rand(128) + 0.01
    found = weighted_error(weight, search_scales(weight, importance, scheme), importance, scheme).sum()
    assert found < 0.95 * weighted_error(weight, absmax_scales(weight, scheme), importance, scheme).sum()


@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e-8])
def test_a_group_of_zero_or_tiny_weights_gets_the_smallest_scale_and_zero_codes(magnitude: float) -> None:
    weight = torch.cat([randn(3, 32), randn(3, 32) * magnitude], dim=1)
    scheme = QuantScheme(4, 32)
    scales = search_scales(weight, torch.ones(64), scheme)
    assert bool((scales[:, 1].abs() == SCALE_MIN).all())
    assert bool((scales[:, 0].abs() > 0.01).all())
    codes = quantize_to_grid(weight, scales, scheme)
    assert not codes[:, 32:].any()
    assert not QuantizedWeight(codes, scales, scheme).dequantize()[:, 32:].any()


@pytest.mark.parametrize("sign", [1, -1])
def test_one_huge_outlier_is_kept_and_may_be_clipped_only_where_it_does_not_matter(sign: int) -> None:
    weight, scheme = randn(1, 32), QuantScheme(4, -1)
    weight[0, 5] = sign * 1e4
    kept = search_scales(weight, torch.ones(32), scheme)
    dense = QuantizedWeight(quantize_to_grid(weight, kept, scheme), kept, scheme).dequantize()
    assert dense[0, 5] == pytest.approx(sign * 1e4, rel=0.01)
    unimportant = torch.ones(32)
    unimportant[5] = 0
    assert search_scales(weight, unimportant, scheme).abs() < 0.5 * kept.abs()


@pytest.mark.parametrize("sign", [1, -1])
@bit_widths
def test_a_group_on_a_grid_of_either_sign_is_found_exactly(sign: int, bits: int) -> None:
    scheme = QuantScheme(bits, -1)
    codes = torch.arange(scheme.code_min, scheme.code_max + 1)[None]
    weight = sign * 0.125 * codes.float()
    scales = search_scales(weight, torch.ones(codes.shape[1]), scheme)
    assert scales.tolist() == [[sign * 0.125]]
    assert torch.equal(quantize_to_grid(weight, scales, scheme), codes.to(torch.int8))


# -- canonical form ------------------------------------------------------------------------------------
CODES, SCALES = torch.zeros(2, 8, dtype=torch.int8), torch.ones(2, 2)


def scale(value: float) -> Tensor:
    return torch.tensor([[1.0, 1.0], [value, 1.0]])


def code(value: int) -> Tensor:
    codes = CODES.clone()
    codes[1, 3] = value
    return codes


REFUSED = {
    "one group too few": (CODES, SCALES[:, :1], "do not fit"),
    "one group too many": (CODES, torch.ones(2, 3), "do not fit"),
    "one row too few": (CODES, SCALES[:1], "do not fit"),
    "scales without rows": (CODES, SCALES[0], "do not fit"),
    "group does not divide": (CODES[:, :7], SCALES[:, :1], "does not divide"),
    "codes int16": (CODES.short(), SCALES, "int8"),
    "codes uint8": (CODES.to(torch.uint8), SCALES, "int8"),
    "scales float64": (CODES, SCALES.double(), "float32"),
    "scales bfloat16": (CODES, SCALES.bfloat16(), "float32"),
    "NaN scale": (CODES, scale(torch.nan), "outside"),
    "infinite scale": (CODES, scale(torch.inf), "outside"),
    "zero scale": (CODES, scale(0.0), "outside"),
    "scale too small": (CODES, scale(SCALE_MIN / 2), "outside"),
    "scale too large": (CODES, scale(65536.0), "outside"),
    "negative scale too large": (CODES, scale(-65536.0), "outside"),
    "scale not in bf16": (CODES, scale(1 + 2**-9), "bfloat16"),
    "code too small": (code(-9), SCALES, "codes"),
    "code too large": (code(8), SCALES, "codes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_canonical_form_refuses(name: str) -> None:
    codes, scales, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        QuantizedWeight(codes, scales, QuantScheme(4, 4))


def test_the_canonical_form_takes_negative_scales_and_the_ends_of_both_ranges() -> None:
    codes = torch.tensor([[-8, 7, 0, 1], [-8, 7, 0, 1]], dtype=torch.int8)
    weight = QuantizedWeight(codes, torch.tensor([[-SCALE_MAX], [SCALE_MIN]]), QuantScheme(4, -1))
    assert weight.dequantize()[:, 0].tolist() == [8 * SCALE_MAX, -8 * SCALE_MIN]


@few
@given(st.sampled_from([2, 3, 4, 8]), st.sampled_from([1, 2, 4, -1]), st.integers(0, 1000))
def test_dequantize_is_code_times_the_scale_of_its_group(bits: int, group: int, seed: int) -> None:
    scheme = QuantScheme(bits, group)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(scheme.code_min, scheme.code_max + 1, (3, 8), generator=generator, dtype=torch.int8)
    scales = round_scales(torch.randn(3, scheme.groups(8), generator=generator))
    dense = QuantizedWeight(codes, scales, scheme).dequantize()
    for row in range(3):
        for column in range(8):
            exact = int(codes[row, column]) * float(scales[row, column // scheme.group(8)])
            assert float(dense[row, column]) == exact  # 8 bits times 8 bits: float32 rounds nothing


def test_dequantize_rounds_once_to_the_asked_dtype() -> None:
    weight = QuantizedWeight(
        torch.tensor([[7, -7]], dtype=torch.int8), round_scales(torch.tensor([[0.3]])), QuantScheme(4, -1)
    )
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(weight.dequantize(dtype), weight.dequantize().to(dtype))
        assert weight.dequantize(dtype).dtype == dtype


def test_dequantize_changes_neither_codes_nor_scales() -> None:
    codes, scales = code(3), SCALES.clone()
    QuantizedWeight(codes, scales, QuantScheme(4, 4)).dequantize()
    assert torch.equal(codes, code(3))
    assert torch.equal(scales, SCALES)

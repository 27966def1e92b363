"""What every format promises, and compressed-tensors against golden bytes and the peer's own reader."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from linears import spec_of, weight_of
from torch import Tensor

from llmquant.errors import FormatError
from llmquant.formats import FORMATS, LinearSpec
from llmquant.quant.grid import QuantizedWeight, QuantScheme

every_format = pytest.mark.parametrize("name", FORMATS)
bit_widths = pytest.mark.parametrize("bits", [2, 3, 4, 8])
CT = FORMATS["compressed-tensors"]


def takes(name: str, spec: LinearSpec) -> bool:
    try:
        FORMATS[name].check([spec])
    except FormatError:
        return False
    return True


def specs_for(name: str) -> list[LinearSpec]:
    """All that the format takes of many shapes, widths, dtypes and kinds."""
    shapes = ((32, (6, 96)), (64, (3, 64)), (-1, (5, 37)), (32, (32, 96)), (64, (64, 128)), (-1, (32, 64)))
    specs = [
        spec_of(bits, group, shape, kind=kind, dtype=dtype, symmetric=symmetric)
        for bits in (2, 3, 4, 8)
        for group, shape in shapes
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for kind in ("Linear", "Conv1D")
        for symmetric in (True, False)
    ]
    return [spec for spec in specs if takes(name, spec)]


def test_what_each_format_takes() -> None:
    taken = {name: specs_for(name) for name in FORMATS}
    assert {name: sorted({s.scheme.bits for s in specs}) for name, specs in taken.items()} == {
        "compressed-tensors": [2, 3, 4, 8],
        "gptq": [4, 8],
        "awq": [4],
        "mlx": [2, 3, 4, 8],
        "gguf": [4, 8],
        "fake": [2, 3, 4, 8],
    }
    assert [name for name, specs in taken.items() if any(s.transposed for s in specs)] == ["gguf", "fake"]
    assert [name for name, specs in taken.items() if any(not s.scheme.symmetric for s in specs)] == [
        "awq",
        "mlx",
        "gguf",
        "fake",
    ]


# -- contract ------------------------------------------------------------------------------------------
@every_format
def test_the_layout_is_that_of_the_tensors(name: str) -> None:
    for spec in specs_for(name):
        tensors = FORMATS[name].tensors(spec, weight_of(spec))
        assert FORMATS[name].layout(spec) == {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()}
        assert all(tensor.is_contiguous() and key.startswith(spec.prefix) for key, tensor in tensors.items())


@every_format
def test_reading_inverts_writing(name: str) -> None:
    for spec in specs_for(name):
        weight = weight_of(spec)
        found = FORMATS[name].read(spec, FORMATS[name].tensors(spec, weight).__getitem__)
        if isinstance(found, QuantizedWeight):
            assert torch.equal(found.codes_OI, weight.codes_OI)
            assert torch.equal(found.scales_OG, weight.scales_OG)
            assert found.scheme == weight.scheme
            if weight.zeros_OG is not None and found.zeros_OG is not None:
                assert torch.equal(found.zeros_OG, weight.zeros_OG)
        else:
            assert found.shape == spec.shape
            assert torch.equal(found, weight.dequantize(spec.dtype))


@every_format
def test_writing_leaves_the_weight_alone(name: str) -> None:
    spec = specs_for(name)[0]
    weight, untouched = weight_of(spec), weight_of(spec)
    FORMATS[name].tensors(spec, weight)
    assert torch.equal(weight.codes_OI, untouched.codes_OI)
    assert torch.equal(weight.scales_OG, untouched.scales_OG)


@every_format
def test_weight_bits_are_the_stored_bits_but_for_padding_and_the_shape(name: str) -> None:
    for spec in specs_for(name):
        layout = FORMATS[name].layout(spec)
        stored = sum(8 * dtype.itemsize * torch.Size(shape).numel() for dtype, shape in layout.values())
        extra = 128 + 31 * spec.shape[0] if name == "compressed-tensors" else 0
        assert 0 <= stored - FORMATS[name].weight_bits(spec) <= extra


def test_weight_bits_of_int4_in_groups_of_128_are_4_and_an_eighth() -> None:
    spec = spec_of(4, 128, (16, 256))
    assert CT.weight_bits(spec) / (16 * 256) == 4.125
    assert FORMATS["fake"].weight_bits(spec) / (16 * 256) == 16


@every_format
def test_a_format_takes_plain_symmetric_linears(name: str) -> None:
    spec = spec_of(4, 32, (32, 96))
    FORMATS[name].check([spec])
    keys = {"quantization_config", "quantization"} if name == "mlx" else {"quantization_config"}
    assert FORMATS[name].config([spec], ["lm_head"]).keys() <= keys


# -- compressed-tensors --------------------------------------------------------------------------------
def raw(tensor: Tensor) -> str:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes().hex(" ")


def test_compressed_tensors_bytes_of_a_tiny_weight() -> None:
    """Codes + 8 are 0..15; bf16 is the upper half of float32: 0.5 = 3f00, 0.25 = 3e80, -1 = bf80, 2 = 4000."""
    spec = spec_of(4, 4, (2, 8), module="m")
    codes = torch.arange(-8, 8, dtype=torch.int8).view(2, 8)
    weight = QuantizedWeight(codes, torch.tensor([[0.5, 0.25], [-1.0, 2.0]]), spec.scheme)
    tensors = CT.tensors(spec, weight)
    assert {name: raw(tensor) for name, tensor in tensors.items()} == {
        "m.weight_packed": "10 32 54 76 98 ba dc fe",
        "m.weight_scale": "00 3f 80 3e 80 bf 00 40",
        "m.weight_shape": "02 00 00 00 00 00 00 00 08 00 00 00 00 00 00 00",
    }
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "m.weight_packed": (torch.int32, (2, 1)),
        "m.weight_scale": (torch.bfloat16, (2, 2)),
        "m.weight_shape": (torch.int64, (2,)),
    }


def test_compressed_tensors_config_of_one_scheme() -> None:
    assert CT.config([spec_of(4, 128, (8, 256)), spec_of(4, 128, (8, 256), module="b")], ["lm_head"]) == {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "format": "pack-quantized",
                    "weights": {
                        "num_bits": 4,
                        "type": "int",
                        "symmetric": True,
                        "dynamic": False,
                        "strategy": "group",
                        "group_size": 128,
                    },
                    "input_activations": None,
                    "output_activations": None,
                }
            },
        }
    }


def test_compressed_tensors_config_of_two_schemes_names_the_modules_of_each() -> None:
    specs = [spec_of(4, 32, module="a"), spec_of(8, -1, module="b"), spec_of(4, 32, module="c")]
    groups = CT.config(specs, [])["quantization_config"]["config_groups"]
    assert {name: group["targets"] for name, group in groups.items()} == {"group_0": ["a", "c"], "group_1": ["b"]}
    assert groups["group_1"]["weights"]["strategy"] == "channel"
    assert "group_size" not in groups["group_1"]["weights"]


def peer_scheme(spec: LinearSpec) -> Any:
    """compressed-tensors' own reading of our config, which refuses unknown keys."""
    config = QuantizationConfig.model_validate(CT.config([spec], ["lm_head"])["quantization_config"])
    assert config.format == "pack-quantized"
    assert config.ignore == ["lm_head"]
    return config.config_groups["group_0"]


def decompressed_by_peer(spec: LinearSpec, weight: QuantizedWeight) -> Tensor:
    local = {name.removeprefix(spec.prefix): tensor for name, tensor in CT.tensors(spec, weight).items()}
    dense: Tensor = PackedQuantizationCompressor.decompress(local, peer_scheme(spec))["weight"]
    return dense


@bit_widths
@pytest.mark.parametrize(("group", "shape"), [(32, (6, 96)), (128, (4, 256)), (-1, (6, 96)), (-1, (5, 37))])
def test_the_peer_decompresses_our_bytes_to_exactly_our_weight(bits: int, group: int, shape: tuple[int, int]) -> None:
    spec = spec_of(bits, group, shape, dtype=torch.float32)
    weight = weight_of(spec, seed=bits)
    assert torch.equal(decompressed_by_peer(spec, weight), weight.dequantize())


@bit_widths
def test_the_peer_decompresses_16_bit_scales_to_our_weight_in_that_dtype(bits: int) -> None:
    spec = spec_of(bits, 32)
    weight = weight_of(spec, seed=bits)
    assert torch.equal(decompressed_by_peer(spec, weight), weight.dequantize(torch.bfloat16))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 4), st.integers(1, 70), st.integers(0, 10**6))
def test_the_peer_reads_rows_of_any_length(bits: int, rows: int, columns: int, seed: int) -> None:
    spec = spec_of(bits, -1, (rows, columns), dtype=torch.float32)
    weight = weight_of(spec, seed)
    assert torch.equal(decompressed_by_peer(spec, weight), weight.dequantize())


def test_compressed_tensors_refuses_conv1d_and_names_it() -> None:
    message = r"^h\.0\.attn: compressed-tensors cannot hold Conv1D .*; use --format gguf or fake$"
    with pytest.raises(FormatError, match=message):
        CT.check([spec_of(), spec_of(kind="Conv1D", module="h.0.attn")])


@pytest.mark.parametrize(
    ("kind", "bits", "symmetric", "shape", "remedy"),
    [
        ("Linear", 8, False, (6, 96), "use --format mlx or fake"),
        ("Conv1D", 8, False, (6, 96), "use --format fake"),
        ("Linear", 4, True, (6, 40), "use --format compressed-tensors"),
        ("Conv1D", 4, True, (6, 40), "use --format fake"),
    ],
)
def test_the_way_out_names_formats_that_hold_the_layer(
    kind: str, bits: int, symmetric: bool, shape: tuple[int, int], remedy: str
) -> None:
    with pytest.raises(FormatError, match=f", or {remedy}$"):
        FORMATS["gguf"].check([spec_of(bits, -1, shape, kind=kind, symmetric=symmetric)])


def test_compressed_tensors_refuses_an_asymmetric_grid() -> None:
    with pytest.raises(FormatError, match="asymmetric"):
        CT.check([replace(spec_of(), scheme=QuantScheme(4, 32, symmetric=False))])


def test_scales_are_exact_in_every_stored_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        spec = spec_of(4, 32, dtype=dtype)
        weight = weight_of(spec)
        stored = CT.tensors(spec, weight)[f"{spec.prefix}weight_scale"]
        assert stored.dtype == dtype
        assert torch.equal(stored.float(), weight.scales_OG)


# -- fake ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fake_holds_a_linear_as_it_is_and_conv1d_transposed(dtype: torch.dtype) -> None:
    fake = FORMATS["fake"]
    for kind in ("Linear", "Conv1D"):
        spec = spec_of(4, 32, (6, 96), kind=kind, dtype=dtype)
        weight = weight_of(spec)
        (stored,) = fake.tensors(spec, weight).values()
        dense = weight.dequantize(dtype)
        assert torch.equal(stored, dense if kind == "Linear" else dense.T)
        assert fake.layout(spec) == {spec.key: (dtype, (6, 96) if kind == "Linear" else (96, 6))}
        assert fake.config([spec], ["lm_head"]) == {}

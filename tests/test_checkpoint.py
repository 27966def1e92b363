"""Quantized checkpoints read back as dense ones: ours in every format, and those of other tools."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from linears import spec_of, weight_of
from safetensors.torch import save_file
from torch import Tensor

import llmquant
from llmquant.checkpoint import PackedSource, open_checkpoint
from llmquant.errors import SourceError
from llmquant.formats import FORMATS
from llmquant.formats.packing import pack_rows

SPEC = spec_of(4, 32, (64, 96), module="m")
WEIGHT = weight_of(SPEC)
ASYMMETRIC = weight_of(spec_of(4, 32, (64, 96), module="m", symmetric=False))


def checkpoint(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> PackedSource:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    source = open_checkpoint(folder)
    assert isinstance(source, PackedSource)
    return source


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "awq", "mlx"])
def test_our_own_formats_read_back_exactly(name: str, tmp_path: Path) -> None:
    fmt, norm = FORMATS[name], torch.randn(7)
    source = checkpoint(tmp_path / "c", fmt.tensors(SPEC, WEIGHT) | {"norm": norm}, fmt.config([SPEC], []))
    assert torch.equal(source.read("m.weight"), WEIGHT.dequantize())
    assert torch.equal(source.read("norm"), norm)
    assert source.tensors.keys() == {"m.weight", "norm"}
    assert source.tensors["m.weight"].shape == (64, 96)
    assert source.bits_per_weight == fmt.weight_bits(SPEC) / (64 * 96)
    assert not {"quantization_config", "quantization"} & source.config.keys()


def test_awq_with_zero_points(tmp_path: Path) -> None:
    spec = spec_of(4, 32, (64, 96), module="m", symmetric=False)
    source = checkpoint(tmp_path / "c", FORMATS["awq"].tensors(spec, ASYMMETRIC), FORMATS["awq"].config([spec], []))
    assert torch.equal(source.read("m.weight"), ASYMMETRIC.dequantize())


def test_compressed_tensors_with_zero_points_as_their_own_packer_writes_them(tmp_path: Path) -> None:
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights})
    state = {
        "weight": ASYMMETRIC.dequantize(),
        "weight_scale": ASYMMETRIC.scales_OG,
        "weight_zero_point": ASYMMETRIC.zeros_OG,
    }
    packed = PackedQuantizationCompressor.compress(state, scheme)
    config = {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}
    source = checkpoint(tmp_path / "c", {f"m.{name}": t for name, t in packed.items()}, config)
    assert torch.equal(source.read("m.weight"), ASYMMETRIC.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq_with_zero_points_in_both_versions_and_act_order(bits: int, version: str, tmp_path: Path) -> None:
    """By the formula: w[o, i] = (u[i, o] - (stored zero + 1 in v1)[g_idx[i], o]) * scale[g_idx[i], o]."""
    generator = torch.Generator().manual_seed(bits)
    u_IO = torch.randint(0, 2**bits, (96, 64), generator=generator, dtype=torch.uint8)
    stored_GO = torch.randint(0, 2**bits - 1, (3, 64), generator=generator, dtype=torch.uint8)
    scales_GO = torch.rand(3, 64, generator=generator).half()
    g_idx = torch.arange(96, dtype=torch.int32)[torch.randperm(96, generator=generator)] // 32
    tensors = {
        "m.qweight": pack_rows(u_IO.T.contiguous(), bits).T,
        "m.qzeros": pack_rows(stored_GO, bits),
        "m.scales": scales_GO,
        "m.g_idx": g_idx,
    }
    method = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": False, "checkpoint_format": version}
    source = checkpoint(tmp_path / "c", tensors, {"quantization_config": method})
    expected = torch.empty(64, 96)
    for i in range(96):
        zero = stored_GO[g_idx[i]].float() + (version == "gptq")
        expected[:, i] = (u_IO[i].float() - zero) * scales_GO[g_idx[i]].float()
    assert torch.equal(source.read("m.weight"), expected)


def test_mlx_weights_that_mlx_quantized(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="needs mlx, which has wheels for macOS and Linux only")
    dense = mx.random.normal((64, 128))
    parts = mx.quantize(dense, group_size=64, bits=3)
    names = ("weight", "scales", "biases")
    config = {"quantization": {"group_size": 64, "bits": 3}}
    tensors = {f"m.{name}": torch.from_numpy(np.array(part)) for name, part in zip(names, parts, strict=True)}
    source = checkpoint(tmp_path / "c", tensors, config)
    expected = torch.from_numpy(np.array(mx.dequantize(*parts, group_size=64, bits=3)))
    torch.testing.assert_close(source.read("m.weight"), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_checkpoints_that_transformers_saved(double: bool, kind: str, tmp_path: Path) -> None:
    """Rows of whole blocks: of others, bitsandbytes 0.50's CPU code takes the scale of a wrong block."""
    import bitsandbytes.functional as bnb
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    original = tiny.build(tmp_path / "m", tiny.ARCHITECTURES["llama"], intermediate_size=128)
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "c")
    source = open_checkpoint(tmp_path / "c")
    assert isinstance(source, PackedSource)
    assert len(source.packed) == 21
    for name in source.packed:
        weight = model.get_parameter(name)
        expected = bnb.dequantize_4bit(weight.data, weight.quant_state).float()
        torch.testing.assert_close(source.read(name), expected, rtol=1e-6, atol=1e-7)
    tiny_tokenizer(tmp_path / "c")
    report = llmquant.evaluate(tmp_path / "c", reference=original, recipe=few())
    assert 0 < report.lanes["c"]["kl_mean"] < 1


def tiny_tokenizer(folder: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tiny.DEMO / file).read_bytes())


def few() -> llmquant.Recipe:
    return llmquant.make_recipe("x", flags={"eval_tokens": 128, "eval_seq_len": 64, "eval_data": "builtin"})


def test_asymmetric_awq_from_a_run_scores_as_the_run_said(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    flags = {"group_size": 32, "method": "rtn", "symmetric": False, "format": "awq", "baselines": "none"}
    recipe = llmquant.make_recipe("x", flags=flags | {"eval_tokens": 128, "eval_seq_len": 64, "eval_data": "builtin"})
    run = llmquant.quantize(tiny_model("llama"), recipe, tmp_path / "out")
    found = llmquant.evaluate(tmp_path / "out", reference=tiny_model("llama"), recipe=few())
    assert found.lanes["out"]["kl_mean"] == pytest.approx(run.lanes["llmquant"]["kl_mean"], rel=1e-3)
    assert found.lanes["out"]["bits_per_weight"] == run.data["bits_per_weight"] == 4 + 20 / 32


def cut(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensors[name][:-1]})


BROKEN: list[tuple[str, Callable[[dict[str, Tensor]], Any], dict[str, Any], str]] = [
    ("gptq", lambda t: t.pop("m.scales"), {}, "no scales beside qweight"),
    ("gptq", cut("m.qweight"), {}, "expected a packing"),
    ("gptq", cut("m.qzeros"), {}, "expected a packing"),
    ("gptq", lambda t: None, {"bits": 5}, "5 bits"),
    ("gptq", lambda t: None, {"checkpoint_format": "marlin"}, "marlin"),
    ("awq", cut("m.qzeros"), {}, "expected a packing"),
    ("awq", lambda t: None, {"version": "gemv"}, "gemv"),
    ("mlx", cut("m.biases"), {}, "expected a packing"),
    ("mlx", lambda t: None, {"mode": "mxfp4"}, "mxfp4"),
    ("mlx", lambda t: None, {"group_size": "32"}, "group_size '32'"),
    ("compressed-tensors", cut("m.weight_scale"), {}, "expected a packing"),
    ("compressed-tensors", lambda t: t.pop("m.weight_shape"), {}, "no weight_shape beside weight_packed"),
    ("compressed-tensors", lambda t: None, {"format": "nvfp4-pack-quantized"}, "nvfp4"),
    ("compressed-tensors", lambda t: None, {"format": "float-quantized"}, "no tensor is stored in FP8"),
    ("gptq", lambda t: t.update({"m.weight": torch.zeros(1)}), {}, "dense and packed"),
]


@pytest.mark.parametrize(("name", "damage", "change", "message"), BROKEN)
def test_a_broken_checkpoint_is_refused(
    name: str, damage: Callable[[dict[str, Tensor]], Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tensors, config = FORMATS[name].tensors(SPEC, WEIGHT), FORMATS[name].config([SPEC], [])
    damage(tensors)
    config["quantization_config"] |= change
    with pytest.raises(SourceError, match=message):
        checkpoint(tmp_path / "c", tensors, config)


def test_a_group_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    tensors = FORMATS["gptq"].tensors(SPEC, WEIGHT)
    tensors["m.g_idx"] += 1
    source = checkpoint(tmp_path / "c", tensors, FORMATS["gptq"].config([SPEC], []))
    with pytest.raises(SourceError, match=r"m\.g_idx: a group that does not exist; expected 0 to 2"):
        source.read("m.weight")

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
from llmquant.log import Lines

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
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    method = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    config = {"quantization_config": method}
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


def gptq_upload(
    folder: Path, stored: int | Tensor, version: str | None = None, **keys: Any
) -> tuple[PackedSource, Tensor]:
    """Symmetric codes of 4 bits with `stored` zeros, and the weight that is meant."""
    generator = torch.Generator().manual_seed(0)
    u_OI = torch.randint(0, 16, (64, 96), generator=generator, dtype=torch.uint8)
    scales_GO = torch.rand(3, 64, generator=generator).half()
    zeros_GO = stored if isinstance(stored, Tensor) else torch.full((3, 64), stored, dtype=torch.uint8)
    tensors = {"m.qweight": pack_rows(u_OI, 4).T, "m.qzeros": pack_rows(zeros_GO, 4), "m.scales": scales_GO}
    method = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False} | keys
    method |= {} if version is None else {"checkpoint_format": version}
    meant = (u_OI.float() - 8) * scales_GO.T.float().repeat_interleave(32, dim=1)
    return checkpoint(folder, tensors, {"quantization_config": method}), meant


@pytest.mark.parametrize(
    ("version", "stored", "said"),
    [
        (None, 7, ""),
        ("gptq", 7, ""),
        ("gptq_v2", 8, ""),
        (None, 8, "checkpoint_format is gptq, but the zeros of its symmetric grids are those of gptq_v2"),
        ("gptq", 8, "checkpoint_format is gptq, but the zeros of its symmetric grids are those of gptq_v2"),
        ("gptq_v2", 7, "checkpoint_format is gptq_v2, but the zeros of its symmetric grids are those of gptq"),
    ],
)
def test_symmetric_gptq_is_read_as_it_is_meant_whatever_its_label(
    version: str | None, stored: int, said: str, tmp_path: Path
) -> None:
    source, meant = gptq_upload(tmp_path / "c", stored, version)
    assert torch.equal(source.read("m.weight"), meant)
    lines: list[str] = []
    source.announce(Lines(lines.append))
    assert [said] == [line[len("c: ") : len(said) + 3] for line in lines or ["c: "]]


@pytest.mark.parametrize("stored", [0, 6, 9, torch.arange(192, dtype=torch.uint8).view(3, 64) % 2 + 7])
def test_zeros_that_no_symmetric_grid_has_are_refused(stored: int | Tensor, tmp_path: Path) -> None:
    source, _ = gptq_upload(tmp_path / "c", stored)
    with pytest.raises(SourceError, match=r'^m\.qzeros: zeros from .* calls symmetric; expected 0 .* set "sym": false'):
        source.read("m.weight")


def test_overrides_of_single_modules_are_read(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="a packing of"):  # 4 bits, by the pattern 8
        gptq_upload(tmp_path / "a", 7, dynamic={"+:^m": {"bits": 8}})
    zeros = torch.arange(192, dtype=torch.uint8).view(3, 64) % 5
    source, _ = gptq_upload(tmp_path / "b", zeros, dynamic={"m": {"sym": False}})
    assert source.packed["m.weight"].grid is not None
    read = source.packed["m.weight"].grid(source.stored.read)
    assert read.zeros_OG is not None
    assert torch.equal(read.zeros_OG.T, zeros.short() - 7)


GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32, "strategy": "group"}}


def compressed(folder: Path, group: dict[str, Any] = GROUP, **keys: Any) -> PackedSource:
    method = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    tensors = FORMATS["compressed-tensors"].tensors(SPEC, WEIGHT)
    return checkpoint(folder, tensors, {"quantization_config": method | keys})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"group": GROUP | {"input_activations": {"num_bits": 8, "dynamic": True}}}, "activations in 8 bits"),
        ({"group": GROUP | {"input_activations": {"num_bits": 4}}}, "activations in 4 bits"),
        ({"group": GROUP | {"output_activations": {"num_bits": 8}}}, "outputs in 8 bits"),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "keys and values in 8 bits"),
        ({}, ""),
    ],
)
def test_what_servers_do_beside_the_weights_is_said(keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    source = compressed(tmp_path / "c", **keys)
    assert torch.equal(source.read("m.weight"), WEIGHT.dequantize())
    lines: list[str] = []
    source.announce(Lines(lines.append))
    assert lines == ([f"c: not applied, its figures are those of the weights alone: {said}"] if said else [])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}, "transform_config, which is not read"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config, which is not read"),
        ({"group": GROUP | {"weights": {"num_bits": 4, "type": "float"}}}, "4 bits of type float"),
        ({"group": GROUP | {"weights": {"group_size": 32}}}, "None bits of type None by config_groups"),
        ({"group": GROUP | {"targets": ["re:x"]}}, "None bits of type None by config_groups"),
    ],
)
def test_weights_that_the_config_does_not_explain_are_refused(
    keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=message):
        compressed(tmp_path / "c", **keys)


@pytest.mark.parametrize("bits", [2, 3])
def test_bits_of_narrow_linears_are_those_of_the_config(bits: int, tmp_path: Path) -> None:
    """A row of 20 weights takes two words, by 3 bits as by 2."""
    narrow = {"hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = tiny.build(tmp_path / "m", tiny.ARCHITECTURES["llama"], head_dim=12, **narrow)
    flags = {"bits": bits, "group_size": -1, "method": "rtn", "eval_tokens": 128, "eval_seq_len": 64}
    recipe = llmquant.make_recipe("x", flags=flags | {"eval_data": "builtin"})
    measured = llmquant.quantize(model, recipe, tmp_path / "q").lanes["llmquant"]["kl_mean"]
    source = open_checkpoint(tmp_path / "q")
    assert isinstance(source, PackedSource)
    assert {linear.bits for linear in source.packed.values()} == {bits}
    assert llmquant.evaluate(tmp_path / "q", reference=model, recipe=recipe).lanes["q"]["kl_mean"] == measured


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

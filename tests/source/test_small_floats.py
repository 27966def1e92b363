"""Originals in FP8 and MXFP4: by the formula, by the decoders of transformers and compressed-tensors, and as a run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import llmquant
from llmquant.checkpoint import PackedSource, open_checkpoint, open_original
from llmquant.cli.app import main
from llmquant.errors import SourceError
from llmquant.preflight.estimate import estimate
from llmquant.preflight.inspection import inspect_checkpoint, inspect_layer
from llmquant.recipe import RunOptions

FLAGS = {"group_size": 32, "samples": 4, "seq_len": 32, "eval_tokens": 128, "eval_seq_len": 64, "eval_data": "builtin"}
BYTES = torch.arange(256, dtype=torch.uint8)


def checkpoint(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any], **config: Any) -> PackedSource:
    folder.mkdir()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = {"model_type": "llama", "dtype": "float32", "quantization_config": quantization} | config
    (folder / "config.json").write_text(json.dumps(config))
    source = open_original(folder)
    assert isinstance(source, PackedSource)
    return source


def e4m3(byte: int) -> float:
    """Sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinities."""
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * ((1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6)


def e2m1(nibble: int) -> float:
    """Sign, 2 bits of exponent with bias 1, 1 of mantissa."""
    sign, exponent, mantissa = -1.0 if nibble & 8 else 1.0, nibble >> 1 & 3, nibble & 1
    return sign * ((1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2)


def finite_bytes(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    octets = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
    return torch.where(octets & 127 == 127, 0, octets).to(torch.uint8)


SCALES: list[tuple[tuple[int, ...], tuple[int, int], dict[str, Any]]] = [
    ((), (48, 40), {}),
    ((1,), (48, 40), {}),
    ((48,), (1, 40), {}),
    ((48, 1), (1, 40), {}),
    ((3, 5), (16, 8), {}),
    ((2, 2), (32, 32), {"weight_block_size": [32, 32]}),  # the last blocks are cut short, as DeepSeek's are
    ((48, 5), (1, 8), {}),
]


@pytest.mark.parametrize(("stored", "block", "extra"), SCALES)
@pytest.mark.parametrize("leaf", ["weight_scale_inv", "weight_scale"])
def test_fp8_by_the_formula_in_float64(
    stored: tuple[int, ...], block: tuple[int, int], extra: dict[str, Any], leaf: str, tmp_path: Path
) -> None:
    octets = finite_bytes(48, 40)
    scale = torch.rand(stored, generator=torch.Generator().manual_seed(1)) + 0.5
    tensors = {"m.weight": octets.view(torch.float8_e4m3fn), f"m.{leaf}": scale, "norm": torch.ones(3)}
    source = checkpoint(tmp_path / "c", tensors, {"quant_method": "fp8"} | extra)
    matrix = scale.double().reshape(-(-48 // block[0]), -(-40 // block[1])).numpy()
    expected = np.array(
        [[e4m3(int(octets[o, i])) * matrix[o // block[0], i // block[1]] for i in range(40)] for o in range(48)]
    )
    assert torch.equal(source.read("m.weight"), torch.from_numpy(expected).float())
    assert source.tensors.keys() == {"m.weight", "norm"}
    assert torch.equal(source.read("norm"), torch.ones(3))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_product_is_rounded_once_to_the_dtype_of_the_config(dtype: str, tmp_path: Path) -> None:
    octets, scale = finite_bytes(4, 8), torch.tensor([[0.3], [1.7], [0.01], [3.3]])
    tensors = {"m.weight": octets.view(torch.float8_e4m3fn), "m.weight_scale": scale}
    source = checkpoint(tmp_path / "c", tensors, {"quant_method": "fp8"}, dtype=dtype)
    exact = torch.tensor([[e4m3(int(b)) for b in row] for row in octets]) * scale
    assert torch.equal(source.read("m.weight"), exact.to(getattr(torch, dtype)))
    assert source.tensors["m.weight"].dtype == getattr(torch, dtype)


@pytest.mark.parametrize("stored", [torch.uint8, torch.float8_e8m0fnu])
def test_exponents_as_scales(stored: torch.dtype, tmp_path: Path) -> None:
    octets = finite_bytes(32, 32)
    exponents = torch.tensor([[120, 127], [130, 118]], dtype=torch.uint8)
    tensors = {"m.weight": octets.view(torch.float8_e4m3fn), "m.weight_scale_inv": exponents.view(stored)}
    source = checkpoint(tmp_path / "c", tensors, {"quant_method": "fp8", "weight_block_size": [16, 16]})
    values = torch.tensor([[e4m3(int(b)) for b in row] for row in octets])
    powers = torch.tensor([[2.0**-7, 1.0], [8.0, 2.0**-9]]).repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert torch.equal(source.read("m.weight"), values * powers)


def packed_experts() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(110, 135, (2, 6, 3), generator=generator, dtype=torch.uint8)


def test_mxfp4_by_the_formula_and_as_transformers_reads_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = packed_experts()
    names = {"m.experts.gate_up_proj_blocks": blocks, "m.experts.gate_up_proj_scales": scales}
    source = checkpoint(tmp_path / "c", names, {"quant_method": "mxfp4"}, dtype="bfloat16")
    expected = torch.empty(2, 96, 6, dtype=torch.float64)
    for e, o, g, j in np.ndindex(2, 6, 3, 32):
        octet = int(blocks[e, o, g, j // 2])
        nibble = octet >> 4 if j % 2 else octet & 15
        expected[e, 32 * g + j, o] = e2m1(nibble) * 2.0 ** (int(scales[e, o, g]) - 127)
    found = source.read("m.experts.gate_up_proj")
    assert source.tensors["m.experts.gate_up_proj"].shape == found.shape == (2, 96, 6)
    assert torch.equal(found.double(), expected)
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales))


def shape_of_scheme(strategy: str, weight: Tensor) -> Tensor:
    """Absmax of what shares a scale, by 448."""
    if strategy == "tensor":
        return weight.abs().max()[None] / 448
    if strategy == "channel":
        return weight.abs().amax(1, keepdim=True) / 448
    return weight.view(2, 32, 3, 32).abs().amax((1, 3)) / 448


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_what_compressed_tensors_packs_as_float_quantized(strategy: str, tmp_path: Path) -> None:
    from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    weights: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    if strategy == "block":
        weights["block_structure"] = [32, 32]
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights})
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(2))
    state = {"weight": weight, "weight_scale": shape_of_scheme(strategy, weight)}
    packed = FloatQuantizationCompressor.compress(state, scheme)
    config = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"g": {"weights": weights}},
    }
    source = checkpoint(tmp_path / "c", {f"m.{name}": t for name, t in packed.items()}, config)
    expected = FloatQuantizationCompressor.decompress(packed, scheme)["weight"]
    assert torch.equal(source.read("m.weight"), expected)
    assert (source.read("m.weight") - weight).norm() < 0.05 * weight.norm()


def test_what_compressed_tensors_packs_as_mxfp4(tmp_path: Path) -> None:
    packed, scheme, config = mxfp4_of(torch.randn(64, 96, generator=torch.Generator().manual_seed(3)))
    from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor

    source = checkpoint(tmp_path / "c", {f"m.{name}": t for name, t in packed.items()}, config)
    expected = MXFP4PackedCompressor.decompress(packed, scheme)["weight"]
    assert torch.equal(source.read("m.weight"), expected.float())


def mxfp4_of(weight: Tensor) -> tuple[dict[str, Tensor], Any, dict[str, Any]]:
    """The tensors, the scheme and the config of compressed-tensors' own packer."""
    from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme

    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights})
    scale = torch.exp2((weight.view(weight.shape[0], -1, 32).abs().amax(-1) / 6).log2().ceil())
    packed = MXFP4PackedCompressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    config = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}
    return packed, scheme, config


def fp8_blocks(name: str, weight: Tensor) -> dict[str, Tensor]:
    rows, columns = weight.shape
    blocks = weight.float().view(rows // 32, 32, columns // 32, 32)
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scale}


def mxfp4_linear(name: str, weight: Tensor) -> dict[str, Tensor]:
    packed, _, _ = mxfp4_of(weight.float())
    return {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in packed.items()}


BLOCK_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32], "fmt": "e4m3"}
MXFP4 = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}
PACKERS: dict[str, tuple[Callable[[str, Tensor], dict[str, Tensor]], dict[str, Any]]] = {
    "fp8": (fp8_blocks, BLOCK_FP8),
    "mxfp4": (mxfp4_linear, MXFP4),
}


def in_small_floats(original: Path, folder: Path, kind: str) -> Path:
    """A copy of a tiny model whose projections are packed."""
    pack, quantization = PACKERS[kind]
    shutil.copytree(original, folder)
    tensors = load_file(original / "model.safetensors")
    packed = {k: v for name, t in tensors.items() for k, v in (pack(name, t) if "_proj" in name else {name: t}).items()}
    save_file(packed, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder


@pytest.fixture(scope="module")
def packed_model(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny Llama in FP8 or MXFP4 by name."""
    base = tmp_path_factory.mktemp("small")
    return lambda kind: (
        base / kind if (base / kind).exists() else in_small_floats(tiny_model("llama"), base / kind, kind)
    )


@pytest.mark.parametrize("kind", PACKERS)
def test_a_run_equals_the_run_on_the_dequantized_copy_byte_for_byte(
    kind: str, packed_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """The copy is what transformers itself makes of FP8, and compressed-tensors' own decoder of MXFP4."""
    packed = packed_model(kind)
    dense = tmp_path / "dense"
    shutil.copytree(packed, dense)
    (dense / "config.json").write_text(json.dumps({k: v for k, v in config_of(packed).items() if "quant" not in k}))
    save_file(opened_by_others(packed, kind), dense / "model.safetensors")
    recipe = llmquant.make_recipe("x", flags=FLAGS | {"baselines": "rtn", "ignore": ["layers.1.mlp.down_proj"]})
    lines: list[str] = []
    ours = llmquant.quantize(packed, recipe, tmp_path / "a", log=lines.append)
    theirs = llmquant.quantize(dense, recipe, tmp_path / "b")
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert ours.data["layers"] == theirs.data["layers"]
    for lane, figures in theirs.lanes.items():
        same = {k: v for k, v in figures.items() if k not in ("bits_per_weight", "bytes")}
        assert same.items() <= ours.lanes[lane].items()
    bits = {"fp8": 8 + 32 / 1024, "mxfp4": 4 + 8 / 32}[kind]
    assert ours.lanes["original"]["bits_per_weight"] == pytest.approx(bits)
    assert config_of(tmp_path / "a")["quantization_config"]["quant_method"] == "compressed-tensors"
    assert sum(ours.data["model"]["stored_as"].values()) == 21
    (kept,) = [row for row in ours.data["tensors"] if row["name"] == "model.layers.1.mlp.down_proj.weight"]
    assert kept["dtype"] == "bfloat16"
    assert "dequantized from" in kept["reason"]
    assert "figures are against what they stand for" in (tmp_path / "a" / "report.html").read_text()
    assert main(["verify", str(tmp_path / "a"), "--source", str(packed)]) == 0


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def opened_by_others(folder: Path, kind: str) -> dict[str, Tensor]:
    if kind == "fp8":
        from transformers import AutoModelForCausalLM, FineGrainedFP8Config

        config = FineGrainedFP8Config(dequantize=True, weight_block_size=(32, 32))
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}
    from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor

    _, scheme, _ = mxfp4_of(torch.ones(1, 32))
    stored = load_file(folder / "model.safetensors")
    dense = {name: tensor for name, tensor in stored.items() if "weight_" not in name}
    for name in stored:
        if name.endswith("weight_packed"):
            stem = name.removesuffix("weight_packed")
            state = {"weight_packed": stored[name], "weight_scale": stored[f"{stem}weight_scale"]}
            dense[f"{stem}weight"] = MXFP4PackedCompressor.decompress(state, scheme)["weight"].bfloat16()
    return dense


def test_plan_inspect_and_eval_say_what_the_source_is(
    packed_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    form = "float8_e4m3fn, blocks of 32 x 32"
    recipe = llmquant.make_recipe("x", flags=FLAGS | {"method": "rtn"})
    found = estimate(packed_model("fp8"), recipe, RunOptions(tmp_path / "out"))
    assert found.stored_as == {f"fp8 ({form})": 21}
    (problem,) = found.problems
    assert problem.message.endswith("those of the weights alone: activations in FP8 (dynamic)")
    assert not problem.blocking
    assert {kind.dtype for kind in found.kinds} == {"bfloat16"}
    assert found.source_bytes < found.output_bytes * 3
    assert main(["plan", "--model", str(packed_model("fp8")), "--group-size", "32"]) == 0
    assert f"21 tensors in fp8 ({form})" in capsys.readouterr().out
    (row,) = [row for row in inspect_checkpoint(packed_model("fp8"))["kinds"] if "up_proj" in row["name"]]
    assert (row["form"], row["stored"]) == (form, "float8_e4m3fn + float32")
    assert main(["inspect", str(packed_model("mxfp4")), "--layer", "model.layers.0.mlp.up_proj"]) == 0
    assert "e2m1, groups of 32" in capsys.readouterr().out
    assert inspect_layer(packed_model("fp8"), "model.norm")["form"] == ""
    report = llmquant.evaluate(packed_model("mxfp4"), reference=packed_model("fp8"), recipe=recipe)
    assert 0 < report.lanes["mxfp4"]["kl_mean"] < 1


def test_no_dense_copy_reaches_the_disk(packed_model: Callable[[str], Path], tmp_path: Path) -> None:
    """The folder of a run never holds more than the output."""
    seen: list[int] = []
    recipe = llmquant.make_recipe("x", flags={"group_size": 32, "method": "rtn", "eval_data": "none"})

    def log(line: str) -> None:
        seen.append(sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()))

    llmquant.quantize(packed_model("fp8"), recipe, tmp_path / "out", log=log)
    final = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert max(seen) <= final
    assert open_checkpoint(tmp_path / "out").weight_bytes < open_checkpoint(packed_model("fp8")).weight_bytes


CODES = {"m.weight": finite_bytes(32, 32).view(torch.float8_e4m3fn)}
ONE = torch.ones(1)
BROKEN: list[tuple[dict[str, Tensor], dict[str, Any], str]] = [
    (CODES, {"quant_method": "fp8"}, "0 scales; expected a matrix `weight` with weight_scale_inv or weight_scale"),
    (CODES | {"m.weight_scale": ONE, "m.weight_scale_inv": ONE}, {"quant_method": "fp8"}, "2 scales"),
    (CODES | {"m.weight_scale": torch.ones(5, 2)}, {"quant_method": "fp8"}, "expected blocks of a weight of"),
    (CODES | {"m.weight_scale": ONE, "m.weight_zero_point": ONE}, {"quant_method": "fp8"}, "zero points"),
    (CODES | {"m.weight_scale": ONE.int()}, {"quant_method": "fp8"}, "int32"),
    ({"m.weight": BYTES.view(16, 16)}, {"quant_method": "fp8"}, "no tensor is stored in FP8"),
    ({"m.weight": BYTES.view(16, 16)}, {"quant_method": "mxfp4"}, "no tensor is stored in MXFP4"),
    ({"m.w_blocks": packed_experts()[0]}, {"quant_method": "mxfp4"}, "no scales"),
    ({"m.w_blocks": packed_experts()[0], "m.w_scales": BYTES}, {"quant_method": "mxfp4"}, r"expected \[E, O, G, 16\]"),
    ({"m.weight_packed": BYTES.view(8, 32), "m.weight_scale": BYTES.view(8, 32)}, MXFP4, "groups of 32"),
    (CODES, {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "quantized already"),
    (CODES, {"quant_method": "hqq"}, r"quantized already \(hqq\).*name the checkpoint that it was made from"),
]


@pytest.mark.parametrize(("tensors", "quantization", "message"), BROKEN)
def test_what_cannot_be_dequantized_is_refused(
    tensors: dict[str, Tensor], quantization: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=message):
        checkpoint(tmp_path / "c", tensors, quantization)


@pytest.mark.parametrize("damage", ["code", "scale"])
def test_nan_in_codes_or_exponents_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    octets, exponent = finite_bytes(32, 32), torch.tensor([[127]], dtype=torch.uint8)
    if damage == "code":
        octets[3, 4] = 127
    else:
        exponent[0, 0] = 255
    tensors = {"m.weight": octets.view(torch.float8_e4m3fn), "m.weight_scale_inv": exponent}
    source = checkpoint(tmp_path / "c", tensors, {"quant_method": "fp8"})
    with pytest.raises(SourceError, match=r"^m\.weight: (1|1024) NaN or Inf values"):
        source.read_finite("m.weight")

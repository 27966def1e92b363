"""gptq, awq and mlx: literal bytes and configs, and the clients' own readers where they are installed."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from linears import counting, spec_of, weight_of
from peers import dequantized, divergence, log_probs
from torch import Tensor

import llmquant
from llmquant.demo import DEMO
from llmquant.errors import FormatError, SourceError
from llmquant.formats import FORMATS, LinearSpec
from llmquant.output.verify import Record
from llmquant.quant.grid import QuantizedWeight

GPTQ, AWQ, MLX = FORMATS["gptq"], FORMATS["awq"], FORMATS["mlx"]


def words(tensor: Tensor) -> list[list[str]]:
    return [[f"{int(word) & 0xFFFFFFFF:08x}" for word in row] for row in tensor.view(torch.int32)]


# -- gptq ----------------------------------------------------------------------------------------------
def test_gptq_bytes_of_a_tiny_weight() -> None:
    """Unsigned codes of row r are (r + 3 c) mod 16: row 0 counts 0 3 6 9 c f 2 5, the first input lowest."""
    spec = spec_of(4, 8, (8, 16), module="m")
    scales = torch.tensor([[0.5, -0.25]]).repeat(8, 1)
    tensors = GPTQ.tensors(spec, QuantizedWeight(counting(8, 16), scales, spec.scheme))
    assert words(tensors["m.qweight"])[0][:2] == ["52fc9630", "630da741"]
    assert words(tensors["m.qweight"])[1][:2] == ["da741eb8", "eb852fc9"]
    assert words(tensors["m.qzeros"]) == [["77777777"], ["77777777"]]
    assert tensors["m.scales"].tolist() == [[0.5] * 8, [-0.25] * 8]
    assert tensors["m.g_idx"].tolist() == [0] * 8 + [1] * 8
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "m.qweight": (torch.int32, (2, 8)),
        "m.qzeros": (torch.int32, (2, 1)),
        "m.scales": (torch.bfloat16, (2, 8)),
        "m.g_idx": (torch.int32, (16,)),
    }


def test_gptq_8_bit_zeros_and_channel_groups() -> None:
    spec = spec_of(8, -1, (32, 64), dtype=torch.float32, module="m")
    tensors = GPTQ.tensors(spec, weight_of(spec))
    assert words(tensors["m.qzeros"]) == [["7f7f7f7f"] * 8]
    assert tensors["m.scales"].dtype == torch.float16
    assert not tensors["m.g_idx"].any()


def test_gptq_config() -> None:
    expected = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "true_sequential": True,
        "lm_head": False,
        "meta": {"quantizer": ["llmquant"]},
    }
    assert GPTQ.config([spec_of()], ["lm_head"]) == {"quantization_config": expected}


def test_gptq_lists_the_quantized_linears_where_others_stay_dense() -> None:
    specs = [spec_of(module=f"model.layers.{i}.mlp.up_proj") for i in range(2)]
    config = GPTQ.config(specs, ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"])
    assert config["quantization_config"]["modules_in_block_to_quantize"] == [["mlp.up_proj"]]
    with pytest.raises(FormatError, match=r"^mlp\.up_proj: is quantized in some blocks and dense in others"):
        GPTQ.config(specs[:1], ["model.layers.1.mlp.up_proj"])


# -- awq -----------------------------------------------------------------------------------------------
def test_awq_bytes_of_a_tiny_weight() -> None:
    """Unsigned codes of input 0 are 0..7 for outputs 0..7: nibbles 0 2 4 6 1 3 5 7 from the lowest."""
    spec = spec_of(4, 8, (8, 16), module="m", symmetric=False)
    zeros = torch.arange(-8, 8, dtype=torch.int8).view(2, 8).T.contiguous()
    scales = torch.tensor([[0.5, -0.25]]).repeat(8, 1)
    tensors = AWQ.tensors(spec, QuantizedWeight(counting(8, 16), scales, spec.scheme, zeros))
    assert words(tensors["m.qweight"])[:2] == [["75316420"], ["a8649753"]]
    assert words(tensors["m.qzeros"]) == [["75316420"], ["fdb9eca8"]]
    assert tensors["m.scales"].tolist() == [[0.5] * 8, [-0.25] * 8]
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "m.qweight": (torch.int32, (16, 1)),
        "m.qzeros": (torch.int32, (2, 1)),
        "m.scales": (torch.bfloat16, (2, 8)),
    }


def test_awq_writes_the_middle_as_zero_of_a_symmetric_grid_and_expects_it() -> None:
    spec = spec_of(4, 32, (8, 32), module="m")
    tensors = AWQ.tensors(spec, weight_of(spec))
    assert words(tensors["m.qzeros"]) == [["88888888"]]
    tensors["m.qzeros"] += 1
    with pytest.raises(SourceError, match=r"^m\.weight: zero points"):
        AWQ.read(spec, tensors.__getitem__)


def test_awq_config() -> None:
    expected = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }
    assert AWQ.config([spec_of(symmetric=False)], ["lm_head"]) == {"quantization_config": expected}


# -- mlx -----------------------------------------------------------------------------------------------
def test_mlx_bytes_of_a_tiny_weight() -> None:
    spec = spec_of(4, 8, (2, 16), module="m")
    scales = torch.tensor([[0.5, -0.25], [1.0, 2.0]])
    tensors = MLX.tensors(spec, QuantizedWeight(counting(2, 16), scales, spec.scheme))
    assert words(tensors["m.weight"]) == [["52fc9630", "da741eb8"], ["630da741", "eb852fc9"]]
    assert tensors["m.scales"].tolist() == scales.tolist()
    assert tensors["m.biases"].tolist() == [[-4.0, 2.0], [-8.0, -16.0]]
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "m.weight": (torch.uint32, (2, 2)),
        "m.scales": (torch.bfloat16, (2, 2)),
        "m.biases": (torch.bfloat16, (2, 2)),
    }


def test_mlx_config_names_the_layers_of_another_width() -> None:
    table = MLX.config([spec_of(module="a"), spec_of(8, 64, module="b")], ["lm_head"])
    expected = {"group_size": 32, "bits": 4, "mode": "affine", "b": {"group_size": 64, "bits": 8}}
    assert table == {"quantization": expected, "quantization_config": expected}


def test_mlx_refuses_a_bias_beyond_fp16() -> None:
    spec = spec_of(4, 32, (1, 32), dtype=torch.float16)
    weight = QuantizedWeight(torch.zeros(1, 32, dtype=torch.int8), torch.tensor([[16384.0]]), spec.scheme)
    with pytest.raises(FormatError, match="overflows fp16"):
        MLX.tensors(spec, weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_mlx_itself_dequantizes_our_bytes_to_exactly_our_weight(bits: int, group: int) -> None:
    mx = pytest.importorskip("mlx.core", reason="needs mlx, which has wheels for macOS and Linux only")
    spec = spec_of(bits, group, (8, 256), dtype=torch.float32, module="m")
    weight = weight_of(spec, seed=bits)
    words, scales, biases = (mx.array(t.numpy()) for t in MLX.tensors(spec, weight).values())
    found = mx.dequantize(words, scales, biases, group_size=group, bits=bits, mode="affine")
    assert np.array_equal(np.array(found), weight.dequantize().numpy())


@pytest.mark.parametrize(
    ("bits", "dtype"),
    [*((bits, torch.bfloat16) for bits in (2, 3, 4)), (4, torch.float16), (8, torch.float16), (8, torch.float32)],
)
def test_mlx_asymmetric_is_what_mlx_computes_and_its_zeros_come_back(bits: int, dtype: torch.dtype) -> None:
    spec = spec_of(bits, 32, (64, 256), dtype=dtype, module="m", symmetric=False)
    weight = weight_of(spec, seed=bits)
    tensors = MLX.tensors(spec, weight)
    back = MLX.read(spec, tensors.__getitem__)
    assert torch.equal(back.zeros_OG, weight.zeros_OG)
    assert torch.equal(back.codes_OI, weight.codes_OI)
    loaded = MLX.loaded(spec, weight)
    off = ((loaded - weight.dequantize()).abs().view(64, 8, 32) / weight.scales_OG.abs()[..., None]).max()
    assert off <= {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype] * (2**bits - 1)
    mx = pytest.importorskip("mlx.core", reason="needs mlx, which has wheels for macOS and Linux only")
    words = mx.array(tensors["m.weight"].numpy())
    scales, biases = (mx.array(tensors[f"m.{part}"].float().numpy()) for part in ("scales", "biases"))
    found = mx.dequantize(words, scales, biases, group_size=32, bits=bits, mode="affine")
    torch.testing.assert_close(
        torch.from_numpy(np.array(found)), loaded, rtol=0, atol=float(loaded.abs().max()) * 2**-22
    )


# -- what they cannot hold -----------------------------------------------------------------------------
REFUSED: list[tuple[str, LinearSpec, str]] = [
    ("gptq", spec_of(3, 32, (32, 96)), "3 bits in gptq; expected 4 or 8"),
    ("gptq", spec_of(4, 32, (32, 96), symmetric=False), "asymmetric grid in gptq.*--format awq, mlx, gguf or fake"),
    ("gptq", spec_of(4, 32, (33, 96)), "33 outputs, 96 inputs"),
    ("gptq", spec_of(4, -1, (32, 80)), "32 outputs, 80 inputs"),
    ("gptq", spec_of(4, 32, (32, 96), kind="Conv1D"), "Conv1D"),
    ("awq", spec_of(8, 32, (32, 96)), "8 bits in awq; expected 4"),
    ("awq", spec_of(4, 32, (12, 96)), "12 outputs"),
    ("mlx", spec_of(4, -1, (32, 96)), "group size -1 in mlx"),
    ("mlx", spec_of(8, 32, (32, 96), symmetric=False), "asymmetric grid of 8 bits in mlx"),
]


@pytest.mark.parametrize(("name", "spec", "message"), REFUSED)
def test_a_linear_that_a_format_cannot_hold_is_refused_by_name(name: str, spec: LinearSpec, message: str) -> None:
    with pytest.raises(FormatError, match=rf"^model\.layers\.0\.mlp\.up_proj: .*{message}"):
        FORMATS[name].check([spec])


@pytest.mark.parametrize("name", FORMATS)
def test_one_scheme_only_where_the_facts_say_so(name: str) -> None:
    specs = [spec_of(4, 32, (32, 128)), spec_of(4, 64, (32, 128), module="b")]
    if FORMATS[name].facts.mixes:
        return FORMATS[name].check(specs)
    with pytest.raises(FormatError, match="knows one scheme"):
        FORMATS[name].check(specs)


def test_the_record_of_an_asymmetric_weight_holds_its_zeros() -> None:
    spec = spec_of(4, 32, (8, 32), symmetric=False)
    weight, records = weight_of(spec), [Record("awq"), Record("awq")]
    other = QuantizedWeight(weight.codes_OI, weight.scales_OG, weight.scheme, torch.zeros_like(weight.zeros_OG))
    records[0].quantized(spec, weight)
    records[1].quantized(spec, other)
    assert records[0].digests != records[1].digests


# -- the clients themselves, where they are installed --------------------------------------------------
@pytest.fixture(scope="module")
def demo_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The demo model, plainly rounded, in a format."""

    def write(name: str, **flags: Any) -> Path:
        flags = {"format": name, "group_size": 32, "method": "rtn", "eval_data": "none"} | flags
        out = tmp_path_factory.mktemp(name) / "out"
        llmquant.quantize("demo", llmquant.make_recipe("demo", flags=flags), out)
        return out

    return write


IDS = torch.randint(5, 4000, (48,), generator=torch.Generator().manual_seed(0))


def mlx_lm_logits(checkpoint: Path) -> torch.Tensor:
    """[T, V] in float32 by the client."""
    utils = pytest.importorskip("mlx_lm.utils", reason="needs mlx-lm")
    mx = pytest.importorskip("mlx.core")
    model, _ = utils.load_model(checkpoint)
    model.set_dtype(mx.float32)
    return torch.from_numpy(np.array(model(mx.array(IDS[None].numpy()))[0]))


@pytest.mark.parametrize("symmetric", [True, False])
def test_mlx_lm_computes_the_same_in_float32(symmetric: bool, demo_in: Callable[..., Path]) -> None:
    out = demo_in("mlx", symmetric=symmetric)
    theirs = mlx_lm_logits(out).double().log_softmax(-1)
    assert divergence(log_probs(dequantized(DEMO, out), IDS), theirs) < 1e-7


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mlx_lm_agrees_to_float32_on_other_models(
    name: str, symmetric: bool, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """To 1e-5 in logits, rope as transformers 5 saves it included."""
    out = tmp_path / "out"
    flags = {"format": "mlx", "group_size": 32, "method": "rtn", "eval_data": "none", "symmetric": symmetric}
    llmquant.quantize(tiny_model(name), llmquant.make_recipe("x", flags=flags), out)
    theirs = mlx_lm_logits(out)
    with torch.no_grad():
        ours = dequantized(tiny_model(name), out)(IDS[None]).logits[0]
    assert float((ours - theirs).abs().max()) < 1e-5


def test_rope_is_where_mlx_lm_looks_for_it() -> None:
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    assert FORMATS["mlx"].model_config({"rope_parameters": linear}) == {
        "rope_theta": 5e5,
        "rope_scaling": linear,
        "rope_parameters": linear,
    }
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    assert FORMATS["mlx"].model_config(plain) == {"rope_theta": 1e4} | plain
    assert FORMATS["mlx"].model_config(plain | {"rope_theta": 7.0})["rope_theta"] == 7.0
    assert FORMATS["mlx"].model_config({"n_embd": 3}) == {"n_embd": 3}


@pytest.mark.parametrize("name", ["gptq", "gptq8", "awq", "awq-asymmetric"])
def test_transformers_with_gptqmodel_opens_and_computes_the_same(name: str, demo_in: Callable[..., Path]) -> None:
    """In a process of its own: gptqmodel changes global state and speaks much."""
    for package in ("gptqmodel", "optimum"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}, which is built from source for the torch at hand")
    flags: dict[str, Any] = {"gptq8": {"bits": 8}, "awq-asymmetric": {"symmetric": False}}.get(name, {})
    out = demo_in(name[:4].rstrip("-"), **flags)
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM as A\n"
        "model, info = A.from_pretrained(sys.argv[1], dtype=torch.float32, output_loading_info=True)\n"
        "assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info\n"
        "assert 'gptqmodel' in type(model.model.layers[0].mlp.up_proj).__module__\n"
        "ids = torch.load(sys.argv[2])\n"
        "torch.save(model(ids[None]).logits[0].detach().double().log_softmax(-1), sys.argv[2])\n"
    )
    file = out.with_name("ids.pt")
    torch.save(IDS, file)
    done = subprocess.run([sys.executable, "-c", code, str(out), str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ours = log_probs(dequantized(DEMO, out), IDS)
    # Their CPU kernels compute in 16 bit.
    assert divergence(ours, torch.load(file)) < 1e-4

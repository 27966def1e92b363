"""GGUF files as others write them, against the package gguf: metadata, a config.json beside it, what is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from gguf_files import LLAMA3, SCALES, built, few, foreign, gguf_of, quantized, stored
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import llmquant
from llmquant.checkpoint import PackedSource, open_checkpoint, open_original
from llmquant.errors import SourceError
from llmquant.export import export
from llmquant.gguf.config import FREQS, LONG, SHORT, Described
from llmquant.gguf.model import GGUFModel
from llmquant.model.skeleton import Skeleton
from llmquant.preflight.inspection import inspect_checkpoint, inspect_layer
from llmquant.source.files import SINGLE

LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
MIXED = dict(zip([f"blk.{i}.{leaf}.weight" for i in (0, 1) for leaf in LINEARS], SCALES, strict=True))
MIXED |= {"token_embd.weight": "Q4_K", "output.weight": "Q6_K"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of whole super-blocks of 256."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    return built(tmp_path_factory.mktemp("wide") / "m", "llama", dtype=torch.float16, **shape)


def test_k_quants_are_what_the_gguf_package_unpacks(wide: Path, tmp_path: Path) -> None:
    """Values by another reader of the file; figures by a dense copy of them."""
    gguf = pytest.importorskip("gguf", reason="needs the gguf package")
    file = foreign(tmp_path / "made-by-others", wide, MIXED)
    source = open_checkpoint(file.parent)
    assert isinstance(source, PackedSource)
    assert source.name == "made-by-others"
    dense: dict[str, Tensor] = {}
    names = {stored(file).names.ours(tensor.name): tensor for tensor in gguf.GGUFReader(file).tensors}
    assert names.keys() == source.tensors.keys() == load_file(wide / SINGLE).keys()
    for key, tensor in names.items():
        assert key is not None
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        for leaf, heads in (("q_proj", 4), ("k_proj", 2)):
            if leaf in key:
                values = values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        assert np.array_equal(source.read(key).float().numpy(), values), key
        assert np.isfinite(values).all()
        dense[key] = torch.from_numpy(np.array(values, np.float32))
    copy = tmp_path / "copy"
    copy.mkdir()
    save_file(dense, copy / SINGLE, {"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (copy / name).write_bytes((wide / name).read_bytes())
    lanes = llmquant.compare([file.parent, copy], reference=wide, recipe=few()).lanes
    assert lanes["made-by-others"]["kl_mean"] == lanes["copy"]["kl_mean"] > 0
    n_weights = {key: info.numel for key, info in source.tensors.items() if key in source.packed}
    n_bytes = sum(tensor.n_bytes for key, tensor in names.items() if key in source.packed)
    assert source.bits_per_weight == 8 * n_bytes / sum(n_weights.values())

    rows = {kind["form"]: kind for kind in inspect_checkpoint(file)["kinds"]}
    bits = {"Q4_K": 4.5, "Q6_K": 6.5625, "Q5_K": 5.5, "Q3_K": 3.4375, "Q2_K": 2.625, "Q5_0": 5.5, "Q4_1": 5.0}
    assert {kind: rows[kind]["bits_per_weight"] for kind in bits} == bits


def test_a_gemma_3_in_k_quants_is_read(tmp_path: Path) -> None:
    """As transformers reads the file: weights, and what the model makes of them."""
    pytest.importorskip("gguf", reason="needs the gguf package")
    shape = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "query_pre_attn_scalar": 64}
    original = built(tmp_path / "m", "gemma3", dtype=torch.float16, **shape)
    kinds = {"blk.0.attn_q.weight": "Q4_K", "blk.1.ffn_down.weight": "Q6_K", "blk.5.ffn_up.weight": "Q4_K"}

    def later(writer: Any) -> None:
        writer.add_float32("gemma3.rope.freq_base_swa", 10000.0)

    file = foreign(tmp_path / "f", original, kinds, later)
    # It does not know what follows from the width of heads: the original's config says it.
    known = AutoConfig.from_pretrained(original)
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, config=known, dtype=torch.float32
    ).eval()
    source = open_checkpoint(file)
    assert source.config["model_type"] == "gemma3_text"
    for key in source.tensors:
        torch.testing.assert_close(source.read(key).float(), theirs.state_dict()[key], rtol=1e-6, atol=1e-6, msg=key)
    skeleton, ids = Skeleton(source), torch.arange(60)[None]
    hidden = skeleton.embed(ids)
    for block in skeleton.blocks:
        with block.loaded():
            hidden = block.forward(hidden)
    with skeleton.head() as logits_of, torch.no_grad():
        ours, wanted = logits_of(hidden[0]), theirs(ids).logits[0]
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)

    def other(writer: Any) -> None:
        writer.add_float32("gemma3.rope.freq_base_swa", 20000.0)

    with pytest.raises(SourceError, match=r"gemma3\.rope\.freq_base_swa: 20000\.0; expected 10000\.0"):
        open_checkpoint(foreign(tmp_path / "g", original, kinds, other))


def test_inspect_looks_into_a_layer(wide: Path, tmp_path: Path) -> None:
    file = foreign(tmp_path / "f", wide, {"blk.0.ffn_up.weight": "Q8_0", "blk.0.ffn_down.weight": "Q4_K"})
    up = inspect_layer(file, "model.layers.0.mlp.up_proj")
    assert up["scheme"] == {"bits": 8, "group_size": 32, "symmetric": True}
    assert sum(up["codes"]["histogram"].values()) == 512 * 256
    assert up["scales"]["count"] == 512 * 256 / 32
    down = inspect_layer(file, "model.layers.0.mlp.down_proj")
    assert (down["form"], down["scheme"], down["values"]["nonfinite"]) == ("Q4_K", None, 0)


def test_without_the_gguf_package_its_install_command_is_named(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {"blk.0.ffn_up.weight": "Q4_0", "blk.0.ffn_down.weight": "Q4_K"}
    source = open_checkpoint(foreign(tmp_path / "f", wide, kinds))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    source.read("model.layers.0.mlp.up_proj.weight")
    with pytest.raises(SourceError, match=r"down_proj\.weight: is stored as Q4_K.*; pip install gguf$"):
        source.read("model.layers.0.mlp.down_proj.weight")


# -- config.json beside the file, and what is refused --------------------------------------------------
def beside(file: Path, **config: Any) -> Path:
    (file.parent / "config.json").write_text(json.dumps(config))
    return file


def test_a_config_beside_the_file_says_what_the_metadata_cannot(wide: Path, tmp_path: Path) -> None:
    def yarn(writer: Any) -> None:
        writer.add_string("llama.rope.scaling.type", "yarn")
        writer.add_float32("llama.some_new_scale", 0.5)

    file = foreign(tmp_path / "f", wide, {}, yarn)
    with pytest.raises(SourceError, match=r"llama\.some_new_scale: 0\.5; expected keys .*config\.json beside"):
        open_checkpoint(file)
    whole = json.loads((wide / "config.json").read_text())
    assert open_checkpoint(beside(file, **whole)).config["rope_parameters"] == whole["rope_parameters"]
    with pytest.raises(
        SourceError, match=r"config\.json: hidden_size 128; expected 256.*; it belongs to another model"
    ):
        open_checkpoint(beside(file, **whole | {"hidden_size": 128}))
    with pytest.raises(SourceError, match=r"config\.json: model type 'qwen2'; expected one of llama"):
        open_checkpoint(beside(file, **whole | {"model_type": "qwen2"}))
    with pytest.raises(SourceError, match=r"rope_freqs\.weight: is missing; expected those of rope type 'llama3'"):
        open_checkpoint(beside(file, **whole | {"rope_parameters": LLAMA3 | {"rope_theta": 10000.0}}))
    plain = foreign(tmp_path / "g", wide, {})
    expected = open_checkpoint(plain).config
    # Uploads hold such stubs: the defaults of the class are not those of the model.
    found = open_checkpoint(beside(plain, model_type="llama", quantization_config={"quant_method": "gptq"})).config
    assert found == expected


def test_factors_of_rope_that_nobody_names_are_refused(wide: Path, tmp_path: Path) -> None:
    def factors(values: list[float]) -> Callable[[Any], None]:
        return lambda writer: writer.add_tensor("rope_freqs.weight", np.array(values, np.float32))

    ones = open_checkpoint(foreign(tmp_path / "a", wide, {}, factors([1.0] * 32)))
    assert ones.config["rope_parameters"]["rope_type"] == "default"
    with pytest.raises(SourceError, match=r"rope_freqs\.weight: divides the frequencies"):
        open_checkpoint(foreign(tmp_path / "b", wide, {}, factors([1.0] * 16 + [2.0, 3.0] * 8)))


@pytest.mark.parametrize("rope", [{"rope_theta": 500000.0, "factor": 8.0}, {"rope_theta": 500000.0, "factor": 32.0}])
def test_the_rope_of_llama_3_is_found_from_its_factors(rope: dict[str, float]) -> None:
    """Llama 3.1 and 3.2: heads of 128 and of 64."""
    wanted = LLAMA3 | rope | {"original_max_position_embeddings": 8192}
    size = 128 if rope["factor"] == 8 else 64
    config = {"model_type": "llama", "hidden_size": 4 * size, "num_attention_heads": 4, "hidden_act": "silu"}
    metadata = GGUFModel(
        config
        | {"num_hidden_layers": 1, "intermediate_size": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072}
        | {"rope_parameters": wanted}
    )
    described = Described("f", metadata.metadata("", 0, 8), {"token_embd.weight": (8, 4 * size)})
    factors = metadata.rope_factors()
    assert factors is not None
    assert described.config({}, {FREQS: factors})["rope_parameters"] == wanted


def test_the_factors_of_phi_3_are_its_longrope() -> None:
    """Phi-4-mini: partial rotation, the factor of attention in the metadata. transformers' own rope is the judge."""
    short, long = ([1.0 + scale * i for i in range(6)] for scale in (0.05, 0.5))
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
    rope |= {"short_factor": short, "long_factor": long, "original_max_position_embeddings": 64}
    shape = tiny.COMMON | tiny.LLAMA | {"original_max_position_embeddings": 64, "max_position_embeddings": 512}
    original = AutoConfig.for_model("phi3", **shape, rope_parameters=dict(rope))
    plain = AutoConfig.for_model("phi3", **shape, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.75})
    metadata = GGUFModel(plain.to_dict()).metadata("", 0, 4096)
    metadata["phi3.rope.scaling.attn_factor"] = (1 + math.log(8) / math.log(64)) ** 0.5
    factors = {LONG: torch.tensor(long), SHORT: torch.tensor(short)}
    described = Described("f", metadata, {"token_embd.weight": (4096, 64), LONG: (6,), SHORT: (6,)})
    config = described.config({}, factors)
    assert described.config(original.to_dict(), factors)["rope_parameters"] == original.rope_parameters
    ours, theirs = (
        AutoModelForCausalLM.from_config(c).model.rotary_emb for c in (AutoConfig.for_model(**config), original)
    )
    assert type(ours) is type(theirs)
    for length in (8, 100):
        ids = torch.arange(length)[None]
        for mine, other in zip(ours(torch.ones(1), ids), theirs(torch.ones(1), ids), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
    with pytest.raises(SourceError, match=r"rope_factors_long\.weight: divides the frequencies.*'default'"):
        described.config(plain.to_dict(), factors)
    with pytest.raises(SourceError, match=r"config\.json: rope of type 'longrope' \(a base of 20000\.0, 10000\.0 by"):
        described.config(original.to_dict() | {"rope_parameters": rope | {"rope_theta": 2e4}}, factors)


def edit(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda metadata: metadata.update({key: value})


BROKEN: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (
        edit("general.architecture", "mamba"),
        "architecture 'mamba'; expected llama, qwen2, qwen3, gemma2, phi3, gemma3, gpt2$",
    ),
    (lambda m: m.pop("general.architecture"), "architecture 'None'"),
    (lambda m: m.pop("llama.block_count"), "llama.block_count: None; expected a number above 0"),
    (edit("llama.attention.head_count", [4, 8]), r"llama.attention.head_count: \[4, 8\]"),
    (edit("llama.rope.scaling.type", "yarn"), "llama.rope.scaling.type: yarn; expected none or linear"),
    (edit("llama.expert_count", 8), "llama.expert_count: 8"),
    (edit("llama.attention.sliding_window", 8), "llama.attention.sliding_window: 8"),
    (edit("llama.rope.dimension_count", 32), "llama.rope.dimension_count: 32; expected 64"),
    (edit("llama.attention.layer_norm_rms_epsilon", float("nan")), "rms_epsilon: nan"),
    (edit("llama.attention.value_length", 8), "llama.attention.value_length: 8"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_a_model_that_is_not_known_is_refused(
    change: Callable[[dict[str, Any]], Any], message: str, wide: Path, tmp_path: Path
) -> None:
    header = stored(foreign(tmp_path / "f", wide, {})).header
    metadata, shapes = dict(header.metadata), {name: tensor.shape for name, tensor in header.tensors.items()}
    change(metadata)
    with pytest.raises(SourceError, match=message):
        Described("f", metadata, shapes).config({}, {})


def test_what_is_no_single_model_is_refused(wide: Path, tmp_path: Path) -> None:
    file = foreign(tmp_path / "f", wide, {"blk.0.ffn_up.weight": "Q4_K"})
    with pytest.raises(
        SourceError, match=r"is a GGUF file; expected a checkpoint folder.*name the checkpoint that it was made"
    ):
        open_original(file)
    with pytest.raises(SourceError, match=r"holds 'some-Q4_K_M\.gguf' and no safetensors weights.*was made from"):
        open_original(file.parent)
    with pytest.raises(SourceError, match="is a GGUF file; expected safetensors"):
        export(file, "awq", tmp_path / "out")
    (file.parent / "other.gguf").write_bytes(file.read_bytes())
    with pytest.raises(SourceError, match=r"holds 2 GGUF files \(other\.gguf, some-Q4_K_M\.gguf\); expected one"):
        open_checkpoint(file.parent)
    (file.parent / SINGLE).write_bytes((wide / SINGLE).read_bytes())
    with pytest.raises(SourceError, match=r"no config\.json"):  # it is a checkpoint of safetensors now
        open_checkpoint(file.parent)
    part = foreign(tmp_path / "part", wide, {}, lambda writer: writer.add_uint16("split.count", 3))
    with pytest.raises(SourceError, match="is one of 3 parts; join them"):
        open_checkpoint(part)
    extra = foreign(
        tmp_path / "e", wide, {}, lambda w: w.add_tensor("blk.0.ffn_gate_inp.weight", np.ones((2, 256), "f"))
    )
    with pytest.raises(SourceError, match=r"'blk\.0\.ffn_gate_inp\.weight': is no tensor of llama"):
        open_checkpoint(extra)


def test_a_window_longer_than_a_files_context_is_refused(tmp_path: Path) -> None:
    original = built(tmp_path / "m", "mistral", sliding_window=32)
    file = gguf_of(quantized(original, tmp_path / "q"))
    with pytest.raises(SourceError, match=r"context 32; expected at least the 64 tokens of a window; --seq-len 32"):
        llmquant.evaluate(file, reference=original, recipe=few())
    assert llmquant.evaluate(file, reference=original, recipe=few(eval_seq_len=32)).lanes

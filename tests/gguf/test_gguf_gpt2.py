"""GPT-2 in GGUF: its Conv1D layers lie the other way round, positions are learned, every module has a bias."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from gguf_files import few, quantized, random_rows, stored
from peers import LlamaCpp, dequantized, divergence, log_probs
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import llmquant
from llmquant.checkpoint import PackedSource, open_checkpoint
from llmquant.errors import FormatError, SourceError, VerifyError
from llmquant.export import export
from llmquant.gguf.model import GGUFModel
from llmquant.gguf.tokenizer import tokenizer_metadata
from llmquant.output.check import verify_folder
from llmquant.preflight.inspection import inspect_layer
from llmquant.source.files import SINGLE
from llmquant.source.resolve import open_source

UNTIED = {"tie_word_embeddings": False, "n_inner": 96}
KEPT = [r"h\.1\.mlp\.c_fc"]


def built(folder: Path, **extra: Any) -> Path:
    shape = {"n_positions": 512, "max_position_embeddings": 512, "initializer_range": 0.2}
    return tiny.build(folder, tiny.GPT2_ARCHITECTURE, **shape | extra)


def file_of(folder: Path) -> Path:
    (file,) = folder.glob("*.gguf")
    return file


@pytest.mark.parametrize(
    ("extra", "flags"),
    [({}, {"ignore": [r"^(?!.*h\.0\.mlp\.c_proj)"]}), (UNTIED, {}), ({}, {"symmetric": False, "ignore": KEPT})],
    ids=["one-linear", "untied", "asymmetric"],
)
def test_llama_cpp_computes_the_same(extra: dict[str, Any], flags: dict[str, Any], tmp_path: Path) -> None:
    """The first one keeps all linears but one in float32, so that nothing hides a wrong name, order or epsilon."""
    source = built(tmp_path / "m", dtype=torch.float32, layer_norm_epsilon=1e-3, **extra)
    out = quantized(source, tmp_path / "q", format="gguf", **flags)
    ids = torch.randint(5, 4096, (60,), generator=torch.Generator().manual_seed(1))
    ours = log_probs(dequantized(source, out), ids)
    cost = divergence(log_probs(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), ids), ours)
    llama, at = LlamaCpp(file_of(out)), list(range(3, 60, 8))
    theirs = torch.stack([llama.log_probs(ids[: t + 1].tolist(), 4096) for t in at])
    assert divergence(ours[at], theirs) < 0.05 * cost


@pytest.mark.parametrize("extra", [{}, UNTIED], ids=["tied", "untied"])
def test_a_file_holds_the_weights_of_a_dense_output(extra: dict[str, Any], tmp_path: Path) -> None:
    """By our reader and by transformers'; what is said of the model; figures; and the checks of a finished folder."""
    pytest.importorskip("gguf", reason="needs the gguf package")
    source = built(tmp_path / "m", dtype=torch.float32, **extra)
    flags = {"ignore": KEPT, "rules": ["attn.c_proj: bits=8"]}
    out, fake = (quantized(source, tmp_path / name, format=name, **flags) for name in ("gguf", "fake"))
    file, expected = file_of(out), load_file(fake / SINGLE)
    read = open_checkpoint(out)
    # Of the file's sizes it takes neither the context nor the width of the MLP.
    opened = {"gguf_file": file.name, "config": AutoConfig.from_pretrained(source), "dtype": torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(out, **opened).state_dict()
    assert isinstance(read, PackedSource)
    assert read.tensors.keys() == expected.keys()
    assert len(read.packed) == 11
    for key, weight in expected.items():
        assert read.tensors[key].shape == tuple(weight.shape)
        assert torch.equal(read.read(key).float(), weight), key
        assert torch.equal(theirs[key], weight), key

    config = AutoConfig.for_model(**{"model_type": "gpt2", **read.config}).to_dict()
    again = GGUFModel(config).metadata("", 0, 4096)
    assert {k: v for k, v in again.items() if not k.startswith("general.")}.items() <= stored(
        file
    ).header.metadata.items()
    lanes = llmquant.compare([out, fake], reference=source, recipe=few()).lanes
    assert lanes["gguf"]["kl_mean"] == pytest.approx(lanes["fake"]["kl_mean"], rel=1e-12) != 0
    up = inspect_layer(out, "transformer.h.0.mlp.c_fc")
    assert up["scheme"] == {"bits": 4, "group_size": 32, "symmetric": True}
    assert up["shape"] == list(expected["transformer.h.0.mlp.c_fc.weight"].shape)
    verify_folder(out, source)


def test_an_upload_as_gpt_2_is_on_the_hub(tmp_path: Path) -> None:
    """Names of the base model, masks among the weights, in bf16, and a tokenizer.json without a type."""
    source = tiny.of_base_model(built(tmp_path / "m", n_layer=1), tmp_path / "upload")
    masks = {"h.0.attn.bias": torch.ones(1, 1, 512, 512), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(load_file(source / SINGLE) | masks, source / SINGLE, metadata={"format": "pt"})
    said = tokenizer_metadata(open_source(source), 4096, None)
    table = json.loads((source / "tokenizer.json").read_text("utf-8"))
    assert table["model"].pop("type") == "BPE"
    (source / "tokenizer.json").write_text(json.dumps(table))
    assert tokenizer_metadata(open_source(source), 4096, None) == said
    out = quantized(source, tmp_path / "q", format="gguf", ignore=[r"mlp\.c_proj"])
    verify_folder(out, source)
    found, weights = open_checkpoint(out), load_file(source / SINGLE)
    kept = found.read("transformer.h.0.mlp.c_proj.weight")
    assert torch.equal(kept, weights["h.0.mlp.c_proj.weight"])
    assert kept.dtype == torch.bfloat16
    for key, message in (("h.0.attn.c_attn.weight", "relative error"), ("h.0.mlp.c_proj.weight", "is not that of")):
        save_file(weights | {key: weights[key].flip(0)}, source / SINGLE, metadata={"format": "pt"})
        with pytest.raises(VerifyError, match=f"{key}: {message}"):
            verify_folder(out, source)
    with pytest.raises(SourceError, match="is a GGUF file"):
        export(out, "gptq", tmp_path / "gptq")


def test_files_of_others_are_read(tmp_path: Path) -> None:
    """As llama.cpp's converter and its quantizer write them: a K-quant, positions in float32, fewer keys."""
    gguf = pytest.importorskip("gguf", reason="needs the gguf package")
    original = built(tmp_path / "m", n_layer=1, n_embd=256)
    model, tensors = GGUFModel(AutoConfig.from_pretrained(original).to_dict()), load_file(original / SINGLE)
    key = "transformer.h.0.mlp.c_fc.weight"
    rows = random_rows("Q4_K", tuple(tensors[key].T.shape), 0)

    def written(name: str, extra_axis: bool = False, **more: float) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, "gpt2")
        for add, field in (
            (writer.add_context_length, "n_positions"),
            (writer.add_embedding_length, "n_embd"),
            (writer.add_block_count, "n_layer"),
            (writer.add_head_count, "n_head"),
            (writer.add_layer_norm_eps, "layer_norm_epsilon"),
        ):
            add(model.config[field])
        writer.add_feed_forward_length(4 * model.config["n_embd"])
        for key_of, value in more.items():
            writer.add_float32(f"gpt2.{key_of}", value)
        for ours, tensor in tensors.items():
            if ours == key:
                writer.add_tensor(model.name(ours), rows, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
            else:
                dense = model.dense(ours, tensor).float().numpy()
                writer.add_tensor(
                    model.name(ours), dense[None] if "attn.c_proj.weight" in ours and extra_axis else dense
                )
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
        return tmp_path / name

    source = open_checkpoint(file := written("a.gguf"))
    wanted = torch.from_numpy(gguf.dequantize(rows, gguf.GGMLQuantizationType.Q4_K)).T
    for ours, tensor in tensors.items():
        assert torch.equal(source.read(ours).float(), wanted if ours == key else tensor.float()), ours
    assert stored(file).config["n_inner"] == 1024
    assert source.config["activation_function"] == "gelu_new"
    with pytest.raises(SourceError, match=r"gpt2\.attn_scale: 2\.0; expected keys that are known here"):
        open_checkpoint(written("b.gguf", attn_scale=2.0))
    with pytest.raises(SourceError, match=r"attn_output\.weight': 3 dimensions; expected a matrix"):
        open_checkpoint(written("c.gguf", extra_axis=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "relu"}, "activation 'relu'; expected gelu_new or gelu_pytorch_tanh or gelu_fast"),
        ({"activation_function": "gelu"}, "activation 'gelu'"),  # GPT-SW3
        ({"scale_attn_weights": False}, "scale_attn_weights False; expected True, as llama.cpp computes it"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ({"add_cross_attention": True}, "add_cross_attention True"),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(change: dict[str, Any], message: str) -> None:
    config = AutoConfig.for_model("gpt-sw3").to_dict()
    assert GGUFModel(config | {"activation_function": "gelu_pytorch_tanh"}).context == 1024
    with pytest.raises(FormatError, match=f"^gguf: {message}"):
        GGUFModel(config | change)


def test_activations_of_three_names_are_one_formula() -> None:
    from transformers.activations import ACT2FN

    x = torch.linspace(-6, 6, 999, dtype=torch.float64)
    ours = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    for name in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"):
        torch.testing.assert_close(ACT2FN[name](x), ours, rtol=1e-8, atol=1e-8)
    assert (ACT2FN["gelu"](x) - ours).abs().max() > 1e-4

"""GGUF files for tests: of our own models, and as others write them, by the package gguf."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.torch import load_file
from transformers import AutoConfig

import llmquant
from llmquant.export import export
from llmquant.gguf.model import GGUFModel
from llmquant.gguf.source import GGUFSource, open_gguf_file
from llmquant.source.files import SINGLE

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def few(**flags: Any) -> llmquant.Recipe:
    return llmquant.make_recipe("x", flags={"eval_tokens": 128, "eval_seq_len": 64, "eval_data": "builtin"} | flags)


def built(folder: Path, name: str, **extra: Any) -> Path:
    shape = {"max_position_embeddings": 512, "initializer_range": 0.2}
    return tiny.build(folder, tiny.ARCHITECTURES[name], **shape | ARCHITECTURES[name] | extra)


def stored(file: Path) -> GGUFSource:
    source = open_gguf_file(file)
    assert isinstance(source, GGUFSource)
    return source


# Offsets of the fp16 numbers in a block; the other bytes may be anything.
SCALES = {
    "Q4_K": (0, 2),
    "Q6_K": (208,),
    "Q5_K": (0, 2),
    "Q3_K": (108,),
    "Q2_K": (80, 82),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q8_0": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "IQ3_S": (0,),
    "IQ2_XXS": (0,),
}


def random_rows(kind: str, shape: tuple[int, ...], seed: int) -> Any:
    """Blocks with scales of either sign, uint8 [rows, bytes of a row]."""
    import gguf

    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    dice = np.random.default_rng(seed)
    blocks = dice.integers(0, 256, (shape[0], shape[1] // weights, size), np.uint8)
    small = {"Q8_0": 2e-3, "Q6_K": 1e-4, "Q4_K": 3e-4, "Q5_K": 2e-4}.get(kind, 1e-3)
    for at in SCALES[kind]:
        scale = (dice.uniform(0.5, 1.5, blocks.shape[:2]) * small * dice.choice([-1, 1], blocks.shape[:2])).astype(
            "<f2"
        )
        blocks[..., at : at + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


def foreign(
    folder: Path, original: Path, kinds: dict[str, str], change: Callable[[Any], None] = lambda writer: None
) -> Path:
    """A model as llama.cpp's converter writes it, by the gguf package; `kinds`: block types by the file's names.

    Blocks are random: the original's weights are written where no type is named.
    """
    gguf = pytest.importorskip("gguf", reason="needs the gguf package")
    model = GGUFModel(AutoConfig.from_pretrained(original).to_dict())
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "some-Q4_K_M.gguf", model.architecture)
    config = model.config
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(model.rope["rope_theta"])
    if model.architecture == "gemma3":
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
        writer.add_sliding_window(config["sliding_window"])
    writer.add_file_type(15)
    change(writer)
    for seed, (key, tensor) in enumerate(load_file(original / SINGLE).items()):
        name = model.name(key)
        if name in kinds:
            rows = random_rows(kinds[name], tuple(tensor.shape), seed)
            writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[kinds[name]])
        else:
            dense = model.rows(key, model.dense(key, tensor))
            writer.add_tensor(name, dense.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "some-Q4_K_M.gguf"


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 256},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {
        "query_pre_attn_scalar": 16,
        "num_hidden_layers": 7,  # the sixth has no window
        "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
    },
    "phi3": {},
}


def quantized(model: Path | str, out: Path, **flags: Any) -> Path:
    flags = {"group_size": 32, "method": "rtn", "eval_data": "none"} | flags
    llmquant.quantize(model, llmquant.make_recipe("x", flags=flags), out)
    return out


def gguf_of(checkpoint: Path, **options: Any) -> Path:
    (file,) = export(checkpoint, "gguf", checkpoint.with_name(f"{checkpoint.name}-gguf"), **options).glob("*.gguf")
    return file


# -- tokenizers ----------------------------------------------------------------------------------------
def with_tokenizer(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    source = tiny.build(folder, tiny.ARCHITECTURES["llama"])
    table = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    change(table)
    (folder / "tokenizer.json").write_text(json.dumps(table))
    return source


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"


REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def splitter(digits: str, *, ignore_merges: bool) -> Callable[[dict[str, Any]], None]:
    def change(table: dict[str, Any]) -> None:
        split = {"type": "Split", "pattern": {"Regex": WORDS + digits + REST}, "behavior": "Isolated", "invert": False}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        table["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
        table["model"]["ignore_merges"] = ignore_merges

    return change


TEXTS = [
    "Hello world, it's 1234567 o'clock\n\n\n  and\tI'LL be  there!!",
    " ünï 你好 a\r\n b  \n",
    "x = {'a': [1, 22, 333]}",
]

"""Tiny random models of every architecture the tests promise, built from transformers configs."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmquant.demo import DEMO

COMMON: dict[str, Any] = {
    "vocab_size": 4096,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}

# name -> (config class, its arguments besides COMMON)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", LLAMA),
    "mistral": ("MistralConfig", LLAMA | {"sliding_window": 16, "head_dim": 16}),
    "qwen2": ("Qwen2Config", LLAMA),
    "qwen3": ("Qwen3Config", LLAMA | {"head_dim": 16}),
    "gemma2": ("Gemma2Config", LLAMA | {"head_dim": 16, "sliding_window": 16}),
    "gemma3": (
        "Gemma3TextConfig",
        LLAMA
        | {
            "head_dim": 16,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("Phi3Config", LLAMA),
    "opt": (
        "OPTConfig",
        {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "word_embed_proj_dim": 32},
    ),
    "gpt_neox": ("GPTNeoXConfig", LLAMA),
    "gptj": ("GPTJConfig", GPT2 | {"rotary_dim": 8}),
    "bloom": ("BloomConfig", {"hidden_size": 64, "n_layer": 3, "n_head": 4}),
    "falcon": ("FalconConfig", {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}),
    "starcoder2": ("Starcoder2Config", LLAMA),
    "olmo2": ("Olmo2Config", LLAMA),
    "cohere": ("CohereConfig", LLAMA),
    "granite": ("GraniteConfig", LLAMA | {"logits_scaling": 4.0, "residual_multiplier": 0.5}),
    "stablelm": ("StableLmConfig", LLAMA),
    "smollm3": ("SmolLM3Config", LLAMA),
    "glm": ("GlmConfig", LLAMA | {"head_dim": 16}),
    "nemotron": ("NemotronConfig", LLAMA),
}
# Models whose blocks share more than hidden states. Gemma 4: inputs by layer, shared keys and values, and hidden states
# that are sliced between two blocks; Gemma 3n: also four streams of hidden states, mixed before the head; Zamba 2: the
# embeddings, and the weights of a block that is there several times; GLM-DSA: which tokens the block before it chose.
GEMMA4: tuple[str, dict[str, Any]] = (
    "Gemma4TextConfig",
    {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "global_head_dim": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 4096,
        "pad_token_id": 0,
    },
)
PARKED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4": GEMMA4,
    "gemma4 without sharing": (GEMMA4[0], GEMMA4[1] | {"num_kv_shared_layers": 0}),
    "gemma3n": (
        "Gemma3nTextConfig",
        GEMMA4[1]
        | {
            "intermediate_size": [64] * 4,
            "laurel_rank": 32,
            "altup_num_inputs": 4,
            "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
            "vocab_size_per_layer_input": 4096,
        },
    ),
    "zamba2": (
        "Zamba2Config",
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 5,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "hybrid"],
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_mem_blocks": 2,
            "adapter_rank": 32,
            "use_mem_rope": True,
            "mamba_d_state": 16,
            "mamba_headdim": 32,
            "mamba_ngroups": 1,
            "n_mamba_heads": 4,
            "chunk_size": 16,
            "pad_token_id": 0,
        },
    ),
    "glm_dsa": (
        "GlmMoeDsaConfig",
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 32,
            "index_n_heads": 2,
            "index_head_dim": 32,
            "index_topk": 16,
            "indexer_types": ["full", "shared"] * 2,
            "mlp_layer_types": ["dense"] * 4,
            "first_k_dense_replace": 4,
            "pad_token_id": 0,
        },
    ),
}
# Linears of theirs that a block runs several times or not at all.
NOT_LAYERS = {"gemma3n": ["altup"], "zamba2": ["adapter"]}
GPT2_ARCHITECTURE = ("GPT2Config", GPT2)
# Recipe flags of a run of seconds on one of these models, with both texts.
SMALL: dict[str, Any] = {
    "group_size": 32,
    "samples": 4,
    "seq_len": 32,
    "eval_data": "builtin",
    "eval_tokens": 128,
    "eval_seq_len": 64,
    "baselines": "none",
}


def build(
    folder: Path,
    architecture: tuple[str, dict[str, Any]],
    *,
    dtype: torch.dtype = torch.bfloat16,
    shard: str = "5GB",
    **overrides: Any,
) -> Path:
    """Write a random model of `architecture`, with the demo's tokenizer, into `folder`."""
    import transformers

    name, arguments = architecture
    config = getattr(transformers, name)(**(COMMON | arguments | overrides))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            # Away from the initial zeros and ones, so that a bias or norm that is lost shows.
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder, max_shard_size=shard)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / file, folder / file)
    return folder


def some_of(names: Iterable[str], quick: str) -> list[Any]:
    """Parameters of a test: all but one are long tests."""
    return [pytest.param(name, marks=() if name == quick else pytest.mark.soak) for name in names]


def of_base_model(source: Path, folder: Path) -> Path:
    """The checkpoint as GPT-2 and BLOOM are on the Hub, with the names of the base model: h.0..., without lm_head."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder

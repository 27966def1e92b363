"""What single types need beside the sizes of their fields, and variants of types.

A variant has a name after a colon (`gemma4_text:moe`): a way in which uploads of the type differ, with a mechanism of
its own. `:fit` has no linear that a group of 32 does not divide; `:dense` has no experts.
"""

from typing import Any

PLAIN_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}


def _mrope(*section: int, **more: Any) -> dict[str, Any]:
    """Rotary embeddings of time, height and width, for the text of a multimodal type."""
    return {"text_config": {"rope_parameters": {**PLAIN_ROPE, "mrope_section": list(section), **more}}}


_SLIDING = ["sliding_attention", "full_attention"]
_GEMMA4_SHARING = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 3,
    "global_head_dim": 32,
}
_GEMMA4_LARGE = {
    "num_hidden_layers": 4,
    "layer_types": _SLIDING * 2,
    "num_kv_shared_layers": 0,
    "global_head_dim": 64,
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}
_GEMMA3N = {
    "num_hidden_layers": 5,
    "layer_types": [*_SLIDING, "sliding_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 2,
    "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0, 0.0],
    "intermediate_size": [256] * 5,
}
_ZAMBA2 = {
    "num_hidden_layers": 5,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "hybrid"],
    "num_mem_blocks": 2,
    "use_shared_attention_adapter": False,
    "use_mem_rope": True,
    "num_key_value_heads": 4,
    "mamba_headdim": 32,
}
_MAMBA = {"hidden_size": 128, "expand": 2, "intermediate_size": 256, "time_step_rank": 8}
_MAMBA_FIT = {**_MAMBA, "time_step_rank": 32}
_MAMBA2 = {"num_heads": 8, "head_dim": 32, "hidden_size": 128, "expand": 2, "state_size": 16, "n_groups": 1}
_GRANITE = {"layer_types": ["mamba", "attention", "mamba"]}
_JAMBA = {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
_LLAMA4 = {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "layer_types": None}
_LFM2_MOE = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}
_MINIMAX = {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "block_size": 16}
_ONE_GROUP = {"n_group": 1, "topk_group": 1}
_FINITE = {"time_step_limit": [0.0, 100.0]}  # by default it ends at infinity, which JSON has no number for
_ALL_HEADS = {"num_key_value_heads": 4}
_DEEPSEEK_DENSE = {
    **{**_ALL_HEADS, "num_hidden_layers": 3, "mlp_layer_types": ["dense"] * 3, "first_k_dense_replace": 3},
}
_CODEC = {"num_filters": 4, "depths": [1, 1, 1, 1, 1, 1, 1]}
# Drafts for a larger Gemma 4, by its keys and values.
_DRAFT = {
    **{"num_hidden_layers": 3, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    **{"num_kv_shared_layers": 3, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
    "global_head_dim": 32,
}
# name -> arguments of its config beside those by field; a nested table is for the config of that name
OVERRIDES: dict[str, dict[str, Any]] = {
    # dense
    "bloom": {"hidden_size": 128, "n_layer": 3, "n_head": 4},
    "codegen": {"n_embd": 128, "n_head": 4, "n_layer": 3, "rotary_dim": 16},
    "cohere_compass_text": {
        "num_hidden_layers": 4,
        "layer_types": _SLIDING * 2,
        "rope_parameters": {"full_attention": PLAIN_ROPE, "sliding_attention": PLAIN_ROPE},
    },
    "ctrl": {"dff": 256},
    "falcon": {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": False},
    "gemma2": {"num_hidden_layers": 4, "query_pre_attn_scalar": 32},
    "gemma3_text": {"query_pre_attn_scalar": 32},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": 16},
    "opt": {"word_embed_proj_dim": 64, "do_layer_norm_before": True},
    "phi3": {"sliding_window": None},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "stablelm": {"use_qkv_bias": True},
    "xglm": {"d_model": 128, "ffn_dim": 256, "num_layers": 3, "attention_heads": 4},
    "youtu": _ALL_HEADS,
    # state shared between blocks
    "gemma3n_text": {**_GEMMA3N, "laurel_rank": 16},
    "gemma3n_text:fit": {**_GEMMA3N, "laurel_rank": 32},
    "gemma4_text": _GEMMA4_SHARING,
    "gemma4_text:31b": _GEMMA4_LARGE,
    "gemma4_text:moe": {
        **_GEMMA4_LARGE,
        **{"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    },
    "gemma4_text:without_ple": {**_GEMMA4_SHARING, "hidden_size_per_layer_input": 0},
    "gemma4_text:without_sharing": {
        **{"num_hidden_layers": 4, "layer_types": _SLIDING * 2, "num_kv_shared_layers": 0, "global_head_dim": 32},
    },
    "gemma4_unified_text": {"global_head_dim": 32},
    "gemma4_unified_text:sharing": _GEMMA4_SHARING,
    # mixtures of experts
    **dict.fromkeys(("axk1", "axk2", "glm4_moe_lite"), _ALL_HEADS),
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "glm_moe_dsa"), _ALL_HEADS),
    "dbrx": {
        **{"d_model": 128, "n_heads": 4, "n_layers": 3},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 128, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_key_value_heads": 4, "topk_method": "group_limited_greedy"},
    **dict.fromkeys(("deepseek_v3:dense", "deepseek_v32:dense"), _DEEPSEEK_DENSE),
    "doge:moe": {"is_moe": True, "num_experts": 64, "num_experts_per_tok": 8},
    "glm_moe_dsa:dense": {
        **{**_ALL_HEADS, "num_hidden_layers": 4, "mlp_layer_types": ["dense"] * 4, "first_k_dense_replace": 4},
        "indexer_types": ["full", "shared", "full", "shared"],
    },
    "dots3_note_text": {
        **_ALL_HEADS,
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32, "swa_kv_lora_rank": 32},
        **{"swa_head_dim": 32, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 32},
    },
    "gpt_oss": {"rope_parameters": PLAIN_ROPE},
    "llama4_text": {**_LLAMA4, "interleave_moe_layer_step": 2, "num_experts_per_tok": 1},
    "llama4_text:dense": {**_LLAMA4, "moe_layers": []},
    "longcat_flash": {
        **{"head_dim": 16, "num_layers": 2, "num_hidden_layers": 4, "zero_expert_num": 1, "num_key_value_heads": 4},
    },
    "phimoe": {"sliding_window": None},
    "qwen2_moe": {"mlp_only_layers": [0]},
    "zaya": {"num_experts_per_tok": 1},
    # state spaces and other hybrids
    "bamba": {"attn_layer_indices": [1]},
    "bamba:fit": {"attn_layer_indices": [1], **_FINITE},
    "falcon_h1:fit": _FINITE,
    **dict.fromkeys(("mamba", "falcon_mamba"), _MAMBA),
    **dict.fromkeys(("mamba:fit", "falcon_mamba:fit"), _MAMBA_FIT),
    "granitemoehybrid": _GRANITE,
    "granitemoehybrid:fit": {**_GRANITE, **_FINITE},
    "granitemoehybrid:dense": {**_GRANITE, **_FINITE, "num_local_experts": 0, "num_experts_per_tok": 0},
    "jamba": {**_JAMBA, "expert_layer_period": 2, "expert_layer_offset": 1},
    "jamba:dense": {**_JAMBA, "num_experts": 1, "num_experts_per_tok": 1},
    "kimi_linear:dense": {"mlp_layer_types": ["dense"] * 4, "num_hidden_layers": 4, "first_k_dense_replace": 4},
    "lfm2": {
        **{"block_auto_adjust_ff_dim": False, "num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    },
    "lfm2_moe": {**_LFM2_MOE, "num_dense_layers": 1},
    "lfm2_moe:dense": {**_LFM2_MOE, "num_dense_layers": 4},
    "mamba2": _MAMBA2,
    "mamba2:fit": {**_MAMBA2, **_FINITE},
    "minimax": _MINIMAX,
    "minimax:dense": {**_MINIMAX, "num_local_experts": 1, "num_experts_per_tok": 1},
    "nemotron_h": _ONE_GROUP,
    "nemotron_h:fit": {**_ONE_GROUP, **_FINITE},
    "nemotron_h:dense": {
        **{**_ONE_GROUP, **_FINITE, "num_hidden_layers": 4},
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
    },
    "qwen3_next:dense": {"mlp_only_layers": [0, 1, 2, 3]},
    "qwen4_exp_text": {
        **{"indexer_budget": 16, "indexer_compress_ratio": 4, "indexer_n_heads": 2, "indexer_kv_heads": 1},
        **{"indexer_head_dim": 32, "ple_layer_ids": [1], "ngram_vocab_size_base": 64, "heads_per_ngram": 2},
        **{"split_ngram_parts": 2, "make_ngram_vocab_size_divisible_by": 8, "hc_lowrank": 32},
    },
    "recurrent_gemma": {
        **{"lru_width": 128, "attention_window_size": 16, "block_types": ["recurrent", "recurrent", "attention"]},
    },
    "rwkv": {"attention_hidden_size": 128, "context_length": 256},
    "xlstm": {"num_blocks": 3},
    "zamba": {
        **{"num_hidden_layers": 5, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"]},
        **{"mamba_dt_rank": 8, "n_mamba_heads": 2, "num_key_value_heads": 4},
    },
    "zamba2": {**_ZAMBA2, "adapter_rank": 32},
    # multimodal
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "paddleocr_vl", "glm4v", "glm46v", "glmga", "glm_ocr"),
        _mrope(4, 6, 6),
    ),
    "chameleon": {"vocabulary_map": {"<image>": 5, "IMGIMGBS": 6}},
    "cohere2_vision": {"alignment_intermediate_size": 256},
    "cosmos3_edge": _mrope(6, 5, 5),
    "deepseek_ocr2": {"text_config": {"num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"]}},
    "dots3_note": {
        "vision_config": {
            **{"adapter_in_dim": 64, "adapter_out_dim": 128, "num_local_experts": 4, "moe_intermediate_size": 64},
        },
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 128},
    },
    "emu3": {
        "vq_config": {"hidden_size": 64},
        "vocabulary_map": {"<image>": 5, "<|extra_200|>": 6, "<|visual token 000001|>": 7},
    },
    "ernie4_5_vl_moe": _mrope(6, 6, 4),
    "fun_asr_nano": {"adaptor_config": {"hidden_size": 128, "intermediate_size": 32}},
    "glm4v_moe": _mrope(2, 3, 3, partial_rotary_factor=0.5),
    "glm5_next": {"text_config": {"num_key_value_heads": 4, "qk_rope_head_dim": 0}},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2", "spatial_target_layers": [1]},
    "kyutai_speech_to_text": {"codec_config": {"upsample_groups": 64}},
    "mistral_large4": {"text_config": _ALL_HEADS},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "muse_spark": {
        "audio_config": {"patch_sizes": [4, 2], "hidden_sizes": [32, 64], "depths": [1, 1], "num_hidden_layers": 2},
    },
    "nemo_speechlm": {"head_config": {"audio_hidden_size": 64}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "phi4_multimodal:llm": {
        **{"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "sliding_window": None},
    },
    "qwen2_5_omni": {
        "talker_config": {"embedding_size": 128},
        "token2wav_config": {"bigvgan_config": {"upsample_initial_channel": 128}},
    },
    "vibevoice_asr": {"acoustic_tokenizer_encoder_config": _CODEC, "semantic_tokenizer_encoder_config": _CODEC},
    # odd ones and encoders
    "blt": {
        **{"encoder_hash_byte_group_vocab": 64, "encoder_config": {"hidden_size": 128}},
        **{"decoder_config": {"hidden_size_global": 128}, "global_config": {"hidden_size": 128}},
    },
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 32},
    "cpmant": {
        **{"dim_ff": 256, "num_attention_heads": 4, "dim_head": 32, "prompt_types": 4, "prompt_length": 4},
        **{"segment_types": 4, "position_bias_num_buckets": 16, "position_bias_max_distance": 32},
    },
    "florence2": {
        "vision_config": {
            **{"patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True]},
            **{"depths": [1, 1], "embed_dim": [32, 64], "num_heads": [2, 4], "num_groups": [2, 4]},
        }
    },
    "gemma4_assistant": {"backbone_hidden_size": 128, "text_config": {"model_type": "gemma4_text", **_DRAFT}},
    "gemma4_unified_assistant": {
        **{"backbone_hidden_size": 128, "text_config": {"model_type": "gemma4_unified_text", **_DRAFT}},
    },
    "reformer": {
        **{"is_decoder": True, "axial_pos_embds_dim": [64, 64], "axial_pos_shape": [16, 16]},
        **{"attention_head_size": 32, "feed_forward_size": 256, "attn_layers": ["local", "lsh", "local"]},
    },
    "roc_bert": {
        **dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), 32),
        **dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim"), 32),
    },
}

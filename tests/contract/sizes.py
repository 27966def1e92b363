"""What makes a config tiny: sizes by the name of the field. What single types need beside them is in `overrides.py`."""

from typing import Any

VOCABULARY = 4096

# Widths are multiples of 32; experts are 4, of which 2 run; windows (16) are shorter than the texts of the check.
TEXT: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"), 4096),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 128),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"), 256),
    **dict.fromkeys(("dense_intermediate_size", "intermediate_size_mlp", "ffn_hidden_size"), 256),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 3),
    "num_decoder_layers": 3,
    "encoder_layers": 2,
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "swa_num_attention_heads"), 4),
    "num_sliding_attention_heads": 4,
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "global_head_dim", "swa_head_dim", "v_head_dim", "qk_head_dim"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 256),
    "original_max_position_embeddings": 256,
    **dict.fromkeys(("word_embed_proj_dim", "embedding_size", "keep_window_size"), 64),
    **dict.fromkeys(("rotary_dim", "sliding_window", "sliding_window_size", "window_size", "attention_chunk_size"), 16),
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "moe_hidden_size", "expert_ffn_hidden_size"), 64),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim"), 64),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 64),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "num_expert_group"), 2),
    **dict.fromkeys(("topk_group", "first_k_dense_replace"), 1),
    # latent attention, indexers
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "index_head_dim", "hidden_size_per_layer_input"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "index_topk"), 16),
    "index_n_heads": 2,
    # state spaces, linear attention, convolutions
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("mamba_d_conv", "conv_kernel", "linear_conv_kernel_dim"), 4),
    **dict.fromkeys(("mamba_expand", "expand", "linear_num_key_heads"), 2),
    **dict.fromkeys(("mamba_dt_rank", "mamba_d_head", "mamba_headdim", "mamba_head_dim"), 32),
    **dict.fromkeys(("mamba_n_heads", "n_mamba_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    "mamba_d_ssm": 256,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    # the rest
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "type_vocab_size": 2},
    **dict.fromkeys(("attention_probs_dropout_prob", "hidden_dropout_prob"), 0.0),
}

# Of vision and audio towers, and of what joins them to the text.
TOWER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "embed_dim", "projection_dim", "d_model"), 64),
    **dict.fromkeys(("max_position_embeddings", "max_source_positions"), 64),
    **dict.fromkeys(("intermediate_size", "mlp_dim", "encoder_ffn_dim", "ffn_dim"), 128),
    **dict.fromkeys(("out_hidden_size", "output_dim", "vision_output_dim", "merger_hidden_size"), 128),
    **dict.fromkeys(("projector_input_dim", "projector_output_dim", "text_hidden_size"), 128),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "depth", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads", "attention_heads"), 2),
    **{"encoder_attention_heads": 2, "window_size": 2},
    **dict.fromkeys(("head_dim", "output_channels", "base_channels"), 32),
    **{"image_size": 28, "patch_size": 14, "num_patches": 4, "num_position_embeddings": 16},
    **{"pos_emb_height": 4, "pos_emb_width": 4, "num_mel_bins": 80, "n_window": 10},
    "deepstack_visual_indexes": [0, 1],
    **{"fullatt_block_indexes": [1], "global_attn_indexes": [1]},
}

"""GPT-2 in GGUF: names, fields of its config, and what llama.cpp computes of it.

Its linears are Conv1D layers: the checkpoint holds their weights as [in_features, out_features], the file as it holds
all matrices, row by row of outputs. Positions are learned, every module has a bias, and there is one activation.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

INNER = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
OUTER = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output"}
# What most configs call a field -> what GPT-2's calls it.
FIELDS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
    "hidden_act": "activation_function",
}
# All that llama.cpp reads of such a file; another key may change what it computes.
KEYS = {"vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length"}
KEYS |= {"attention.head_count", "attention.layer_norm_epsilon", "tensor_data_layout"}
ACTIVATION = "gelu_new"
_SAME = (ACTIVATION, "gelu_pytorch_tanh", "gelu_fast")  # one formula under three names
_SWITCHES = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


def in_common(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config`, its fields called as in most configs, with the width of the MLP where it leaves that out."""
    common = dict(config) | {usual: config[own] for usual, own in FIELDS.items()}
    common["intermediate_size"] = common["intermediate_size"] or 4 * common["hidden_size"]
    return common


def refuse_differences(config: Mapping[str, Any], refuse: Callable[[str, object, object], None]) -> None:
    """Call `refuse(what, got, expected)` where llama.cpp, which knows one GPT-2, would compute something else."""
    if (activation := config["activation_function"]) not in _SAME:
        refuse("activation", activation, " or ".join(_SAME))
    for name, wanted in _SWITCHES.items():
        if bool(config.get(name, wanted)) != wanted:
            refuse(name, config[name], wanted)


def is_conv1d(key: str) -> bool:
    """Whether this is the weight of a Conv1D, by its name in a checkpoint.

    >>> is_conv1d("transformer.h.0.attn.c_attn.weight"), is_conv1d("h.0.ln_1.weight"), is_conv1d("wpe.weight")
    (True, False, False)
    """
    return re.fullmatch(r"(?:transformer\.)?h\.\d+\.(?:attn|mlp)\.c_\w+\.weight", key) is not None

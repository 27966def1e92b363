"""What llama.cpp must be told about a model: metadata, names of tensors, and the few weights that it stores
differently.

Three kinds differ. Rows of q and k are permuted for Llama and Mistral, because llama.cpp rotates neighbouring pairs
where transformers rotates halves. Gemma's norms are stored with 1 added. GPT-2's Conv1D layers are transposed. A model
that llama.cpp would compute differently is refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import FormatError, option
from llmquant.gguf import gpt2

ARCHITECTURES = {"mistral": "llama"} | {name: name for name in ("llama", "qwen2", "qwen3", "gemma2", "phi3")}
ARCHITECTURES |= {"gemma3_text": "gemma3", "gpt2": "gpt2", "gpt-sw3": "gpt2"}
GEMMAS = ("gemma2", "gemma3")  # norms with 1 added, two more of them in a block, windows in some blocks
_ACTIVATIONS = dict.fromkeys(GEMMAS, "gelu_pytorch_tanh")
# llama.cpp knows the largest model by its number of blocks, and scales its attention by another width.
_LARGEST = {"gemma2": 46, "gemma3": 62}
# Every so many blocks, one without a window, and the base of rope in those with one.
_PERIOD, LOCAL_THETA = {"gemma2": 2, "gemma3": 6}, 10000.0

OUTER = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
INNER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up",  # Phi3: gate and up in one, gate first, in llama.cpp too
}
INNER_OF_GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@dataclass(frozen=True)
class GGUFModel:
    """A model that llama.cpp knows. FormatError where it would compute something else than the config says."""

    config: dict[str, Any]  # transformers' own config, with every default filled in

    def __post_init__(self) -> None:
        kind = self.config.get("model_type")
        if kind not in ARCHITECTURES:
            raise FormatError(
                "gguf",
                f"model type {kind!r}",
                expected=", ".join(ARCHITECTURES),
                remedy=f"use another {option('format')}",
            )
        self._refuse_differences()

    @property
    def architecture(self) -> str:
        return ARCHITECTURES[self.config["model_type"]]

    @property
    def common(self) -> dict[str, Any]:
        """The config, its fields called as in most configs."""
        return gpt2.in_common(self.config) if self.architecture == "gpt2" else self.config

    @property
    def head_dim(self) -> int:
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"])

    @property
    def rope(self) -> dict[str, Any]:
        """rope_theta, rope_type and the type's own parameters, from either spelling of the config."""
        old = self.config.get("rope_scaling") or {}
        rope = {"rope_type": old.get("type", "default"), **old, **full_rope(self.config.get("rope_parameters"))}
        rope.setdefault("rope_theta", self.config.get("rope_theta", 10000.0))
        return rope

    def _refuse_differences(self) -> None:
        def refuse(what: str, got: object, expected: object) -> None:
            raise FormatError("gguf", f"{what} {got!r}", expected=f"{expected}, as llama.cpp computes it")

        config, kind = self.config, self.architecture
        if kind == "gpt2":
            return gpt2.refuse_differences(config, refuse)
        act = config.get("hidden_activation") or config.get("hidden_act")
        if act != (wanted := _ACTIVATIONS.get(kind, "silu")):
            refuse("activation", act, wanted)
        types = ("default", "llama3") if kind == "llama" else ("default",)
        if self.rope["rope_type"] not in (*types, "linear"):
            refuse("rope type", self.rope["rope_type"], " or ".join((*types, "linear")))
        if kind in GEMMAS:
            scalar, scale = config.get("query_pre_attn_scalar", 256), scale_of(kind, config, self.head_dim)
            if scalar != scale:
                refuse("query_pre_attn_scalar", scalar, scale)
            if config.get("layer_types", windows := windows_of(kind, self.n_layers)) != windows:
                refuse("layer_types", "of another order", f"every {_PERIOD[kind]}. layer without a window, no other")
            for name in ("attn_logit_softcapping", "final_logit_softcapping"):
                if bool(config.get(name)) != (kind == "gemma2"):
                    refuse(name, config.get(name), "a number" if kind == "gemma2" else "none")
        if kind == "gemma3":
            if config.get("use_bidirectional_attention"):
                refuse("use_bidirectional_attention", True, False)
            local = (config.get("rope_parameters") or {}).get("sliding_attention", {})
            if (base := local.get("rope_theta", LOCAL_THETA)) != LOCAL_THETA or local.get("factor", 1.0) != 1.0:
                refuse("rope of layers with a window", base, f"{LOCAL_THETA}, as it is")

    @property
    def n_layers(self) -> int:
        return int(self.common["num_hidden_layers"])

    @property
    def context(self) -> int:
        """For how many positions llama.cpp computes what transformers does: Gemma's sliding window is all it knows."""
        context, window = int(self.common["max_position_embeddings"]), self.config.get("sliding_window") or 0
        if not window or self.architecture in GEMMAS or not self.config.get("use_sliding_window", True):
            return context
        return min(context, int(window))

    def metadata(self, name: str, file_type: int, vocab_size: int) -> dict[str, Any]:
        """The entries `general.*` and the entries of the architecture."""
        config, arch = self.common, self.architecture
        own: dict[str, Any] = {
            "vocab_size": vocab_size,
            "context_length": self.context,
            "embedding_length": int(config["hidden_size"]),
            "block_count": self.n_layers,
            "feed_forward_length": int(config["intermediate_size"]),
            "attention.head_count": int(config["num_attention_heads"]),
        }
        own |= (
            {"attention.layer_norm_epsilon": float(config["layer_norm_epsilon"])}
            if arch == "gpt2"
            else self._of_llamas()
        )
        general = {
            "general.architecture": arch,
            "general.type": "model",
            "general.name": name,
            "general.file_type": file_type,
            "general.quantization_version": 2,
        }
        return general | {f"{arch}.{key}": value for key, value in own.items()}

    def _of_llamas(self) -> dict[str, Any]:
        """What is said of heads, norms and rope in all architectures but GPT-2's."""
        config, arch = self.config, self.architecture
        own: dict[str, Any] = {
            "attention.head_count_kv": int(config.get("num_key_value_heads") or config["num_attention_heads"]),
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
            "rope.dimension_count": int(self.head_dim * self._rotary_share),
            "rope.freq_base": float(self.rope["rope_theta"]),
        }
        if self.rope["rope_type"] == "linear":
            own |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(self.rope["factor"])}
        if arch == "phi3":
            original = config.get("original_max_position_embeddings") or config["max_position_embeddings"]
            own["rope.scaling.original_context_length"] = int(original)
        if arch == "gemma2":
            own |= {
                "attn_logit_softcapping": float(config["attn_logit_softcapping"]),
                "final_logit_softcapping": float(config["final_logit_softcapping"]),
            }
        if arch in GEMMAS:
            own["attention.sliding_window"] = int(config["sliding_window"])
        return own

    @property
    def _rotary_share(self) -> float:
        return float(self.rope.get("partial_rotary_factor", self.config.get("partial_rotary_factor") or 1.0))

    def name(self, key: str) -> str:
        """llama.cpp's name of a tensor; FormatError if it has none."""
        base, stack, inner, outer = r"(?:model\.)?", "layers", INNER, OUTER
        if self.architecture in GEMMAS:
            inner = INNER | INNER_OF_GEMMA
        if self.architecture == "gpt2":
            base, stack, inner, outer = r"(?:transformer\.)?", "h", gpt2.INNER, gpt2.OUTER
        if match := re.fullmatch(rf"{base}{stack}\.(\d+)\.(.+)\.(weight|bias)", key):
            if match[2] in inner:
                return f"blk.{match[1]}.{inner[match[2]]}.{match[3]}"
        elif match := re.fullmatch(rf"{base}({'|'.join(outer)})\.(weight|bias)", key):
            return f"{outer[match[1]]}.{match[2]}"
        raise FormatError(key, "llama.cpp knows no such tensor", remedy=f"use another {option('format')}")

    def heads_of(self, key: str) -> int | None:
        """The number of heads of a tensor whose rows must be permuted for llama.cpp; None for other tensors."""
        match = re.search(r"\.self_attn\.([qk])_proj\.", key)
        if match is None or self.architecture != "llama":
            return None
        heads = int(self.config["num_attention_heads"])
        return heads if match[1] == "q" else int(self.config.get("num_key_value_heads") or heads)

    def rows(self, key: str, tensor: Tensor) -> Tensor:
        """`tensor` with its rows in llama.cpp's order: within each head, from (half, pair) to (pair, half)."""
        heads = self.heads_of(key)
        if heads is None:
            return tensor
        split = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1)
        return split.transpose(1, 2).reshape(tensor.shape).contiguous()

    def dense(self, key: str, tensor: Tensor) -> Tensor:
        """A tensor that is not quantized: vectors in float32, Gemma's norms with 1 added, matrices as rows of outputs.

        `rows` is applied separately.
        """
        if tensor.dim() > 1:
            return tensor.T.contiguous() if gpt2.is_conv1d(key) else tensor
        tensor = tensor.float()
        return tensor + 1 if self.architecture in GEMMAS and "norm" in key else tensor

    def rope_factors(self) -> Tensor | None:
        """`llama3_factors` of a model of that rope type; None for other types."""
        return llama3_factors(self.rope, self.head_dim) if self.rope["rope_type"] == "llama3" else None


def full_rope(parameters: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Rope's parameters of blocks without a window, where a config has those of each kind."""
    found: Mapping[str, Any] = (parameters or {}).get("full_attention", parameters or {})
    return found


def windows_of(architecture: str, n_layers: int) -> list[str]:
    """Which blocks of a Gemma have a window, in llama.cpp.

    >>> windows_of("gemma2", 3)
    ['sliding_attention', 'full_attention', 'sliding_attention']
    """
    period = _PERIOD[architecture]
    return ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(n_layers)]


def scale_of(architecture: str, config: Mapping[str, Any], head_dim: int) -> int:
    """What llama.cpp divides the scores of a Gemma's attention by the square root of."""
    large = config["num_hidden_layers"] == _LARGEST[architecture]
    return int(config["hidden_size"]) // int(config["num_attention_heads"]) if large else head_dim


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> Tensor:
    """llama3 rope as llama.cpp stores it: what each frequency f is divided by, float32 [head_dim / 2].

    With the wavelength l = 2 pi / f and the original context n, that is
        factor   where l > n / low_freq_factor
        1        where l < n / high_freq_factor
    and in between 1 / ((1 - s) / factor + s), s going linearly in f from 0 to 1, as in transformers.
    """
    factor, low, high = (float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(rope["original_max_position_embeddings"])
    frequency = float(rope["rope_theta"]) ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = ((context * frequency / (2 * torch.pi) - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()

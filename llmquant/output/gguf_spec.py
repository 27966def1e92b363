"""What a GGUF file must hold and say, by the checkpoint's config.json: the reader's own account, for verification.

Written from llama.cpp's description of the format and its tables of names. It shares no code with `gguf/`, which
writes the files, so that a mistake of the writer is not repeated here. `tests/output/test_gguf_spec.py` compares the
tables with those of llama.cpp's own package gguf, which this file does not need. The tokenizer is not covered.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmquant.errors import VerifyError

ROPE = "rope_freqs.weight"  # what the frequencies of rope are divided by: computed from config.json
# model_type of config.json -> llama.cpp's architecture
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2"}
ARCHITECTURES |= {"gemma3_text": "gemma3", "phi3": "phi3", "gpt2": "gpt2", "gpt-sw3": "gpt2"}
# The modules of a decoder block: llama.cpp's name -> transformers' name.
_PLAIN = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# GPT-2's linears, which its checkpoints hold as [in, out].
_CONV1D = {"attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
_OF_HEADS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
BLOCKS = {
    "llama": _PLAIN,
    "qwen2": _PLAIN,
    "qwen3": _PLAIN | _OF_HEADS,
    "gemma2": _PLAIN | _GEMMA,
    "gemma3": _PLAIN | _GEMMA | _OF_HEADS,
    "phi3": {
        "attn_norm": "input_layernorm",
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    },
    "gpt2": _CONV1D | {"attn_norm": "ln_1", "ffn_norm": "ln_2"},
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_OUTER_GPT2 = {"token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f"}
OUTER = dict.fromkeys(BLOCKS, _OUTER) | {"gpt2": _OUTER_GPT2 | {"output": "lm_head"}}
# What transformers assumes where config.json does not have the key.
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
_WIDE = {"intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768}
_WIDE |= {"sliding_window": 4096, "use_sliding_window": False}
_GEMMAS = _DEFAULTS | {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _DEFAULTS | {"intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": _DEFAULTS
    | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": _DEFAULTS | _WIDE,
    "qwen3": _DEFAULTS | _WIDE | {"head_dim": 128},
    "gemma2": _GEMMAS
    | {"max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMAS | {"max_position_embeddings": 131072, "rope_theta": 1000000.0},
    "phi3": {
        **_DEFAULTS,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
    },
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "layer_norm_epsilon": 1e-5}
    | {"tie_word_embeddings": True},
}
DEFAULTS["gpt-sw3"] = DEFAULTS["gpt2"]
# Fields that GPT-2's config.json calls by names of its own.
_OWN = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
_OWN |= {"max_position_embeddings": "n_positions", "intermediate_size": "n_inner"}


@dataclass(frozen=True)
class Order:
    """Names of the tensors and the order of their rows."""

    architecture: str
    heads: int
    kv_heads: int

    @classmethod
    def of_file(cls, where: str, metadata: Mapping[str, Any]) -> "Order":
        """As the file itself says. VerifyError where it says nothing that can be."""
        architecture = metadata.get("general.architecture")
        heads = metadata.get(f"{architecture}.attention.head_count")
        kv_heads = metadata.get(f"{architecture}.attention.head_count_kv", heads)
        if architecture not in BLOCKS or any(type(n) is not int or n < 1 for n in (heads, kv_heads)):
            raise VerifyError(
                where, f"architecture {str(architecture)[:40]!r}, {str(heads)[:20]} and {str(kv_heads)[:20]} heads"
            )
        return cls(str(architecture), int(heads or 0), int(kv_heads or 0))

    def stored_name(self, key: str) -> str | None:
        """llama.cpp's name of a tensor of the checkpoint, or of that of its base model; None where it has none."""
        if key == ROPE:
            return key
        base, stack = ("transformer.", "h") if self.architecture == "gpt2" else ("model.", "layers")
        module, _, leaf = key.removeprefix(base).rpartition(".")
        if leaf not in ("weight", "bias"):
            return None
        if match := re.fullmatch(rf"{stack}\.(\d+)\.(.+)", module):
            found = [name for name, ours in BLOCKS[self.architecture].items() if ours == match[2]]
            return f"blk.{match[1]}.{found[0]}.{leaf}" if found else None
        found = [name for name, ours in OUTER[self.architecture].items() if ours.removeprefix(base) == module]
        return f"{found[0]}.{leaf}" if found else None

    def heads_of(self, key: str) -> int | None:
        """Heads of a tensor whose rows are in another order than in the checkpoint; None for others.

        llama.cpp rotates neighbouring rows of a head in its Llama, and rows half a head apart, as transformers does,
        in all other architectures that are known here.
        """
        leaf = (self.stored_name(key) or "").split(".")[-2:-1]
        heads = {"attn_q": self.heads, "attn_k": self.kv_heads}
        return heads.get(leaf[0]) if leaf and self.architecture == "llama" else None

    def is_transposed(self, key: str) -> bool:
        """Whether the checkpoint holds a matrix as [in, out], where llama.cpp has [out, in]."""
        *_, part, leaf = ("", *(self.stored_name(key) or ".").split("."))
        return self.architecture == "gpt2" and part in _CONV1D and leaf == "weight"

    def as_stored(self, key: str, tensor: Tensor) -> Tensor:
        """A tensor that is not quantized, as the file must hold it, but for the order of rows.

        Vectors are in float32; llama.cpp multiplies with Gemma's norms as they are, where transformers adds 1 first.
        """
        if self.is_transposed(key):
            return tensor.T
        if tensor.dim() != 1 or key == ROPE:
            return tensor
        leaf = (self.stored_name(key) or "").split(".")[-2]
        return tensor.float() + (1 if self.architecture in ("gemma2", "gemma3") and leaf.endswith("norm") else 0)


class Expected:
    """What llama.cpp must be told of the model of a config.json."""

    def __init__(self, where: str, config: Mapping[str, Any]) -> None:
        self.where, self._config = where, config
        if (kind := config.get("model_type")) not in ARCHITECTURES:
            raise VerifyError(where, f"model type {str(kind)[:40]!r}", expected=" or ".join(ARCHITECTURES))
        self._defaults = DEFAULTS[kind]
        self.architecture = ARCHITECTURES[kind]
        try:
            self.heads = int(self._get("num_attention_heads"))
            self.head_dim = int(self._get("head_dim") or self._get("hidden_size") // self.heads)
            self.order = Order(self.architecture, self.heads, int(self._get("num_key_value_heads") or self.heads))
            self.rope = self._rope()
            self.metadata = self._metadata()
            self.rope_factors = self._llama3() if self.rope["rope_type"] == "llama3" else None
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise VerifyError(where, f"its config.json cannot be read ({type(error).__name__}: {error})") from None

    def _get(self, key: str) -> Any:
        own = _OWN.get(key, key) if self.architecture == "gpt2" else key
        return self._config[own] if own in self._config else self._defaults.get(own)

    def _rope(self) -> dict[str, Any]:
        """`rope_parameters` of config.json, or the older `rope_scaling` with a `rope_theta` beside it."""
        rope: dict[str, Any] = {"rope_theta": self._get("rope_theta")}
        rope |= {"partial_rotary_factor": self._get("partial_rotary_factor") or 1.0}
        parameters = self._config.get("rope_parameters") or {}
        rope |= (self._config.get("rope_scaling") or {}) | parameters.get("full_attention", parameters)
        return rope | {"rope_type": rope.get("rope_type") or rope.get("type") or "default"}

    def _metadata(self) -> dict[str, Any]:
        own: dict[str, Any] = {
            "context_length": self._context(),
            "embedding_length": int(self._get("hidden_size")),
            "block_count": int(self._get("num_hidden_layers")),
            "feed_forward_length": int(self._get("intermediate_size") or 4 * self._get("hidden_size")),
            "attention.head_count": self.heads,
        }
        own |= self._heads_and_rope()
        general = {"architecture": self.architecture, "type": "model", "quantization_version": 2}
        return {f"general.{key}": value for key, value in general.items()} | {
            f"{self.architecture}.{key}": value for key, value in own.items()
        }

    def _heads_and_rope(self) -> dict[str, Any]:
        if self.architecture == "gpt2":
            return {"attention.layer_norm_epsilon": float(self._get("layer_norm_epsilon"))}
        own: dict[str, Any] = {
            "attention.head_count_kv": self.order.kv_heads,
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "attention.layer_norm_rms_epsilon": float(self._get("rms_norm_eps")),
            "rope.dimension_count": int(self.head_dim * self.rope["partial_rotary_factor"]),
            "rope.freq_base": float(self.rope["rope_theta"]),
        }
        if self.rope["rope_type"] == "linear":
            own |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(self.rope["factor"])}
        if self.architecture == "phi3":
            context = self._get("original_max_position_embeddings") or self._get("max_position_embeddings")
            own["rope.scaling.original_context_length"] = int(context)
        if self.architecture in ("gemma2", "gemma3"):
            own["attention.sliding_window"] = int(self._get("sliding_window"))
        if self.architecture == "gemma2":
            for key in ("attn_logit_softcapping", "final_logit_softcapping"):
                own[key] = float(self._get(key))
        return own

    def _context(self) -> int:
        """Up to a sliding window that llama.cpp does not know: there, both compute the same."""
        context, window = self._get("max_position_embeddings"), self._get("sliding_window")
        known = self.architecture in ("gemma2", "gemma3") or self._get("use_sliding_window") is False
        return int(context if known or not window else min(context, window))

    def _llama3(self) -> NDArray[np.float32]:
        """As llama.cpp's converter: 1 for short wavelengths, `factor` for long ones, and in between a mixture."""
        factor, low, high = (float(self.rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        context = self.rope.get("original_max_position_embeddings") or self._get("max_position_embeddings")
        found = []
        for i in range(0, self.head_dim, 2):
            wavelength = 2 * math.pi * float(self.rope["rope_theta"]) ** (i / self.head_dim)
            if wavelength < context / high:
                found.append(1.0)
            elif wavelength > context / low:
                found.append(factor)
            else:
                smooth = (context / wavelength - low) / (high - low)
                found.append(1 / ((1 - smooth) / factor + smooth))
        return np.array(found, np.float32)

    def tensors(self) -> set[str]:
        """Names of all tensors of the file."""
        arch, tied = self.architecture, self._get("tie_word_embeddings")
        bias: set[str] = {"attn_q", "attn_k", "attn_v"} if arch == "qwen2" else set()
        bias |= set(BLOCKS["gpt2"]) if arch == "gpt2" else set()
        if self._get("attention_bias") and self._config["model_type"] in ("llama", "qwen3", "gemma2", "gemma3_text"):
            bias |= {"attn_q", "attn_k", "attn_v", "attn_output"}
        if self._get("mlp_bias") and self._config["model_type"] == "llama":
            bias |= {"ffn_gate", "ffn_up", "ffn_down"}
        leaves = [f"{name}.weight" for name in BLOCKS[arch]] + [f"{name}.bias" for name in bias]
        names = {f"blk.{i}.{leaf}" for i in range(int(self._get("num_hidden_layers"))) for leaf in leaves}
        names |= {f"{name}.weight" for name in OUTER[arch] if name != "output" or not tied}
        names |= {"output_norm.bias"} if arch == "gpt2" else set()
        return names | ({ROPE} if self.rope_factors is not None else set())

    def check(self, metadata: Mapping[str, Any], tensors: Iterable[str], vocab_size: int) -> None:
        """VerifyError unless the file has these tensors and says this of the model, and nothing else."""
        if odd := sorted(self.tensors() ^ set(tensors)):
            what = "is missing" if odd[0] in self.tensors() else "is no tensor of this model"
            raise VerifyError(f"{self.where}: {odd[0]}", what)
        expected = self.metadata | {f"{self.architecture}.vocab_size": vocab_size}
        own = {key for key in metadata if key.startswith(f"{self.architecture}.")}
        for key in sorted(expected.keys() | own):
            got, wanted = metadata.get(key), expected.get(key)
            same = (type(got), got) == (type(wanted), wanted)
            if isinstance(got, float) and isinstance(wanted, float):
                got, wanted = np.float32(got), np.float32(wanted)  # as the file holds them
                same = bool(got == wanted)
            if not same:
                raise VerifyError(f"{self.where}: {key}", str(got)[:60], expected=f"{wanted!s}, by config.json")
        if (count := len(metadata.get("tokenizer.ggml.tokens", []))) != vocab_size:
            raise VerifyError(f"{self.where}: tokenizer.ggml.tokens", f"{count} tokens", expected=str(vocab_size))

    def check_rope(self, factors: NDArray[np.float32]) -> None:
        """VerifyError unless these are the factors of rope by config.json, but for their last bits."""
        wanted = self.rope_factors
        if wanted is None or wanted.shape != factors.shape or not np.allclose(factors, wanted, rtol=1e-6, atol=0):
            raise VerifyError(f"{self.where}: {ROPE}", "other factors than those of config.json")

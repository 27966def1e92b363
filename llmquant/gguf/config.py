"""GGUF metadata and names -> a config and tensor names of transformers: the inverse of `gguf/model.py`.

The metadata says what llama.cpp computes. A key that is not known here may change that, so such a file is refused,
unless a config.json in the same folder says what the model is. Where both say something, they must agree.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from llmquant.errors import SourceError
from llmquant.gguf import gpt2
from llmquant.gguf.model import (
    ARCHITECTURES,
    GEMMAS,
    INNER,
    INNER_OF_GEMMA,
    LOCAL_THETA,
    OUTER,
    full_rope,
    llama3_factors,
    scale_of,
)

# Keys that are read below, and keys that do not change what llama.cpp computes.
_KNOWN = {
    *("context_length", "embedding_length", "block_count", "feed_forward_length"),
    *(f"attention.{key}" for key in ("head_count", "head_count_kv", "key_length", "value_length")),
    *("attention.layer_norm_rms_epsilon", "attn_logit_softcapping", "final_logit_softcapping"),
    *("rope.dimension_count", "rope.freq_base", "rope.scale_linear"),
    *(f"rope.scaling.{key}" for key in ("type", "factor", "original_context_length")),
    *("vocab_size", "tensor_data_layout", "rope.scaling.finetuned"),
}
# Tensors of numbers that divide rope's frequencies: Llama 3's, and Phi-3's for long and for short texts.
FREQS, LONG, SHORT = FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_WINDOWED = (*GEMMAS, "phi3")
_MODEL_TYPES = {"gemma3": "gemma3_text"}  # where transformers has another name for an architecture
_REMEDY = "put the original's config.json beside the file"


@dataclass(frozen=True)
class Names:
    """Names and order of the tensors of one architecture."""

    architecture: str
    heads: int
    kv_heads: int

    def ours(self, name: str) -> str | None:
        """transformers' name of a tensor in the file; None if it has none."""
        base, stack, outer = (
            ("transformer", "h", gpt2.OUTER) if self.architecture == "gpt2" else ("model", "layers", OUTER)
        )
        if match := re.fullmatch(r"blk\.(\d+)\.(.+)\.(weight|bias)", name):
            inner = _inner_back(self.architecture).get(match[2])
            return None if inner is None else f"{base}.{stack}.{int(match[1])}.{inner}.{match[3]}"
        match = re.fullmatch(r"(\w+)\.(weight|bias)", name)
        if match is None or (leaf := _back(outer).get(match[1])) is None:
            return None
        return f"{leaf}.{match[2]}" if leaf == "lm_head" else f"{base}.{leaf}.{match[2]}"

    def heads_of(self, key: str) -> int | None:
        """The number of heads of a tensor whose rows are in llama.cpp's order; None for other tensors."""
        match = re.search(r"\.self_attn\.([qk])_proj\.", key)
        if match is None or self.architecture != "llama":
            return None
        return self.heads if match[1] == "q" else self.kv_heads

    def back(self, key: str, stored: Tensor) -> Tensor:
        """A stored tensor as transformers has it: rows of each head from (pair, half) to (half, pair); Gemma's norms
        less 1; dense weights of Conv1D layers, which are read in the shape that they have there, transposed.

        The norms come back exactly for s in [0.5, 2], where 1 + (s - 1) = s in float32, and else up to the last bit.
        """
        if (heads := self.heads_of(key)) is not None:
            split = stored.reshape(heads, stored.shape[0] // heads // 2, 2, -1)
            return split.transpose(1, 2).reshape(stored.shape).contiguous()
        if self.architecture in GEMMAS and "norm" in key:
            return stored.float() - 1
        if gpt2.is_conv1d(key) and stored.is_floating_point():
            return stored.view(stored.shape[::-1]).T.contiguous()
        return stored


def _inner_back(architecture: str) -> dict[str, str]:
    if architecture == "gpt2":
        return _back(gpt2.INNER)
    merged = ("self_attn.qkv_proj", "mlp.gate_up_proj")
    left_out = ("mlp.up_proj",) if architecture == "phi3" else merged
    table = INNER | INNER_OF_GEMMA if architecture in GEMMAS else INNER
    return _back({ours: theirs for ours, theirs in table.items() if ours not in left_out})


def _back(table: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in table.items()}


class Described:
    """What the header of a GGUF file says about its model. SourceError if that is no model that is known here."""

    def __init__(self, where: str, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.where, self.metadata, self.shapes = where, metadata, shapes
        known = tuple(dict.fromkeys(ARCHITECTURES.values()))
        self.architecture = metadata.get("general.architecture")
        if self.architecture not in known:
            raise SourceError(where, f"architecture {str(self.architecture)[:40]!r}", expected=", ".join(known))
        if "token_embd.weight" not in shapes:
            raise SourceError(where, "no token_embd.weight", expected="a language model")
        self.heads = self._natural("attention.head_count")
        self.kv_heads = self._natural("attention.head_count_kv", self.heads)
        width = self._natural("embedding_length")
        self.head_dim = self._natural("attention.key_length", width // self.heads or 1)
        self.names = Names(self.architecture, self.heads, self.kv_heads)

    def config(self, beside: Mapping[str, Any], factors: Mapping[str, Tensor]) -> dict[str, Any]:
        """A config for transformers.

        beside    the config.json in the file's folder, or {}
        factors   those of the tensors FACTORS that the file holds
        """
        if not beside.keys() & {"hidden_size", gpt2.FIELDS["hidden_size"]}:
            self._refuse_unknown()
        kind = _MODEL_TYPES.get(str(self.architecture), self.architecture)
        config = {"model_type": kind, **self._sizes(), **self._flags()}
        self._refuse_other(beside, config)
        rotates = self.architecture != "gpt2"
        if rotates and not beside.keys() & {"rope_theta", "rope_scaling", "rope_parameters"}:
            config["rope_parameters"] = self._rope_by_kind(factors)
        config |= beside
        # Whatever a config says: if the file holds a head, it is used.
        config["tie_word_embeddings"] = "output.weight" not in self.shapes
        if rotates:
            self._check_rope(config, factors)
        return config

    def _sizes(self) -> dict[str, Any]:
        arch, width = self.architecture, self._natural("embedding_length")
        sizes: dict[str, Any] = {
            "vocab_size": self.shapes["token_embd.weight"][0],
            "max_position_embeddings": self._natural("context_length"),
            "hidden_size": width,
            "num_hidden_layers": self._natural("block_count"),
            "intermediate_size": self._natural("feed_forward_length"),
            "num_attention_heads": self.heads,
        }
        if arch == "gpt2":
            own = {gpt2.FIELDS.get(key, key): value for key, value in sizes.items()}
            return own | {"layer_norm_epsilon": self._float("attention.layer_norm_epsilon")}
        sizes |= {
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self._float("attention.layer_norm_rms_epsilon"),
        }
        if self._natural("attention.value_length", self.head_dim) != self.head_dim:
            self._refuse("attention.value_length", f"{self.head_dim}, as attention.key_length")
        if arch in _WINDOWED and self._key("attention.sliding_window") in self.metadata:
            sizes["sliding_window"] = self._natural("attention.sliding_window")
        if arch == "phi3":
            context = self._natural("rope.scaling.original_context_length", sizes["max_position_embeddings"])
            sizes["original_max_position_embeddings"] = context
        if arch == "gemma2":
            sizes["attn_logit_softcapping"] = self._float("attn_logit_softcapping", 50.0)
            sizes["final_logit_softcapping"] = self._float("final_logit_softcapping", 30.0)
        if arch in GEMMAS:
            sizes["query_pre_attn_scalar"] = scale_of(arch, sizes, self.head_dim)
        return sizes

    def _flags(self) -> dict[str, Any]:
        """What follows from the presence of tensors, and the activation, which follows from the architecture."""
        flags: dict[str, Any] = {"hidden_act": "silu"}
        if self.architecture in GEMMAS:
            flags = {"hidden_activation": "gelu_pytorch_tanh"}
        if self.architecture == "gpt2":
            flags = {"activation_function": gpt2.ACTIVATION}
        for name in ("bos", "eos", "pad"):  # the defaults of transformers' class may lie outside the vocabulary
            key = f"tokenizer.ggml.{'padding' if name == 'pad' else name}_token_id"
            flags[f"{name}_token_id"] = self.metadata.get(key)
        if self.architecture in ("llama", "qwen3"):
            flags["attention_bias"] = "blk.0.attn_q.bias" in self.shapes
        if self.architecture == "llama":
            flags["mlp_bias"] = "blk.0.ffn_up.bias" in self.shapes
        return flags

    # -- rope ------------------------------------------------------------------------------------------
    def _rope_by_kind(self, factors: Mapping[str, Tensor]) -> dict[str, Any]:
        """rope_parameters, in Gemma 3 of blocks with and without a window."""
        rope = self._rope(factors)
        if self.architecture != "gemma3":
            return rope
        if self._float("rope.freq_base_swa", LOCAL_THETA) != LOCAL_THETA:
            self._refuse("rope.freq_base_swa", str(LOCAL_THETA))
        local = {"rope_type": "default", "rope_theta": LOCAL_THETA}
        return {"full_attention": rope, "sliding_attention": local}

    def _rope(self, factors: Mapping[str, Tensor]) -> dict[str, Any]:
        """rope_parameters from the metadata. For the scalings of Llama 3 and Phi-3 the file holds only the factors."""
        theta = self._float("rope.freq_base", 10000.0)
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
        kind, factor = self.metadata.get(self._key("rope.scaling.type"), "none"), self._float("rope.scale_linear", 1.0)
        if kind == "linear":
            factor = self._float("rope.scaling.factor")
        elif kind != "none":
            self._refuse("rope.scaling.type", "none or linear")
        if factor != 1:
            rope |= {"rope_type": "linear", "factor": factor}
        rotated = self._natural("rope.dimension_count", self.head_dim)
        if rotated != self.head_dim:
            if self.architecture != "phi3" or rotated > self.head_dim:
                self._refuse("rope.dimension_count", str(self.head_dim))
            rope["partial_rotary_factor"] = rotated / self.head_dim
        if factors.keys() >= {LONG, SHORT}:
            rope |= {"rope_type": "longrope", "long_factor": factors[LONG].tolist()}
            rope |= {"short_factor": factors[SHORT].tolist()}
            rope["original_max_position_embeddings"] = self._natural("rope.scaling.original_context_length")
            if self._key("rope.scaling.attn_factor") in self.metadata:
                rope["attention_factor"] = self._float("rope.scaling.attn_factor")
        return self._llama3(rope, factors[FREQS]) if FREQS in factors else rope

    def _llama3(self, rope: dict[str, Any], stored: Tensor) -> dict[str, Any]:
        """The scaling of Llama 3.1 and later, recovered from its factors.

        low_freq_factor and high_freq_factor are 1 and 4 in all of these models. Any frequency f between the two
        wavelengths then gives the original context: 1 / stored = (1 - s) / factor + s with
        s = (context f / 2 pi - low) / (high - low).
        """
        factor, low, high = float(stored.max()), 1.0, 4.0
        between = (stored > 1.001) & (stored < factor * 0.999)
        if rope["rope_type"] == "default" and len(stored) == self.head_dim // 2 and bool(between.any()):
            i = int(between.nonzero()[0, 0])
            smooth = (1 / float(stored[i]) - 1 / factor) / (1 - 1 / factor)
            frequency = rope["rope_theta"] ** (-2 * i / self.head_dim)
            context = round(2 * math.pi / frequency * (low + smooth * (high - low)))
            return rope | {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": context,
            }
        return rope  # `_check_rope` refuses it, unless all factors are 1

    def _check_rope(self, config: Mapping[str, Any], factors: Mapping[str, Tensor]) -> None:
        """SourceError unless rope's base and factors in the file are those of the config. Missing factors are 1."""
        given = [config[key] for key in ("rope_scaling", "rope_parameters") if isinstance(config.get(key), dict)]
        rope = {"rope_theta": config.get("rope_theta", 10000.0)}
        rope |= {k: v for part in given for k, v in full_rope(part).items()}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        wanted: dict[str, Tensor] = {}
        try:
            if not math.isclose(rope["rope_theta"], theirs := self._float("rope.freq_base", 10000.0), rel_tol=1e-6):
                raise ValueError(f"a base of {rope['rope_theta']}, {theirs} by the GGUF file")
            if kind == "llama3":
                wanted[FREQS] = llama3_factors(rope, self.head_dim)
            if kind == "longrope":
                wanted = {LONG: torch.tensor(rope["long_factor"]), SHORT: torch.tensor(rope["short_factor"])}
        except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise SourceError(f"{self.where}: config.json", f"rope of type {str(kind)[:40]!r} ({error})") from None
        for name in sorted(wanted.keys() | factors.keys()):
            mine = wanted[name] if name in wanted else torch.ones_like(factors[name])
            found = factors[name] if name in factors else torch.ones_like(mine)
            if found.shape != mine.shape or not torch.allclose(found, mine, rtol=1e-4):
                raise SourceError(
                    f"{self.where}: {name}",
                    "divides the frequencies of rope by other factors" if name in factors else "is missing",
                    expected=f"those of rope type {str(kind)[:40]!r}",
                    remedy=_REMEDY,
                )

    # -- single entries --------------------------------------------------------------------------------
    def _refuse_other(self, beside: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """SourceError if the config.json in the file's folder belongs to another model."""
        kind = beside.get("model_type", config["model_type"])
        if ARCHITECTURES.get(kind) != self.architecture:
            raise SourceError(
                f"{self.where}: config.json", f"model type {str(kind)[:40]!r}", expected=f"one of {self.architecture}"
            )
        # Where transformers has a sliding window, the file names a shorter context: these keys may differ.
        for key in config.keys() & beside.keys() - {"model_type", "max_position_embeddings", "sliding_window"}:
            numbers = [value for value in (config[key], beside[key]) if isinstance(value, int | float)]
            if len(numbers) == 2 and not key.endswith("_id") and not math.isclose(*numbers, rel_tol=1e-6):
                raise SourceError(
                    f"{self.where}: config.json",
                    f"{key} {numbers[1]}",
                    expected=f"{numbers[0]}, as the GGUF file says",
                    remedy="it belongs to another model",
                )

    def _refuse_unknown(self) -> None:
        own = {key.partition(".")[2] for key in self.metadata if key.startswith(f"{self.architecture}.")}
        known = gpt2.KEYS if self.architecture == "gpt2" else _KNOWN
        windowed = {"attention.sliding_window"} if self.architecture in _WINDOWED else set()
        windowed |= {"rope.freq_base_swa"} if self.architecture == "gemma3" else set()
        longrope = {"rope.scaling.attn_factor"} if LONG in self.shapes else set()
        if unknown := sorted(own - known - windowed - longrope):
            idle = ("expert_count", "expert_used_count")
            if odd := [key for key in unknown if key not in idle or self.metadata[self._key(key)] != 0]:
                self._refuse(odd[0], "keys that are known here")

    def _key(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def _natural(self, key: str, default: int | None = None) -> int:
        value: Any = self.metadata.get(self._key(key), default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # one value for each block
        if type(value) is not int or not 0 < value < 2**40:
            self._refuse(key, "a number above 0")
        return int(value)

    def _float(self, key: str, default: float | None = None) -> float:
        value = self.metadata.get(self._key(key), default)
        if type(value) is not float or not math.isfinite(value) or value <= 0:
            self._refuse(key, "a number above 0")
        return float(value)

    def _refuse(self, key: str, expected: str) -> NoReturn:
        got = str(self.metadata.get(self._key(key)))[:60]
        raise SourceError(f"{self.where}: {self._key(key)}", got, expected=expected, remedy=_REMEDY)

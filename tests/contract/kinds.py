"""What sort of model a type is, by its mappings, its config and its modules. For the tables; llmquant never asks."""

import re

from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from contract.build import AUTO, meta_model, type_of

KINDS = ("dense", "MoE", "hybrid", "hybrid MoE", "multimodal", "odd", "encoder")
# Decoders that generate no text from text alone: they belong to an encoder or a codec.
_HALVES = ("bert-generation", "moshi", "musicgen", "musicgen_melody", "trocr", "whisper")
_TEXT_ONLY = ("mistral4",)  # which the mapping of image-text-to-text has, too
_TOWERS = {name for auto, names in AUTO.items() if auto is not AutoModelForCausalLM for name in names} - {*_TEXT_ONLY}
_ENCODERS = (
    *modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    *(set(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES) - _TOWERS),
    *_HALVES,
)
# Not one next token from those before: two streams, prompts of their own, bytes, drafts for another model, diffusion.
_ODD = ("blt", "cpmant", "diffusion_gemma", "gemma4_assistant", "gemma4_unified_assistant", "pi0", "xlnet")
_EXPERTS = re.compile("(Experts|MoE|MOE|Moe|MoeBlock|MoEBlock|Router)$")
_STATE = re.compile("Mamba|SSM|DeltaNet|DeltaAttention|Rwkv|Recurrent|ShortConv|Lightning|LinearAttention|xLSTM")


def kind_of(name: str) -> str:
    """One of KINDS; "unknown" where that takes the modules and the type cannot be built."""
    base = type_of(name)
    if base in _ODD:
        return "odd"
    if base in _ENCODERS or getattr(CONFIG_MAPPING[base], "is_encoder_decoder", False):
        return "encoder"
    if base in _TOWERS and not name.endswith(":text"):
        return "multimodal"
    try:
        modules = list(meta_model(name).modules())
    except Exception:
        return "unknown"
    classes = {type(module).__name__ for module in modules}
    experts = any(_EXPERTS.search(one) for one in classes)
    stateful = any(_STATE.search(one) for one in classes) or any(isinstance(module, nn.Conv1d) for module in modules)
    return " ".join(word for word, there in (("hybrid", stateful), ("MoE", experts)) if there) or "dense"

"""Checkpoints as people upload them: the same model under other names, with more in it than the class knows.

Each is a base name of `build.py` and what is done to its tensors or its config. Stock transformers opens all of them.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from contract.build import add_tokenizer, build
from contract.reference import config, tensors
from contract.sizes import VOCABULARY

Tensors = dict[str, Tensor]
DEPTH = 3  # of the bases


@dataclass(frozen=True)
class Upload:
    """`base` with its tensors and its config changed, in `shards` files with the tensors dealt out like cards."""

    base: str
    change: Callable[[Tensors], Tensors] = dict
    settings: Mapping[str, Any] | None = None  # None: the field is taken out
    shards: int = 1

    def make(self, name: str, folder: Path) -> Path:
        base = build(self.base, folder.with_name("base"))
        stored = config(base) | dict(self.settings or {})
        folder.mkdir(parents=True)
        add_tokenizer(folder)
        kept = {key: value for key, value in stored.items() if value is not None or key not in (self.settings or {})}
        (folder / "config.json").write_text(json.dumps(kept), "utf-8")
        write(self.change(tensors(base)), folder, self.shards)
        return folder


def write(stored: Tensors, folder: Path, shards: int) -> None:
    """One file, or so many with an index: tensor n is in file n mod `shards`."""
    own = {name: tensor.contiguous().clone() for name, tensor in sorted(stored.items())}
    if shards == 1:
        save_file(own, folder / "model.safetensors", {"format": "pt"})
        return
    place = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(own)}
    for file in sorted(set(place.values())):
        save_file({name: own[name] for name in own if place[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}), "utf-8")


def renamed(*pairs: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    """Every name with the first pattern that it begins with replaced."""

    def change(stored: Tensors) -> Tensors:
        def new(name: str) -> str:
            return next((re.sub(f"^{old}", by, name) for old, by in pairs if re.match(old, name)), name)

        return {new(name): tensor for name, tensor in stored.items()}

    return change


def copied(old: str, new: str, **more: Callable[[], Tensor]) -> Callable[[Tensors], Tensors]:
    """The tensors whose names begin with `old` once more, beginning with `new`; and `more` beside them."""

    def change(stored: Tensors) -> Tensors:
        twice = {new + name.removeprefix(old): tensor for name, tensor in stored.items() if name.startswith(old)}
        return stored | twice | {f"{new}{leaf}.weight": make() for leaf, make in more.items()}

    return change


def fused(stored: Tensors) -> Tensors:
    """All experts of a layer in two tensors, as the model has them: [E, gate and up, I] and [E, O, down]."""
    kept, experts = {}, dict[str, dict[tuple[int, str], Tensor]]()
    for name, tensor in stored.items():
        if match := re.fullmatch(r"(.+\.experts)\.(\d+)\.(\w+)\.weight", name):
            experts.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
        else:
            kept[name] = tensor
    for base, parts in experts.items():
        numbers = sorted({number for number, _ in parts})
        pairs = [torch.cat([parts[number, "gate_proj"], parts[number, "up_proj"]]) for number in numbers]
        kept[f"{base}.gate_up_proj"] = torch.stack(pairs)
        kept[f"{base}.down_proj"] = torch.stack([parts[number, "down_proj"] for number in numbers])
    return kept


def without_head(stored: Tensors) -> Tensors:
    return {name: tensor for name, tensor in stored.items() if name != "lm_head.weight"}


def tied_head(stored: Tensors) -> Tensors:
    return stored | {"lm_head.weight": stored["model.embed_tokens.weight"]}


def other_head(stored: Tensors) -> Tensors:
    return stored | {"lm_head.weight": _random(VOCABULARY, 128)}


def with_buffers(stored: Tensors) -> Tensors:
    """What old versions of transformers saved, too."""
    layers = [f"model.layers.{i}.self_attn" for i in range(DEPTH)]
    tables = {f"{layer}.rotary_emb.inv_freq": torch.arange(16).float() for layer in layers}
    return stored | tables | {f"{layers[0]}.masked_bias": torch.tensor(-1e4)}


def in_dtype(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda stored: {name: tensor.to(dtype) for name, tensor in stored.items()}


def padded(stored: Tensors) -> Tensors:
    """64 rows of the vocabulary that the tokenizer does not know."""
    rows = {
        name: torch.cat([stored[name], _random(64, 128)]) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    return stored | rows


def _random(*shape: int) -> Tensor:
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    return (noise / shape[-1] ** 0.5).to(torch.bfloat16)


_JOIN = {"eh_proj": lambda: _random(128, 256)}  # of an MTP head: the hidden state and the next token's embedding
_OLD_ROPE = {"rope_parameters": None, "rope_theta": 5000.0}
# The names of conditional classes before transformers 4.52.
_OLD_LLAVA = renamed(
    (r"model\.language_model\.", "language_model.model."),
    (r"model\.vision_tower\.", "vision_tower."),
    (r"model\.multi_modal_projector", "multi_modal_projector"),
    (r"lm_head", "language_model.lm_head"),
)
UPLOADS: dict[str, Upload] = {
    "llama+buffers": Upload("llama", with_buffers),
    "llama+bare_names": Upload("llama", renamed((r"model\.", ""))),
    "llama+tied_head_stored": Upload("llama", tied_head, {"tie_word_embeddings": True}),
    "llama+tied_other_head": Upload("llama", other_head, {"tie_word_embeddings": True}),
    "llama+tied_without_head": Upload("llama", without_head, {"tie_word_embeddings": True}),
    "llama+torch_dtype": Upload("llama", settings={"dtype": None, "torch_dtype": "bfloat16"}),
    "llama+float16": Upload("llama", in_dtype(torch.float16), {"dtype": "float16"}),
    "llama+float32": Upload("llama", in_dtype(torch.float32), {"dtype": "float32"}),
    "llama+linear_rope": Upload("llama", settings=_OLD_ROPE | {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama+padded_vocabulary": Upload("llama", padded, {"vocab_size": VOCABULARY + 64}),
    "llama+more_layers": Upload("llama", copied("model.layers.0.", f"model.layers.{DEPTH}.", **_JOIN)),
    "llama+fewer_layers": Upload("llama", settings={"num_hidden_layers": 2}),
    "llama+shards": Upload("llama", shards=3),
    "qwen3+mtp": Upload("qwen3", copied("model.layers.0.", "mtp.layers.0.", **_JOIN)),
    "gemma3+old_names": Upload("gemma3", _OLD_LLAVA),
    "llava+old_names": Upload("llava", _OLD_LLAVA),
    "qwen3_5+mtp": Upload("qwen3_5", copied("model.language_model.layers.0.", "mtp.layers.0.", **_JOIN)),
    "qwen3_5_moe+mtp": Upload("qwen3_5_moe", copied("model.language_model.layers.0.", "mtp.layers.0.", **_JOIN)),
    "qwen3_5_moe+fused": Upload("qwen3_5_moe", fused),
    "qwen3_moe+fused": Upload("qwen3_moe", fused),
    "deepseek_v3+mtp": Upload("deepseek_v3", copied("model.layers.1.", f"model.layers.{DEPTH}.", **_JOIN)),
    "mixtral+shards": Upload("mixtral", shards=5),
    "qwen3_moe+shards": Upload("qwen3_moe", shards=5),
}

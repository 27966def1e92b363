"""The judge: stock transformers, and a dequantized copy of an output that shares no code with llmquant.

`dequantized` unpacks every `weight_packed` by the definition of the format (pack-quantized: 4-bit codes plus 8, eight
in an int32, lowest first; one scale per group) and writes a dense checkpoint with the original's config. Stock
transformers opens it by the same rules as the original, whatever the names mean to llmquant.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from contract.build import AUTO, quiet

PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys")


@dataclass(frozen=True)
class Stock:
    """A checkpoint as transformers opens it: the model, and the keys that it misses or does not know."""

    model: Any
    problems: dict[str, set[str]]

    def parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """[n, T, V] in float32 of ids [n, T]."""
        with quiet():
            return torch.as_tensor(self.model(input_ids=ids, use_cache=False).logits).float()


def config(folder: Path) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return stored


def class_of(folder: Path) -> Any:
    """The class that `architectures` names; else the Auto class that knows the type."""
    stored = config(folder)
    named = getattr(transformers, (stored.get("architectures") or [""])[0], None)
    return named or next(auto for auto, names in AUTO.items() if stored["model_type"] in names)


def other_class(folder: Path) -> Any:
    """AutoModelForCausalLM, where it opens the folder by another class than `architectures` names."""
    causal = AUTO[transformers.AutoModelForCausalLM].get(config(folder)["model_type"])
    return None if causal in (None, class_of(folder).__name__) else transformers.AutoModelForCausalLM


def stock(folder: Path, opener: Any = None) -> Stock:
    """The checkpoint in float32; experts, too, which stock leaves in the bf16 that it made of packed ones."""
    with quiet():
        model, info = (opener or class_of(folder)).from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    for parameter in model.parameters():
        if parameter.ndim == 3 and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return Stock(model.eval(), {kind: {str(key) for key in info[kind]} for kind in PROBLEMS})


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def unpack(packed: Tensor, scales: Tensor, shape: Tensor) -> Tensor:
    """The float32 weight [O, I] of int32 words [O, ceil(I / 8)] and scales [O, groups].

    >>> word = torch.tensor([[0x7FFFFF98]], dtype=torch.int32)  # codes 0, 1, 7, 7, 7, 7, 7, -1
    >>> unpack(word, torch.tensor([[0.5, 2.0]]), torch.tensor([1, 8])).tolist()
    [[0.0, 0.5, 3.5, 3.5, 14.0, 14.0, 14.0, -2.0]]
    """
    rows, columns = (int(size) for size in shape)
    nibbles = (packed.to(torch.int64)[..., None] >> torch.arange(0, 32, 4)) & 15
    codes = nibbles.reshape(rows, -1)[:, :columns] - 8
    return codes * scales.float().repeat_interleave(columns // scales.shape[1], dim=1)


def dequantized(out: Path, source: Path, folder: Path) -> Path:
    """Write the output as a dense float32 checkpoint into `folder`.

    Stock makes packed experts dense while it loads them, and every linear where the config says `dequantize`: in the
    dtype of the scales, bf16 as a rule. So does the reference.
    """
    stored, dense = tensors(out), {}
    all_rounded = config(out)["quantization_config"].get("dequantize", False)
    for name, tensor in stored.items():
        base, _, leaf = name.rpartition(".")
        if leaf == "weight_packed":
            scales = stored[f"{base}.weight_scale"]
            weight = unpack(tensor, scales, stored[f"{base}.weight_shape"])
            rounded = all_rounded or ".experts." in name
            dense[f"{base}.weight"] = weight.to(scales.dtype).float() if rounded else weight
        elif leaf not in ("weight_scale", "weight_shape") or f"{base}.weight_packed" not in stored:
            dense[name] = tensor.float() if tensor.is_floating_point() else tensor
    folder.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in dense.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    for file in source.glob("*.json"):
        if "safetensors" not in file.name:
            shutil.copy(file, folder / file.name)
    return folder


def filled(out: Path, source: Path, folder: Path, opener: Any = None) -> Stock:
    """An output whose single experts transformers has no rule for: its fused parameters, put together here."""
    shutil.rmtree(folder, ignore_errors=True)
    stored, original = load_file(dequantized(out, source, folder) / "model.safetensors"), tensors(source)
    single = {name: tensor for name, tensor in stored.items() if name not in original}
    rest = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in original.items()}
    save_file(rest | {name: stored[name] for name in stored.keys() - single.keys()}, folder / "model.safetensors")
    opened = stock(folder, opener)
    for owner in {found[1] for name in single if (found := re.match(r"(.*?)\.\d+(\.\w+)?\.(weight|bias)$", name))}:
        named = dict(opened.model.named_modules())
        module = named.get(owner) or named[owner.removeprefix("language_model.")]  # by the text's own class
        for leaf, parameter in module.named_parameters(recurse=False):
            parameter.data = torch.stack([_expert(module, leaf, n, owner, single) for n in range(len(parameter))])
    return opened


def _expert(module: Any, leaf: str, number: int, owner: str, single: dict[str, Tensor]) -> Tensor:
    """The entry of expert `number` in the fused parameter `leaf`."""
    projection, kind = leaf.removesuffix("_bias"), "bias" if leaf.endswith("_bias") else "weight"
    if projection == "weight":
        return single[f"{owner}.{number}.weight"]
    names = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
    parts = [single[f"{owner}.{number}.{name}.{kind}"] for name in names]
    interleaved = len(parts) > 1 and not getattr(module, "is_concatenated", True)
    rows = torch.stack(parts, 1).flatten(0, 1) if interleaved else torch.cat(parts)
    transposed = getattr(module, "is_transposed", type(module).__name__ == "Llama4TextExperts")
    return rows.T.contiguous() if transposed and kind == "weight" else rows


def divergence(reference: Tensor, other: Tensor) -> float:
    """Mean KL(reference || other) in nats over all tokens that a window predicts."""
    p, q = (logits[:, :-1].double().log_softmax(-1) for logits in (reference, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def perplexity(logits: Tensor, ids: Tensor) -> float:
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())
    return float(loss.exp())

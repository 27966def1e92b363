"""Weights stored as small floats, FP8 and MXFP4, read as dense ones.

Many models are published in FP8 only. A run can start from such a checkpoint: each tensor is made dense when it is
read, so no 16-bit copy of the model is needed.

    FP8     w[o, i] = q[o, i] s[o // a, i // b]
            q is e4m3 or e5m2; s is a float, or a byte e that stands for 2^(e - 127). A block of a x b weights shares s:
            the whole tensor, a row, a group of a row, or 128 x 128 (DeepSeek, Qwen3-FP8).
    MXFP4   w[.., 32 g + j] = e2m1(nibble j of block g) 2^(e[.., g] - 127)
            The low nibble of a byte comes first.

The product is computed in float32 and rounded once to the dtype that the config names, as the published converters do.

Sources: DeepSeek-V3's fp8_cast_bf16.py; OCP Microscaling Formats (MX) 1.0; compressed-tensors' naive and mxfp4.

Shapes: O out_features, I in_features, E experts, G groups in a row.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import SourceError
from llmquant.source.header import TensorInfo
from llmquant.source.layouts import PackedLinear, Read, Tensors

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = ("weight_scale_inv", "weight_scale")
_OF_ACTIVATIONS = ("input_scale", "input_zero_point", "activation_scale")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
_MX = 32  # numbers that share an exponent


def _dense_dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype that config.json names for the model; bfloat16 where it names none."""
    nested = config.get("text_config")
    for place in (config, nested if isinstance(nested, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if place.get(key) in _DTYPES:
                return _DTYPES[place[key]]
    return torch.bfloat16


def fp8(tensors: Tensors, config: dict[str, Any], read: Read) -> dict[str, PackedLinear]:
    """Every FP8 weight, with its scale.

    Block sizes follow from the scale's shape, or from the config where the last blocks of a matrix are cut short.
    SourceError for FP8 without a scale, and for scales that fit no blocks.
    """
    found = {}
    for name, info in tensors.items():
        if info.dtype not in _FP8:
            continue
        stem, _, leaf = name.rpartition(".")
        beside = [f"{stem}.{part}" for part in _SCALES if f"{stem}.{part}" in tensors]
        if f"{stem}.weight_zero_point" in tensors:
            raise SourceError(name, "FP8 with zero points", remedy="name the 16-bit checkpoint")
        if leaf != "weight" or len(info.shape) != 2 or len(beside) != 1:
            raise SourceError(
                name,
                f"{_short(info.dtype)} {list(info.shape)} with {len(beside)} scales",
                expected="a matrix `weight` with weight_scale_inv or weight_scale beside it",
                remedy="name the 16-bit checkpoint",
            )
        shape, scale = (info.shape[0], info.shape[1]), tensors[beside[0]]
        block = _block(shape, scale, _configured_block(config))
        unused = tuple(f"{stem}.{part}" for part in _OF_ACTIVATIONS if f"{stem}.{part}" in tensors)
        parts, dtype = (name, scale.name, *unused), _dense_dtype(config)
        form = f"{_short(info.dtype)}, {_block_name(block, shape)}"
        found[name] = PackedLinear(
            stem, shape, dtype, 0, 0, True, parts, None, _fp8_reader(name, scale.name, block, dtype), form
        )
    if not found:
        raise SourceError("quantization_config", "no tensor is stored in FP8", remedy="name the 16-bit checkpoint")
    return found


def _fp8_reader(weight: str, scale: str, block: tuple[int, int], dtype: torch.dtype) -> Callable[[Read], Tensor]:
    def dense(read: Read) -> Tensor:
        weight_OI = read(weight).float()
        scales = _scale_values(read(scale)).reshape(-(-weight_OI.shape[0] // block[0]), -1)
        rows = scales.repeat_interleave(block[0], dim=0)[: weight_OI.shape[0]]
        for group in range(scales.shape[1]):  # column by column, so that no second matrix of the weight's size is made
            columns = slice(group * block[1], (group + 1) * block[1])
            weight_OI[:, columns] *= rows[:, group, None]
        return weight_OI.to(dtype)

    return dense


def _scale_values(stored: Tensor) -> Tensor:
    if stored.dtype == torch.uint8:
        return _power(stored)
    return stored.float()


def _power(exponents: Tensor) -> Tensor:
    """2^(e - 127), exact; 255 stands for NaN.

    >>> _power(torch.tensor([127, 128], dtype=torch.uint8)).tolist()
    [1.0, 2.0]
    """
    return exponents.view(torch.float8_e8m0fnu).float()


def _configured_block(config: dict[str, Any]) -> tuple[int, int] | None:
    quantization = config["quantization_config"]
    size = quantization.get("weight_block_size")
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        size = size or ((group or {}).get("weights") or {}).get("block_structure")
    if isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size):
        return size[0], size[1]
    return None


def _block(shape: tuple[int, int], scale: TensorInfo, configured: tuple[int, int] | None) -> tuple[int, int]:
    """(rows, columns) of a block that shares a scale."""
    given = scale.shape if len(scale.shape) == 2 else (scale.numel, 1)
    block = []
    for size, count, wanted in zip(shape, given, configured or (0, 0), strict=True):
        if wanted and count == -(-size // wanted):
            block.append(wanted)
        elif count > 0 and size % count == 0:
            block.append(size // count)
        else:
            raise SourceError(scale.name, f"shape {list(scale.shape)}", expected=f"blocks of a weight of {list(shape)}")
    if len(scale.shape) > 2 or (scale.dtype != torch.uint8 and not scale.dtype.is_floating_point):
        raise SourceError(scale.name, f"{_short(scale.dtype)} {list(scale.shape)}", expected="a matrix of floats")
    return block[0], block[1]


def _block_name(block: tuple[int, int], shape: tuple[int, int]) -> str:
    if block[0] >= shape[0] and block[1] >= shape[1]:
        return "one scale"
    if block[0] == 1:
        return "by row" if block[1] >= shape[1] else f"groups of {block[1]}"
    return f"blocks of {block[0]} x {block[1]}"


def mxfp4(tensors: Tensors, config: dict[str, Any], read: Read) -> dict[str, PackedLinear]:
    """gpt-oss: bytes `X_blocks` [E, O, G, 16] and `X_scales` [E, O, G] are the parameter X [E, 32 G, O]."""
    found = {}
    for name, blocks in tensors.items():
        stem, _, leaf = name.rpartition("_")
        if leaf != "blocks" or blocks.dtype != torch.uint8:
            continue
        scales = tensors.get(f"{stem}_scales")
        fits = len(blocks.shape) == 4 and blocks.shape[-1] == _MX // 2
        if scales is None or scales.dtype != torch.uint8 or scales.shape != blocks.shape[:-1] or not fits:
            got = "no scales" if scales is None else f"scales {list(scales.shape)}"
            raise SourceError(
                stem, f"blocks {list(blocks.shape)}, {got}", expected="[E, O, G, 16] with scales [E, O, G]"
            )
        experts, rows, groups, _ = blocks.shape
        dtype = _dense_dtype(config)

        def dense(read: Read, stem: str = stem, dtype: torch.dtype = dtype) -> Tensor:
            blocks, scales = read(f"{stem}_blocks"), read(f"{stem}_scales")
            one_by_one = (_e2m1(*pair).to(dtype).T for pair in zip(blocks.flatten(2), scales, strict=True))
            return torch.stack(list(one_by_one))

        parts = (name, scales.name)
        found[stem] = PackedLinear(
            stem, (experts, groups * _MX, rows), dtype, 0, 0, True, parts, None, dense, "e2m1, groups of 32"
        )
    if not found:
        raise SourceError("quantization_config", "no tensor is stored in MXFP4", remedy="name the 16-bit checkpoint")
    return found


def mxfp4_linears(tensors: Tensors, config: dict[str, Any], read: Read) -> dict[str, PackedLinear]:
    """compressed-tensors: bytes weight_packed [O, I / 2] and weight_scale [O, I / 32] are the weight [O, I]."""
    found = {}
    for name, packed in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if leaf != "weight_packed":
            continue
        scale = tensors.get(f"{stem}.weight_scale")
        fits = len(packed.shape) == 2 and packed.dtype == torch.uint8 and packed.shape[1] % (_MX // 2) == 0
        if scale is None or not fits or scale.dtype != torch.uint8:
            raise SourceError(stem, "no bytes of e2m1 with exponents", expected="weight_packed and weight_scale, uint8")
        shape, dtype = (packed.shape[0], 2 * packed.shape[1]), _dense_dtype(config)
        if scale.shape != (shape[0], shape[1] // _MX):
            raise SourceError(scale.name, f"shape {list(scale.shape)}", expected=f"groups of {_MX} of {list(shape)}")

        def dense(read: Read, stem: str = stem, dtype: torch.dtype = dtype) -> Tensor:
            return _e2m1(read(f"{stem}.weight_packed"), read(f"{stem}.weight_scale")).to(dtype)

        unused = tuple(f"{stem}.{part}" for part in ("input_global_scale",) if f"{stem}.{part}" in tensors)
        found[f"{stem}.weight"] = PackedLinear(
            stem, shape, dtype, 0, 0, True, (name, scale.name, *unused), None, dense, "e2m1, groups of 32"
        )
    if not found:
        raise SourceError("quantization_config", "no tensor is stored in MXFP4", remedy="name the 16-bit checkpoint")
    return found


def _e2m1(octets_OB: Tensor, exponents_OG: Tensor) -> Tensor:
    """Bytes [O, B] and exponents [O, G] -> numbers [O, 2 B], float32."""
    codes = torch.stack([octets_OB & 15, octets_OB >> 4], dim=-1).view(*exponents_OG.shape, _MX)
    values: Tensor = _E2M1[codes.int()].mul_(_power(exponents_OG)[..., None])
    return values.view(octets_OB.shape[0], -1)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# By quant_method; for compressed-tensors, by quant_method and format.
SMALL_FLOATS: dict[str, Callable[[Tensors, dict[str, Any], Read], dict[str, PackedLinear]]] = {
    "fp8": fp8,
    "mxfp4": mxfp4,
    "compressed-tensors float-quantized": fp8,
    "compressed-tensors naive-quantized": fp8,
    "compressed-tensors mxfp4-pack-quantized": mxfp4_linears,
}

"""Where a model runs and in which precision: device, compute dtype, precision of products."""

import torch

from llmquant.errors import RecipeError, option
from llmquant.source.base import Source


def pick_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise RecipeError(
                option("device"),
                f"{device}, but this torch sees no GPU",
                remedy=f"use {option('device')} cpu or a CUDA build of torch",
            )
        if (torch.device(device).index or 0) >= torch.cuda.device_count():
            raise RecipeError(
                option("device"),
                f"{device}, but there are {torch.cuda.device_count()} GPUs",
                expected=f"an index below {torch.cuda.device_count()}",
            )
    return torch.device(device)


def pick_dtype(dtype: str, device: torch.device, source: Source) -> torch.dtype:
    """float32 on the CPU; on a GPU the dtype of the checkpoint's largest tensor, where torch computes in it."""
    if dtype != "auto":
        picked: torch.dtype = getattr(torch, dtype)
        return picked
    largest = max(source.tensors.values(), key=lambda info: info.nbytes, default=None)
    if device.type == "cpu" or largest is None or largest.dtype not in (torch.bfloat16, torch.float16):
        return torch.float32
    return largest.dtype


def pick_products(choice: str, device: torch.device, dtype: torch.dtype, bits: int) -> torch.dtype:
    """auto: bfloat16 below 8 bits on a CPU that multiplies it natively, else the compute dtype.

    The streams of hidden states stay in the compute dtype. At 8 bits the rounding of the products is no longer small
    against that of the weights.
    """
    if device.type != "cpu" or dtype != torch.float32:
        if choice == "auto":
            return dtype
        if getattr(torch, choice) != dtype:
            raise RecipeError(
                option("products"), choice, expected=f"auto, with {option('dtype')} {str(dtype).removeprefix('torch.')}"
            )
    if choice == "auto":
        if bits >= 8:
            return dtype
        has = torch.cpu.get_capabilities()
        return torch.bfloat16 if any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else torch.float32
    picked: torch.dtype = getattr(torch, choice)
    return picked

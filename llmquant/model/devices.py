"""Where a model runs and in which precision: device, compute dtype, precision of products."""

import torch

from llmquant.errors import RecipeError, option
from llmquant.source.base import Source


def pick_device(name: str) -> torch.device:
    """The device of a name: auto, cpu, or any type that this torch computes on, with an index or without.

    auto is the machine's accelerator, whichever that is, else the CPU. RecipeError names what there is instead.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    here = f"auto, cpu or {accelerator.type}" if accelerator is not None else "auto or cpu, which is all there is here"
    try:
        device = torch.device(name)
        module = torch.get_device_module(device)  # there is none for meta, which holds no numbers
    except RuntimeError:
        raise RecipeError(option("device"), repr(name), expected=here) from None
    count = module.device_count() if module.is_available() else 0
    if not count:
        raise RecipeError(
            option("device"), f"{name}, but this torch sees no GPU or other device of that type", expected=here
        )
    if (device.index or 0) >= count:
        raise RecipeError(option("device"), f"{name}, of {count} there are", expected=f"an index below {count}")
    return torch.device("cpu") if device.type == "cpu" else device


def pick_dtype(dtype: str, device: torch.device, source: Source) -> torch.dtype:
    """float32 on the CPU; on an accelerator the dtype of the checkpoint's largest tensor, if that is 16 bits wide."""
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


def device_memory(device: torch.device) -> int | None:
    """Bytes of an accelerator's memory, where torch tells them."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None

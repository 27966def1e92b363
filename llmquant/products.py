"""The precision of products that allow it: forwards of calibration text and Hessians.

Never the solver, never the evaluation.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from llmquant.errors import RecipeError


def pick_products(choice: str, device: torch.device, dtype: torch.dtype, bits: int) -> torch.dtype:
    """auto: bfloat16 below 8 bits on a CPU that multiplies it natively, else the compute dtype.

    The streams of hidden states stay in the compute dtype. At 8 bits the rounding of the products is no longer small
    beside that of the weights.
    """
    if device.type != "cpu" or dtype != torch.float32:
        if choice == "auto":
            return dtype
        if getattr(torch, choice) != dtype:
            raise RecipeError("--products", choice, expected=f"auto, with --dtype {str(dtype).removeprefix('torch.')}")
    if choice == "auto":
        if bits >= 8:
            return dtype
        has = torch.cpu.get_capabilities()
        return torch.bfloat16 if any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else torch.float32
    picked: torch.dtype = getattr(torch, choice)
    return picked


def forwards_in(products: torch.dtype, compute: torch.dtype) -> AbstractContextManager[object]:
    """While it lasts, linears and attention multiply in `products` where the model computes in float32."""
    if products == compute:
        return nullcontext()
    # No cache: weights change between the steps of a block.
    return torch.autocast("cpu", products, cache_enabled=False)


@contextmanager
def sums_of(products: torch.dtype) -> Iterator[None]:
    """While it lasts, products of float32 matrices may round their factors as `products` does, and add up in float32.

    A product of bfloat16 matrices would round its result as well. TF32 holds bfloat16 and float16 numbers exactly.
    """
    cpu, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = cpu.fp32_precision, cuda.fp32_precision
    if products == torch.bfloat16:
        cpu.fp32_precision = "bf16"
    if products in (torch.bfloat16, torch.float16):
        cuda.fp32_precision = "tf32"
    try:
        yield
    finally:
        cpu.fp32_precision, cuda.fp32_precision = before

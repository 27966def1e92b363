"""How matrices are multiplied: at which precision, and by which library.

Forwards of calibration text and Hessians may be rounded; the solver and the evaluation never are.
"""

import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

# x @ w.T as torch's compiler calls it for a Linear, always by oneDNN. Taken where it is measured: on x86.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if platform.machine() in ("x86_64", "AMD64") else None


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of matrices, as `linear` multiplies."""
    return linear(a, (b if _is_dense(b) else b.contiguous()).mT)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias; float32 on an x86 CPU by oneDNN instead of BLAS.

    Both add up in float32. MKL leaves AVX-512 of other makers' processors unused: there oneDNN is twice as fast.
    """
    plain = all(factor.dtype == torch.float32 and factor.device.type == "cpu" for factor in (x, weight_OI))
    if _ONEDNN is None or not plain or not x.numel() or not weight_OI.numel() or torch.is_autocast_enabled("cpu"):
        return nn.functional.linear(x, weight_OI, bias_O)
    if not _is_dense(weight_OI):  # gaps between its rows would cost a factor of a thousand
        weight_OI = weight_OI.contiguous()
    product: Tensor = _ONEDNN(x, weight_OI, bias_O, "none", [], "")
    return product


def _is_dense(matrix: Tensor) -> bool:
    return matrix.is_contiguous() or matrix.mT.is_contiguous()


def fast_linears(model: nn.Module) -> None:
    """Let every plain Linear of `model` multiply by `linear`."""
    for module in model.modules():
        if type(module) is nn.Linear:
            # On the instance: class, attributes and state-dict names stay what the model expects.
            module.__dict__["forward"] = partial(_forward, module)


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


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

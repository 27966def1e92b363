"""How matrices are multiplied: at which precision, and by which library.

Precision. Products over the calibration text may be rounded to bfloat16 (`--products`): its forwards, and the sums of
xhat xhat^T in `hessian.py`. They average over tens of thousands of tokens, so the rounding costs little, and a CPU with
bfloat16 instructions computes them in less than half the time. At 8 bits the quantization itself is so exact that the
rounding would show, and float32 is the default. The solver's products and the evaluation are never rounded.

Library. On x86, torch hands float32 products to MKL, which leaves AVX-512 unused on other makers' processors. oneDNN,
which comes with torch too, uses it: just as exact, twice as fast there. The two add in different orders, so their
results differ in the last bits.

eval/LOG.md ("Speed") has the measurements. Shapes: O out_features, I in_features.
"""

import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

# x @ w.T as torch's compiler calls it for a Linear: always oneDNN. Used on x86 only, where it was measured.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if platform.machine() in ("x86_64", "AMD64") else None


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for two matrices, multiplied as by `linear`.

    >>> matmul(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])).tolist()
    [[11.0]]
    """
    return linear(a, (b if _is_dense(b) else b.contiguous()).mT)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias. float32 tensors on an x86 CPU go to oneDNN, all others to torch's own choice."""
    plain = all(factor.dtype == torch.float32 and factor.device.type == "cpu" for factor in (x, weight_OI))
    other = torch.is_autocast_enabled("cpu") or (x.requires_grad and torch.is_grad_enabled())  # it has no derivative
    if _ONEDNN is None or not plain or not x.numel() or not weight_OI.numel() or other:
        return nn.functional.linear(x, weight_OI, bias_O)
    if not _is_dense(weight_OI):  # oneDNN is a thousand times slower where there are gaps between the rows
        weight_OI = weight_OI.contiguous()
    product: Tensor = _ONEDNN(x, weight_OI, bias_O, "none", [], "")
    return product


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in the precision of `total`. On a GPU the factors may be 16 bit wide, for a float32 sum."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, total.dtype, out=total)


def _is_dense(matrix: Tensor) -> bool:
    """Whether rows, or columns, lie in memory without gaps."""
    return matrix.is_contiguous() or matrix.mT.is_contiguous()


def fast_linears(model: nn.Module) -> None:
    """Make every plain nn.Linear of `model` multiply by `linear`. Subclasses stay as they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            # On the instance: class, attributes and state-dict names stay what the model expects.
            module.__dict__["forward"] = partial(_forward, module)


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


def forwards_in(products: torch.dtype, compute: torch.dtype) -> AbstractContextManager[object]:
    """A context in which a model's linears and attention multiply in `products` instead of its own dtype `compute`."""
    if products == compute:
        return nullcontext()
    # No cache of rounded weights: they change between the steps of a block.
    return torch.autocast("cpu", products, cache_enabled=False)


@contextmanager
def sums_of(products: torch.dtype) -> Iterator[None]:
    """A context in which products of float32 matrices may round their factors to `products`, and add up in float32.

    Multiplying bfloat16 tensors instead would round the sums as well: torch returns a bfloat16 result. On a GPU TF32 is
    used, which holds bfloat16 and float16 numbers exactly; `add_product` is twice as fast there.
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

"""Made-up weights: the model's own forward can run before any real weight is read, and costs nearly nothing.

A matrix is a window that slides over one vector of random numbers, row by row; a linear gives a random row times its
first input. So no memory is needed and no product computed, and every value still depends on all that it depends on in
the model, tokens first. Shapes, types and the flow of arguments are the model's own; numbers mean nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.model.meta import is_conv1d, shape_OI
from llmquant.model.tape import forward_replaced


@contextmanager
def made_up(model: Any, device: torch.device) -> Iterator[None]:
    """The model with made-up weights, in the place of all that lies on the meta device, while the `with` lasts."""
    empty = [
        (module, tensors, name, tensor)
        for module in model.modules()
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None and tensor.is_meta
    ]
    longest = max((sum(tensor.shape) for *_, tensor in empty), default=0)
    # Small and positive: nothing overflows, and no logarithm of them is undefined.
    pool = (0.01 + 0.1 * torch.rand(longest + 1, generator=torch.Generator().manual_seed(0))).to(device)

    @cache
    def numbers(dtype: torch.dtype) -> Tensor:
        return pool.to(dtype)

    def window(module: nn.Module, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():  # indices and divisors
            return torch.ones(tensor.shape, dtype=tensor.dtype, device=device)
        if tensor.ndim > 2:  # kernels of convolutions, which are small, and which torch wants in one piece
            return numbers(tensor.dtype)[:1].expand(tensor.shape).contiguous()
        vector = numbers(tensor.dtype)
        if isinstance(module, nn.Embedding):
            vector = vector[: sum(tensor.shape)].clone()  # for whoever asks whose storage a view is of
        return vector.as_strided(tensor.shape, (1,) * tensor.ndim)

    def product(n_out: int) -> Callable[[Tensor], Tensor]:
        return lambda x: x[..., :1] * numbers(x.dtype)[:n_out]

    with ExitStack() as stack:
        for module, tensors, name, tensor in empty:
            shown = window(module, tensor)
            stack.callback(tensors.__setitem__, name, tensor)
            tensors[name] = nn.Parameter(shown, requires_grad=False) if tensors is module._parameters else shown
        for module in model.modules():
            if type(module) is nn.Linear or is_conv1d(module):  # a subclass may answer something else (a router)
                stack.enter_context(forward_replaced(module, product(shape_OI(module)[0])))
        yield

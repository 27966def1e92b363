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

from llmquant.model.meta import is_conv1d
from llmquant.model.tape import forward_replaced
from llmquant.model.weights import Weights


@contextmanager
def made_up(model: Any, weights: Weights) -> Iterator[None]:
    """The model with made-up weights while the `with` lasts."""
    longest = max(sum(weights.get(name).shape) for name in weights.names)
    # Small and positive: nothing overflows, and no logarithm of them is undefined.
    pool = (0.01 + 0.1 * torch.rand(longest + 1, generator=torch.Generator().manual_seed(0))).to(weights.device)

    @cache
    def numbers(dtype: torch.dtype) -> Tensor:
        return pool.to(dtype)

    def window(name: str) -> Tensor:
        tensor = weights.get(name)
        if not tensor.is_floating_point():  # indices and divisors
            return torch.ones(tensor.shape, dtype=tensor.dtype, device=weights.device)
        if tensor.ndim > 2:  # kernels of convolutions, which are small, and which torch wants in one piece
            return numbers(tensor.dtype)[:1].expand(tensor.shape).contiguous()
        vector = numbers(tensor.dtype)
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding):
            vector = vector[: sum(tensor.shape)].clone()  # for whoever asks whose storage a view is of
        return vector.as_strided(tensor.shape, (1,) * tensor.ndim)

    def product(n_out: int) -> Callable[[Tensor], Tensor]:
        return lambda x: x[..., :1] * numbers(x.dtype)[:n_out]

    with ExitStack() as stack:
        stack.enter_context(weights.holding({name: window(name) for name in weights.names}))
        for module in model.modules():
            if type(module) is nn.Linear or is_conv1d(module):
                n_out = module.weight.shape[1 if is_conv1d(module) else 0]
                stack.enter_context(forward_replaced(module, product(n_out)))
        yield

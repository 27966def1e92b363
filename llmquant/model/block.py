"""One decoder block of a model: its weights in and out of memory, its forward, its linears.

A newcomer runs one in two lines; its other arguments (masks, rope tables) are known since `embed`:

>>> from llmquant.model.skeleton import Skeleton
>>> from llmquant.source.resolve import open_source
>>> model = Skeleton(open_source("demo")); hidden = model.embed(torch.arange(6)[None])
>>> with model.blocks[0].loaded() as block: print(block.forward(hidden).shape)
torch.Size([1, 6, 256])

Shapes: B batch, T time, D hidden, O out_features, I in_features.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.errors import SourceError, option
from llmquant.formats import LinearSpec
from llmquant.model.meta import is_linear
from llmquant.model.parked import Batch, Parked
from llmquant.model.tape import Call, own_forward
from llmquant.model.weights import Weights
from llmquant.quant.matmul import forwards_in


class Block:
    """The decoder block `index` of a model.

    name     of its module in the model, such as `model.layers.0`
    module   the model's own, on the meta device except while it is `loaded`
    params   names of its parameters and persistent buffers in the model
    calls    what it is called with besides the hidden states, by the shape [B, T] of a batch of tokens, where blocks
             share nothing else (`model/tape.py`)
    """

    def __init__(self, index: int, name: str, module: nn.Module, params: list[str], weights: Weights) -> None:
        self.index, self.name, self.module, self.params = index, name, module, params
        self.calls: dict[tuple[int, ...], Call] = {}
        self._weights = weights

    @property
    def where(self) -> str:
        """The checkpoint's name, for errors."""
        return self._weights.source.name

    @property
    def device(self) -> torch.device:
        return self._weights.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self._weights.dtype

    @property
    def linears(self) -> dict[str, nn.Module]:
        """Its nn.Linear and Conv1D modules by their full names."""
        return {f"{self.name}.{name}": m for name, m in self.module.named_modules() if is_linear(m)}

    # -- weights -------------------------------------------------------------------------------------------
    @contextmanager
    def loaded(self) -> Iterator["Block"]:
        """The block with its weights in memory, for the length of a `with`."""
        with self._weights.loaded(self.params):
            yield self

    def holding(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Other `weights` (parameter name -> tensor in the module's own layout) for the length of a `with`."""
        return self._weights.holding(weights)

    def get(self, param: str) -> Tensor:
        """A parameter as it lies in the module."""
        return self._weights.get(param)

    def weight(self, spec: LinearSpec) -> Tensor:
        """weight_OI of a linear, float32."""
        weight = self.get(spec.param).detach().float()
        return weight.T.contiguous() if spec.transposed else weight

    def laid_out(self, spec: LinearSpec, weight_OI: Tensor) -> Tensor:
        """`weight_OI` as the module holds it: its layout, the compute dtype, the device."""
        dense = weight_OI.to(self.device, self.get(spec.param).dtype)
        return dense.T.contiguous() if spec.transposed else dense

    def set_weight(self, spec: LinearSpec, weight_OI: Tensor) -> None:
        """Replace the weight of a linear until the block is freed."""
        self._weights.put(spec.param, self.laid_out(spec, weight_OI))

    # -- forward -------------------------------------------------------------------------------------------
    def forward(self, batch: Batch, products: torch.dtype | None = None) -> Any:
        """A batch of a stream through the block, with its own arguments; what the stream's `update` wants of it.

        For hidden states [B, T, D] that is the hidden states behind the block, with the arguments recorded for batches
        of this shape; a parked forward has its arguments with it. `products`: the precision of products, where it is
        not that of the compute dtype.
        """
        with torch.no_grad(), forwards_in(products or self.dtype, self.dtype):
            if isinstance(batch, Parked):
                return batch.run(self.index, own_forward(self.module))
            return self.calls[tuple(batch.shape[:2])](self.module, batch.to(self.device))

    def steps(self, forward: Callable[[], object], wanted: Collection[str] | None = None) -> list[list[str]]:
        """Linears of the loaded block by the input they share, in the order in which `forward` reaches them.

        Two linears share an input where they read the same elements of the same memory and nothing wrote into it in
        between. Only the `wanted` ones, all without it. SourceError where one runs more than once.
        """
        seen: dict[tuple[Any, ...], list[str]] = {}
        alive: list[Tensor] = []  # inputs stay referenced, or another one could be born at the same address

        def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            alive.append(x)
            place = (x.untyped_storage().data_ptr(), x.storage_offset(), x.shape, x.stride())
            seen.setdefault((*place, _state(x)), []).append(name)

        linears = {name: m for name, m in self.linears.items() if wanted is None or name in wanted}
        hooks = [m.register_forward_pre_hook(partial(note, name)) for name, m in linears.items()]
        try:
            forward()
        finally:
            for hook in hooks:
                hook.remove()
        names = [name for step in seen.values() for name in step]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise SourceError(
                f"{self.where}: {twice}",
                "runs more than once in a block",
                remedy=f"keep it in 16 bit with {option('ignore')}",
            )
        return list(seen.values())


def _state(x: Tensor) -> int:
    """A number that changes when something is written into `x`: torch's count of writes to its memory.

    Inference tensors have no such count; for them it is a hash of the values.
    """
    if not x.is_inference():
        return x._version
    return hash(x.cpu().contiguous().view(torch.uint8).numpy().tobytes())

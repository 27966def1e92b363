"""One decoder block of a model: its weights in and out of memory, its forward, its linears.

A newcomer runs one in two lines; its other arguments (masks, rope tables) are known since `embed`:

>>> from llmquant.model.skeleton import Skeleton
>>> from llmquant.source.resolve import open_source
>>> model = Skeleton(open_source("demo")); hidden = model.embed(torch.arange(6)[None])
>>> with model.blocks[0].loaded() as block: print(block.forward(hidden).shape)
torch.Size([1, 6, 256])

Shapes: B batch, T time, D hidden, O out_features, I in_features.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.errors import SourceError, option
from llmquant.formats import LinearSpec
from llmquant.model.experts import Experts
from llmquant.model.meta import is_linear
from llmquant.model.parked import Batch, Parked
from llmquant.model.tape import Call, own_forward
from llmquant.model.weights import Value, Weights
from llmquant.quant.grid import QuantizedWeight
from llmquant.quant.matmul import forwards_in


@dataclass(frozen=True)
class Gradients:
    """Of one scalar, in one batch.

    entering     at what enters the block, [B, T, D]
    at_outputs   at the outputs [..., O] of linears, by name: a list, as a linear may run several times
    inputs       what these linears read then, [..., I]
    of_params    of parameters, by name, as the module holds them
    0 where the scalar does not depend on it.
    """

    entering: Tensor
    at_outputs: dict[str, list[Tensor]]
    inputs: dict[str, list[Tensor]]
    of_params: dict[str, Tensor]


class Block:
    """The decoder block `index` of a model.

    name     of its module in the model, such as `model.layers.0`
    module   the model's own, on the meta device except while it is `loaded`
    params   names of its parameters and persistent buffers in the model
    calls    what it is called with besides the hidden states, by the shape [B, T] of a batch of tokens, where blocks
             share nothing else (`model/tape.py`)
    steps    names of its linears by the input that they share
    order    its linears -> their places in the order of the forward
    unseen   linears whose inputs cannot be seen, so that they are not quantized -> why
    adds     linears whose outputs it adds to its hidden states, in the order of its forward -> times what
    shares   linears of experts -> the part of all tokens that reaches them, on average
    store    for experts that are made on demand: takes codes away, and returns what reads weight_OI back
    """

    def __init__(self, index: int, name: str, module: nn.Module, params: list[str], weights: Weights) -> None:
        self.index, self.name, self.module, self.params = index, name, module, params
        self.calls: dict[tuple[int, ...], Call] = {}
        self.steps: list[list[str]] = []
        self.order: dict[str, int] = {}
        self.unseen: dict[str, str] = {}
        self.adds: dict[str, float] = {}
        self.shares: dict[str, float] = {}
        self.store: Callable[[LinearSpec, QuantizedWeight], Callable[[], Tensor]] | None = None
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

    @cached_property
    def n_weights(self) -> int:
        """Of all its linears."""
        return sum(math.prod(self._weights.shape(f"{name}.weight")) for name in self.linears)

    def expert(self, linear: str) -> tuple[nn.Module, int] | None:
        """For a linear of an expert: the module that gathers what it reads, and the expert's number; else None."""
        if (owner := self.experts_of(linear)) is None:
            return None
        experts, (number, _, leaf) = self._experts[owner], linear.removeprefix(f"{owner}.").partition(".")
        return experts.down_inputs if leaf and leaf == experts.down else experts.up_inputs, int(number)

    def experts_of(self, linear: str) -> str | None:
        """The module of experts that a linear is part of; None for all others."""
        return next((owner for owner in self._experts if linear.startswith(f"{owner}.")), None)

    @cached_property
    def _experts(self) -> dict[str, Experts]:
        named = self.module.named_modules(prefix=self.name)
        return {name: module for name, module in named if isinstance(module, Experts)}

    # -- weights -------------------------------------------------------------------------------------------
    @contextmanager
    def loaded(
        self, instead: Mapping[str, Value] = MappingProxyType({}), then: "Block | None" = None
    ) -> Iterator["Block"]:
        """The block with its weights in memory, for the length of a `with`; some experts only while they are used.

        instead   parameter name -> what it is given, in the module's own layout, and not read
        then      the block that is loaded next
        """
        for owner, experts in self._experts.items():
            if self._weights.on_demand.intersection(self.params):
                experts.present = partial(self._present, owner)
        with self._weights.loaded(self.params, instead):
            if then is not None:
                self._weights.read_ahead(then.params)
            yield self

    def _present(self, owner: str, expert: int, leaves: Sequence[str]) -> AbstractContextManager[None]:
        names = [".".join(part for part in (f"{owner}.{expert}", leaf, "weight") if part) for leaf in leaves]
        return self._weights.present(names)

    def holding(self, weights: Mapping[str, Value]) -> AbstractContextManager[None]:
        """Other `weights` (parameter name -> tensor in the module's own layout) for the length of a `with`."""
        return self._weights.holding(weights)

    def restored(self, specs: Sequence[LinearSpec]) -> AbstractContextManager[None]:
        """The linears `specs` as they are now, again at the end of a `with`, whatever it makes of them."""
        return self._weights.holding({spec.param: self._weights.value(spec.param) for spec in specs})

    def weight(self, spec: LinearSpec) -> Tensor:
        """weight_OI of a linear, float32."""
        return _rows_first(spec, self._weights.get(spec.param))

    def rounded(self, param: str, dtype: torch.dtype) -> Value:
        """A parameter as it lies in the module, in another dtype."""
        value = self._weights.value(param)
        return value.to(dtype) if isinstance(value, Tensor) else lambda: value().to(dtype)

    def changed(self, spec: LinearSpec, change: Callable[[Tensor], Tensor]) -> Value:
        """The weight of a linear after `change` (weight_OI -> weight_OI), as the module holds it."""
        value = self._weights.value(spec.param)
        if isinstance(value, Tensor):
            return self.laid_out(spec, change(_rows_first(spec, value)))
        return lambda: self.laid_out(spec, change(_rows_first(spec, value())))

    def laid_out(self, spec: LinearSpec, weight_OI: Tensor) -> Tensor:
        """`weight_OI` as the module holds it: its layout, the compute dtype, the device."""
        dense = weight_OI.to(self.device, self._weights.compute_dtype(spec.param))
        return dense.T.contiguous() if spec.transposed else dense

    def stored(self, spec: LinearSpec, weight: QuantizedWeight) -> Callable[[], Tensor] | None:
        """What reads the codes of a linear back, where `store` takes them; None where they stay in memory."""
        return self.store(spec, weight) if self.store and self.is_made(spec) else None

    def is_made(self, spec: LinearSpec) -> bool:
        """Whether the weight of a linear is made whenever it is used."""
        return spec.param in self._weights.on_demand

    def set_weight(self, spec: LinearSpec, weight: Value) -> None:
        """Replace the weight of a linear by weight_OI, or by what makes it, until the block is freed."""
        if isinstance(weight, Tensor):
            self._weights.put(spec.param, self.laid_out(spec, weight))
        elif self.is_made(spec):
            self._weights.put(spec.param, lambda: self.laid_out(spec, weight()))
        else:
            self.set_weight(spec, weight())

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

    def gradients(
        self,
        hidden: Tensor,
        grad: Tensor,
        products: torch.dtype,
        *,
        linears: Sequence[str] = (),
        params: Sequence[str] = (),
    ) -> Gradients:
        """One batch backwards through the loaded block, by autograd. Its forwards must not be parked.

        hidden   [B, T, D], what enters the block
        grad     [B, T, D], the gradient of some scalar at what leaves it
        linears  at whose outputs its gradient is wanted, and
        params   of which it is, by their names in the model
        SourceError where autograd refuses.
        """
        outputs: dict[str, list[Tensor]] = {name: [] for name in linears}
        read: dict[str, list[Tensor]] = {name: [] for name in linears}

        def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):  # and not what a router makes of it
                outputs[name].append(output)
                read[name].append(inputs[0].detach())

        modules = self.linears
        handles = [modules[name].register_forward_hook(partial(keep, name)) for name in linears]
        leaves = [self._weights.get(name).requires_grad_() for name in params]
        try:
            with torch.enable_grad(), forwards_in(products, self.dtype):
                entering = hidden.to(self.device).detach().requires_grad_()
                # A copy goes in: a block may add to its hidden states in place, which a leaf does not allow.
                leaving = self.calls[tuple(hidden.shape[:2])](self.module, entering.clone())
            found = [output for name in linears for output in outputs[name] if output.requires_grad]
            of_entering, *grads = torch.autograd.grad(
                leaving, [entering, *leaves, *found], grad.to(leaving), allow_unused=True, materialize_grads=True
            )
        except RuntimeError as error:  # an operation without a derivative, or one that writes over what it needs
            raise SourceError(
                f"{self.where}: block {self.index}",
                f"no gradients go through it ({' '.join(str(error).split())[:200]})",
                remedy=f"use {option('curvature')} off and {option('recover')} off",
            ) from None
        finally:
            for handle in handles:
                handle.remove()
            for leaf in leaves:
                leaf.requires_grad_(False)
        at = {id(output): g for output, g in zip(found, grads[len(leaves) :], strict=True)}
        at_outputs = {
            name: [at[id(o)] if id(o) in at else torch.zeros_like(o) for o in outputs[name]] for name in linears
        }
        return Gradients(of_entering, at_outputs, read, dict(zip(params, grads, strict=False)))


def with_next(blocks: Sequence[Block]) -> Iterator[tuple[Block, Block | None]]:
    """Every block and the one that is loaded after it."""
    return zip(blocks, [*blocks[1:], None], strict=False)  # of no blocks there is no last one


def _rows_first(spec: LinearSpec, weight: Tensor) -> Tensor:
    """weight_OI in float32, from the module's own layout."""
    weight = weight.detach().float()
    return weight.T.contiguous() if spec.transposed else weight

"""One block of the quantized model, whose codes stay and whose scales, norms and biases are trained."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from llmquant.formats import FORMATS, LinearSpec
from llmquant.model.block import Block
from llmquant.model.weights import Value
from llmquant.quant.grid import QuantizedWeight
from llmquant.quant.training import Trained, scale_gradient, with_scales

Values = Mapping[str, Tensor]  # by parameter: scales_OG of a linear that is trained, or a norm or bias


@dataclass
class BlockTraining:
    """What is trained in a block, and the block with some values of that.

    specs     its quantized linears
    scales    those whose scales are trained, by parameter
    vectors   norms and biases that are trained, by parameter -> dtype in the checkpoint
    read      codes and scales of a linear, as they were written
    sums      the loss's gradients so far, by parameter, while the block is loaded
    """

    block: Block
    specs: Sequence[LinearSpec]
    scales: Mapping[str, LinearSpec]
    vectors: Mapping[str, torch.dtype]
    format_name: str
    read: Callable[[LinearSpec], QuantizedWeight]
    products: torch.dtype
    sums: dict[str, Tensor] = field(default_factory=dict)
    _weights: dict[str, QuantizedWeight] = field(default_factory=dict)  # those of `scales`, while the block is loaded

    def start(self, vector: Callable[[str], Tensor]) -> dict[str, Trained]:
        """All that is trained, before the first step; `vector` reads a norm or bias."""
        found = {param: Trained.of(self.read(spec).scales_OG) for param, spec in self.scales.items()}
        return found | {param: Trained.of(vector(param)) for param in self.vectors}

    def quantized(self, spec: LinearSpec, values: Values, weight: QuantizedWeight | None = None) -> QuantizedWeight:
        """A linear as it is written with these values; `weight`: the same with others, where that was read before."""
        weight = weight or self.read(spec)
        return with_scales(weight, values[spec.param]) if spec.param in self.scales else weight

    def vector(self, param: str, values: Values) -> Tensor:
        """A norm or bias as it is written with these values."""
        return values[param].to(self.vectors[param])

    @contextmanager
    def loaded(self, values: Values) -> Iterator[None]:
        """The block in memory, with these values, as a loader will see them."""
        self._weights = {param: self.quantized(spec, values) for param, spec in self.scales.items()}
        instead: dict[str, Value] = {param: self.vector(param, values) for param in self.vectors}
        for spec in self.specs:
            instead[spec.param] = partial(self._dense, spec)
        with self.block.loaded(instead):
            yield
        self._weights, self.sums = {}, {}

    def _dense(self, spec: LinearSpec) -> Tensor:
        weight = self._weights.get(spec.param) or self.read(spec)
        return self.block.laid_out(spec, FORMATS[self.format_name].loaded(spec, weight))

    def forward(self, hidden: Tensor) -> Tensor:
        """A batch through the loaded block."""
        out: Tensor = self.block.forward(hidden, self.products)
        return out

    def backwards(self, hidden: Tensor, gradient: Tensor) -> Tensor:
        """A batch that enters as `hidden` and has this gradient behind the block: its gradient before the block. What
        is trained gets its own into `sums`."""
        found = self.block.gradients(hidden, gradient, self.products, params=[*self.scales, *self.vectors])
        for param, part in found.of_params.items():
            if (spec := self.scales.get(param)) is not None:
                part = scale_gradient(part.T if spec.transposed else part, self._weights[param])
            part = part.float().cpu()
            self.sums[param] = self.sums[param] + part if param in self.sums else part
        return found.entering
